"""What the hardware counts for the two most expensive kernels, by Nsight Compute; and whether small
kernels touch memory that is not theirs, by compute-sanitizer. Either where it is installed."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.phase import Items, Setting

KERNELS = 2
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis",
            "ComputeWorkloadAnalysis", "SchedulerStats")  # fmt: skip
NCU_SECONDS, MEMCHECK_SECONDS, SPARE_SECONDS = 25.0, 40.0, 3.0
WARM_UP = 2
"""Launches of a kernel before the one that is counted."""


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    end = time.monotonic() + setting.limit - SPARE_SECONDS

    def left(most: float) -> float:
        return max(1.0, min(most, end - time.monotonic()))

    for task, kernel, layer in _expensive(setting):
        item = f"{layer}: {kernel}"
        if to.wants(item):
            with to.item(item) as facts:
                counted = _counted(task, kernel, left(NCU_SECONDS))
                facts |= {"kernel": kernel, "layer": layer, **counted}
    if to.wants("memcheck"):
        with to.item("memcheck") as facts:
            facts |= _memcheck(setting, left(MEMCHECK_SECONDS))


def _expensive(setting: Setting) -> list[tuple[dict[str, Any], str, str]]:
    """(task, kernel, layer and pass), the most time first."""
    rows = [row for facts in setting.measured("profile").values() for row in facts.get("rows", ())]
    found: dict[str, tuple[dict[str, Any], str, str]] = {}
    for row in sorted(rows, key=lambda row: -row["seconds"]):
        if row["task"] is not None:
            place = (row["task"], row["kernel"], f"{row['layer']} {row['pass']}")
            found.setdefault(json.dumps(row["task"]), place)
    return list(found.values())[:KERNELS]


def _counted(task: dict[str, Any], kernel: str, seconds: float) -> dict[str, Any]:
    tool = shutil.which("ncu")
    if tool is None:
        return {"missing": "ncu (Nsight Compute) is not on the PATH"}
    sections = [word for name in SECTIONS for word in ("--section", name)]
    done = _run(
        [
            tool, "--csv", "--page", "details", "--clock-control", "none", *sections,
            "--kernel-name", kernel, "--launch-skip", str(WARM_UP), "--launch-count", "1",
            sys.executable, "-m", "benchmarks.gpu.phases.counters", json.dumps(task),
        ],
        seconds,
    )  # fmt: skip
    metrics = metrics_of(done["output"])
    if not metrics:
        return {"metrics": {}, "log": done["output"][-2000:], "status": done["status"]}
    return {"metrics": metrics}


def metrics_of(output: str) -> dict[str, float]:
    """ "name [unit]" -> value, of ncu's CSV, which follows lines of its own."""
    lines = output.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (ValueError, KeyError, AttributeError):
            continue  # a word, or a rule's advice
        found[f"{row['Metric Name']} [{row['Metric Unit']}]".removesuffix(" []")] = value
    return found


def _memcheck(setting: Setting, seconds: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"missing": "compute-sanitizer is not on the PATH"}
    if setting.rehearsal:
        return {"missing": "no GPU"}
    done = _run(
        [
            tool, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all",
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu/test_kernels.py",
            "-k", "sanitizer",
        ],
        seconds,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    return {"errors": errors_of(done["output"]), "status": done["status"],
            "log": done["output"][-2000:]}  # fmt: skip


def errors_of(output: str) -> int | None:
    """Of compute-sanitizer's last line; None where it did not come so far."""
    for line in reversed(output.splitlines()):
        if "ERROR SUMMARY:" in line:
            return int(line.split("ERROR SUMMARY:")[1].split()[0])
    return None


def _run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Status (None: it took longer than that) and all that a command prints."""
    try:
        done = subprocess.run(
            command, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output
        return {"status": None, "output": text}
    return {"status": done.returncode, "output": done.stdout}


def main() -> None:
    """Launches the kernel of a task (JSON) with its default tile, for Nsight Compute to watch."""
    import torch

    from benchmarks.gpu.launches import task_of
    from fastdcgan_kernels.choice import choose, targets
    from fastdcgan_kernels.tuner import trials

    task, device = task_of(json.loads(sys.argv[1])), torch.device("cuda", 0)
    target = targets.target_of(device)
    assert target is not None
    run = trials.TileTrial(task, device).prepare(choose.tile_for(task, target))
    for _ in range(WARM_UP + 1):
        run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
