"""Which of the drawn images are kept: no copies of real images, and not the worst. Not here: how
images are drawn (drawing.py).

The rules, for the images of one class, with distances between the features of a network:

- copy: x is nearer to a real image of its class than t, the `duplicate_quantile` (0.01) of the
  distances of the class's real images from their nearest others; real images that are there twice
  (distance 0) do not count for t. Of perfect samples about as large a share would be dropped. A
  blur that is nearer to all of them than they are to each other counts as a copy, too.
- density (Naeem et al. 2020): (1/k) #{real r: |x - r| <= the distance of r from its k-th nearest
  other real image}; an image of density 0 is dropped: it lies in no real image's ball. The share of
  images that are kept is then precision in the sense of Kynkäänniemi et al. 2019.
- d: an image is dropped whose logit by the run's discriminator (in eval mode) is below the
  `reject_share` (0.2) quantile of the logits of 1,024 other images of the same generator. Real
  images are no yardstick here: a discriminator that has seen few of them knows each by heart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdcgan.data.picture import Pixels
from fastdcgan.latent.draw import Discriminator
from fastdcgan.metrics.scores import radii_of, squared_distances

KEPT, COPY, BAD = 0, 1, 2

Verdicts = np.ndarray[Any, np.dtype[np.int64]]
"""(N,) of KEPT, COPY and BAD."""


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The real images of a class in the space of features, and the rules that need it."""

    features: Tensor = field(repr=False)
    """(R, D) float64, less `middle`."""
    middle: Tensor = field(repr=False)
    """(D,): their mean. Short vectors: small errors in their distances."""
    copy_radius: float
    """What is nearer to a real image is a copy; 0: nothing is."""
    balls: Tensor | None = field(repr=False)
    """(R,) squared radii; None: nothing is rejected by density."""

    @classmethod
    def of(cls, real: Tensor, *, quantile: float, nearest: int | None) -> "Neighbourhood":
        """By features (R, D) of the real images.

        Args:
            quantile: of their nearest distances; 0: no copies are looked for.
            nearest: k of the balls; None: no density.
        """
        real = real.double()
        middle = real.mean(0)
        real = real - middle
        radius = copy_radius(real, quantile) if quantile else 0.0
        return cls(real, middle, radius, None if nearest is None else radii_of(real, nearest))

    def judge(self, features: Tensor) -> Verdicts:
        """Of images by their features (N, D)."""
        apart = squared_distances(features.to(self.middle) - self.middle, self.features)
        verdicts = np.full(len(features), KEPT)
        if self.balls is not None:
            verdicts[~(apart <= self.balls).any(1).cpu().numpy()] = BAD
        copies = apart.min(1).values.sqrt() < self.copy_radius
        verdicts[copies.cpu().numpy()] = COPY
        return verdicts


def copy_radius(real: Tensor, quantile: float) -> float:
    """That quantile of the positive distances of `real` (R, D) from their nearest others; 0 where
    all are the same."""
    nearest = radii_of(real, 1).sqrt()
    nearest = nearest[nearest > 0]
    return float(np.quantile(nearest.cpu().numpy(), quantile)) if len(nearest) else 0.0


@dataclass(frozen=True, eq=False)
class Opinion:
    """A discriminator, and the logit below which it finds an image bad."""

    logits: Callable[[Pixels], Tensor] = field(repr=False)
    least: float

    @classmethod
    def of(cls, logits: Callable[[Pixels], Tensor], pilot: Pixels, share: float) -> "Opinion":
        """By the logits of other images of the same generator, of which that share is bad."""
        return cls(logits, float(np.quantile(logits(pilot).numpy(), share)))

    def judge(self, images: Pixels) -> Verdicts:
        """Of images (N, H, W, C)."""
        return np.where((self.logits(images) < self.least).numpy(), BAD, KEPT)


def logits_by(netD: Discriminator, label: int | None = None) -> Callable[[Pixels], Tensor]:
    """Images (N, H, W, C) to the logits (N,) of a discriminator in eval mode, on the CPU; with
    `label` as images of that one of its classes."""
    device = next(netD.parameters()).device

    def logits(images: Pixels) -> Tensor:
        found = []
        with torch.no_grad():
            for batch in torch.from_numpy(images).split(256):
                x = batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
                labels = labels_of(label, len(x))
                given = (x,) if labels is None else (x, labels.to(device))
                found.append(netD(*given).float().cpu())
        return torch.cat(found)

    return logits


def labels_of(label: int | None, n: int) -> Tensor | None:
    """(n,) int64, the labels of n images of one class; None for None."""
    return None if label is None else torch.full((n,), label)


@dataclass(frozen=True, eq=False)
class Screen:
    """All that is asked of the images of one class."""

    features: Callable[[Pixels], Tensor] | None
    """Images to features (N, D); None: no rule needs them."""
    neighbourhood: Neighbourhood | None
    opinion: Opinion | None

    def judge(self, images: Pixels) -> Verdicts:
        """Of images (N, H, W, C). What is a copy and bad is a copy."""
        verdicts = np.full(len(images), KEPT)
        if self.opinion is not None:
            verdicts = self.opinion.judge(images)
        if self.neighbourhood is not None:
            assert self.features is not None
            near = self.neighbourhood.judge(self.features(images))
            verdicts = np.where(near == KEPT, verdicts, near)
        return verdicts

    def facts(self) -> dict[str, float]:
        """The thresholds, for the manifest."""
        found = {}
        if self.neighbourhood is not None:
            found["copy_radius"] = self.neighbourhood.copy_radius
        if self.opinion is not None:
            found["least_logit"] = self.opinion.least
        return found
