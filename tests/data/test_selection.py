"""A few images to work on: of pictures, sources and places on the map."""

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data.decode import decode
from fastdcgan.data.selection import select
from fastdcgan.data.sources.blue_marble import read_map
from fastdcgan.errors import InputError


def test_a_picture_is_decoded_as_for_training(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for channels in (1, 3):
        found = select(str(tmp_path / "photo.png"), size=32, channels=channels, n=5).images
        assert np.array_equal(found, decode(pixels, 32, channels)[None])


def test_images_of_a_source(tiny_data, capsys):
    images = np.load(tiny_data)
    found = select(str(tiny_data), size=32, channels=3, n=7, seed=3).images
    assert np.array_equal(found, images[np.random.default_rng(3).permutation(36)[:7]])
    few = select(str(tiny_data), size=32, channels=3, n=2, seed=3).images
    assert np.array_equal(few, found[:2])
    assert len(select(str(tiny_data), size=32, channels=3, n=99).images) == 36
    capsys.readouterr()
    grey = select(str(tiny_data), size=32, channels=1, n=2).images
    assert grey.shape == (2, 32, 32, 1)
    assert "images of 3 channels: taken as 1" in capsys.readouterr().err


def test_the_test_split_is_taken_where_there_is_one(tmp_path):
    x = np.arange(2, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
    np.savez(tmp_path / "both.npz", x_train=x[:1], x_test=x[1:])
    found = {s: select(str(tmp_path / "both.npz"), size=32, channels=1, n=1, split=s).images
             for s in (None, "test", "train")}  # fmt: skip
    assert [images.max() for images in found.values()] == [1, 1, 0]


def test_places_on_the_map():
    earth = read_map()
    assert earth.shape == (2700, 5400, 3)
    sahara = select("blue-marble@24,5", size=64, channels=3, n=9).images
    y, x = round((90 - 24) / 180 * 2700) - 32, round((5 + 180) / 360 * 5400) - 32
    assert np.array_equal(sahara, earth[None, y : y + 64, x : x + 64])
    red, _, blue = sahara.mean((0, 1, 2))
    assert red > blue + 40, "a desert"
    atlantic = select("blue-marble@30,-40", size=64, channels=3, n=1).images
    assert atlantic[..., 2].mean() > atlantic[..., 0].mean() + 10, "a sea"
    tiles = select("blue-marble@24,5,2", size=32, channels=3, n=9).images
    together = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])
    assert np.array_equal(together, sahara[0])
    assert select("blue-marble@90,180", size=64, channels=3, n=1).images.shape == (1, 64, 64, 3)
    with pytest.raises(InputError, match="no place on the map"):
        select("blue-marble@1", size=64, channels=3, n=1)
