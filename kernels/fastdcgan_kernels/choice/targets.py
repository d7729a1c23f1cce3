"""Which devices the kernels are made for, and whether they are to run: FASTDCGAN_IMPL. Imports
Triton only to see whether it is there."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from .devices import DEVICES
from .types import Target

MODES = ("auto", "reference", "triton")
# Shared memory of a block: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability" (maximum per block, opt-in); LDS of a work-group: AMD's CDNA3 and CDNA4 ISA guides.
# Multiprocessors: of the card whose peaks stand behind them.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912, 108, False, DEVICES["a100"]),
        Target("sm_89", "cuda", 89, 32, 101_376, 142, False, DEVICES["l40s"]),
        Target("sm_90", "cuda", 90, 32, 232_448, 132, True, DEVICES["h100"]),
        Target("sm_100", "cuda", 100, 32, 232_448, 148, True, DEVICES["b200"]),
        Target("sm_120", "cuda", 120, 32, 101_376, 170, True, DEVICES["rtx5090"]),
        Target("gfx942", "hip", "gfx942", 64, 65_536, 304, False, DEVICES["mi300x"]),
        Target("gfx950", "hip", "gfx950", 64, 163_840, 256, False, DEVICES["mi355x"], tf32=False),
    )
}
INTERPRETER = Target(
    "interpreter", "cpu", "interpreter", 1, 1 << 40, 1, False, DEVICES["h100"],
    device="interpreter",
)  # fmt: skip

_modes: list[str] = []
_assumed: list[Target] = []
Given = TypeVar("Given")


@contextlib.contextmanager
def pushed(stack: list[Given], value: Given) -> Iterator[Given]:
    """Inside, the value is the last of the stack."""
    stack.append(value)
    try:
        yield value
    finally:
        stack.pop()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def mode() -> str:
    """As `implementation` says, else FASTDCGAN_IMPL: "auto" (default), "reference" or "triton".

    Raises:
        ValueError: for anything else.
    """
    if _modes:
        return _modes[-1]
    given = os.environ.get("FASTDCGAN_IMPL", "auto")
    if given not in MODES:
        raise ValueError(f"FASTDCGAN_IMPL={given!r} was given; give one of {', '.join(MODES)}")
    return given


@contextlib.contextmanager
def implementation(mode: str) -> Iterator[None]:
    """Inside, `mode` is what FASTDCGAN_IMPL says outside; "auto" leaves it as that says."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} was given; give one of {', '.join(MODES)}")
    with contextlib.nullcontext() if mode == "auto" else pushed(_modes, mode):
        yield


def assume(target: Target) -> contextlib.AbstractContextManager[Target]:
    """Inside, tensors on the meta device are taken to be on this target."""
    return pushed(_assumed, target)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def target_of(device: torch.device) -> Target | None:
    """What kernels on this device are made for; None where none run."""
    if device.type == "meta":
        return _assumed[-1] if _assumed else None
    if device.type == "cpu":
        return INTERPRETER if os.environ.get("TRITON_INTERPRET") == "1" else None
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return None


@functools.cache
def _cuda_target(index: int) -> Target | None:
    """The known target at or below this device's capability, with the device's own figures."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        known = TARGETS.get(found.gcnArchName.split(":")[0])
    else:  # of one family a device runs what was made for an older one
        own = 10 * found.major + found.minor
        archs = [int(t.arch) for t in TARGETS.values() if t.backend == "cuda"]
        below = [arch for arch in archs if arch // 10 == own // 10 and arch <= own]
        known = TARGETS[f"sm_{max(below)}"] if below else None
    if known is None:
        return None
    most = known.shared_bytes
    if not torch.version.hip:
        most = min(most, getattr(found, "shared_memory_per_block_optin", most))
    return replace(
        known, shared_bytes=most, multiprocessors=found.multi_processor_count, device=found.name,
    )  # fmt: skip
