"""The data feed: an epoch of a folder of photographs, as batches of 64x64 on the device. The
DataLoaders decode every picture in every epoch; ours did so once, which took the `packing_seconds`
that are saved with it."""

import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import ours, peers
from benchmarks.ours import DEVICE
from benchmarks.timing import Workload
from fastdcgan.data import prepare

BATCH, PICTURES = 64, 1024
WIDTH, HEIGHT = 178, 218  # CelebA's
VARIANTS = ("pytorch example", "pytorch tuned", "fastdcgan")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of JPEGs, in one class folder as ImageFolder wants it: random windows of the
    built-in map, so that they take as long to decode as photographs do."""
    packed = prepare("blue-marble", size=192, progress=False)
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "all").mkdir()
    random = np.random.default_rng(0)
    for n in range(PICTURES):
        window = packed.images[random.integers(packed.n)]
        y, x = random.integers(len(window) - HEIGHT), random.integers(len(window) - WIDTH)
        picture = Image.fromarray(window[y : y + HEIGHT, x : x + WIDTH])
        picture.save(folder / "all" / f"{n:05}.jpg", quality=90)
    return folder


def loader(epoch):
    """All batches of an epoch, the start of the workers included, as every epoch has it."""

    def run():
        for images in epoch():
            images.to(DEVICE, non_blocking=True)

    return Workload(run, PICTURES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_feed(together, pictures, tmp_path_factory, variant):
    def packed_feed():
        cache = tmp_path_factory.mktemp("cache")
        start = time.perf_counter()
        packed = prepare(str(pictures), size=64, cache=cache, progress=False)
        packing = time.perf_counter() - start
        workload = ours.feed(packed, DEVICE, BATCH)
        return replace(workload, repeat=20, facts={"packing_seconds": round(packing, 2)})

    makers = {
        "pytorch example": lambda: loader(peers.example_feed(pictures, BATCH)),
        "pytorch tuned": lambda: loader(peers.tuned_feed(pictures, BATCH, DEVICE)),
        "fastdcgan": packed_feed,
    }
    together("feed", makers, variant, rounds=5, warm_up=1, batch=BATCH)
