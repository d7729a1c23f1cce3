"""One kernel launch as data: what runs on a device and what inspect/ compiles ahead of time are
the same object. Not here: which launches a block needs (the families beside)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

# Of every compilation. a * b + c as one rounding: what Triton did before it asked to be told.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """kernel: a triton.jit function; grid: programs along each axis; arguments: every parameter by
    name: tensors, tensor descriptors and constants; warps and stages: for the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Of its compilation."""
        return {"num_warps": self.warps, "num_stages": self.stages, **OPTIONS}

    @property
    def named(self) -> dict[str, Any]:
        """The arguments, those of named tuples one by one: of an operand `x` x, x_aux and x_coef;
        of the shape S P, Q, CS and so on."""
        found: dict[str, Any] = {}
        for name, value in sorted(self.arguments.items(), key=lambda item: item[0] != "S"):
            found |= _one_by_one(name, value)
        return found

    def run(self, device: torch.device) -> None:
        """Launch on `device` (whichever is current), or record if somebody is recording; on the
        meta device there is nothing to do."""
        for see in _watchers:
            see(self)
        if _recorders:
            launches, sketches = _recorders[-1]
            launches.append(self.sketch if sketches else self)
        if _recorders or device.type == "meta":
            return
        with torch.cuda.device(device) if device.type == "cuda" else _interpreting:
            self.kernel[self.grid](**self.arguments, **self.options)

    def compile(self) -> Any:
        """What Triton compiles for this launch and keeps in its cache; nothing runs."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options)

    @property
    def sketch(self) -> Launch:
        """The same without data: enough to be compiled, and holds no memory."""
        arguments = {name: _sketched(value) for name, value in self.arguments.items()}
        return replace(self, arguments=arguments)


def compile_ahead(run: Callable[[], object]) -> None:
    """Compiles the kernels that `run` launches, side by side: Triton alone compiles each at its
    first launch, one after the other, a second and more each. What fails here fails again, and is
    told, at that launch. `run` is called, but launches nothing: its results are of no use."""
    with recording(sketches=True) as launches:
        run()
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with ThreadPoolExecutor(processors) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
            for launch in launches:
                launch.compile()
        kernels = [future.result(ignore_errors=True) for future in mode.future_kernels.values()]
        # The piece of C by which Python launches a kernel, which Triton keeps, too.
        launcher = triton.runtime.driver.active.launcher_cls
        for kernel in kernels:
            if kernel is not None:
                pool.submit(launcher, kernel.src, kernel.metadata)


def _sketched(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        found = map(_sketched, value)
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    return replace(value, base=_sketched(value.base)) if hasattr(value, "block_shape") else value


def _one_by_one(name: str, value: Any) -> dict[str, Any]:
    """Those that a named tuple has, also within another."""
    if not hasattr(value, "_asdict"):
        return {name: value}
    found: dict[str, Any] = {}
    for field, own in value._asdict().items():
        whole = name if field == "value" else f"{name}_{field}"
        found |= _one_by_one(field if name == "S" else whole, own)
    return found


_interpreting = threading.Lock()  # Triton's interpreter has one state for all threads
_recorders: list[tuple[list[Launch], bool]] = []
_watchers: list[Callable[[Launch], object]] = []


@contextlib.contextmanager
def recording(sketches: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are collected in order, or their sketches, and not run; tensors may be on the
    meta device."""
    launches: list[Launch] = []
    _recorders.append((launches, sketches))
    try:
        yield launches
    finally:
        _recorders.pop()


@contextlib.contextmanager
def watching(see: Callable[[Launch], object]) -> Iterator[None]:
    """`see` is called with each launch inside, before it runs. Autograd copies a gradient that
    somebody else holds: what keeps the launches, and so their tensors, changes what a step does."""
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)
