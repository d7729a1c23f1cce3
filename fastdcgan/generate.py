"""`python -m fastdcgan.generate`: draws images from a trained generator. The options are
`GenerateConfig`'s fields."""

import sys
from collections.abc import Sequence

from fastdcgan import command
from fastdcgan.latent.config import GenerateConfig

DESCRIPTION = """Draw images from a run or any DCGAN checkpoint, ours or the PyTorch example's.

Examples:

  python -m fastdcgan.generate --from runs/000-blue-marble-dcgan64 --n 64 --out grid.png --numbered

  python -m fastdcgan.generate --from netG_epoch_24.pth --n 1000000 --out shards/%06d.tar --amp

  python -m fastdcgan.generate --from RUN --interpolate 3,17,5 --loop --scale 4 --out walk.gif

  python -m fastdcgan.generate --from RUN --arithmetic "1,2,3 - 4,5,6 + 7,8,9" --out sheet.png
"""


def _generate(args: Sequence[str]) -> None:
    config = command.parse(
        GenerateConfig, prog="python -m fastdcgan.generate", description=DESCRIPTION, args=args
    )
    config.validate()
    from fastdcgan.latent.generation import generate

    for line in generate(config):
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_generate, args)


if __name__ == "__main__":
    sys.exit(main())
