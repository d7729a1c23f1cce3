"""Where a command may write what it made: looked at before minutes are spent, written whole or not
at all. Not here: the formats of pictures (picture.py)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdcgan.data.picture import FORMATS, Pixels, atomic_write, save_image
from fastdcgan.errors import InputError


def check_picture(path: Path, *, force: bool) -> None:
    """InputError where `path` cannot be written as a picture, or is there (without force)."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: end its name in {', '.join(FORMATS)}")
    _check(path, force)


def check_images(path: Path, *, force: bool) -> None:
    """The same for many images: a .npz, or a folder (a name without a suffix)."""
    if path.suffix not in ("", ".npz"):
        raise InputError(f"cannot write images to {path}: give a .npz file or a folder")
    _check(path, force)


def write_images(path: Path, images: Pixels) -> None:
    """Images (N, H, W, C) as `images` in a .npz, or as 000000.png, ... in a folder.

    Raises:
        InputError: where they cannot be written.
    """
    try:
        if path.suffix == ".npz":
            atomic_write(path, lambda file: np.savez_compressed(file, images=images))
            return
        path.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            save_image(path / f"{index:06d}.png", image)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or path}: {error.strerror or error}"
        ) from None


def write_sheet(path: Path, rows: Sequence[Sequence[Pixels]], titles: Sequence[str]) -> None:
    """A picture of rows of images, with a title above each column, on white.

    Args:
        path: a name as `save_image` takes it.
        rows: of images (H, W, C), uint8, all of one size.
        titles: one for each image of a row.

    Raises:
        InputError: where it cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width, channels = rows[0][0].shape
    times = max(1, 96 // height)  # small images are enlarged, each pixel to a square
    gap, head = 6, 18
    step_y, step_x = height * times + gap, width * times + gap
    size = (gap + step_x * len(titles), head + step_y * len(rows))
    sheet = Image.new("RGBA" if channels in (2, 4) else "RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, title in enumerate(titles):
        draw.text((gap + column * step_x, 2), title, fill="black", font=font)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            pixels = image.repeat(times, axis=0).repeat(times, axis=1)
            cell = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            sheet.paste(cell, (gap + x * step_x, head + y * step_y))
    try:
        save_image(path, np.asarray(sheet))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _check(path: Path, force: bool) -> None:
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not force:
        raise InputError(f"{path} exists already: choose another name, or --force")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
