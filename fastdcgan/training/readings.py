"""What the loop reads off the steps: their losses, left on the device until they are wanted, and
their speed."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdcgan.training import distributed
from fastdcgan.training.step import READINGS


class Readings:
    """The losses of the last steps, left on the device until someone wants to read them."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._rows = torch.zeros(capacity, len(READINGS), device=device)
        self.next = torch.zeros(1, dtype=torch.long, device=device)
        """The row to write next, which is on the device because a CUDA graph does the writing."""
        self._count = 0

    def put(self, row: Tensor) -> None:
        """Writes one step's row: device work only. The host is to `count` it."""
        self._rows.index_copy_(0, self.next, row[None])
        self.next.add_(1).remainder_(len(self._rows))

    def count(self) -> bool:
        """One more row is written; True when there is room for no more."""
        self._count += 1
        return self._count == len(self._rows)

    def take(self) -> list[list[float]]:
        """The rows since the last call, summed over processes. Waits for the device."""
        rows = self._rows[: self._count].clone()
        self._count = 0
        self.next.zero_()
        summed: list[list[float]] = distributed.sum_over_ranks(rows).tolist()
        return summed


class Meter:
    """Images per second of the steps alone."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of all laps: of training, without what it was paused for."""
        self.steady_images, self.steady_seconds = 0, 0.0
        self.rate = math.nan
        self._images, self._since, self._paused = 0, time.perf_counter(), 0.0

    def lap(self, *, steady: bool) -> None:
        """Ends a lap: the device has finished all steps counted since the last one."""
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        if self._images:
            self.seconds += seconds
            self.rate = self._images / seconds
        if steady:
            self.steady_images += self._images
            self.steady_seconds += seconds
        self._images, self._since, self._paused = 0, now, 0.0

    def count(self, images: int) -> None:
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training: samples, checkpoints, evaluations."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @property
    def overall(self) -> float:
        """The steady rate; that of the last lap where the run was too short to become steady."""
        return self.steady_images / self.steady_seconds if self.steady_images else self.rate
