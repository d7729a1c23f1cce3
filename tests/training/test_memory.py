"""What a step frees stays with the process: told by the pages that the system has to give it."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from fastdcgan.training.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    tensors = [torch.ones(16 << 20) for _ in range(3)]  # 64 MB each

if sys.argv[1] == "kept":
    print(keep_freed_memory())
for _ in range(5):  # small objects find their places in between
    use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library")
def test_freed_memory_is_used_again(environment):
    counted = {}
    for how in ("given back", "kept"):
        run = subprocess.run(
            [sys.executable, "-c", COUNT, how], env=environment, capture_output=True, text=True,
            check=True, timeout=120,
        )  # fmt: skip
        *said, count = run.stdout.split()
        assert said == (["True"] if how == "kept" else [])
        counted[how] = int(count)
    # 1.9 GB are 3,600 pages of 512 KB, the largest that a system has for this, or more.
    assert counted["given back"] > 900
    assert counted["kept"] < counted["given back"] / 3
