"""`python -m benchmarks.report` on runs that the real plugin saved, and on copies made slower,
throttled, of another machine, broken; and with --gpu on made-up runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report import (
    BEGIN,
    END,
    _roofline,
    gpu_runs,
    main,
    readme_part,
    with_gpu_part,
)
from tests.benchmarks import synthetic_gpu

ROOT = Path(__file__).parents[2]
LATER = "2100-01-01T00:00:00+00:00"
STEP = "test_step[fastdcgan]"


@pytest.fixture
def saved(mini):
    (path,) = mini[1].rglob("*.json")
    return json.loads(path.read_text())


@pytest.fixture
def storage(tmp_path, saved):
    """A folder of runs: `write(name, run)` saves one; "before.json" is there."""
    folder = tmp_path / "runs"
    folder.mkdir()

    def write(name, run):
        path = folder / name
        path.write_text(json.dumps(run) if isinstance(run, dict) else run)
        return path

    write("before.json", steady(saved, 1.0))
    return folder, write


def steady(run, factor, only=None, spread=0.02, **facts):
    """A copy whose times are those of its fastest rounds times `factor` (or those of one entry
    are), and whose quartiles are `spread` around the median."""
    run = json.loads(json.dumps(run))
    for entry in run["benchmarks"]:
        changed = only in (None, entry["name"])
        middle = entry["stats"]["min"] * (factor if changed else 1)
        entry["stats"] |= {
            "median": middle,
            "q1": middle * (1 - spread),
            "q3": middle * (1 + spread),
        }
        if changed:
            entry["extra_info"] |= facts
    return run


def later(run, **changes):
    return {**run, "datetime": LATER, **changes}


@pytest.fixture
def arguments(storage, tmp_path):
    return ["--storage", str(storage[0]), "--out", str(tmp_path / "out")]


@pytest.fixture
def report(arguments, capsys):
    """The command in this process."""

    def run(*more):
        status = main([*arguments, *map(str, more)])
        return SimpleNamespace(returncode=status, **capsys.readouterr()._asdict())

    return run


def test_page_and_plots(command, arguments, storage, saved, tmp_path):
    roofline = tmp_path / "roofline.json"
    costs = {"device": "H100", "batch": 16, "steps": [{"roofline_seconds": 0.001}]}
    roofline.write_text(json.dumps(costs))
    assert _roofline([roofline]) == ("roofline of ours on H100, predicted", {16: 16_000})
    storage[1]("now.json", later(steady(saved, 1.0)))
    done = command("benchmarks.report", *arguments, "--roofline", roofline)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| **fastdcgan** |")]
    entry = next(e for e in saved["benchmarks"] if e["name"] == STEP)
    peer = next(e for e in saved["benchmarks"] if e["name"] == "test_step[peer]")
    ratio = peer["stats"]["min"] / entry["stats"]["min"]
    assert any(f"{ratio:.2f} x" in row for row in rows)
    assert "## step, batch 16" in page
    assert "## blocks, both, batch 16 (ms)" in page
    for name in ("step.png", "blocks.png", "history.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("factor", "spread", "status"),
    [
        (1.3, 0.02, 1),  # slower by more than 10 %, beyond noise
        (1.05, 0.02, 0),  # beyond noise, but less than 10 %
        (1.3, 0.2, 0),  # more than 10 %, but the rounds are spread as widely
        (0.7, 0.02, 0),  # faster
    ],
)
def test_gate(report, storage, saved, factor, spread, status):
    storage[1]("before.json", steady(saved, 1.0, spread=spread))
    storage[1]("now.json", later(steady(saved, factor, STEP, spread=spread)))
    done = report("--fail-on", "10%")
    assert done.returncode == status, done.out + done.err
    lines = done.err.splitlines()
    assert len(lines) == status
    if status:
        assert lines[0].startswith("regression: step, batch 16, fastdcgan: ")
        assert "(+30.0%; its baselines +0.0%)" in lines[0]
        assert report().returncode == 0  # without the gate nothing fails


@pytest.mark.parametrize(("baseline", "status"), [(1.5, 0), (1.2, 0), (1.1, 1), (0.8, 1)])
def test_what_happens_to_a_baseline_is_the_machine(report, storage, saved, baseline, status):
    """Ours 30 % slower. A baseline that is slower by itself is no regression of ours either."""
    now = steady(saved, 1.3, STEP)
    peer = next(e for e in now["benchmarks"] if e["name"] == "test_step[peer]")
    for name in ("median", "q1", "q3"):
        peer["stats"][name] *= baseline
    storage[1]("now.json", later(now))
    assert report("--fail-on", "10%").returncode == status


def test_throttled_run_is_refused_and_not_compared(report, storage, saved, tmp_path):
    reasons = {"throttled": True, "throttle_reasons": ["hardware thermal slowdown"]}
    storage[1]("now.json", later(steady(saved, 1.5, STEP, **reasons)))
    done = report("--fail-on", "10%")
    assert done.returncode == 1
    assert done.err == "THROTTLED, so no good run: step, batch 16, fastdcgan\n"
    assert "not compared: step, batch 16, fastdcgan: this run was throttled (hardware" in (done.out)
    assert "**fastdcgan** (THROTTLED)" in (tmp_path / "out" / "report.md").read_text()


def test_too_few_rounds_are_not_compared(report, storage, saved):
    run = steady(saved, 2.0, STEP)
    for entry in run["benchmarks"]:
        entry["stats"]["rounds"] = 2
    storage[1]("now.json", later(run))
    done = report("--fail-on", "10%")
    assert done.returncode == 0
    assert "2 rounds, too few to know their noise" in done.out


def test_another_machine_is_not_compared(report, storage, saved):
    other = {**saved["machine_info"], "threads": 999}
    now = storage[1]("now.json", later(steady(saved, 2.0), machine_info=other))
    done = report("--fail-on", "10%")  # the first run of a machine passes, and says so
    assert done.returncode == 0
    assert "no earlier run of this hardware" in done.out
    # But a comparison that was asked for by name and cannot be made is no success.
    done = report("--run", now, "--against", storage[0] / "before.json", "--fail-on", "10%")
    assert done.returncode == 1
    assert "of another machine (threads: " in done.out
    assert "nothing could be compared" in done.err


def test_other_software_is_said_and_compared(report, storage, saved):
    other = {**saved["machine_info"], "torch": "99.0"}
    storage[1]("now.json", later(steady(saved, 2.0, STEP), machine_info=other))
    done = report("--fail-on", "10%")
    assert done.returncode == 1
    assert "other software (torch: " in done.out


def one_line(done, *parts):
    assert done.returncode == 1
    assert len(done.err.splitlines()) == 1, done.err
    for part in ("error: ", *parts):
        assert part in done.err


def test_mistakes_are_one_line(report, storage, tmp_path):
    one_line(report("--fail-on", "ten"), "--fail-on ten", "10%")
    one_line(report("--run", tmp_path / "none.json"), "none.json", "No such file")
    broken = storage[1]("broken.json", '{"machine_info": {')
    one_line(report(), "broken.json", "delete it")
    broken.write_text('{"label": 1}')
    one_line(report("--run", storage[0] / "before.json", "--against", broken), "broken.json")
    broken.unlink()
    one_line(report("--roofline", storage[0] / "before.json"), "no roofline")
    one_line(report("--storage", tmp_path / "empty"), "no saved runs", "--benchmark-autosave")


@pytest.fixture
def gpu(tmp_path):
    """A folder of runs with one in it, a README, and the command's options that name them."""
    folder, readme = tmp_path / "results" / "gpu", tmp_path / "README.md"
    (folder / "made-up").mkdir(parents=True)
    (folder / "made-up" / "summary.json").write_text(json.dumps(synthetic_gpu.summary()))
    readme.write_text((ROOT / "README.md").read_text())
    return folder, readme, ["--gpu", "--gpu-runs", folder, "--readme", readme]


def test_gpu_pages_plots_and_the_readme(command, gpu):
    folder, readme, options = gpu
    run, original = folder / "made-up", readme.read_text()
    done = command("benchmarks.report", *options)
    assert done.returncode == 0, done.stderr
    page = (run / "report.md").read_text()
    assert page.startswith(f"# A training step on {synthetic_gpu.CARD}\n")
    for name in ("steps.png", "launches-100.png", "launches-800.png"):
        assert f"({name})" in page
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    before, part = text.split(BEGIN)
    part, after = part.split(END)
    assert original.startswith(before)
    assert original.endswith(after)
    assert "No GPU has been measured" not in text
    assert f"Measured on {synthetic_gpu.CARD}, torch 2.0, 2000-01-01, by `python -m " in part
    assert "(results/gpu/made-up/report.md)" in part
    rows = [line for line in part.splitlines() if line.startswith("| training step")]
    assert rows == [
        "| training step, batch 50 |  |  | 100,000 |",
        "| training step, batch 100 | 30,303 | 181,818 | 90,909 (3.00x example, 0.50x tuned) |",
        "| training step, batch 200 |  |  | 100,000 |",
        "| training step, batch 800 |  | 181,818 | 90,909 (0.50x tuned) |",
    ]
    assert "Proof: within bounds at 100, 800." in part
    assert "Tests: 40 passed, 1 failed, 2 skipped in 60 s." in part
    # Without a run the README says so, and its other parts are as they were.
    (run / "summary.json").rename(folder.parent / "elsewhere.json")
    assert command("benchmarks.report", *options).returncode == 0
    empty, rest = readme.read_text().removeprefix(before).split(END)
    assert empty.startswith(f"{BEGIN}\n**No GPU has been measured: there is no row for one.**")
    assert rest == after


def test_a_gpu_run_with_little_in_it_has_a_page(report, gpu):
    folder, readme, options = gpu
    path = folder / "made-up" / "summary.json"
    run = synthetic_gpu.summary()
    run["items"] = {
        "machine": run["items"]["machine"],
        "steps": {"8 alone: fastdcgan --amp": {"error": "MadeUp: no"}},
    }
    path.write_text(json.dumps(run))
    done = report(*options)
    assert done.returncode == 0, done.err
    assert not list(path.parent.glob("*.png"))
    assert "Proof: none." in readme.read_text()
    run["items"]["steps"] = {
        "8 alone: fastdcgan --amp": {
            "batch": 8, "variant": "fastdcgan --amp", "in_turn": False, "median": 1e-3,
            "throttled": True,
        }
    }  # fmt: skip
    path.write_text(json.dumps(run))
    assert report(*options).returncode == 0
    assert "| training step, batch 8 |  |  | 8,000 (throttled) |" in readme.read_text()
    assert [one.name for one in path.parent.glob("*.png")] == ["steps.png"]


def test_the_readme_takes_no_rehearsal(report, gpu):
    folder, readme, options = gpu
    path, original = folder / "made-up" / "summary.json", readme.read_text()
    path.write_text(json.dumps({**synthetic_gpu.summary(), "rehearsal": True}))
    one_line(report(*options), "made-up is a rehearsal: no GPU was measured")
    one_line(report(*options[:2], path.parent, *options[3:]), "is a rehearsal")
    assert readme.read_text() == original
    assert [one.name for one in path.parent.iterdir()] == ["summary.json"]
    path.write_text("torn")
    one_line(report(*options), "made-up holds no run")
    readme.write_text("# Without a place\n")
    path.unlink()
    one_line(report(*options), "README.md has no place for the table")
    one_line(report(*options[:-1], folder / "none.md"), "cannot read", "none.md")


def test_the_readmes_part_is_that_of_the_runs_here():
    """`python -m benchmarks.report --gpu` was run since the runs or its words changed."""
    runs = gpu_runs(ROOT / "benchmarks" / "results" / "gpu")
    text = (ROOT / "README.md").read_text()
    assert with_gpu_part(text, readme_part(runs, ROOT), ROOT) == text


@pytest.mark.parametrize("module", ["benchmarks.report", "benchmarks.scaling"])
def test_help_loads_nothing_heavy(command, tmp_path, module):
    for name in ("torch", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")

    path = f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"
    done = command(module, "--help", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout
