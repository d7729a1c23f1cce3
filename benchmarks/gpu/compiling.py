"""Compiles launches ahead of their first use, in as many processes as there are cores, into the
cache that they will be looked up in. A launch is compiled by Triton's own just-in-time path, for a
target that is named and not asked for: so the same code runs without a GPU."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu.phase import line_of
from fastdcgan_kernels.choice.types import Target
from fastdcgan_kernels.gpu.launch import Launch
from fastdcgan_kernels.inspect.report import tile_of

_launches: Sequence[Launch] = ()
"""What the processes compile: they inherit it, because a kernel cannot be sent to one."""
_launchers = False
"""Whether the C that launches a kernel is compiled, too; it needs the CUDA driver's library."""


def gpu_target(target: Target) -> GPUTarget:
    """What Triton calls it. A device's own capability may be above that of the plan's target."""
    if target.device and torch.cuda.is_available():
        found: GPUTarget = triton.runtime.driver.active.get_current_target()
        return found
    return GPUTarget(target.backend, target.arch, target.warp_size)


def compile_all(launches: Iterable[Launch], target: Target, seconds: float) -> dict[str, Any]:
    """Compiles each kind of launch once.

    Args:
        launches: on tensors of any device; nothing of them runs.
        target: what for.
        seconds: after which what is not compiled stays so.

    Returns:
        {"kernels": different ones, "compiled": done in time, "processes", "seconds",
        "failed": {kernel and tile: why}}.
    """
    global _launches
    start = time.monotonic()
    _launches = list({_kind(launch): launch for launch in launches}.values())
    processes = min(len(os.sched_getaffinity(0)), len(_launches)) or 1
    context = multiprocessing.get_context("fork")
    failed: dict[str, str] = {}
    compiled = 0
    # A process that was forked from one that uses CUDA must not ask it anything.
    start_with = (gpu_target(target), torch.cuda.is_available())
    with context.Pool(processes, _start, start_with) as pool:
        found = pool.imap_unordered(_compile, range(len(_launches)))
        for _ in _launches:
            try:
                name, why = found.next(max(0.1, start + seconds - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            compiled += not why
            if why:
                failed[name] = why
    return {
        "kernels": len(_launches),
        "compiled": compiled,
        "processes": processes,
        "seconds": round(time.monotonic() - start, 2),
        "failed": failed,
    }


def _start(target: GPUTarget, launchers: bool) -> None:
    """In a process of the pool: there is a GPU of this target, as far as compiling goes."""
    global _launchers
    _launchers = launchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)


def _compile(place: int) -> tuple[str, str]:
    """(kernel and tile, why it failed or "")."""
    launch = _launches[place]
    name = f"{launch.kernel.fn.__name__} {tile_of(launch)}"
    try:
        built = launch.compile()
        if _launchers:
            _build_launcher(built)
    except Exception as error:
        return name, line_of(error)
    return name, ""


def _build_launcher(built: Any) -> None:
    """The piece of C by which Python launches a kernel, which Triton would compile at its first
    launch. Where this fails, that is when it is compiled."""
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(built.src, built.metadata)


def _kind(launch: Launch) -> tuple[Any, ...]:
    """Equal where the compiler is asked for the same."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16
        if hasattr(value, "block_shape"):
            return value.base.dtype, tuple(value.block_shape)
        return value

    plain = {name: one(value) for name, value in launch.arguments.items()}
    return launch.kernel.fn.__name__, tuple(plain.items()), tuple(launch.options.items())
