"""A command of the tests that is forked is the command that Python starts."""

import signal
import subprocess
import sys
import time

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


def test_it_finds_pytorch_imported(command, tmp_path):
    (tmp_path / "seen.py").write_text("import sys; print('torch._dynamo' in sys.modules)")
    assert command("seen", cwd=tmp_path).stdout == "True\n"


def test_one_that_takes_too_long_is_ended_and_the_next_one_runs(command, tmp_path):
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        command("slow", cwd=tmp_path, timeout=2)
    assert ended.value.stdout == "begun\n"
    assert command("platform", cwd=tmp_path).returncode == 0


def test_what_is_started_runs_beside_others_and_takes_signals(command, start, tmp_path):
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    first, second = (start("slow", cwd=tmp_path) for _ in range(2))
    assert command("platform", cwd=tmp_path).returncode == 0, "and it has an end before they have"
    assert first.poll() is second.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.1)
    second.kill()
    assert command("platform", cwd=tmp_path).returncode == 0, "its own end, not the killed one's"
    assert (second.wait(10), first.poll()) == (-9, None)
    while not (first.files[0].exists() and first.files[0].read_text()):
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    printed, errors = first.communicate(10)
    assert first.returncode == first.poll() == -signal.SIGINT
    assert (printed, errors.splitlines()[-1]) == ("begun\n", "KeyboardInterrupt")
    first.kill()  # which has ended: nothing is sent
