"""One kernel launch as data: what runs on a device and what inspect/ compiles ahead of time are
the same object. Not here: which launches a block needs (the families beside).

Programmatic dependent launch (CUDA C++ Programming Guide, the section of that name): where a target
has it, a launch is set up, and its programs start, while the one ahead of it in the stream still
ends; there they wait. That is safe where every kernel waits before all else, which `begin` is for:
so a launch that has ended has seen the end of all before it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..choice.targets import starts_early

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton made for AMD alone
    gdc_launch_dependents = gdc_wait = None

# Of every compilation. a * b + c as one rounding: what Triton did before it asked to be told.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """kernel: a triton.jit function; grid: programs along each axis; arguments: every parameter by
    name but PDL: tensors, tensor descriptors and constants; warps and stages: for the compiler;
    pdl: whether it may start early."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2
    pdl: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of its compilation. Some targets do not know the option that they do not have."""
        early = {"launch_pdl": True} if self.pdl else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **OPTIONS, **early}

    @property
    def given(self) -> dict[str, Any]:
        """Every argument of the kernel."""
        return {**self.arguments, "PDL": self.pdl}

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
        meta device there is nothing to do. It may start early if the device has that."""
        launch = replace(self, pdl=starts_early(device))
        for see in _watchers:
            see(launch)
        if _recorders:
            _recorders[-1].append(launch)
        if _recorders or device.type == "meta":
            return
        with torch.cuda.device(device) if device.type == "cuda" else _interpreting:
            launch.kernel[launch.grid](**launch.given, **launch.options)

    def compile(self) -> Any:
        """What Triton compiles for this launch and keeps in its cache; nothing runs."""
        return self.kernel.warmup(**self.given, grid=self.grid, **self.options)


def _one_by_one(name: str, value: Any) -> dict[str, Any]:
    """Those that a named tuple has, also within another."""
    if not hasattr(value, "_asdict"):
        return {name: value}
    found: dict[str, Any] = {}
    for field, own in value._asdict().items():
        whole = name if field == "value" else f"{name}_{field}"
        found |= _one_by_one(field if name == "S" else whole, own)
    return found


@triton.jit
def begin(PDL: tl.constexpr):
    """The first statement of every kernel: waits until all that the launch ahead has stored is
    there, then lets the next launch start as soon as there is room beside this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


_interpreting = threading.Lock()  # Triton's interpreter has one state for all threads
_recorders: list[list[Launch]] = []
_watchers: list[Callable[[Launch], object]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are collected in order and not run; tensors may be on the meta device."""
    launches: list[Launch] = []
    _recorders.append(launches)
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
