"""The process in which phase `engines` runs tiles, because a kernel with barriers of its own may
hang: `python -m benchmarks.gpu.engine DEVICE`. It answers questions in JSON:

{"task", "tile"}            whether this tile's values are right, more than once, in memory that was
                            NaN before; by which kernel
{"task", "tiles": [...]}    seconds of each, in turn with PyTorch's own convolution, the last
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.launches import task_of
from benchmarks.timing import CudaClock, Workload, in_turn, wall_clock
from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu.launch import recording
from fastdcgan_kernels.tuner import trials
from fastdcgan_kernels.tuner.child import serve

RUNS = 4
"""Of which each gives the first one's bits."""
LAUNCHES, REPLAYS, ROUNDS = 10, 3, 9
"""In a CUDA graph, of it in a round, and rounds."""
WARM_SECONDS = 0.1


def main(device: torch.device) -> None:
    """The command."""
    known: dict[Task, Any] = {}  # the last question's experiment

    def start() -> None:
        torch.backends.cudnn.benchmark = True
        # Of a rehearsal's float32: in TF32 old versions of Triton leave descriptors aside.
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        one = torch.ones(64, 64, device=device)
        float((one @ one).sum())

    def answer(line: str, prepared: Callable[[], None]) -> str:
        question = json.loads(line)
        task = task_of(question["task"])
        if task not in known:
            known.clear()
            known[task] = trials.trial_of(task, device)
        tiles = question.get("tiles") or [question["tile"]]
        runs = [known[task].prepare(Tile(**tile)) for tile in tiles]
        with recording() as launches:
            for run in runs:
                run()
        if device.type == "cuda":
            for launch in launches:
                launch.compile()
        prepared()
        if "tile" in question:
            kernel = launches[0].kernel.fn.__name__
            return json.dumps({"kernel": kernel, "why": _wrong(known[task], runs[0])})
        return json.dumps(_seconds([*runs, _vendor(known[task])], device))

    serve(start, answer)


def _wrong(trial: Any, run: Callable[[], Any]) -> str:
    """Why what it gives is not right; "": it is."""
    torch.use_deterministic_algorithms(True)  # memory that is handed out is NaN
    try:
        first = run()
        why: str = trial.wrong(first)
        for _ in range(RUNS - 1):
            pairs = zip(_tensors(first), _tensors(run()), strict=True)
            why = why or ("" if all(torch.equal(a, b) for a, b in pairs) else "not the same bits")
        return why
    finally:
        torch.use_deterministic_algorithms(False)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [t for t in (result.value, result.partials, result.counts) if t is not None]


def _vendor(trial: Any) -> Callable[[], object]:
    """PyTorch's convolution alone, channels_last in the same dtype."""
    g, x, weight = trial.task.geometry, trial.source.value, trial.weight
    convolve = F.conv_transpose2d if trial.transposed else F.conv2d
    return lambda: convolve(x, weight, None, g.stride, g.pad)


def _seconds(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Medians, in turn; on a GPU of replays of CUDA graphs, with operands that may be in the L2."""
    if device.type != "cuda":
        found = in_turn(
            {str(at): Workload(run) for at, run in enumerate(runs)}, wall_clock, rounds=1
        )
        return [statistics.median(own) for own in found.values()]
    works = {str(at): Workload(_graph(run).replay, repeat=REPLAYS) for at, run in enumerate(runs)}
    clock = CudaClock()
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        in_turn(works, clock, rounds=1)
    found = in_turn(works, clock, rounds=ROUNDS)
    return [statistics.median(own) / LAUNCHES for own in found.values()]


def _graph(run: Callable[[], object]) -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            run()
    return graph


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
