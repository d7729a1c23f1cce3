"""A few images to work on, as pixels: one picture, some of a source, or places on the built-in map.
Not here: the images of a training run (cache.py, feeds.py)."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastdcgan.data.cache import prepare
from fastdcgan.data.picture import Pixels
from fastdcgan.data.sources import files, open_source
from fastdcgan.errors import InputError

PLACE = "blue-marble@"


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select` returns."""

    images: Pixels = field(repr=False)
    """(N, size, size, channels)."""
    described: str
    """Where they are from, for people."""


def select(
    spec: str,
    *,
    size: int,
    channels: int,
    n: int,
    seed: int = 0,
    split: Literal["train", "test"] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Selection:
    """Up to `n` images, square, of that size and those channels.

    Args:
        spec: the path of one picture; "blue-marble@LAT,LON" or "blue-marble@LAT,LON,K": the tile of
            `size` pixels about that place (degrees north and east), or K x K tiles side by side;
            or any source, see `open_source`.
        size, channels: see `decode`.
        n: images, drawn at random; the first ones are the same whatever `n` is.
        seed: of the choice.
        split: None: the test split where the source has one, else all of its images.
        cache, progress: see `prepare`.

    Raises:
        InputError: they are not there, cannot be read, or are grey where colours are wanted.
    """
    if n < 1:
        raise InputError(f"--n {n} was given; it must be at least 1")
    if spec.startswith(PLACE):
        _check_channels(spec, 3, channels)
        images = _places(spec, size, channels)[:n]
        return Selection(images, f"{spec} ({_count(len(images))})")
    path = Path(spec).expanduser()
    if path.is_file() and files.is_picture(path):
        return Selection(_picture(path, size, channels)[None], spec)
    chosen = split or _split(spec, cache)
    own = open_source(spec, split=chosen, cache=cache).channels
    _check_channels(spec, own, channels, say=progress)
    packed = prepare(
        spec, size=size, channels=channels, split=chosen, cache=cache, progress=progress
    )
    rows = np.random.default_rng(seed % 2**64).permutation(packed.n)[:n]
    margin = (packed.window - packed.size) // 2  # of wider windows their middle
    middle = slice(margin, margin + packed.size)
    images = np.ascontiguousarray(packed.images[rows, middle, middle])
    return Selection(images, f"{spec} ({chosen}: {len(images):,} of {packed.n:,} images)")


def _count(n: int) -> str:
    return "one image" if n == 1 else f"{n} images"


def _split(spec: str, cache: Path | None) -> Literal["train", "test"]:
    try:
        open_source(spec, split="test", cache=cache)
    except InputError:  # no such split; anything else that is wrong is wrong with "train" as well
        return "train"
    return "test"


def _check_channels(spec: str, own: int, wanted: int, *, say: bool = True) -> None:
    if wanted >= 3 > own:
        raise InputError(
            f"{spec} has images of {own} channel{'s' * (own > 1)}; the run's have {wanted}: "
            "give images in colour, or a run of grey ones"
        )
    if own != wanted and say:
        print(f"{spec} has images of {own} channels: taken as {wanted}", file=sys.stderr)


def _picture(path: Path, size: int, channels: int) -> Pixels:
    from fastdcgan.data.decode import decode

    try:
        return decode(path.read_bytes(), size, channels)
    except Exception as error:  # of any type that a decoder of a damaged file can think of
        reason = " ".join(str(error).split())
        if type(error).__name__ == "UnidentifiedImageError":  # its text is an object's address
            reason = "not a picture of any known kind"
        raise InputError(f"{path} cannot be read as a picture: {reason}") from None


def _places(spec: str, size: int, channels: int) -> Pixels:
    from fastdcgan.data.decode import decode
    from fastdcgan.data.sources.blue_marble import read_map

    try:
        latitude, longitude, *more = spec.removeprefix(PLACE).split(",")
        north, east, side = float(latitude), float(longitude), int(*more or ["1"])
        if not (-90 <= north <= 90 and -180 <= east <= 180 and side >= 1):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(
            f"{spec} is no place on the map: give {PLACE}LAT,LON, degrees north from -90 to 90 and "
            f"east from -180 to 180, or {PLACE}LAT,LON,K for K x K tiles"
        ) from None
    earth = read_map()
    height, width = earth.shape[:2]
    if side * size > height:
        raise InputError(f"{spec}: {side} tiles of {size} pixels are more than the map has")
    top = round(float(np.clip((90 - north) / 180 * height - side * size / 2, 0,
                              height - side * size)))  # fmt: skip
    left = round(float(np.clip((east + 180) / 360 * width - side * size / 2, 0,
                               width - side * size)))  # fmt: skip
    tiles = [
        earth[y : y + size, x : x + size]
        for y in range(top, top + side * size, size)
        for x in range(left, left + side * size, size)
    ]
    return np.stack([decode(np.ascontiguousarray(tile), size, channels) for tile in tiles])
