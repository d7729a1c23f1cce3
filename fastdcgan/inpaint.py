"""`python -m fastdcgan.inpaint`: fills hidden parts of images with a trained generator."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdcgan import command

DESCRIPTION = """Hide a part of each image and let the generator of a run fill it (Yeh et al. 2017);
say how near that comes to what was hidden, beside fills that need no generator.

Examples:

  python -m fastdcgan.inpaint --from runs/000-blue-marble-dcgan64 --images blue-marble \\
      --mask center --sheet filled.png

  python -m fastdcgan.inpaint --from runs/fashion --images photo.png --mask scratch.png \\
      --out filled/ --strength 1
"""


@dataclass(frozen=True)
class Options:
    """What to fill, and how."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder or checkpoint; with --prior 0 a generator's .safetensors or .pth will do."""
    images: str
    """One picture, a source as for training (its test images, where it has such), or
    blue-marble@LAT,LON."""
    mask: str = "center"
    """What is hidden: center, left, random, grid (all but a pixel in 4 x 4), lowres (all, the means
    of 4 x 4 pixels are seen), full (all, and all is seen), or a picture that is white there."""
    sheet: Path | None = None
    """A picture: of each image what is seen, the generator's image, the fill, the image itself."""
    out: Path | None = None
    """The filled images: a .npz (array "images") or a folder of PNGs."""
    json: bool = False
    """Print one JSON object and nothing else."""
    n: int = 16
    """How many images, where there are more."""
    split: Literal["train", "test"] | None = None
    """Which part of a source; by default its test images, where it has such."""
    share: float | None = None
    """Part of the image that center, left and random hide; by default 0.25, 0.5 and 0.8."""
    window: int = 7
    """A pixel counts by how much is hidden among so many times so many about it."""
    restarts: int = 8
    """Starting points of each image, in one batch; the best end is kept."""
    pool: int = 2048
    """Random draws among which the starting points are chosen."""
    steps: int = 150
    """Steps of Adam."""
    lr: float = 0.05
    """Adam's first step, in z; it falls to 0."""
    prior: float = 0.003
    """Weight of the discriminator's opinion; 0 does without the discriminator."""
    combine: Literal["best", "mean"] = "best"
    """Fill with the best restart, or with the mean of all: nearer on average, less sharp."""
    blending: Literal["poisson", "none"] = "poisson"
    """Blend the fill in, so that no seam is left, or paste it."""
    strength: float | None = None
    """How much of the generator's gradients is blended in, 0 (a smooth membrane) to 1; by default
    as far as they agree with what is seen of the image."""
    batch: int = 256
    """Latent vectors that go through the nets together."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    amp: bool = False
    """The nets' products in bf16, where the device has it natively."""
    compile: bool = False
    """Compile forward and backward with torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = 0
    """Seed of starting points, of the choice of images, and of the random mask."""
    cache: Path | None = None
    """Where packed images are kept; by default $FASTDCGAN_CACHE or the user's cache folder."""
    force: bool = False
    """Overwrite what is there."""


def _inpaint(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.inpaint", description=DESCRIPTION, args=args
    )
    with command.needs_extra("edit", "cv2", "scipy", "skimage"):
        from fastdcgan.inpainting.files import inpaint

    report = inpaint(**{k: v for k, v in vars(options).items() if k != "json"})
    for line in [report.to_json()] if options.json else report.lines():
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_inpaint, args)


if __name__ == "__main__":
    sys.exit(main())
