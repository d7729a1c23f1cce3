"""`python -m fastdcgan.doctor`: says what this machine can do, and proves it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastdcgan import command
from fastdcgan.errors import RunError

DESCRIPTION = """Say what this machine can do, and prove it: devices, versions, number formats, what
training would run, every fused block against float64, whole steps, compilers, data, timings.

Every line has a verdict: ok, warning, failed, or not possible here. The exit status is 1 if a line
failed. The first run on a GPU also compiles the kernels, and so takes longer than later ones.

Examples:

  python -m fastdcgan.doctor --quick

  python -m fastdcgan.doctor --device cuda:1 --json > doctor.json
"""


@dataclass(frozen=True)
class Options:
    """What to examine."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    quick: bool = False
    """Leave out the timings."""
    json: bool = False
    """Print one JSON object and nothing else."""


def _doctor(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.doctor", description=DESCRIPTION, args=args
    )
    start = time.perf_counter()
    from fastdcgan.hardware import pick_device

    device = pick_device(options.device)
    from fastdcgan.diagnosis import examine
    from fastdcgan.diagnosis.report import failures, print_tables, to_json

    sections = examine(device, quick=options.quick)
    if options.json:
        found = list(sections)
        print(to_json(found, device=str(device), seconds=time.perf_counter() - start))
    else:
        found = print_tables(sections)
    failed = failures(found)
    if failed:
        raise RunError(f"failed: {', '.join(failed)}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_doctor, args)


if __name__ == "__main__":
    sys.exit(main())
