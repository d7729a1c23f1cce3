"""The driver of `python -m benchmarks.gpu`: what a phase that fails, hangs or is killed costs, and
what is left of a run that was cut off. The phases here are modules that each test writes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.gpu import driver
from benchmarks.gpu.driver import Phase
from fastdcgan.errors import InputError

SOUND = """
    def measure(to, setting):
        for name in ("a", "b"):
            if to.wants(name):
                to.put(name, value=1.5, rehearsal=setting.rehearsal)
"""
RAISES = """
    def measure(to, setting):
        to.put("before", value=1)
        with to.item("an item that raises"):
            raise ValueError("of an item")
        to.put("after", value=2)
        raise RuntimeError("of the phase")
"""
HANGS = """
    import subprocess, sys, time
    def measure(to, setting):
        to.put("before", value=1)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        to.put("child", pid=child.pid)
        time.sleep(600)
"""
KILLS_ITSELF = """
    import os, signal
    def measure(to, setting):
        to.put("before", value=1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def phase(tmp_path, monkeypatch):
    """phase(name, source, limit=60): a phase whose module has this source."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(name, source, limit=60.0):
        (folder / f"phase_{name}.py").write_text(textwrap.dedent(source))
        return Phase(name, f"phase_{name}", limit)

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here imports torch, or runs in the interpreter."""
    monkeypatch.setattr(driver, "COLD_SECONDS", 0.0)
    monkeypatch.setattr(driver, "REHEARSAL_TIMES", 1.0)


@pytest.fixture
def run(tmp_path):
    """run(*phases, **options): the summary of a rehearsal, and what was said."""
    said = []

    def call(*phases, **options):
        out = options.pop("out", tmp_path / "out")
        summary = driver.run(out, phases=phases, rehearse=True, say=said.append, **options)
        return summary, said

    return call


def is_gone(pid):
    """Whether a process ends within five seconds. (A container may leave it a zombie.)"""
    for _ in range(50):
        try:
            if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_each_item_is_kept_with_its_facts(phase, run, tmp_path):
    summary, _ = run(phase("sound", SOUND))
    assert summary["phases"]["sound"]["state"] == "done"
    assert {name: facts["value"] for name, facts in summary["items"]["sound"].items()} == {
        "a": 1.5, "b": 1.5
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["items"] == summary["items"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").open()]
    assert [row["item"] for row in rows if "item" in row] == ["a", "b"]


def test_a_phase_that_raises_costs_itself_alone(phase, run):
    summary, said = run(phase("raises", RAISES), phase("sound", SOUND))
    state = summary["phases"]["raises"]
    assert (state["state"], state["why"]) == ("failed", "RuntimeError: of the phase")
    assert "Traceback" in state["log"]
    assert str(driver.ROOT) not in json.dumps(summary)
    assert list(summary["items"]["raises"]) == ["before", "an item that raises", "after"]
    assert summary["items"]["raises"]["an item that raises"]["error"] == "ValueError: of an item"
    assert summary["phases"]["sound"]["state"] == "done"
    assert any("raises: failed" in line and "of the phase" in line for line in said)


def test_a_phase_that_hangs_is_ended_at_its_limit_with_all_it_started(phase, run):
    start = time.monotonic()
    summary, _ = run(phase("hangs", HANGS, limit=4), phase("sound", SOUND))
    assert time.monotonic() - start < 30
    assert summary["phases"]["hangs"]["state"] == "timed out"
    assert summary["items"]["hangs"]["before"]["value"] == 1
    assert summary["phases"]["sound"]["state"] == "done"
    assert is_gone(summary["items"]["hangs"]["child"]["pid"])


def test_a_phase_that_is_killed_is_said_to_be(phase, run):
    summary, _ = run(phase("killed", KILLS_ITSELF), phase("sound", SOUND))
    state = summary["phases"]["killed"]
    assert (state["state"], state["why"]) == ("killed", "SIGKILL")
    assert summary["items"]["killed"]["before"]["value"] == 1
    assert summary["phases"]["sound"]["state"] == "done"


def test_a_full_disk_costs_no_measurement(phase, run, tmp_path):
    """/dev/full is a file on a disk that is full; here it becomes so during a phase."""
    fills = """
        def measure(to, setting):
            (setting.out / "items.jsonl").unlink()
            (setting.out / "items.jsonl").symlink_to("/dev/full")
            for name in ("a", "b"):
                to.put(name, value=1.5)
    """
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").symlink_to("/dev/full")
    summary, said = run(phase("fills", fills), phase("sound", SOUND))
    assert list(summary["items"]["fills"]) == list(summary["items"]["sound"]) == ["a", "b"]
    assert summary["problem"] == f"cannot write {out / 'items.jsonl'}: No space left on device"
    assert sum("No space left" in line for line in said) == 1


def test_a_second_call_goes_on_where_the_first_ended(phase, run):
    """What is done is left; what was cut off measures the items that it lacks; those that raised
    are tried again."""
    cut = """
        import os, signal
        def measure(to, setting):
            for name in ("a", "b", "c"):
                if to.wants(name):
                    with to.item(name) as facts:
                        if name == "a" and not os.path.exists(setting.out / "again"):
                            raise ValueError("once")
                        if name == "c" and not os.path.exists(setting.out / "again"):
                            (setting.out / "again").touch()
                            os.kill(os.getpid(), signal.SIGKILL)
                        facts["process"] = os.getpid()
    """
    phases = phase("sound", SOUND), phase("cut", cut)
    first, _ = run(*phases)
    assert first["phases"]["cut"]["state"] == "killed"
    kept = {name: dict(facts) for name, facts in first["items"]["sound"].items()}
    b = first["items"]["cut"]["b"]["process"]
    second, said = run(*phases)
    assert "sound: measured before" in said
    assert second["items"]["sound"] == kept
    assert second["phases"]["cut"]["state"] == "done"
    found = {name: facts["process"] for name, facts in second["items"]["cut"].items()}
    assert found["b"] == b
    assert found["a"] == found["c"] != b


def test_a_phase_that_is_asked_for_is_measured_anew(phase, run):
    once = """
        import os
        def measure(to, setting):
            to.put(str(os.getpid()), value=1)
    """
    phases = phase("once", once), phase("sound", SOUND)
    first, _ = run(*phases)
    second, _ = run(*phases, only=["once"])
    assert len(second["items"]["once"]) == 1
    assert second["items"]["once"].keys() != first["items"]["once"].keys()
    assert second["items"]["sound"] == first["items"]["sound"]


def test_an_unknown_phase_is_one_line(phase, run):
    with pytest.raises(InputError, match="--only nonsense was given; phases are sound"):
        run(phase("sound", SOUND), only=["nonsense"])


def test_a_torn_line_costs_itself(phase, run, tmp_path):
    run(phase("sound", SOUND))
    with (tmp_path / "out" / "items.jsonl").open("a") as file:
        file.write('{"phase": "sound", "item": "torn", "val')
    summary, _ = run(phase("sound", SOUND))
    assert list(summary["items"]["sound"]) == ["a", "b"]


def test_out_of_time_later_phases_are_not_reached(phase, run):
    slow = phase("slow", "import time\ndef measure(to, setting):\n    time.sleep(600)")
    summary, _ = run(slow, phase("sound", SOUND), minutes=4 / 60)
    assert summary["phases"]["slow"]["state"] == "timed out"
    assert summary["phases"]["sound"] | {"at": ""} == {
        "state": "not reached", "seconds": 0.0, "why": "out of time", "log": None,
        "rehearsal": True, "at": "",
    }  # fmt: skip


def test_a_card_and_a_rehearsal_share_no_folder(phase, run, tmp_path):
    run(phase("sound", SOUND))
    with pytest.raises(InputError, match="it holds a rehearsal: give another folder"):
        driver.run(tmp_path / "out", phases=[], rehearse=False)


def test_what_a_phase_prints_is_its_log_and_no_item(phase, run):
    noisy = """
        import os, sys
        def measure(to, setting):
            print('{"item": "printed"}')
            os.system("echo from a child")
            to.put("real", value=1)
            sys.exit(3)
    """
    summary, _ = run(phase("noisy", noisy))
    assert list(summary["items"]["noisy"]) == ["real"]
    assert summary["phases"]["noisy"]["state"] == "failed"
    assert "from a child" in summary["phases"]["noisy"]["log"]


def test_ctrl_c_ends_the_phase_and_keeps_what_was_measured(phase, tmp_path):
    """In a process of its own, as a user's terminal would send it."""
    hangs = phase("hangs", HANGS)
    out = tmp_path / "out"
    program = (
        "from pathlib import Path; from benchmarks.gpu import driver; "
        f"driver.run(Path({str(out)!r}), rehearse=True, "
        f"phases=[driver.Phase('hangs', {hangs.module!r}, 60.0)])"
    )
    paths = [str(driver.ROOT), str(driver.ROOT / "kernels"), os.environ["PYTHONPATH"]]
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
    )
    for _ in range(200):
        time.sleep(0.1)
        if (out / "items.jsonl").exists() and "child" in (out / "items.jsonl").read_text():
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["phases"]["hangs"]["why"] == "Ctrl-C"
    assert is_gone(summary["items"]["hangs"]["child"]["pid"])
