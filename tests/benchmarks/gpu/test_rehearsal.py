"""`python -m benchmarks.gpu` as a user calls it: all phases on the CPU, and what it says without a
GPU."""

import json
import os

import pytest

from benchmarks.gpu import driver, page
from fastdcgan_kernels.choice import measured

LACKING = ("tyro", "rich", "matplotlib", "pynvml")
"""What the command must do without, some of which may be installed here."""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Environment in which these cannot be imported."""
    folder = tmp_path_factory.mktemp("lacking")
    for name in LACKING:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(driver.ROOT), str(driver.ROOT / "kernels"), str(folder)])
    }


@pytest.fixture(scope="module")
def rehearsed(command, without, tmp_path_factory):
    """(folder, the finished process)."""
    out = tmp_path_factory.mktemp("rehearsed")
    done = command("benchmarks.gpu", "--rehearse", "--out", out, env=without, timeout=580)
    return out, done


def test_all_phases_run_without_a_gpu(rehearsed):
    out, done = rehearsed
    summary = json.loads((out / "summary.json").read_text())
    states = {name: state["state"] for name, state in summary["phases"].items()}
    assert states == {phase.name: "done" for phase in driver.PHASES}, done.stderr
    assert page.failures(summary) == []
    assert done.returncode == 0


def test_each_phase_measures_what_it_says(rehearsed):
    summary = page.load(rehearsed[0])
    found = summary["items"]
    assert found["machine"]["versions"]["torch"]
    assert found["compile"]["default 2"]["compiled"] == found["compile"]["default 2"]["kernels"] > 0
    proof = found["proof"]["2"]
    assert proof["said"] == []
    assert 0 < proof["figures"]["blocks"]["largest"] < proof["figures"]["blocks"]["allowed"]
    engines = found["engines"].values()
    assert {one["engine"] for one in engines if one.get("seconds")} >= {"pointers", "descriptors"}
    assert {one["engine"] for one in engines if one.get("skipped")} >= {"gluon"}
    assert found["steps"].keys() == {
        "2 alone: fastdcgan --amp", "2 in turn: fastdcgan --amp", "2 in turn: pytorch example",
        "2 in turn: pytorch tuned", "2 in turn: fastdcgan --amp --overlap off",
    }  # fmt: skip
    rows = found["profile"]["2"]["rows"]
    assert {"D1", "D4", "G1", "G4", "step"} <= {row["layer"] for row in rows}
    assert all(row["seconds"] > 0 for row in rows)
    assert found["tests"]["pytest"]["skipped"] > 100
    xml = (rehearsed[0] / "gpu.xml").read_text()
    assert xml.count("<skipped") > 100
    assert "hostname" not in xml
    assert found["ways"]["2 vendor"]["median"] > 0
    (contest,) = found["tiles"].values()
    assert contest["candidates"][0]["seconds"] > 0
    assert "missing" in found["counters"]["memcheck"]


def test_the_page_and_the_screen_say_that_it_is_a_rehearsal(rehearsed):
    out, done = rehearsed
    assert (out / "report.md").read_text().startswith("# A rehearsal on a CPU: no GPU was measured")
    lines = done.stdout.splitlines()
    assert len(lines) <= 10
    assert "rehearsal" in lines[0].lower()
    assert lines[-1] == f"wrote {out / 'report.md'}"


def test_no_place_of_this_machine_is_written(rehearsed):
    """The files are meant to be passed on."""
    for path in rehearsed[0].iterdir():
        text = path.read_text()
        assert str(driver.ROOT) not in text, path.name
        assert str(rehearsed[0]) not in text, path.name


def test_the_tuners_file_is_beside_it(rehearsed):
    tuned = list(rehearsed[0].glob("tuned-*.json"))
    assert len(tuned) == 1
    assert json.loads(tuned[0].read_text())["format"] == measured.FORMAT


def test_a_second_call_measures_nothing_more(rehearsed, command, without):
    out, _ = rehearsed
    before = (out / "items.jsonl").read_text()
    done = command("benchmarks.gpu", "--rehearse", "--out", out, env=without)
    assert done.returncode == 0
    assert done.stderr.count("measured before") == len(driver.PHASES)
    assert (out / "items.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--only", "proof,no", "--rehearse"], "--only proof,no was given; phases are machine"),
        (["--minutes", "0"], "--minutes 0 was given; give more than 0"),
        (["--minutes", "nan"], "--minutes nan was given; give more than 0"),
        (["--out", "/dev/null/x", "--rehearse"], "--out /dev/null/x was given: Not a directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(command, given, line):
    done = command("benchmarks.gpu", *given)
    assert done.returncode in (1, 2)
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so(command):
    done = command("benchmarks.gpu", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert done.stderr == "error: PyTorch sees no GPU here: --rehearse shows the phases on a CPU\n"


def test_the_help_does_not_wait_for_torch(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    paths = [str(driver.ROOT), str(driver.ROOT / "kernels"), str(tmp_path)]
    done = command("benchmarks.gpu", "--help", env={"PYTHONPATH": os.pathsep.join(paths)})
    assert done.returncode == 0
    assert "--rehearse" in done.stdout
