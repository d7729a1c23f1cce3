"""`python -m fastdcgan.gallery`: a run in the browser, to draw, move, walk, inpaint and watch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastdcgan import command

DESCRIPTION = """Look at a run in the browser: draw samples, move them along directions of the
latent space, walk from one to another, paint over images and let the run fill them, watch it train.

Examples:

  python -m fastdcgan.gallery --from runs/000-blue-marble-dcgan64

  python -m fastdcgan.gallery --from runs/fashion/netG_best.safetensors --images photos/ --port 0
"""


@dataclass(frozen=True)
class Options:
    """What to show, and where."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder (its newest generator, again whenever the page is loaded), a checkpoint of
    ours, or a generator's .safetensors or .pth."""
    host: str = "127.0.0.1"
    """The address to listen at. By default only this machine sees the page; with 0.0.0.0 whoever
    reaches it may use it, without a password."""
    port: int = 7860
    """The port to listen at; 0 for any that is free."""
    images: str | None = None
    """Images to fill: a picture or a source as for training; by default the run's own data (test
    images, where it has such), or samples where that is not there."""
    seed: int = 0
    """Seed that every tab begins with."""
    amp: bool = False
    """Compute in bf16 (fp16) where the device has it natively."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache: Path | None = None
    """Where packed images are kept; by default $FASTDCGAN_CACHE or the user's cache folder."""


def _gallery(args: Sequence[str]) -> None:
    options = command.parse(
        Options, prog="python -m fastdcgan.gallery", description=DESCRIPTION, args=args
    )
    with command.needs_extra("gallery", "gradio", "scipy"):
        import gradio  # noqa: F401

        from fastdcgan.browsing.serving import show
    show(**vars(options))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_gallery, args)


if __name__ == "__main__":
    sys.exit(main())
