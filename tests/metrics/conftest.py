"""What the tests of the metrics share: Lite0, and features of tiles of the map of the Earth."""

import numpy as np
import pytest
import torch

from fastdcgan.data import prepare
from fastdcgan.metrics.features import centre, extract
from fastdcgan.metrics.networks import load_network

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def lite0():
    return load_network("lite0", CPU)


@pytest.fixture(scope="session")
def tiles(private_cache):
    """400 disjoint tiles of 64 pixels in random order, uint8 (400, 64, 64, 3)."""
    packed = prepare("blue-marble", size=64, progress=False)
    return centre(packed, np.random.default_rng(5).permutation(packed.n)[:400])


@pytest.fixture(scope="session")
def features(tiles, lite0):
    """Features of the tiles, (400, 1280)."""
    return extract([tiles], lite0, CPU)
