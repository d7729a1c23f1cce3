"""How fast whole steps are here, one way against another: all ways by turns, medians. A hint for
choosing flags, and no benchmark (benchmarks/)."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastdcgan.data import Packed
from fastdcgan.diagnosis.layers import batch_for
from fastdcgan.diagnosis.rows import Row, Verdict, first_line
from fastdcgan.diagnosis.steps import start
from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype
from fastdcgan.training.whole_step import WholeStep

ROUNDS = 5
CLEAR = 1.1  # a way must be so many times as fast before it is called faster


@dataclass
class Way:
    """Flags to compare. `less`: they leave something off that is meant to be fast."""

    flags: str
    options: dict[str, Any]
    less: bool = False
    whole: WholeStep | None = None
    wrong: Row | None = None


def ways(device: torch.device) -> list[Way]:
    """What one would run here first, and then with each flag that matters."""
    amp, on_gpu = amp_dtype(device) is not None, device.type == "cuda"
    if not on_gpu:
        found = [Way("no flags", {}), Way("--impl reference", {"impl": "reference"}, less=True)]
        return [*found, Way("--amp", {"amp": True})] if amp else found
    base = {"amp": amp}
    return [
        Way("--amp", base),
        Way("without --amp", {}, less=True),
        Way("--impl reference", base | {"impl": "reference"}, less=True),
        Way("--impl triton", base | {"impl": "triton"}),
        Way("--cuda-graph off", base | {"cuda_graph": "off"}, less=True),
        Way("--compile", base | {"compile": True}),
    ]


def timing_rows(packed: Packed, device: torch.device) -> Iterable[Row]:
    """A row for each way, with what to do where another than the default is clearly faster."""
    batch, steps = batch_for(device), 20 if device.type == "cuda" else 1
    every = ways(device)
    for way in every:
        _prepare(way, packed, device, batch)
    running = [way for way in every if way.whole is not None]
    seconds = interleaved([way.whole for way in running if way.whole], device, steps)
    medians = {way.flags: statistics.median(s) for way, s in zip(running, seconds, strict=True)}
    for way in every:
        yield way.wrong or _row(way, medians, batch, every[0].flags)
    if device.type != "cuda":
        yield Row("--impl triton", "not possible here", f"its kernels run on GPUs, not on {device}")
        yield Row("--cuda-graph", "not possible here", f"graphs are for GPUs, not for {device}")
        yield Row(
            "--compile",
            "not possible here",
            "compiling a step takes longer than this command may",
            "compare python -m fastdcgan.train --steps 100 with and without --compile",
        )


def _prepare(way: Way, packed: Packed, device: torch.device, batch: int) -> None:
    """Start it and make the first steps: they compile, capture and allocate."""
    said: list[str] = []
    name = way.flags
    try:
        whole = start(packed, device, say=said.append, batch_size=batch, **way.options)
        for _ in range(3 if device.type == "cuda" else 1):
            whole()
        finish(device)
    except InputError as error:
        way.wrong = Row(name, "not possible here", str(error))
        return
    except Exception as error:  # whatever a driver, a compiler or a kernel raises
        way.wrong = Row(name, "failed", first_line(error))
        return
    if said:
        way.wrong = Row(name, "warning", "; ".join(said))
        return
    way.whole = whole


def interleaved(
    every: list[WholeStep], device: torch.device, steps: int, rounds: int = ROUNDS
) -> list[list[float]]:
    """Seconds of a step of each, measured by turns, so that a slow moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in every]
    for _ in range(rounds):
        for whole, own in zip(every, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(steps):
                whole()
            finish(device)
            own.append((time.perf_counter() - begin) / steps)
    return seconds


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _row(way: Way, medians: dict[str, float], batch: int, first: str) -> Row:
    own, base = medians[way.flags], medians.get(first)
    values: dict[str, Any] = {"seconds": own, "images_per_second": batch / own, "batch": batch}
    detail = f"{1e3 * own:.1f} ms a step, {batch / own:,.0f} images/s"
    if base is None or way.flags == first:
        return Row(way.flags, "ok", detail, values=values)
    times = base / own
    detail += f", {times:.2f} times {first}"
    if times < CLEAR:
        return Row(way.flags, "ok", detail, values=values)
    how = way.flags if way.flags.startswith("without") else f"with {way.flags}"
    verdict: Verdict = "warning" if way.less else "ok"
    return Row(way.flags, verdict, detail, f"train {how}: it is faster here", values)
