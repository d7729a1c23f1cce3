"""Tools to try a step out and compare it with another, leaving no trace: how the parts that need a
GPU are checked on the user's own, before they are trusted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastdcgan.training.state import TrainState


@contextmanager
def undone(state: TrainState, tensors: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts tensors, random states and step back to what they are now, in
    place, and calls it at the end."""
    saved, step, noise = [t.clone() for t in tensors], state.step, random_states(state)

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        state.step = step
        torch.cuda.set_rng_state(noise[0], state.device)
        if state.generator is not None:
            state.generator.set_state(noise[1])

    try:
        yield undo
    finally:
        undo()


def random_states(state: TrainState) -> list[Tensor]:
    own = [] if state.generator is None else [state.generator.get_state()]
    return [torch.cuda.get_rng_state(state.device), *own]


def furthest(before: list[Tensor], after: list[Tensor], replayed: list[Tensor]) -> float:
    """The largest |replayed - after| / |after - before| of any tensor."""
    apart = [
        torch.stack([(c - b).double().norm(), (b - a).double().norm()])
        for a, b, c in zip(before, after, replayed, strict=True)
    ]
    off, moved = torch.stack(apart).cpu().unbind(1)
    return float((off / moved.clamp(min=1e-30)).max())


def mean_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """|found - expected| / |expected|, the RMS over the tensors that are not all zero."""
    pairs = [
        torch.stack([(b - a).double().norm(), a.double().norm()])
        for a, b in zip(expected, found, strict=True)
    ]
    off, size = torch.stack(pairs).cpu().unbind(1)
    return float((off / size)[size > 0].square().mean().sqrt())
