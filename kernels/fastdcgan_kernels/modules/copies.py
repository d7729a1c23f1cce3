"""The convolution weights of a net in another dtype, for its blocks to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils.parametrize import is_parametrized

from .block import is_convolution


class WorkingCopies:
    """The convolution weights of a net in another dtype, all cast in one go. Fused blocks called
    inside `with copies:` read these instead of casting their own weights at every call; gradients
    and updates are the weights' as ever.

    Nothing notices by itself that a weight has changed: `refresh` after every update. What was
    changed otherwise, by the loading of a checkpoint, say, is seen by `fresh`; fused optimisers
    are not.

    Args:
        net: its weights may change in place, and stay where they are.
        dtype: what the blocks compute in, e.g. bfloat16 under autocast.
        narrow: the gradients of the weights are to be in that dtype, too, as convolutions of
            PyTorch's make them under autocast; but here they stay so (`Tensor.grad_dtype`), and
            more than one backward between two updates would add them up in it. `adam.Adam` takes
            them. Default: as the weights.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, narrow: bool = False) -> None:
        # A weight that is computed at each access (spectral norm) has no copy: it is cast.
        self._convs: list[Any] = [
            m for m in net.modules() if is_convolution(m) and not is_parametrized(m)
        ]
        self._weights: list[Tensor] = [m.weight.detach() for m in self._convs]
        self._copies = [torch.empty_like(w, dtype=dtype) for w in self._weights]
        self._versions: list[int] = []
        for conv in self._convs if narrow else ():
            conv.weight.grad = None
            conv.weight.grad_dtype = dtype

    @property
    def of(self) -> dict[Tensor, Tensor]:
        """The copy of each weight."""
        weights = (conv.weight for conv in self._convs)
        return dict(zip(weights, self._copies, strict=True))

    def fresh(self) -> bool:
        """Whether no weight was changed in place, by PyTorch's own count, since the last refresh.
        What a replayed CUDA graph changes is not counted; let it hold the refresh, too."""
        return self._versions == [w._version for w in self._weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now: one launch."""
        if self._weights:
            torch._foreach_copy_(self._copies, self._weights)
        self._versions = [w._version for w in self._weights]

    def written(self, weights: Iterable[Tensor]) -> None:
        """To be called by who has changed these weights, and their copies as `refresh` would."""
        of = self.of
        increment_version([of[weight] for weight in weights])
        self._versions = [w._version for w in self._weights]

    def leave(self) -> None:
        """The weights' gradients are in their own dtype again; those there are are dropped."""
        for conv in self._convs:
            conv.weight.grad = None
            conv.weight.grad_dtype = conv.weight.dtype

    def __enter__(self) -> WorkingCopies:
        for conv, copy in zip(self._convs, self._copies, strict=True):
            conv.__dict__["_working"] = copy
        return self

    def __exit__(self, *error: object) -> None:
        for conv in self._convs:
            conv.__dict__.pop("_working", None)
