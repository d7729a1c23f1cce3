"""A sheet to see memorisation by: each sample beside the real images that are nearest to it in the
features of a network. Not here: the features themselves."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdcgan.data import Packed, grid
from fastdcgan.data.picture import Pixels
from fastdcgan.metrics.features import centre, to_rgb

SAMPLES = 16
NEIGHBOURS = 6
GAP = 8  # pixels between the samples' column and their neighbours
SIDE = 64  # smaller images are enlarged to about that, each pixel to a square


def neighbour_sheet(
    samples: Pixels,
    features: Tensor,
    real: Tensor,
    rows: np.ndarray[Any, Any],
    packed: Packed,
) -> Pixels:
    """One row a sample: on the left the sample, then a gap, then its nearest real images, the
    nearest first. RGB, uint8.

    Args:
        samples: (S, H, W, C) uint8.
        features: (S, D) theirs.
        real: (R, D) features of real images.
        rows: (R,) which of the packed images these are.
        packed: the real images, H x W.
    """
    apart = torch.cdist(features.double(), real.double())
    nearest = apart.topk(min(NEIGHBOURS, len(real)), largest=False).indices.numpy()
    found = centre(packed, rows[nearest.flatten()])
    left = grid(_shown(samples), columns=1)
    right = grid(_shown(found), columns=nearest.shape[1])
    return np.concatenate([left, np.full((len(left), GAP, 3), 255, np.uint8), right], axis=1)


def _shown(images: Pixels) -> Pixels:
    tensor = to_rgb(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))
    times = max(1, SIDE // tensor.shape[2])
    return tensor.permute(0, 2, 3, 1).numpy().repeat(times, axis=1).repeat(times, axis=2)
