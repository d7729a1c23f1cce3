"""A command of the tests that is forked is the command that Python starts."""

import subprocess
import sys

import pytest

MODULE = """
import atexit, multiprocessing, os, sys
def work():
    print("of a process of its own", flush=True)
if __name__ == "__main__":
    atexit.register(print, "at the end")
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start(), child.join()
    print(sys.argv[1:], sys.path[0], os.getcwd(), __spec__.name, os.environ["COLUMNS"])
    sys.stdout.flush()
    print("said", file=sys.stderr)
    end = sys.argv[-1]
    if end == "killed":
        os.kill(os.getpid(), 9)
    if end == "raises":
        raise ValueError(end)
    sys.exit({"seven": 7, "text": "why"}.get(end))
"""


@pytest.mark.parametrize("end", ["well", "seven", "text", "raises", "killed"])
def test_it_prints_and_ends_as_a_process_of_its_own(command, environment, tmp_path, end):
    (tmp_path / "some.py").write_text(MODULE)
    argv = [sys.executable, "-m", "some", "an argument", end]
    alone = subprocess.run(
        argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    forked = command("some", "an argument", end, cwd=tmp_path)
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    assert forked.stderr.splitlines()[-1] == alone.stderr.splitlines()[-1]


def test_one_that_takes_too_long_is_ended_and_the_next_one_runs(command, tmp_path):
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        command("slow", cwd=tmp_path, timeout=2)
    assert ended.value.stdout == "begun\n"
    assert command("platform", cwd=tmp_path).returncode == 0
