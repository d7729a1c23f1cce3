"""`python -m fastdcgan.stylize`: gives images the look of others."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdcgan import command

DESCRIPTION = """Give images the look of others and keep their edges (Gatys et al. 2016), by the
features of a run's discriminator and of EfficientNet-Lite0.

Examples:

  python -m fastdcgan.stylize --content blue-marble@42,15 --style blue-marble@24,5,2 \\
      --from runs/000-blue-marble-dcgan64 --sheet desert.png

  python -m fastdcgan.stylize --content photos/ --style painting.jpg --from runs/photos \\
      --in both --strength 0.9 --out restyled/
"""


@dataclass(frozen=True)
class Options:
    """What gets whose look, and how."""

    content: str
    """One picture, a source as for training, or blue-marble@LAT,LON[,K]: one tile of the map, or K
    x K of them."""
    style: str
    """Likewise; of several images the mean look counts."""
    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder or checkpoint; for pixels alone a discriminator's .safetensors will do."""
    space: Annotated[Literal["pixels", "latent", "both"], tyro.conf.arg(name="in")] = "pixels"
    """Change the pixels, or the latent vector (the result is then an image of the generator's)."""
    features: Literal["both", "discriminator", "lite0"] = "both"
    """Whose features make the look."""
    strength: float = 0.8
    """0 keeps the content, 1 minds only the style."""
    reverse: bool = False
    """Give the style images the content's look, too."""
    sheet: Path | None = None
    """A picture: content, style and result of each image."""
    out: Path | None = None
    """The results: a .npz (array "images") or a folder of PNGs."""
    json: bool = False
    """Print one JSON object and nothing else."""
    n: int = 4
    """How many images of each, where there are more."""
    steps: int = 300
    """Steps of Adam."""
    restarts: int = 4
    """In the latent space: starting points of each image; the best end is kept."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    amp: bool = False
    """The networks' products in bf16, where the device has it natively."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = 0
    """Seed of the choice of images, and of the starting points."""
    cache: Path | None = None
    """Where packed images are kept; by default $FASTDCGAN_CACHE or the user's cache folder."""
    force: bool = False
    """Overwrite what is there."""


def _stylize(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.stylize", description=DESCRIPTION, args=args
    )
    from fastdcgan.stylisation.files import stylize

    report = stylize(**{k: v for k, v in vars(options).items() if k != "json"})
    for line in [report.to_json()] if options.json else report.lines():
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_stylize, args)


if __name__ == "__main__":
    sys.exit(main())
