"""Rounds of several workloads, timed in turn (A B C, A B C, ...), so that a machine that drifts
slows all of them alike: on the CPU by the wall clock, on a GPU by CUDA events. Not here: what is
timed, and how the rounds are saved (conftest.py)."""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.nvml import Sampler

Clock = Callable[["Workload"], float]
"""Runs one round of a workload; gives its seconds per call."""

FLUSH_BYTES = 2**30
"""Written between two timings of a block: 20 times the L2 of an H100, and long enough in the
writing (0.3 ms at 3 TB/s) for the host to have launched the block before the device begins it."""
SUSTAINED_SECONDS = 1.0
"""Of one workload alone, for its power: NVML's readings move some 10 times a second."""


class Unavailable(Exception):
    """This machine lacks what a workload needs; the message says what."""


@dataclass
class Workload:
    """What is timed."""

    run: Callable[[], object]
    """One call."""
    images: int | None = None
    """That one call makes or takes; None where images are not the matter."""
    before: Callable[[], object] | None = None
    """Runs ahead of every round, and is not timed."""
    repeat: int = 1
    """Calls in a round."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is worth saving of it."""


@dataclass
class Measured:
    """What came of one workload."""

    seconds: list[float] = field(default_factory=list)
    """Of one call, in each round."""
    images: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Memory, and on a GPU power, clocks, temperature, throttling."""
    error: Exception | None = None
    """Why there are no rounds; `Unavailable` where it could not be otherwise on this machine."""


def repeated(make: Callable[..., Workload], times: int) -> Callable[..., Workload]:
    """Makes the same workload with so many calls in a round."""
    return lambda *args, **options: replace(make(*args, **options), repeat=times)


def wall_clock(workload: Workload) -> float:
    """A round by the host's clock: for work that is done when the call returns."""
    if workload.before is not None:
        workload.before()
    start = time.perf_counter()
    for _ in range(workload.repeat):
        workload.run()
    return (time.perf_counter() - start) / workload.repeat


class CudaClock:
    """A round by two CUDA events around it on the current stream.

    Args:
        flush: is written ahead of every round, so that nothing of the last one is in the L2 cache.
            None: nothing is.
        event: makes an event; that of torch.cuda but in tests.
    """

    def __init__(
        self, flush: torch.Tensor | None = None, event: Callable[..., Any] = torch.cuda.Event
    ) -> None:
        self._flush, self._event = flush, event

    def __call__(self, workload: Workload) -> float:
        start, end = self._event(enable_timing=True), self._event(enable_timing=True)
        if workload.before is not None:
            workload.before()
        if self._flush is not None:
            self._flush.zero_()
        start.record()
        for _ in range(workload.repeat):
            workload.run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000 / workload.repeat


def in_turn(
    workloads: Mapping[str, Workload], clock: Clock, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each workload: `rounds` times each, A B C, A B C, ..."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(rounds):
        for name, workload in workloads.items():
            seconds[name].append(clock(workload))
    return seconds


def measure(
    makers: Mapping[str, Callable[[], Workload]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 2,
    flush: bool = False,
) -> dict[str, Measured]:
    """Makes the workloads, warms each up, and times them in turn. What one of them raises keeps
    the others from nothing.

    Args:
        makers: makes a workload; raises `Unavailable` where this machine cannot run it.
        device: what the workloads run on.
        rounds: timed, of each.
        warm_up: rounds of each that are not (compilation, allocators, caches).
        flush: empty the GPU's L2 cache between rounds.
    """
    cuda = device.type == "cuda"
    clock: Clock = wall_clock
    if cuda:
        torch.cuda.init()  # before its memory's statistics are asked for
        filler = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush else None
        clock = CudaClock(filler)
    measured = {name: Measured() for name in makers}
    workloads: dict[str, Workload] = {}
    for name, make in makers.items():
        held = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            workload = make()
            for _ in range(warm_up):
                clock(workload)
        except Exception as error:
            measured[name].error = error
            continue
        workloads[name] = workload
        measured[name].images = workload.images
        measured[name].facts |= workload.facts
        if cuda:
            peak = torch.cuda.max_memory_allocated(device) - held
            measured[name].facts["memory_peak_mib"] = round(peak / 2**20, 1)
    gc.collect()
    sampler = Sampler.of(device) if cuda else contextlib.nullcontext()
    with sampler as during:
        for name, seconds in in_turn(workloads, clock, rounds=rounds).items():
            measured[name].seconds = seconds
    if during is not None:
        for name in workloads:
            measured[name].facts |= during.clocks()
    if cuda:
        for name, workload in workloads.items():
            measured[name].facts |= _power(workload, device)
    return measured


def _power(workload: Workload, device: torch.device) -> dict[str, Any]:
    """Power of this workload alone, sustained, `before` included where it has one (then there are
    no images per joule, because what it costs is not the images' own)."""
    calls = 0
    torch.cuda.synchronize(device)
    with Sampler.of(device) as sampler:
        end = time.perf_counter() + SUSTAINED_SECONDS
        while time.perf_counter() < end:
            if workload.before is not None:
                workload.before()
            for _ in range(workload.repeat):
                workload.run()
            calls += workload.repeat
            torch.cuda.synchronize(device)
    alone = workload.before is None
    facts = sampler.power(calls * workload.images if alone and workload.images else None)
    clocks = sampler.clocks()
    return facts | clocks if clocks["throttled"] else facts
