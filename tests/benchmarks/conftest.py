"""Benchmarks of trivial functions, run by the real plugin through the real fixtures."""

import subprocess
import sys

import pytest

MINI = '''
"""Two groups: three functions that sleep, and three that cannot be timed."""
import time

import pytest
from benchmarks.timing import Unavailable, Workload

ORDER = []


def sleeper(name, seconds):
    def run():
        ORDER.append(name)
        time.sleep(seconds)

    return lambda: Workload(run, images=16)


SLEEPERS = {
    "peer": sleeper("peer", 0.004),
    "fastdcgan": sleeper("fastdcgan", 0.002),
    "fastdcgan --amp": sleeper("fastdcgan --amp", 0.001),
}


@pytest.mark.parametrize("variant", SLEEPERS)
def test_step(together, benchmark, groups, variant):
    together("step", SLEEPERS, variant, rounds=5, warm_up=1, batch=16)
    seconds = groups["step, batch 16"][variant].seconds
    assert benchmark.stats.stats.data == seconds  # what is saved is what was measured
    assert min(seconds) >= {"peer": 0.004, "fastdcgan": 0.002}.get(variant, 0.001)
    warm_up, rounds = ORDER[:3], ORDER[3:]
    assert warm_up == list(SLEEPERS)
    assert rounds == 5 * list(SLEEPERS)  # in turn


def unavailable():
    raise Unavailable("there is no such library here")


def broken():
    raise ZeroDivisionError("of its own")


@pytest.mark.parametrize("variant", ["missing", "broken", "fine"])
def test_failing(together, variant):
    makers = {"missing": unavailable, "broken": broken, "fine": sleeper("fine", 0.001)}
    together("failing", makers, variant, rounds=3, warm_up=0)


@pytest.mark.parametrize("block", ["G1", "D1"])
@pytest.mark.parametrize("variant", SLEEPERS)
def test_block(together, block, variant):
    together("block", SLEEPERS, variant, rounds=3, block=block, mode="both", batch=16)
'''


@pytest.fixture(scope="session")
def measured(environment):
    """measured(folder, text, *arguments): runs the benchmarks in the text there, and saves them."""
    # Not as a part of this run: its workers and its coverage are told of in the environment.
    alone = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COV"))}

    def run(folder, text, *arguments):
        (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
        (folder / "test_mini.py").write_text(text)
        always = ["--benchmark-only", "--benchmark-autosave", "-p", "no:cacheprovider", "-ra"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "test_mini.py", *always, *arguments],
            cwd=folder,
            env=alone,
            timeout=300,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def mini(measured, tmp_path_factory):
    """What pytest printed, and the folder of saved runs with one in it."""
    folder = tmp_path_factory.mktemp("mini")
    done = measured(folder, MINI)
    assert done.stdout, done.stderr
    return done.stdout, folder / ".benchmarks"
