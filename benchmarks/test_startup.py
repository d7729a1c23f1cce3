"""Start-up: how long a user waits for the help, the import, and the first training step, each in a
process of its own."""

import subprocess
import sys
from functools import partial

import pytest

from benchmarks.ours import DEVICE
from benchmarks.timing import Workload

BATCH = 16
FIRST_STEP = (
    "import torch; from benchmarks import {room} as room; "
    f"room.{{step}}(torch.device('{DEVICE}'), {BATCH}).run()"
)
# Each group: variant -> arguments of python.
GROUPS = {
    "help": {
        # The imports ahead of its argument parser, as far as they are PyTorch's.
        "pytorch example": ["-c", "import argparse, torch, torchvision"],
        "fastdcgan": ["-m", "fastdcgan.train", "--help"],
    },
    "import": {
        "import torch": ["-c", "import torch"],
        "fastdcgan": ["-c", "import fastdcgan"],
    },
    "first step": {
        "pytorch example": ["-c", FIRST_STEP.format(room="peers", step="example_step")],
        "fastdcgan": ["-c", FIRST_STEP.format(room="ours", step="step")],
    },
}


def process(arguments, environment, images):
    run = partial(
        subprocess.run,
        [sys.executable, *arguments],
        env=environment,
        check=True,
        capture_output=True,
    )
    return Workload(run, images)


@pytest.mark.parametrize(
    ("what", "variant"), [(what, variant) for what, group in GROUPS.items() for variant in group]
)
def test_startup(together, bare_environment, what, variant):
    images = BATCH if what == "first step" else None
    makers = {
        name: partial(process, arguments, bare_environment, images)
        for name, arguments in GROUPS[what].items()
    }
    # By the first steps torch is in the page cache, for which the others are warmed up.
    warm_up = 0 if what == "first step" else 1
    together("start-up,", makers, variant, rounds=3, warm_up=warm_up, what=what)
