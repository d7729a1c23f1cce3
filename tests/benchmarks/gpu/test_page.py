"""The page of a GPU run and its lines for the screen, of a made-up run: what they say, and that no
missing fact stops them."""

import copy
import json
import subprocess
import sys

import pytest

from benchmarks import report
from benchmarks.gpu import page
from fastdcgan.errors import InputError
from tests.benchmarks import synthetic_gpu


@pytest.fixture
def summary():
    return synthetic_gpu.summary()


def table(text, title):
    """Cells of the rows of the first table below a heading."""
    lines = text.split(f"{title}\n", 1)[1].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| --"))
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_ratios_are_of_what_was_measured_in_turn(summary):
    for batch in (100, 200):
        summary["items"]["steps"][f"{batch} alone: pytorch tuned"] = {
            "batch": batch, "variant": "pytorch tuned", "ours": False, "in_turn": False,
            **synthetic_gpu.timed(batch, 0.1),
        }  # fmt: skip
    rows = [row[:6] for row in table(page.document(summary), "## Images per second")]
    assert ["100", "in turn", "**fastdcgan --amp**", "1.100 (1.045 to 1.155)", "90,909", ""] in rows
    assert ["100", "in turn", "pytorch tuned", "0.550 (0.522 to 0.578)", "181,818", "0.50"] in rows
    assert ["100", "in turn", "pytorch example", "3.300 (3.135 to 3.465)", "30,303", "3.00"] in rows
    assert {row[5] for row in rows if row[1] == "alone"} == {""}
    assert page.speedups(summary) == {
        100: {"pytorch tuned": pytest.approx(0.5), "pytorch example": pytest.approx(3)},
        800: {"pytorch tuned": pytest.approx(0.5)},
    }
    assert page.rates(summary) == pytest.approx({50: 1e5, 100: 1e5 / 1.1, 200: 1e5, 800: 1e5 / 1.1})


def test_ours_with_a_switch_turned_is_no_baseline(summary):
    """It has its row and its ratio, and stands not among what ours is faster than."""
    before = page._speed_lines(summary)
    for variant, seconds in ((page.IN_ONE_STREAM, 2e-3),):
        summary["items"]["steps"][f"100 in turn: {variant}"] = {
            "batch": 100, "variant": variant, "ours": False, "in_turn": True,
            **synthetic_gpu.timed(100, seconds),
        }  # fmt: skip
    assert page._speed_lines(summary) == before
    assert {page.IN_ONE_STREAM} < page.speedups(summary)[100].keys()
    rows = {row[2]: row for row in table(page.document(summary), "## Images per second")}
    assert rows[page.IN_ONE_STREAM][1] == "in turn"
    text = report._readme_of(summary, "folder")
    assert "example" in text
    assert "launches" not in text
    assert "overlap" not in text


def test_a_throttled_step_is_marked(summary):
    facts = summary["items"]["steps"]["100 in turn: pytorch tuned"]
    facts |= {"throttled": True, "throttle_reasons": ["made-up heat"]}
    rows = table(page.document(summary), "## Images per second")
    assert [row[2] for row in rows if row[-1] == "THROTTLED made-up heat"] == ["pytorch tuned"]


def test_launches_are_sorted_by_the_time_that_they_lose(summary):
    rows = summary["items"]["profile"]["100"]["rows"]
    worst = synthetic_gpu.row("D3", "weight gradient", "slow", 1e-4, 2e-5)
    rows.insert(7, {**worst, "predicted_seconds": 5e-5})
    text = page.document(summary)
    found = table(text.replace("| us lost", "# lost\n| us lost", 1), "# lost")
    assert found[0] == [
        "80.0", "D3", "weight gradient", "slow", "64x64x64 4w3s", "100.0", "25", "10", "20%", "50.0"
    ]  # fmt: skip
    lost = [float(row[0]) for row in found]
    assert lost == sorted(lost, reverse=True)
    assert len(found) == page.ROWS
    every = sum(row["seconds"] - row["floor_seconds"] for row in rows) * 1e6
    assert f"3 other launches lose {every - sum(lost):.1f} us." in text
    kinds = {row[0]: row[1:4] for row in table(text, "## Where the time goes, batch 100")}
    assert kinds["weight gradient"] == ["11", "400.0", f"{400 / 782:.0%}"]
    assert "gaps are 50.0 us" in text
    assert "| `at::made_up<float>` | 2 | 10.0 |" in text


def test_engines_stand_beside_cudnn_and_one_that_hung_is_a_failure(summary):
    summary["items"]["engines"]["D3 forward: 32x32"] = {
        **synthetic_gpu.engine("gluon"), "wrong": "hung: it had 20 s to run", "debugger": "no warps"
    }  # fmt: skip
    text = page.document(summary)
    assert table(text, "## Engines") == [
        ["D3", "forward", "gluon", "64x64", "20.0", "30.0", "1.5", "right"],
        ["D3", "forward", "descriptors", "64x64", "-", "-", "-", "gather_pointers ran"],
        ["D3", "forward", "gluon", "64x64", "-", "-", "-", "hung: it had 20 s to run"],
    ]
    assert "- D3 forward: 32x32: no warps" in text
    assert "engines, D3 forward: 32x32: hung: it had 20 s to run" in page.failures(summary)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradients": {"error": 0.3, "allowed": 0.2}}, "gradients 0.3 of 0.2"),
        ({"gradients": {"error": float("nan"), "allowed": 0.2}}, "gradients - of 0.2"),
        ({"blocks": {"largest": 0.5, "allowed": 0.1, "where": "D4"}}, "blocks 0.5 of 0.1 at D4"),
        ({"graph": {"error": None, "allowed": 0.1}}, "graph - of 0.1"),
        ({"update": {"wrong": ["G1.weight"]}}, "update of G1.weight"),
    ],
)
def test_a_proof_beyond_a_bound_fails(summary, change, said):
    assert "proof: within bounds at 100, 800" in page.screen(summary)
    summary["items"]["proof"]["800"]["figures"] |= change
    text = page.document(summary)
    verdicts = {row[0]: row[-1] for row in table(text, "## Proof")}
    assert verdicts == {"100": "within its bounds", "800": said}
    assert f"proof: FAILED at 800: {said}" in page.screen(summary)
    assert f"- proof, 800: {said}" in text


def test_what_the_step_said_is_a_failed_proof(summary):
    summary["items"]["proof"]["100"] |= {"said": ["goes on without its graph"], "graphed": False}
    assert page.wrong(summary["items"]["proof"]["100"]) == ["goes on without its graph"]


def test_the_screen_has_nine_lines(summary):
    lines = page.screen(summary)
    assert len(lines) == 9
    assert lines[0].startswith(synthetic_gpu.CARD)
    assert lines[2] == "tests: 40 passed, 1 failed, 2 skipped in 60 s"
    assert "90,909 at 100" in lines[3]
    assert "0.50 of tuned and 3.00 of example at 100; 0.50 of tuned at 800" in lines[4]
    assert all("weight gradient" in line for line in lines[5:8])
    assert lines[8] == "failed: test test_made_up: MadeUp: 1 (and 1 more)"
    summary["phases"]["profile"] |= {"state": "timed out", "why": "word " * 100}
    summary["items"]["machine"]["card"]["name"] = "X" * 200
    summary["items"]["steps"] = {
        "a": {"error": "OutOfMemoryError: " + "much " * 100},
    }
    lines = page.screen(summary)
    assert len(lines) == 9
    assert max(map(len, lines)) <= page.WIDTH
    assert "profile timed out" in lines[8]
    assert "images/s of ours: not measured" in lines


def test_errors_and_phases_are_told(summary):
    summary["items"]["steps"]["800 in turn: pytorch tuned"] = {"error": "OutOfMemoryError: made up"}
    summary["phases"]["tiles"] = {
        "state": "killed", "seconds": 3.0, "why": "SIGKILL", "log": "first\nlast words"
    }  # fmt: skip
    del summary["phases"]["counters"]
    text = page.document(summary)
    assert "- steps, 800 in turn: pytorch tuned: OutOfMemoryError: made up" in text
    assert "- compile, default 100: gather 8x8x8: MadeUp: no" in text
    assert ["tiles", "killed", "3", "SIGKILL"] in table(text, "## Phases")
    assert ["counters", "not run", "-", ""] in table(text, "## Phases")
    assert "last words" in text
    assert page.speedups(summary)[800] == {}


def test_a_rehearsal_says_so_first(summary):
    summary["rehearsal"] = True
    assert "no GPU was measured" in page.document(summary).splitlines()[0]
    assert "no GPU was measured" in page.screen(summary)[0]


def places(node, path=()):
    """Paths of everything in a summary; of long lists, of their first two."""
    children = {}
    if isinstance(node, dict):
        children = node
    elif isinstance(node, list):
        children = dict(enumerate(node[:2]))
    for name, child in children.items():
        yield (*path, name)
        yield from places(child, (*path, name))


@pytest.mark.parametrize("value", [None, {"error": "MadeUp: gone"}, "gone"], ids=str)
def test_no_missing_fact_stops_the_page(summary, value):
    """Each fact by itself is null, missing, or, where an item was, an error."""
    del summary["items"]["profile"]["800"], summary["items"]["profile"]["100"]["rows"][3:]
    every = list(places(summary))
    assert len(every) > 300
    for path in every:
        broken = copy.deepcopy(summary)
        inside = broken
        for name in path[:-1]:
            inside = inside[name]
        if value == "gone":
            del inside[path[-1]]
        elif value is None or (len(path) == 3 and path[0] == "items"):
            inside[path[-1]] = value
        assert page.document(broken).startswith("# A ")
        assert 5 <= len(page.screen(broken)) <= 9


def test_an_empty_run_has_a_page():
    bare = {"phases": {}, "items": {}}
    assert "Not measured: phase steps not run." in page.document(bare)
    assert "images/s of ours: not measured" in page.screen(bare)


def test_a_folder_is_read_from_either_file(summary, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert page.load(tmp_path) == page.known(summary)
    lines = [
        {"phase": "steps", "state": "started", "at": "2000-01-01T00:00:01+00:00"},
        {"phase": "steps", "item": "a", "batch": 1, "at": "2000-01-01T00:00:03+00:00"},
        {"phase": "steps", "item": "a", "batch": 2, "at": "2000-01-01T00:00:02+00:00"},
        {"phase": "tiles", "state": "done", "seconds": 1.0},
    ]
    (tmp_path / "items.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '[1]\n{"phase": "steps", "item": "b"'
    )
    newer = page.load(tmp_path)  # a call after the one that wrote the summary, and was killed
    assert newer["items"]["steps"]["a"]["batch"] == 2
    assert newer["phases"]["steps"]["state"] == "started"
    assert newer["commit"] == summary["commit"]
    assert newer["items"]["proof"] == page.known(summary["items"]["proof"])
    (tmp_path / "summary.json").write_text('{"made_by": "pyth')
    alone = page.load(tmp_path)
    assert list(alone["items"]["steps"]) == ["a"]
    assert alone["when"] == "2000-01-01T00:00:03+00:00"
    assert "made_by" not in alone
    assert alone["rehearsal"] is False
    assert "steps did not end" in page.screen(alone)[-1]
    with (tmp_path / "items.jsonl").open("a") as file:
        again = {"phase": "steps", "state": "started", "anew": True, "rehearsal": True}
        file.write("\n" + json.dumps(again) + "\n")
    assert "steps" not in page.load(tmp_path)["items"]
    assert page.load(tmp_path)["rehearsal"] is True


def test_a_folder_without_a_run_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="holds no run") as caught:
            page.load(folder)
        assert "\n" not in str(caught.value)


def test_the_page_loads_nothing_heavy(environment):
    heavy = ("torch", "tyro", "matplotlib", "numpy")
    check = f"import sys, benchmarks.gpu.page; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
