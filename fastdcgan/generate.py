"""`python -m fastdcgan.generate`: draws images from a trained generator."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdcgan import command

DESCRIPTION = """Draw images from a run or any DCGAN checkpoint, ours or the PyTorch example's.

Examples:

  python -m fastdcgan.generate --from runs/000-blue-marble-dcgan64 --n 64 --out grid.png

  python -m fastdcgan.generate --from netG_epoch_24.pth --n 1000 --each samples/ --seed 7
"""


@dataclass(frozen=True)
class Options:
    """What to draw, and where to."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder (its last generator), a checkpoint of ours, or a generator's .safetensors or
    .pth: the best of a run with evaluations is RUN/netG_best.safetensors."""
    n: int = 64
    """How many images."""
    out: Path | None = None
    """A picture (.png, .jpg ...: one grid) or .npz (array "images", uint8, N x H x W x C)."""
    each: Path | None = None
    """A folder for one PNG per image."""
    seed: int = 0
    """Seed of the latent vectors: the same seed gives the same images."""
    truncation: float | None = None
    """Draw z with every |value| at most this: lower means more typical and less diverse."""
    statistics: Literal["running", "batch"] = "running"
    """BatchNorm by running statistics (each image for itself) or by those of its batch, as in
    training."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    force: bool = False
    """Overwrite what is there."""


def _generate(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.generate", description=DESCRIPTION, args=args
    )
    from fastdcgan.latent.draw import draw_to_files

    for line in draw_to_files(
        options.source,
        n=options.n,
        out=options.out,
        each=options.each,
        seed=options.seed,
        truncation=options.truncation,
        statistics=options.statistics,
        ema=options.ema,
        device=options.device,
        force=options.force,
    ):
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_generate, args)


if __name__ == "__main__":
    sys.exit(main())
