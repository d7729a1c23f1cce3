"""A model once more, to be called without a trace in the model itself: the same classes, copies of
attributes. Not here: what a twin is called for (reading.py, fusion.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


def without_values(tensor: Tensor) -> Tensor:
    """Its twin on the meta device."""
    return tensor if _is_lazy(tensor) else _like(tensor, torch.empty_like(tensor, device="meta"))


def with_values(tensor: Tensor) -> Tensor:
    """Its copy, in the same memory format."""
    return tensor if _is_lazy(tensor) else _like(tensor, tensor.detach().clone())


def _is_lazy(tensor: Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor))


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """A parameter for a parameter."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied.detach(), tensor.requires_grad)
    return copied.detach()


class CopyTensors(TorchFunctionMode):
    """Inside, `copy.deepcopy` copies tensors like this."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone) and isinstance(args[0], Tensor):
            return self._copied(args[0])
        return func(*args, **(kwargs or {}))


def twin_of(model: Model, copied: Callable[[Tensor], Tensor]) -> Model:
    """The model and its children once more, their tensors `copied`, one for each. What else cannot
    be copied (locks, files) they share."""
    twins: dict[nn.Module, Any] = {m: m.__new__(type(m)) for m in model.modules()}
    memo: dict[int, Any] = {id(m): twin for m, twin in twins.items()}
    tensors = (t for m in twins for t in (*m._parameters.values(), *m._buffers.values()))
    memo |= {id(tensor): copied(tensor) for tensor in tensors if tensor is not None}
    with CopyTensors(copied):
        for m, twin in twins.items():
            twin.__dict__ = {name: _copied(value, memo) for name, value in vars(m).items()}
    found: Model = twins[model]
    return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a user's object may raise
        return copy.copy(value) if isinstance(value, dict | list | set) else value
