"""The benchmarks themselves run, each once and untimed, as from a bare checkout; and runs of which
pytest selected a part, or that were interrupted or killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_suite_runs(environment, private_cache):
    """One small block in every mode, and the eager steps."""
    chosen = "(test_block and D5) or (test_step and 16)"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q"),
            *("-k", chosen, "-p", "no:cacheprovider"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


SMALL = """
import os
import signal
from functools import partial

import pytest
from benchmarks.timing import Workload

END = None  # what ends the run in the last group


def make(name, batch):
    with open("made", "a") as file:
        print(name, batch, file=file)

    def run():
        if END is not None and batch == 48:
            os.kill(os.getpid(), END)

    return Workload(run, images=batch)


VARIANTS = ("pytorch tuned", "fastdcgan", "fastdcgan --amp")


@pytest.mark.parametrize("batch", [16, 32, 48])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step(together, batch, variant):
    together("step", {n: partial(make, n, batch) for n in VARIANTS}, variant, rounds=3, batch=batch)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_block(together, mode, variant):
    makers = {name: partial(make, f"{mode} {name}", 4) for name in VARIANTS}
    together("block", makers, variant, rounds=3, block="G1", mode=mode, batch=4)
"""


def names(path):
    return [entry["name"] for entry in json.loads(path.read_text())["benchmarks"]]


def reported(folder):
    """The page about the only run that is saved there."""
    storage, out = folder / ".benchmarks", folder / "report"
    assert report.main(["--storage", str(storage), "--out", str(out)]) == 0
    return (out / "report.md").read_text()


def test_what_pytest_left_out_is_neither_made_nor_measured(measured, tmp_path):
    """Neither variants of a group nor groups; and the report does without a baseline."""
    done = measured(tmp_path, SMALL, "-k", "(step and 32 or block and forward) and not tuned")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "made").read_text().splitlines() == [
        "fastdcgan 32", "fastdcgan --amp 32", "forward fastdcgan 4", "forward fastdcgan --amp 4"
    ]  # fmt: skip
    (path,) = (tmp_path / ".benchmarks").rglob("*.json")  # nothing partial is left
    assert len(names(path)) == 4
    page = reported(tmp_path)
    assert "step, batch 32" in page
    assert "blocks, forward" in page
    assert "tuned" not in page


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_keeps_what_it_has_measured(end, measured, tmp_path):
    text = SMALL.replace("END = None", f"END = signal.{end}")
    done = measured(tmp_path, text, "-k", "step")
    assert done.returncode == (2 if end == "SIGINT" else -getattr(signal, end)), done.stdout
    (path,) = (tmp_path / ".benchmarks").rglob("*.json")
    assert (path.parent.name == "partial") == (end != "SIGINT")
    assert len(names(path)) == 6
    page = reported(tmp_path)
    assert all(f"step, batch {batch}" in page for batch in (16, 32))
    assert "batch 48" not in page
