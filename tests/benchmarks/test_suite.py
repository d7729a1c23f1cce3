"""The benchmarks themselves run, each once and untimed, as from a bare checkout."""

import subprocess
import sys
from pathlib import Path

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
