"""What this machine can do, asked and proved: the parts of `python -m fastdcgan.doctor`.

A check is a function that gives rows (rows.py); `examine` calls them in order. Every check works on
what training works on: the engine's choice, the kernels' plan, whole steps of the built-in data."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch

from fastdcgan.data import Packed
from fastdcgan.diagnosis import apart, blocks, data, steps, timings
from fastdcgan.diagnosis.expectations import cpu_rows, engine_rows, plan_rows, plan_title
from fastdcgan.diagnosis.machine import facts
from fastdcgan.diagnosis.rows import Row, Section, guarded
from fastdcgan.hardware import use_allowed_threads


def examine(device: torch.device, *, quick: bool = False) -> Iterator[Section]:
    """All checks, section by section as they are done. `quick` leaves out the timings."""
    broken = guarded("device", lambda: _enter(device))
    yield Section("This machine", [*broken, *facts(device)])
    if broken:
        return
    with ExitStack() as stack:
        others = apart.begin(device)
        for other in others:
            stack.callback(other.stop)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastdcgan-doctor-")))

        @cache
        def packed() -> Packed:
            return data.open_data(folder)

        def on_data(check: Callable[[Packed, torch.device], Iterable[Row]]) -> Iterable[Row]:
            return check(packed(), device)

        engine = guarded("engine", lambda: engine_rows(device))
        engine += guarded("CPU kernels", lambda: cpu_rows(device))
        yield Section("What training runs here", engine)
        yield Section(plan_title(device), guarded("plan", lambda: plan_rows(device)))
        yield Section(blocks.TITLE, guarded("blocks", lambda: blocks.check_blocks(device)))
        yield Section(
            "Data",
            [
                *guarded("built-in data", lambda: data.data_rows(packed())),
                *guarded("cache folder", data.cache_rows),
            ],
        )
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        yield Section(
            "Training steps",
            [
                *guarded("whole step", lambda: on_data(steps.graph_rows)),
                *guarded("training", lambda: on_data(steps.training_rows)),
            ],
        )
        compilers = [row for other in others for row in guarded(other.name, other.rows)]
        if device.type == "cuda":
            compilers = [apart.compiled_row(apart.compiled(str(device)))]
        yield Section("Compilers", compilers)
        if not quick:
            yield Section("Timings", guarded("timings", lambda: on_data(timings.timing_rows)))


def _enter(device: torch.device) -> list[Row]:
    """Sets this process up as training does, and computes something; no rows."""
    use_allowed_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if float(torch.full((4,), 0.5, device=device).sum()) != 2:
        return [Row("device", "failed", f"{device} cannot add")]
    return []
