"""The probe: a trained discriminator beside the pixels."""

import gzip

import numpy as np
import pytest
import torch

from fastdcgan import models
from fastdcgan.data import prepare
from fastdcgan.data.sources import FASHION_MNIST
from fastdcgan.latent.draw import load_discriminator
from fastdcgan.metrics.probe import _features, probe

CPU = torch.device("cpu")


def packed_of(source, split="train"):
    return prepare(str(source), size=32, split=split, progress=False)


def test_features_are_each_layers_maxima(tmp_path):
    """Of 32 pixels: 16 x 16, 8 x 8 and 4 x 4 maps, each as 4 x 4 maxima."""
    net = models.Discriminator(size=32, ndf=4, channels=1).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    found = _features(net, packed_of(tmp_path / "a.npy"), np.arange(5))
    x = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    expected = []
    with torch.no_grad():
        for layer in net.main:
            x = layer(x)
            if isinstance(layer, torch.nn.LeakyReLU):
                cells = x.unflatten(2, (4, -1)).unflatten(4, (4, -1))
                expected.append(cells.amax((3, 5)).flatten(1))
    assert found.shape == (5, 16 * (4 + 8 + 16))
    np.testing.assert_allclose(found, torch.cat(expected, 1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def some_fashion(tmp_path):
    """The first of Fashion-MNIST's images and labels, in a folder of the same kind."""
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, count in (("train", 3000), ("t10k", 1000)):
        for kind, head, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            name = f"{split}-{kind}-ubyte"
            with gzip.open(FASHION_MNIST / f"{name}.gz") as file:
                start, values = file.read(head), file.read(count * size)
            (folder / name).write_bytes(start[:4] + count.to_bytes(4, "big") + start[8:] + values)
    return folder


def test_a_trained_discriminator_beats_the_pixels(command, some_fashion, tmp_path):
    done = command(
        "fastdcgan.train",
        *("--data", some_fashion, "--image-size", 32, "--ngf", 8, "--ndf", 16),
        *("--batch-size", 32, "--steps", 60, "--no-tensorboard", "--out", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    net = load_discriminator(tmp_path / "run")
    found = probe(net, str(some_fashion), n=2500)
    assert (found.train, found.test, found.width) == (2500, 1000, 16 * (16 + 32 + 64))
    assert found.accuracy > found.accuracy_pixels + 0.01
    assert found.accuracy > 0.8
