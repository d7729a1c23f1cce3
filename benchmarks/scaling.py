"""`python -m benchmarks.scaling`: how training scales over processes. Weak scaling is measured
(torchrun, gloo, one thread a process: every process keeps its batch), and for links of GPUs the
cost of the all-reduce is predicted by formula. docs/scaling.md says what both mean."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fastdcgan import command
from fastdcgan.data.picture import atomic_write
from fastdcgan.errors import InputError, RunError

DESCRIPTION = """Measure weak scaling on this machine's CPU, and predict it for GPUs.

Examples:

  python -m benchmarks.scaling

  python -m benchmarks.scaling --predict
      prints the predicted table only
"""
WARM_UP = 2

# How GPUs are linked: name, how many of them, and bytes a second that one can send while it
# receives as many, by data sheets (half of what those give for both directions together).
LINKS = (
    ("NVLink 4 in one machine (H100 SXM, 900 GB/s both ways)", 8, 450e9),
    ("PCIe 5.0 x16 in one machine (H100 PCIe, 128 GB/s both ways)", 8, 64e9),
    ("InfiniBand NDR, 400 Gbit/s a GPU (DGX H100)", 64, 50e9),
    ("Ethernet, 100 Gbit/s a GPU", 64, 12.5e9),
)
FLOP_PER_IMAGE = 2274e6
"""Of one step at 64x64, with nothing wasted."""
FLOPS = 798e12
"""A second, bf16 products of an H100, as measured on one: a step takes at least what they take."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    batch_size: int = 16
    """Images per process."""
    steps: int = 8
    """Timed in each launch, after two that are not."""
    repeats: int = 3
    """Launches of each number of processes, in turn."""
    predict: bool = False
    """Print the predictions for GPUs only."""
    out: Path | None = None
    """A Markdown file to write the same to, with the command and the machine."""


@dataclass
class Reduced:
    """What the all-reduces moved, and what they cost this process."""

    bytes: int = 0
    waited: float = 0.0
    """Seconds until the last process came."""
    seconds: float = 0.0
    """From then on."""


@dataclass
class Launches:
    """Steps of all launches with one number of processes, as its first process saw them."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    reduced: list[float] = field(default_factory=list)


@contextmanager
def counted() -> Iterator[Reduced]:
    """Counts every torch.distributed.all_reduce meanwhile. A barrier ahead of each tells waiting
    from reducing."""
    import torch.distributed as dist

    counts, original = Reduced(), dist.all_reduce

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        dist.barrier()
        here = time.perf_counter()
        result = original(tensor, *args, **kwargs)
        counts.seconds += time.perf_counter() - here
        counts.waited += here - start
        counts.bytes += tensor.numel() * tensor.element_size()
        return result

    dist.all_reduce = all_reduce
    try:
        yield counts
    finally:
        dist.all_reduce = original


def rank(options: Options) -> None:
    """One process of a launch: trains, and the first one prints its steps as a line of JSON."""
    import torch

    from fastdcgan.training import distributed
    from fastdcgan.training.config import TrainConfig
    from fastdcgan.training.state import TrainState
    from fastdcgan.training.step import Step

    ranks, device = distributed.ranks_from_environment(), torch.device("cpu")
    distributed.join(ranks, device)
    B = options.batch_size
    state = TrainState(TrainConfig(channels=3, batch_size=B), device)
    step = Step(state, batch_size=B)
    images = torch.rand(B, 64, 64, 3).mul_(2).sub_(1).permute(0, 3, 1, 2)
    launch = Launches()
    for n in range(WARM_UP + options.steps):
        with counted() as counts:
            start = time.perf_counter()
            z = torch.randn(B, state.config.nz, 1, 1, generator=state.generator)
            step(images, z, share=1 / ranks.world)
            seconds = time.perf_counter() - start
        if n >= WARM_UP:
            launch.seconds.append(seconds)
            launch.bytes.append(counts.bytes)
            launch.waited.append(counts.waited)
            launch.reduced.append(counts.seconds)
    if ranks.writes:
        print(json.dumps(vars(launch)), flush=True)
    distributed.leave()


def measure(options: Options) -> dict[int, Launches]:
    """Launches torchrun with each number of processes, in turn, `repeats` times."""
    arguments = ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }
    found = {n: Launches() for n in options.ranks}
    for _ in range(options.repeats):
        for n, launches in found.items():
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
            done = subprocess.run(
                [sys.executable, "-m", *torchrun, "-m", "benchmarks.scaling", *arguments],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RunError(f"torchrun with {n} processes failed:\n{done.stderr[-2000:]}")
            steps = json.loads(done.stdout.splitlines()[-1])
            for name, values in steps.items():
                getattr(launches, name).extend(values)
    return found


def table(found: dict[int, Launches], batch: int) -> list[str]:
    """The measurements in Markdown. Efficiency is against the fewest processes measured."""
    lines = [
        "| processes | images/s per process | images/s | efficiency | all-reduced per step, bytes "
        "| waiting for others | all-reduce |",
        "|---|---|---|---|---|---|---|",
    ]
    fewest = batch / median(found[min(found)].seconds)
    for n, launches in found.items():
        step = median(launches.seconds)
        rate = batch / step
        waited, reduced = (median(part) / step for part in (launches.waited, launches.reduced))
        lines.append(
            f"| {n} | {rate:.1f} | {n * rate:.1f} | {rate / fewest:.0%} "
            f"| {median(launches.bytes):,.0f} | {waited:.1%} of the step | {reduced:.1%} |"
        )
    return lines


def ring_seconds(bytes: float, n: int, bandwidth: float) -> float:
    """Of a ring all-reduce among n devices: each sends 2 (n-1)/n of the bytes (reduce-scatter, then
    all-gather), at `bandwidth` bytes a second. Latency is left out."""
    return 2 * (n - 1) / n * bytes / bandwidth


def predictions(bytes: float) -> list[str]:
    """The predicted table in Markdown, for a step that runs at the products' own speed."""
    lines = [
        "| link of each GPU | GPUs | all-reduce | efficiency at batch 128 | at 512 | at 1024 "
        "| batch for 90 % |",
        "|---|---|---|---|---|---|---|",
    ]
    image = FLOP_PER_IMAGE / FLOPS
    for link, n, bandwidth in LINKS:
        seconds = ring_seconds(bytes, n, bandwidth)
        shares = (f"{B * image / (B * image + seconds):.0%}" for B in (128, 512, 1024))
        lines.append(
            f"| {link} | {n} | {seconds * 1e3:.2f} ms | {' | '.join(shares)} "
            f"| {9 * seconds / image:,.0f} |"
        )
    return lines


def gradient_bytes() -> int:
    """Of both nets at 64x64, in float32."""
    import torch

    from fastdcgan import models

    with torch.device("meta"):
        nets = models.build("dcgan", size=64, nz=100, ngf=64, ndf=64, channels=3)
    return sum(p.numel() * 4 for net in nets for p in net.parameters())


def _scaling(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m benchmarks.scaling", description=DESCRIPTION, args=args
    )
    for name in ("batch_size", "steps", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not options.ranks or min(options.ranks) < 1:
        raise InputError(f"--ranks {options.ranks} was given; give numbers of processes")
    if "RANK" in os.environ:  # we are one of torchrun's
        rank(options)
        return
    page = []
    if not options.predict:
        page += [f"Measured, batch {options.batch_size} per process, 1 thread each:", ""]
        page += [*table(measure(options), options.batch_size), ""]
    page += [f"Predicted, {gradient_bytes():,} bytes of gradients per step:", ""]
    page += predictions(gradient_bytes())
    print(*page, sep="\n")
    if options.out is not None:
        from benchmarks.parity import machine

        given = " ".join(args)
        head = ["# Scaling", "", f"By `python -m benchmarks.scaling {given}`. {machine()}.", ""]
        text = "\n".join([*head, *page, ""])
        atomic_write(options.out, lambda file: file.write(text.encode()))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_scaling, args)


if __name__ == "__main__":
    sys.exit(main())
