"""`python -m fastdcgan.evaluate`: scores generated images beside real ones."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdcgan import command

DESCRIPTION = """Score a run, a generator's file or any images beside real ones: FID, KID, Inception
Score, precision, recall, density, coverage, the distance of the spectra and the peak of a grid,
each beside what other real images score.

Examples:

  python -m fastdcgan.evaluate --real blue-marble --fake runs/000-blue-marble-dcgan64

  python -m fastdcgan.evaluate --real photos/ --fake samples.npz --n 5000 --json
"""


@dataclass(frozen=True)
class Options:
    """What to score, and by what."""

    real: str
    """The real images: a source as for training (blue-marble, fashion-mnist, a folder, ...)."""
    fake: str
    """A run's folder (its last generator), a generator's .safetensors (RUN/netG_best.safetensors)
    or .pth, or images (folder, zip, .npz, ...)."""
    n: int = 10_000
    """Images of each set, at most half of the real images: the floor takes as many others."""
    features: str = "lite0"
    """lite0, inception:FILE (the published FID's network with your copy of its weights), or a
    TorchScript file."""
    image_size: int | None = None
    """Pixels on a side where the fakes are files; by default what the first of them has."""
    split: Literal["train", "test"] = "train"
    """Which part of the real images, where there are two."""
    seed: int = 0
    """Seed of the latent vectors, or of the choice among more fakes than --n."""
    statistics: Literal["running", "batch"] = "running"
    """The generator's BatchNorm by running statistics or by those of its batch."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    neighbours: Path | None = None
    """Write a picture: samples, each beside its nearest real images."""
    probe: str | None = None
    """A labelled source (fashion-mnist, a folder of classes): also report how well the features of
    the run's discriminator tell its classes apart."""
    modes: bool = False
    """Also count the modes of stacked-mnist that the fakes show, by a classifier that is trained
    first, in a minute (extra `digits`)."""
    json: bool = False
    """Print one JSON object and nothing else."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache: Path | None = None
    """Where packed images and their features are kept; by default $FASTDCGAN_CACHE or the user's
    cache folder."""


def _evaluate(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.evaluate", description=DESCRIPTION, args=args
    )
    from fastdcgan.metrics import evaluate

    report = evaluate(
        options.real,
        options.fake,
        n=options.n,
        features=options.features,
        image_size=options.image_size,
        split=options.split,
        seed=options.seed,
        statistics=options.statistics,
        ema=options.ema,
        neighbours=options.neighbours,
        probe=options.probe,
        modes=options.modes,
        device=options.device,
        cache=options.cache,
    )
    if options.json:
        print(report.to_json())
    else:
        for line in report.lines():
            print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_evaluate, args)


if __name__ == "__main__":
    sys.exit(main())
