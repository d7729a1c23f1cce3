"""`python -m fastdcgan.augment`: a balanced synthetic set for a classifier's training. The options
are `AugmentConfig`'s fields, and `TrainConfig`'s for the generators' training."""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from fastdcgan import command
from fastdcgan.synthetic_data.config import AugmentConfig, Training
from fastdcgan.training.config import PRESETS, preset

DESCRIPTION = f"""Train a generator for each class of a labelled set and draw a balanced set of new
images from them, without copies of the real images and without the worst.

Examples:

  python -m fastdcgan.augment --data photos/ --per-class 500 --out synthetic --steps 3000 \\
      --batch-size 16 --diffaugment color,translation
      photos/ has a subfolder for each class; so has synthetic/; the same command goes on after a
      stop

  python -m fastdcgan.augment --data fashion-mnist --per-class 1000 --to npz --out more \\
      --from synthetic-runs/generators/* --reject density
      draws another set from runs that are there

--preset {{{",".join(PRESETS)}}} chooses the training recipe, as in fastdcgan.train; the training
options change it.
"""

PROG = "python -m fastdcgan.augment"


def options(args: Sequence[str]) -> AugmentConfig:
    """The set that a command line asks for."""
    rest = list(args)
    recipe = preset(command.take(rest, "--preset") or "dcgan")
    required: Any = tyro.MISSING
    return command.parse(
        AugmentConfig,
        prog=PROG,
        description=DESCRIPTION,
        args=rest,
        default=AugmentConfig(required, required, training=Training(**vars(recipe))),
    )


def _augment(args: Sequence[str]) -> None:
    config = options(args)
    config.validate()
    from fastdcgan.synthetic_data.making import augment

    for line in augment(config, command=f"{PROG} {shlex.join(args)}").lines():
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_augment, args)


if __name__ == "__main__":
    sys.exit(main())
