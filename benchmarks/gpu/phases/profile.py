"""Where the time of a step goes: each launch in a replay of its CUDA graph, beside what it would
take at the card's peaks. The profiler's kernels are joined with the launches that the step makes
when it is run eagerly; both are in the same order, because all are in one stream."""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost_model import DEVICES, seconds_of
from benchmarks.gpu.launches import Seen, seeing, task_facts
from benchmarks.gpu.phase import Items, Setting, line_of
from benchmarks.gpu.step import whole_step
from fastdcgan_kernels.gpu.launch import Launch, watching
from fastdcgan_kernels.tuner.trials import device_time

REPLAY = "torch.profiler, replays of the CUDA graph, medians"
REPLAYS = 5
WARM_SECONDS = 0.2
"""Of replays before those, with the profiler and without: the clock of an idle GPU is slow."""
ALONE = "each launch by itself"
COPIES = ("gpu_memcpy", "gpu_memset")
UNLIKE = 200
"""Names of kernels that are kept."""


@dataclass(frozen=True)
class Kernel:
    """One entry of the device's timeline; seconds."""

    name: str
    start: float
    seconds: float


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    # Set before CUPTI starts: ended and begun again, it has lost the kernels of captured graphs.
    os.environ["TEARDOWN_CUPTI"] = "0"
    if setting.device.type == "cuda":
        trace(lambda: torch.zeros(1, device=setting.device), setting.device)
    peaks = _peaks(setting)
    for batch in setting.size.main:
        if to.wants(str(batch)):
            with to.item(str(batch)) as facts:
                facts |= {"batch": batch, "peaks": peaks, **_profile(setting, batch, peaks)}


def _profile(setting: Setting, batch: int, peaks: dict[str, Any]) -> dict[str, Any]:
    said: list[str] = []
    eager = whole_step(
        setting, batch, say=said.append, prove=False, cuda_graph="off", overlap="off"
    )
    facts: dict[str, Any] = {"said": said, "span_seconds": None, "others": []}
    if setting.device.type == "cuda":
        eager()  # its working copies of weights exist from now on
        with seeing(eager.state) as seen:
            eager()
        whole = whole_step(setting, batch, say=said.append, prove=False, overlap="off")
        whole()
        whole()
        try:
            kernels = trace(whole, setting.device)
        except RuntimeError as error:  # of the profiler, which some machines do not allow
            said.append(f"the profiler: {line_of(error)}")
            kernels = []
        steps = join(seen, kernels) if whole.graphed else None
        if steps is not None:
            times = [statistics.median(k.seconds for k in own) for own in zip(*steps, strict=True)]
            others = _others(within_last(steps, kernels))
            facts |= {"source": REPLAY, "span_seconds": statistics.median(map(span, steps))}
            facts |= {"others": others, "seconds": sum(times) + sum(o["seconds"] for o in others)}
            return {**facts, "rows": _rows(seen, times, peaks)}
        facts["joined"] = False
        facts["unlike"] = [k.name for k in kernels][:UNLIKE]  # for whoever mends it
    kept: list[Launch] = []
    with seeing(eager.state) as seen, watching(kept.append):
        eager()
    times = [_alone(launch, setting.device) for launch in kept]
    facts |= {"source": ALONE, "seconds": sum(times)}
    return {**facts, "rows": _rows(seen, times, peaks)}


def trace(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What the device does in some calls, of which the first ones warm it up, by PyTorch's
    profiler, in its order."""

    def warm_up() -> None:
        torch.cuda.synchronize(device)
        end = time.monotonic() + WARM_SECONDS
        while time.monotonic() < end:
            run()
            torch.cuda.synchronize(device)

    warm_up()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        warm_up()
        for _ in range(REPLAYS):
            run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return timeline(json.loads(path.read_text("utf-8")))


def timeline(chrome: dict[str, Any]) -> list[Kernel]:
    """The kernels and copies of a trace, in the order of their starts; its times are in us."""
    found = [
        Kernel(event["name"], float(event["ts"]) * 1e-6, float(event["dur"]) * 1e-6)
        for event in chrome["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", *COPIES)
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def join(seen: Sequence[Seen], kernels: Sequence[Kernel]) -> list[list[Kernel]] | None:
    """Of each of the last REPLAYS steps the kernels that are these launches; None where the kernels
    of these names are anything but these launches, over and over."""
    wanted = [one.kernel for one in seen]
    ours = [kernel for kernel in kernels if kernel.name in set(wanted)]
    steps = [ours[at : at + len(wanted)] for at in range(0, len(ours), len(wanted))]
    if not steps or any([kernel.name for kernel in step] != wanted for step in steps):
        return None
    return steps[-REPLAYS:]


def span(step: Sequence[Kernel]) -> float:
    """Seconds from the first one's start to the last one's end."""
    return step[-1].start + step[-1].seconds - step[0].start


def within_last(steps: Sequence[Sequence[Kernel]], kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels of the last step that are not ours: those since the end of the step before."""
    ours = {kernel.name for kernel in steps[-1]}
    since = steps[-2][-1].start if len(steps) > 1 else -1.0
    return [k for k in kernels if k.name not in ours and since < k.start < steps[-1][-1].start]


def _alone(launch: Launch, device: torch.device) -> float:
    """Seconds of a launch repeated by itself: its operands are in the caches then."""
    if device.type == "cuda":
        return device_time(lambda: launch.run(device), lambda line: None, repeats=5)
    start = time.perf_counter()
    launch.run(device)
    return time.perf_counter() - start


def _rows(
    seen: Sequence[Seen], times: Sequence[float], peaks: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for place, (one, seconds) in enumerate(zip(seen, times, strict=True)):
        floor, predicted = seconds_of(
            one.work,
            flops=peaks["flops_per_second"],
            bytes=peaks["bytes_per_second"],
            l2=peaks["l2_bytes_per_second"],
            multiprocessors=peaks["multiprocessors"],
        )
        rows.append(
            {
                "place": place,
                "layer": one.layer,
                "pass": one.of,
                "kernel": one.kernel,
                "tile": one.tile,
                "images": one.images,
                "grid": one.grid,
                "seconds": seconds,
                "flops": one.work.flops,
                "bytes": one.work.bytes,
                "l2_bytes": one.work.l2,
                "floor_seconds": floor,
                "predicted_seconds": predicted,
                "task": None if one.task is None else task_facts(one.task),
            }
        )
    return rows


def _others(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """PyTorch's own, by name, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.seconds)
    found = [
        {"name": name, "launches": len(own), "seconds": sum(own)} for name, own in times.items()
    ]
    return sorted(found, key=lambda one: -one["seconds"])


def _peaks(setting: Setting) -> dict[str, Any]:
    """Those that phase `machine` measured, where it did, else an H100's, assumed."""
    device = DEVICES["h100"]
    assumed = {"flops_per_second": device.flops16, "bytes_per_second": device.bytes,
               "l2_bytes_per_second": device.l2}  # fmt: skip
    measured = setting.measured("machine")
    names = {"flops_per_second": "product", "bytes_per_second": "copy", "l2_bytes_per_second": "l2"}
    found = {
        name: measured.get(item, {}).get(name.removeprefix("l2_")) for name, item in names.items()
    }
    peaks = {name: found[name] or value for name, value in assumed.items()}
    source = "measured" if all(found.values()) else "assumed" if not any(found.values()) else "both"
    multiprocessors = measured.get("card", {}).get("multiprocessors") or device.multiprocessors
    return {**peaks, "source": source, "multiprocessors": multiprocessors}
