"""The whole step under each way that a block can run, overriding the plan's choice for all blocks:
which way is fastest on this GPU, as far as one way for all can say."""

from functools import partial
from typing import get_args

from benchmarks.gpu.phase import Items, Setting
from benchmarks.gpu.phases.steps import ours, rounds
from benchmarks.timing import Workload
from fastdcgan_kernels.choice import choose
from fastdcgan_kernels.choice.types import How

WAYS = tuple(how for how in get_args(How) if how != "reference")


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    for batch in setting.size.main:
        ways = {f"{batch} {way}": way for way in WAYS[-1 if setting.rehearsal else 0 :]}
        makers = {item: partial(_workload, setting, batch, way) for item, way in ways.items()}
        rounds(
            to, setting, makers, {item: {"batch": batch, "way": way} for item, way in ways.items()}
        )


def _workload(setting: Setting, batch: int, way: How) -> Workload:
    """The workload, its first step made this way: what a graph has captured stays so. Where steps
    run eagerly, each is made this way."""
    workload = ours(setting, batch)
    step = workload.run

    def run() -> None:
        with choose.override(way):
            step()

    run()
    workload.run = run
    return workload
