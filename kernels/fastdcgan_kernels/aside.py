"""A second stream beside the one of a backward pass, for what the pass itself does not wait for:
the weights' gradients, and updates by them. Not here: what is launched there (gpu/blocks.py,
adam.py), and where a step asks for it.

Inside `forked`, `aside` puts launches into the second stream, behind all that the first has got so
far, or had at a `mark`. At the end of `forked` the first waits for the second. What is read there
is kept until then: its memory would be handed out again in the first stream. It follows PyTorch's
recipe for streams in CUDA graphs: a capture takes in a stream that waits for a captured one, and
must see it join.

A gradient is complete only where the streams have joined. Autograd takes it as it is, without a
launch, where it is the only one of a parameter and lies in memory as the parameter does; else it
would copy or add it, in the first stream and too early. So `forked` is for a backward pass through
each layer once, and what is no parameter or has a gradient already (`waits`) is not put aside.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


class Fork:
    """A second stream, and what it reads."""

    def __init__(self, second: torch.cuda.Stream) -> None:
        self.second = second
        self._kept: list[object] = []

    def mark(self) -> torch.cuda.Event:
        """As `mark`."""
        event: torch.cuda.Event = torch.cuda.current_stream(self.second.device).record_event()
        return event

    @contextlib.contextmanager
    def aside(self, *read: object, since: torch.cuda.Event | None = None) -> Iterator[None]:
        """As `aside`."""
        self.second.wait_event(since or self.mark())
        self._kept.append(read)
        with torch.cuda.stream(self.second):
            yield

    def join(self) -> None:
        """The current stream waits for the second."""
        torch.cuda.current_stream(self.second.device).wait_stream(self.second)
        self._kept.clear()


_forks: list[Fork] = []


@functools.cache
def _second(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def forked(device: torch.device, on: bool = True) -> Iterator[None]:
    """Inside, `aside` is in a second stream, also for the threads of a backward pass; the current
    stream waits for it at the end. Nothing on a device without streams, or where not `on`."""
    if not on or device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        fork = Fork(_second(torch.cuda.current_device()))
        _forks.append(fork)
        try:
            yield
        finally:
            _forks.pop()
            fork.join()


def waits(weight: Tensor) -> bool:
    """Whether somebody may read this weight's gradient before the streams have joined."""
    narrow = weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last)
    return not weight.is_leaf or weight.grad is not None or narrow


def mark() -> torch.cuda.Event | None:
    """Where the current stream is now, for `aside`; None: there is no second."""
    return _forks[-1].mark() if _forks else None


@contextlib.contextmanager
def aside(*read: object, since: torch.cuda.Event | None = None) -> Iterator[None]:
    """Inside, launches are in the second stream, where there is one.

    Args:
        *read: tensors, or what holds tensors, of the first that they read or write.
        since: they wait for what the first had got at that `mark`. Default: by now.
    """
    with _forks[-1].aside(*read, since=since) if _forks else contextlib.nullcontext():
        yield
