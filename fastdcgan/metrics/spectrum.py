"""What the eye sees and features of a network do not: whether images have the data's texture at
every scale, and whether a grid lies over them. Both from the mean power spectrum of the pixels, so
they need no network. Not here: scores from features (scores.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastdcgan.data.picture import Pixels

IMAGES = 256
"""Of each set: as many as the spectrum of 64x64 images needs to be known to 0.3 dB."""
SMALLEST = 16
"""Pixels on a side, from which on a quarter of the sampling frequency has neighbours of its own."""
ROUNDING = 1 / 12
"""Variance of a value's rounding to whole numbers: the power that every image of bytes has."""

Spectrum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Texture:
    """How the spectrum of one set of images stands to that of the real images."""

    spectrum_db: float | None
    """Root mean square distance of the radial log power spectra, in dB, over all frequencies up to
    half the sampling frequency; 0 is best. Blur is a distance at high frequencies."""
    peak: float | None
    """How much the highest peak at a quarter or a half of the sampling frequency, along rows or
    columns, stands out more than the data's; 1 is the data, more a grid of 4 or of 2 pixels."""


def power_spectrum(images: Iterable[Pixels], count: int = IMAGES) -> Spectrum:
    """The mean over images and channels of abs(FFT(Hann window * (image - its mean)))^2.

    Args:
        images: chunks (n, S, S, C), uint8.
        count: of the first images that are taken.

    Returns:
        (S, S), float64; frequency 0 is first, as in np.fft. The power of rounding is added, which
        an image of bytes has anyway, so that no logarithm is of nothing.
    """
    total, seen, window = np.zeros(()), 0, np.ones(())
    for chunk in images:
        taken = chunk[: count - seen]
        if not len(taken):
            break
        side = taken.shape[1]
        line = np.sin(np.pi * np.arange(side) / side) ** 2
        window = line[:, None] * line
        for image in taken:  # one by one: a chunk of large images in float64 were gigabytes
            x = image.astype(np.float64)
            x -= x.mean((0, 1))
            found = np.fft.fft2(x * window[..., None], axes=(0, 1))
            total = total + (found.real**2 + found.imag**2).mean(2)
        seen += len(taken)
    mean: Spectrum = total / max(seen, 1) + ROUNDING * (window**2).sum()
    return mean


def texture(real: Spectrum, fake: Spectrum) -> Texture:
    """Compares two spectra of images of one size; None where they are too small to have one."""
    if len(real) < SMALLEST:
        return Texture(None, None)
    decibels = 10 * np.log10(radial(fake) / radial(real))
    return Texture(float(np.sqrt((decibels**2).mean())), float((peaks(fake) / peaks(real)).max()))


def radial(power: Spectrum) -> Spectrum:
    """The mean of an (S, S) spectrum over rings of frequency 1, 2, ..., S / 2 cycles an image."""
    side = len(power)
    along = np.fft.fftfreq(side, 1 / side)
    ring = np.rint(np.hypot(along[:, None], along)).astype(int).ravel()
    rings = np.bincount(ring, power.ravel())[1 : side // 2 + 1]
    means: Spectrum = rings / np.bincount(ring)[1 : side // 2 + 1]
    return means


def peaks(power: Spectrum) -> Spectrum:
    """(4,): the power of the rows, then of the columns, at a quarter and at half of the sampling
    frequency over the mean of those 2, 3 and 4 to either side; 1 where nothing stands out. The next
    one is left out, because the window spreads a peak over it."""
    side = len(power)
    found = []
    for lines in (power.mean(1), power.mean(0)):
        for frequency in (side // 4, side // 2):
            beside = [lines[(frequency + sign * k) % side] for k in (2, 3, 4) for sign in (-1, 1)]
            found.append(lines[frequency] / np.mean(beside))
    return np.array(found)
