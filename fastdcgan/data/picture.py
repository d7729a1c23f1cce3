"""Pictures out: tensors to uint8, grids of images, files that are whole or absent. Not here:
reading pictures (decode.py), plots."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from fastdcgan.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# By suffix: the format's name in PIL, how it is written, and the channels that it can hold.
FORMATS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    ".png": ("PNG", {}, (1, 2, 3, 4)),
    ".jpg": ("JPEG", {"quality": 95}, (1, 3)),
    ".jpeg": ("JPEG", {"quality": 95}, (1, 3)),
    ".webp": ("WEBP", {"lossless": True}, (1, 2, 3, 4)),
}


def to_uint8(images: "Tensor") -> Pixels:
    """Images as a network gives them -> pixels: round((x + 1) * 127.5), clamped to 0..255.

    Args:
        images: (N, C, H, W) of any floating dtype, memory format and device, in [-1, 1].

    Returns:
        A uint8 array of shape (N, H, W, C). The uint8 values that a feed made the images of come
        back exactly, from float32 and wider.
    """
    return quantise(images).cpu().numpy()


def quantise(images: "Tensor") -> "Tensor":
    """What `to_uint8` returns, as a tensor where `images` are."""
    import torch

    values = images.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous()


def grid(images: Pixels, columns: int | None = None, padding: int = 2) -> Pixels:
    """Images side by side, row by row, as one image; the ground is black (transparent, with alpha).

    Args:
        images: (N, H, W, C), uint8, N at least 1.
        columns: images in a row; None: as square a grid as there is.
        padding: pixels between images and around them.

    Returns:
        A uint8 array (rows * (H + padding) + padding, columns * (W + padding) + padding, C).
    """
    n, height, width, channels = images.shape
    columns = ceil(sqrt(n)) if columns is None else columns
    rows = ceil(n / columns)
    step_y, step_x = height + padding, width + padding
    ground = np.zeros((rows * step_y + padding, columns * step_x + padding, channels), np.uint8)
    for index, image in enumerate(images):
        y, x = padding + index // columns * step_y, padding + index % columns * step_x
        ground[y : y + height, x : x + width] = image
    return ground


def save_image(path: str | Path, image: Pixels) -> None:
    """Writes one image; the file is whole or, if that fails, as it was before.

    Args:
        path: ends in .png, .jpg, .jpeg or .webp (all but JPEG are lossless).
        image: (H, W, C), uint8; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA. JPEG has no alpha.

    Raises:
        InputError: where the suffix is another one, or its format cannot hold the channels.
        OSError: where the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: end its name in {', '.join(FORMATS)}")
    name, options, held = FORMATS[path.suffix.lower()]
    if image.shape[2] not in held:
        raise InputError(f"cannot write {path}: {name} holds no alpha, end its name in .png")
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    atomic_write(path, lambda file: picture.save(file, name, **options))


def atomic_write(
    path: str | Path, write: Callable[[BinaryIO], object], fsync: bool = False
) -> None:
    """Writes a file through another one beside it, as `atomic_file` does.

    Args:
        path: the file; its folder must exist.
        write: is given the open file and writes all of it.
        fsync: wait until the file is on the disk, so that a crash of the machine cannot lose it.

    Raises:
        OSError: where it cannot be written; `path` is then as it was.
    """
    with atomic_file(path, fsync) as file:
        write(file)


@contextmanager
def atomic_file(path: str | Path, fsync: bool = False) -> Iterator[BinaryIO]:
    """An open file beside `path`, which gets that name when the block ends and is removed when it
    raises: at every moment `path` is the old file or the new one, never a part of it.

    Args, Raises: as of `atomic_write`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # it is there only if something failed
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
