"""Features of images: streamed, of any channels, and those of real images kept by their content."""

import numpy as np
import pytest
import torch
from torch import nn

from fastdcgan.data import prepare
from fastdcgan.errors import InputError
from fastdcgan.metrics.comparison import compare
from fastdcgan.metrics.features import centre, extract, real_features, to_rgb
from fastdcgan.metrics.networks import FeatureNetwork

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Means of the channels of each quarter, (N, 12); counts the images that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def network():
    return FeatureNetwork("counting", Counting(), None, "v1")


def packed_of(path, images, cache):
    np.save(path, images)
    return prepare(str(path), size=images.shape[1], cache=cache, progress=False)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def test_to_rgb():
    grey = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    assert torch.equal(to_rgb(grey), grey.repeat(1, 3, 1, 1))
    clear = torch.tensor([[10], [0]], dtype=torch.uint8).reshape(1, 2, 1, 1)
    assert to_rgb(clear).flatten().tolist() == [255, 255, 255], "transparent is white"
    half = torch.tensor([0, 100, 200, 51], dtype=torch.uint8).reshape(1, 4, 1, 1)
    assert to_rgb(half).flatten().tolist() == [204, 224, 244], "a fifth of it on white"


def test_images_are_streamed(network, images):
    """No chunk is asked for before the one before it has been through the network."""

    def chunks():
        for start in range(0, 60, 20):
            assert network.module.seen == start
            yield images[start : start + 20]

    found = extract(chunks(), network, CPU)
    whole = network.module(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(found, whole)


def test_a_network_of_the_wrong_kind_is_said(images):
    maps = FeatureNetwork("maps", nn.Identity(), None, None)
    with pytest.raises(InputError, match=r"the network maps does not give features \(N, D\)"):
        extract([images], maps, CPU)


def test_real_features_are_kept_and_found_by_content(network, images, tmp_path):
    packed = packed_of(tmp_path / "a.npy", images, tmp_path)
    features, rows = real_features(packed, 30, network, CPU, cache=tmp_path)
    assert network.module.seen == 30
    assert len(set(rows.tolist())) == 30
    direct = extract([centre(packed, rows)], network, CPU)
    assert torch.equal(features, direct)
    network.module.seen = 0

    again, again_rows = real_features(packed, 30, network, CPU, cache=tmp_path)
    assert network.module.seen == 0, "all of it was there"
    assert torch.equal(again, features)
    assert np.array_equal(again_rows, rows)

    more, more_rows = real_features(packed, 60, network, CPU, cache=tmp_path)
    assert network.module.seen == 30, "only what was not there"
    assert torch.equal(more[:30], features)
    assert sorted(more_rows.tolist()) == list(range(60))
    network.module.seen = 0

    images[0, 0, 0, 0] ^= 1
    changed = packed_of(tmp_path / "a.npy", images, tmp_path)
    real_features(changed, 30, network, CPU, cache=tmp_path)
    assert network.module.seen == 30, "one bit is other content"
    network.module.seen = 0

    other = FeatureNetwork("counting", network.module, None, "v2")
    real_features(changed, 30, other, CPU, cache=tmp_path)
    assert network.module.seen == 30, "another network"
    unknown = FeatureNetwork("counting", network.module, None, None)
    for _ in range(2):
        network.module.seen = 0
        real_features(changed, 30, unknown, CPU, cache=tmp_path)
        assert network.module.seen == 30, "what cannot be told apart is not kept"


def test_a_damaged_cache_is_made_again(network, images, tmp_path):
    packed = packed_of(tmp_path / "a.npy", images, tmp_path)
    features, _ = real_features(packed, 30, network, CPU, cache=tmp_path)
    (entry,) = (tmp_path / "features").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert torch.equal(real_features(packed, 30, network, CPU, cache=tmp_path)[0], features)
    assert network.module.seen == 60


def test_compare_takes_disjoint_halves_and_keeps_the_floor(network, images, tmp_path):
    packed = packed_of(tmp_path / "a.npy", images, tmp_path)
    found = compare(packed, [images[:30]], 30, network, CPU, cache=tmp_path)
    assert len(set(found.real[1].tolist())) == 60
    (kept,) = (tmp_path / "features").glob("*.json")
    kept.write_text(kept.read_text().replace('"fid": ', '"fid": 1000'))
    again = compare(packed, [images[:30]], 30, network, CPU, cache=tmp_path)
    assert again.floor.fid > 1000, "it was read, not computed"
    assert again.scores == found.scores
    # The other half in the fakes' place scores the floor.
    half = centre(packed, found.real[1][30:])
    assert compare(packed, [half], 30, network, CPU, cache=tmp_path).scores == found.floor
    with pytest.raises(InputError, match=r"has 60 images: too few for n = 31"):
        compare(packed, [images[:31]], 31, network, CPU, cache=tmp_path)
