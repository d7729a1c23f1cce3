"""The discriminator as a maker of features: a linear classifier on them, as in section 5 of the
DCGAN paper (Radford et al. 2016), beside the same classifier on the pixels. Not here: how the
discriminator is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan import models
from fastdcgan.data import Packed, prepare
from fastdcgan.data.labels import labels
from fastdcgan.errors import InputError
from fastdcgan.metrics.features import chunks

Discriminator = models.Discriminator | models.TF28Discriminator
Array = np.ndarray[Any, np.dtype[np.float32]]

GRID = 4  # places on a side that each layer's features are max-pooled to, as in the paper
C = 1e-3  # inverse strength of the classifier's L2 penalty, on features of unit variance


@dataclass(frozen=True)
class Probe:
    """What `probe` returns."""

    accuracy: float
    """Share of the test images whose class the classifier finds by the discriminator's features."""
    accuracy_pixels: float
    """The same by a random projection of the pixels to as many numbers."""
    width: int
    """Features of an image."""
    train: int
    """Images that the classifier learnt from."""
    test: int
    """Images that it was tested on."""
    source: str
    """The labelled images."""

    def lines(self) -> Iterator[str]:
        yield f"probe on {self.source}: {self.train:,} images to learn, {self.test:,} to test"
        yield f"  discriminator's features  {self.accuracy:.2%} ({self.width:,} of them)"
        yield f"  random projection         {self.accuracy_pixels:.2%} (of the pixels, as wide)"


def probe(
    net: Discriminator,
    source: str,
    *,
    n: int = 10_000,
    seed: int = 0,
    cache: Path | None = None,
) -> Probe:
    """How well a linear classifier on the discriminator's features tells classes apart: multinomial
    logistic regression (scikit-learn) on each layer's activations, max-pooled to 4 x 4.

    It learns from up to `n` images and is tested on up to `n` others: of the test split where the
    source has one, else of a fifth of the images that is kept aside.

    Args:
        net: in eval mode, on any device.
        source: labelled images: a set with IDX files of labels (fashion-mnist), a .npz with
            `labels`, or a folder or archive with a subfolder for each class.
        seed: of the choice of images, and of the random projection.
        cache: see `prepare`.

    Raises:
        InputError: the source has no labels, or scikit-learn is not installed.
    """
    learn, test = _sets(source, net, n, seed, cache)
    by_features = [(_features(net, packed, rows), y) for packed, rows, y in (learn, test)]
    width = by_features[0][0].shape[1]
    pixels = [_pixels(packed, rows) for packed, rows, _ in (learn, test)]
    random = np.random.default_rng(seed)
    projection = random.standard_normal((pixels[0].shape[1], width), np.float32)
    by_pixels = [(x @ projection, y) for x, (_, _, y) in zip(pixels, (learn, test), strict=True)]
    return Probe(
        _accuracy(*by_features),
        _accuracy(*by_pixels),
        width,
        len(learn[1]),
        len(test[1]),
        source,
    )


Chosen = tuple[Packed, np.ndarray[Any, Any], np.ndarray[Any, Any]]  # images, rows, their classes


def _sets(
    source: str, net: Discriminator, n: int, seed: int, cache: Path | None
) -> tuple[Chosen, Chosen]:
    """What to learn from, and what to test on."""

    def packed_and_labels(split: str) -> tuple[Packed, np.ndarray[Any, Any]]:
        packed = prepare(source, size=net.size, channels=net.channels, split=split, cache=cache)
        return packed, labels(packed, cache).numbers

    learn, classes = packed_and_labels("train")
    order = np.random.default_rng(seed).permutation(learn.n)
    try:
        test, test_classes = packed_and_labels("test")
        test_rows = np.random.default_rng(seed).permutation(test.n)[:n]
    except InputError:  # it has no such split
        kept = max(1, learn.n // 5)
        test, test_classes, test_rows, order = learn, classes, order[:kept][:n], order[kept:]
    rows = order[:n]
    return (learn, rows, classes[rows]), (test, test_rows, test_classes[test_rows])


def _features(net: Discriminator, packed: Packed, rows: np.ndarray[Any, Any]) -> Array:
    """(n, F): what every LeakyReLU gives, max-pooled, side by side."""
    device = next(net.parameters()).device
    layers: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        layers.append(F.adaptive_max_pool2d(output, min(GRID, output.shape[-1])).flatten(1).cpu())

    hooks = [m.register_forward_hook(keep) for m in net.modules() if isinstance(m, nn.LeakyReLU)]
    found = []
    try:
        for chunk in chunks(packed, rows, 64):
            layers.clear()
            x = torch.from_numpy(np.ascontiguousarray(chunk)).to(device).permute(0, 3, 1, 2)
            with torch.no_grad():
                net.main(x.float() / 127.5 - 1)  # whatever a label would add comes after it
            found.append(torch.cat(layers, 1).float().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(found)


def _pixels(packed: Packed, rows: np.ndarray[Any, Any]) -> Array:
    """(n, H * W * C) in [-1, 1]."""
    parts = [chunk.reshape(len(chunk), -1) for chunk in chunks(packed, rows)]
    return np.concatenate(parts).astype(np.float32) / 127.5 - 1


def _accuracy(learn: tuple[Array, Any], test: tuple[Array, Any]) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise InputError("--probe needs scikit-learn: pip install 'fastdcgan[metrics]'") from None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=300, tol=1e-3))
    return float(classifier.fit(*learn).score(*test))
