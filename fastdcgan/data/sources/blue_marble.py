"""The built-in source: square windows of one photographic map of the whole Earth, shipped with the
package. Not here: the random crops out of the windows (feeds.py)."""

import hashlib
from collections.abc import Iterator
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np

from fastdcgan.data.sources.base import Item, Source
from fastdcgan.errors import InputError

TILE = 64  # pixels; the anchors are those of a grid of such tiles, whatever the size of the images
MARGIN = 32  # pixels of its surroundings that a window shows on each side of a training image
LATITUDES = (0.08, 0.86)  # of the map's height: nearer to the poles the projection smears
DETAIL = 12  # a tile's standard deviation, the mean of its channels': below lies open sea

# Two bands of longitude, in columns of tiles, are kept for testing: Greenland, the Atlantic and
# Brazil; the Urals, the deserts of Central Asia and the Indian Ocean. A tenth of all tiles, and in
# both splits sea, forest, desert and snow. A band is 320 pixels wide: the widest window there is.
TEST_BANDS = ((28, 33), (54, 59))

# How many tiles lie in each split; a test counts them. Written down so that opening a packed cache
# need not look at the map.
TILES = {"train": 998, "test": 127}


def open_blue_marble(split: str) -> Source:
    """The map as a source. An epoch of the train split is as long as the map has disjoint tiles."""
    return Source(
        name="blue-marble",
        location=f"blue-marble/{split}",
        channels=3,
        fingerprint=hashlib.sha256(_file()).hexdigest(),
        items=partial(_items, split),
        count=TILES[split],
        epoch_images=sum(TILES.values()) if split == "train" else TILES["test"],
        hflip=True,
        margin=2 * MARGIN,
    )


def windows(earth: np.ndarray[Any, Any], split: str, window: int) -> Iterator[tuple[int, int]]:
    """The top left corners (y, x) of the split's windows on the map, row by row.

    Each window has a tile of the grid in its middle, or as near to it as the split's own region
    allows: no pixel of a test window is in any train window.

    Args:
        earth: the map, uint8 of shape (H, W, 3).
        split: "train" or "test".
        window: pixels on a side of a window.

    Raises:
        InputError: where a window would be wider than a test band.
    """
    height, width = earth.shape[:2]
    top, bottom = (int(height * part) for part in LATITUDES)
    cuts = [0, *(TILE * column for band in TEST_BANDS for column in band), width]
    spans = list(pairwise(cuts))[int(split == "test") :: 2]  # train and test take turns
    widest = TILE * min(right - left for left, right in TEST_BANDS)
    if window > widest:
        raise InputError(
            f"blue-marble has no images of {window - 2 * MARGIN} pixels: "
            f"ask for at most {widest - 2 * MARGIN}, or give images of your own"
        )
    for y in range(top, bottom - TILE + 1, TILE):
        row = earth[y : y + TILE, : width // TILE * TILE].reshape(TILE, -1, TILE, 3)
        detail = row.astype(np.float32).std(axis=(0, 2)).mean(axis=1)
        for x in TILE * np.flatnonzero(detail > DETAIL):
            for left, right in spans:
                if left <= x < right:
                    shift = (TILE - window) // 2
                    yield (
                        int(np.clip(y + shift, top, bottom - window)),
                        int(np.clip(x + shift, left, right - window)),
                    )


def read_map() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The whole map, (2700, 5400, 3): equirectangular, from 90 degrees north and 180 west."""
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(_file())) as image:
        return np.asarray(image.convert("RGB"))


def _items(split: str, window: int) -> Iterator[Item]:
    earth = read_map()
    for y, x in windows(earth, split, window):
        cut = earth[y : y + window, x : x + window]
        yield f"blue-marble at row {y}, column {x}", partial(np.ascontiguousarray, cut)


def _file() -> bytes:
    return resources.files("fastdcgan.data").joinpath("assets/blue_marble.jpg").read_bytes()
