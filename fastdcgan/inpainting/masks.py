"""What of an image is hidden, and how much each pixel that is seen counts. Not here: the images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter

from fastdcgan.errors import InputError

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Weights = np.ndarray[Any, np.dtype[np.float64]]

SHARES = {"center": 0.25, "left": 0.5, "random": 0.8}
"""Masks that hide a part of any size, and the part that they hide by default."""

GRID = 4  # of `grid`, one pixel in so many is seen, in both directions
FACTOR = 4  # `lowres` sees the mean of squares of so many pixels

WINDOW = 7  # pixels about a seen one whose hidden share is its weight: Yeh et al. 2017, section 3.1


@dataclass(frozen=True, eq=False)
class Mask:
    """Made by `make_mask`."""

    name: str
    """As the user named it."""
    hole: Bools = field(repr=False)
    """(H, W): True where pixels are hidden, and to be made."""
    weights: Weights = field(repr=False)
    """(H / factor, W / factor): what a difference counts at what is seen. Their sum is 1."""
    factor: int = 1
    """What is seen is the image averaged over squares of so many pixels."""

    @property
    def share(self) -> float:
        """The part of the image that is hidden, 0 to 1."""
        return float(self.hole.mean())

    @property
    def sees_all(self) -> bool:
        """Whether no pixel of the image stays, because all of them are looked at instead."""
        return bool(self.hole.all())


def make_mask(
    spec: str, size: int, *, share: float | None = None, window: int = WINDOW, seed: int = 0
) -> Mask:
    """The mask that `spec` names, for square images of `size` pixels.

    Args:
        spec: one of
            "center": a square in the middle is hidden;
            "left": the left part;
            "random": single pixels, drawn at random;
            "grid": all but one pixel in 4 x 4;
            "lowres": everything, while the mean of every 4 x 4 pixels is seen;
            "full": everything, while all of it is seen: the generator's nearest image;
            or a picture of `size` x `size` pixels, white (128 and more) where it hides.
        share: part of the image that center, left and random hide; None: see SHARES.
        window: see `contextual_weights`.
        seed: of "random".

    Raises:
        InputError: there is no such mask, it hides nothing or all, or is of another size.
    """
    if share is not None and spec not in SHARES:
        raise InputError(f"--share {share} was given; it is for {', '.join(SHARES)}, not {spec}")
    part = SHARES.get(spec, 0.0) if share is None else share
    if not 0 <= part < 1:
        raise InputError(f"--share {share} was given; it must be above 0 and below 1")
    if window < 1 or window % 2 == 0:
        raise InputError(f"--window {window} was given; it must be odd: 1, 3, 5 ...")
    if spec in ("full", "lowres"):
        factor = FACTOR if spec == "lowres" else 1
        seen = np.full((size // factor, size // factor), (factor / size) ** 2)
        return Mask(spec, np.ones((size, size), bool), seen, factor)
    hole = np.zeros((size, size), bool)
    if spec == "center":
        side = round(size * part**0.5)
        first = (size - side) // 2
        hole[first : first + side, first : first + side] = True
    elif spec == "left":
        hole[:, : round(size * part)] = True
    elif spec == "random":
        hidden = np.random.default_rng(seed % 2**64).permutation(size * size)[
            : round(size * size * part)
        ]
        hole.flat[hidden] = True
    elif spec == "grid":
        hole[:] = True
        hole[::GRID, ::GRID] = False
    else:
        hole = _from_file(Path(spec), size)
    if not hole.any() or hole.all():
        what = "no pixel" if not hole.any() else "every pixel"
        raise InputError(f"--mask {spec} hides {what} of {size} x {size}: nothing can be filled")
    return Mask(spec, hole, contextual_weights(hole, window))


def contextual_weights(hole: Bools, window: int = WINDOW) -> Weights:
    """For each pixel that is seen, the part of the `window` x `window` pixels about it that is
    hidden (outside of the image nothing is), so that what lies at the hole counts most; 0 where it
    is hidden. Equation 3 of Yeh et al. 2017, scaled to a sum of 1."""
    weights: Weights = uniform_filter(hole.astype(np.float64), window, mode="constant") * ~hole
    weights[weights < 1e-9] = 0  # running sums leave such remains
    if not weights.any():  # window 1: every pixel that is seen counts alike
        weights = (~hole).astype(np.float64)
    scaled: Weights = weights / weights.sum()
    return scaled


def _from_file(path: Path, size: int) -> Bools:
    from PIL import Image

    if not path.is_file():
        raise InputError(
            f"--mask {path} was given; it is neither center, left, random, full, grid, lowres nor "
            "a file"
        )
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
    except Exception as error:  # of any type that a decoder of a damaged file can think of
        reason = type(error).__name__
        raise InputError(f"--mask {path} cannot be read as a picture ({reason})") from None
    if pixels.shape != (size, size):
        height, width = pixels.shape
        raise InputError(
            f"--mask {path} has {width} x {height} pixels; the run's images have {size} x {size}"
        )
    return pixels >= 128
