"""`python -m fastdcgan.data`: packs a source of images ahead of training and shows what it holds.
All work is done by the package's functions; here are only the options and the printing."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdcgan.command import parse, run
from fastdcgan.errors import InputError

DESCRIPTION = """Pack images ahead of training, and see what they are.

Examples:
  python -m fastdcgan.data --data photos/ --size 64 --sheet photos.png
  python -m fastdcgan.data --data fashion-mnist --size 32 --split test
"""


@dataclass(frozen=True)
class Options:
    data: str = "blue-marble"
    """blue-marble, fashion-mnist, torchvision:NAME, or a path: folder, zip, tar, IDX, npy, npz."""
    size: int = 64
    """Pixels on a side of an image."""
    channels: Literal[1, 2, 3, 4] | None = None
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; as the images are by default."""
    split: Literal["train", "test"] = "train"
    """Which part of the images, where the source has two."""
    cache: Path | None = None
    """Where packed images are kept; by default $FASTDCGAN_CACHE or ~/.cache/fastdcgan."""
    workers: int | None = None
    """Threads that decode; by default one a CPU."""
    sheet: Path | None = None
    """Write 64 of the images, evenly spread over all, to this picture."""


def pack(args: Sequence[str]) -> None:
    """Packs what the command line names, and prints what it holds.

    Raises:
        InputError: where the source or the cache cannot be used, or the sheet not be written.
    """
    options = parse(Options, prog="python -m fastdcgan.data", description=DESCRIPTION, args=args)

    import numpy as np

    from fastdcgan.data import grid, prepare, save_image

    packed = prepare(
        options.data,
        size=options.size,
        channels=options.channels,
        split=options.split,
        cache=options.cache,
        workers=options.workers,
    )
    crops = f", crops of {packed.window}x{packed.window}" if packed.window > packed.size else ""
    facts = {
        "source": f"{packed.source} ({packed.split})",
        "images": f"{packed.n:,}, {packed.skipped:,} skipped",
        "epoch": f"{packed.epoch_images:,} images{', flipped at random' if packed.hflip else ''}",
        "size": f"{packed.size}x{packed.size}{crops}",
        "channels": packed.channels,
        "bytes": f"{packed.nbytes:,}",
        "path": packed.path,
        "sha256": packed.sha256,
    }
    for name, fact in facts.items():
        print(f"{name:<8}  {fact}")
    if options.sheet is not None:
        chosen = np.linspace(0, packed.n - 1, min(64, packed.n)).round().astype(int)
        margin = (packed.window - packed.size) // 2
        middle = slice(margin, margin + packed.size)
        try:
            save_image(options.sheet, grid(packed.images[chosen][:, middle, middle]))
        except OSError as error:
            raise InputError(f"cannot write {options.sheet}: {error.strerror or error}") from None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run(pack, args)


if __name__ == "__main__":
    sys.exit(main())
