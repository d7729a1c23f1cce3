"""How much of a model runs by fused kernels: `share`, and how much each convolution is of it. Not
here: what is found, and why not (fusion.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..cpu import ops as _  # noqa: F401  (makes the operators)
from ..ops import NAMESPACE, SIGNATURES
from .twins import twin_of, with_values
from .watching import undisturbed


def share(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    """The part of a model's convolutions that fused kernels run on this input: of the
    multiplications of a forward pass, from 0 to 1.

    Args:
        model: fused or not, on its device, in training or evaluation, as it will run: under the
            caller's autocast and FASTDCGAN_IMPL. A copy is called, so parameters, buffers,
            attributes and random numbers stay as they are.
        *args, **kwargs: what it is called with. The share depends on their shapes and dtypes.

    Raises:
        ValueError: it runs no convolution.
    """
    twin = twin_of(model, with_values)
    with undisturbed(), torch.no_grad(), _Multiplications() as counted:
        twin(*args, **kwargs)
    if not counted.fused + counted.plain:
        raise ValueError(f"{type(model).__name__} runs no convolution on this input")
    part: float = counted.fused / (counted.fused + counted.plain)
    return part


def multiplications(model: nn.Module, *args: Any) -> dict[nn.Module, int]:
    """Of each of a model's convolutions in a forward pass, wherever they run."""
    twin = twin_of(model, with_values)
    counts: dict[nn.Module, int] = {}

    def count(own: nn.Module, conv: Any, given: Any, out: torch.Tensor) -> None:
        transposed = isinstance(conv, nn.ConvTranspose2d)
        counts[own] = counts.get(own, 0) + _count(given[0], conv.weight, out, transposed)

    for own, conv in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            conv.register_forward_hook(functools.partial(count, own))
    with undisturbed(), torch.no_grad():
        twin(*args)
    return counts


class _Multiplications(TorchDispatchMode):
    """Counts those of the convolutions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.plain = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.plain += _count(args[0], args[1], out, args[6])
        elif func.namespace == NAMESPACE and "weight" in SIGNATURES[func._opname].kinds:
            given = SIGNATURES[func._opname].named(args)
            first = out[0] if isinstance(out, Sequence) else out
            self.fused += _count(given["x"], given["weight"], first, given["transposed"])
        return out


def _count(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, transposed: bool) -> int:
    """Each weight meets each pixel of the output, or if transposed of the input."""
    pixels = x if transposed else out
    return weight.numel() * pixels.numel() // pixels.shape[1]
