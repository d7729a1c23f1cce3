"""Features of 128x128 images by Lite0, in images per second: `pytest benchmarks/test_features.py
--benchmark-only`."""

import numpy as np
import pytest

from fastdcgan.hardware import pick_device
from fastdcgan.metrics.features import BATCH, BATCH_ELSEWHERE, extract
from fastdcgan.metrics.networks import load_network

DEVICE = pick_device("auto")


@pytest.mark.parametrize("side", [32, 64, 128])
def test_lite0(benchmark, side):
    """`side`: of the images; the network sees 128x128."""
    network = load_network("lite0", DEVICE)
    count = 32 * BATCH.get(DEVICE.type, BATCH_ELSEWHERE)
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    benchmark.pedantic(
        lambda: extract([images], network, DEVICE), rounds=5, iterations=1, warmup_rounds=1
    )
    benchmark.extra_info["images_per_second"] = round(count / benchmark.stats["median"], 1)
