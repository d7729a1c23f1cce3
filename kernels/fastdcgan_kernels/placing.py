"""Two batches side by side in memory without a copy: the second is written where the first ends.
Not here: who wants that (a training step), who writes (gpu/)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .choice.geometry import empty
from .choice.targets import pushed

_places: list[Tensor | None] = []


def side_by_side(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two uninitialised channels_last tensors (n, c, h, w), one behind the other. Neither
    is a view, so autograd gives each a history of its own."""
    both = torch.empty(2 * n * c * h * w, dtype=dtype, device=device)
    return _at(both, 0, (n, c, h, w)), _at(both, n * c * h * w, (n, c, h, w))


def placed(place: Tensor | None) -> contextlib.AbstractContextManager[Tensor | None]:
    """Inside, a kernel that can writes the first result like `place` there. None: nowhere."""
    return contextlib.nullcontext() if place is None else pushed(_places, place)


def place_for(
    n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Where a result is to go, on the device and by default in the dtype of `like`; None:
    `placed` said nothing, or another result is there already."""
    if not _places or _places[-1] is None:
        return None
    place = _places[-1]
    kind = place.shape, place.dtype, place.device
    if kind != ((n, c, h, w), dtype or like.dtype, like.device):
        return None
    _places[-1] = None
    return place


def empty_or_placed(
    n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Where a kernel writes a result (n, c, h, w), channels_last: `place_for` it, else new."""
    place = place_for(n, c, h, w, like, dtype)
    return empty(n, c, h, w, like, dtype) if place is None else place


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Both batches as one, in the dtype of the second: the memory itself where they are side by
    side, else a copy. It is of the values alone: gradients do not go through it."""
    first, second = first.detach(), second.detach()
    whole = (first.shape[0] + second.shape[0], *first.shape[1:])
    if _behind(first, second):
        return _at(first, int(first.storage_offset()), whole)
    return torch.cat([first.to(second.dtype), second])


def _at(memory: Tensor, offset: int, shape: tuple[int, ...]) -> Tensor:
    """A channels_last tensor in the storage of `memory`."""
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    return memory.new_empty(0).set_(memory.untyped_storage(), offset, shape, strides)


def _behind(first: Tensor, second: Tensor) -> bool:
    """Whether both are of one kind, in one memory, and the second begins where the first ends."""
    if first.dim() != 4 or first.dtype != second.dtype or first.shape[1:] != second.shape[1:]:
        return False
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (first, second))
    memories = {t.untyped_storage()._cdata for t in (first, second)}
    gap = int(second.storage_offset()) - int(first.storage_offset()) - first.numel()
    return dense and len(memories) == 1 and gap == 0
