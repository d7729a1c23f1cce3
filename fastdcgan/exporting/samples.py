"""The picture on a model card: 64 samples of a generator; of a discriminator there is none."""

from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.data.picture import grid, save_image
from fastdcgan.exporting.card import is_generator
from fastdcgan.latent.draw import Sampler

COUNT = 64


def save_samples(net: Any, folder: Path, *, sampler: Sampler | None = None, seed: int = 0) -> bool:
    """Writes samples.png for a generator; returns whether it is one.

    Args:
        net: one of `fastdcgan.models`.
        folder: where to.
        sampler: draws instead of `net` (elsewhere, or faster).
        seed: of the latent vectors.
    """
    if not is_generator(net):
        return False
    images = (sampler or Sampler(net)).draw(COUNT, seed=seed)
    save_image(folder / "samples.png", grid(np.concatenate(list(images))))
    return True
