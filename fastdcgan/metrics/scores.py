"""Scores of a set of images from its features: FID and Inception Score by torchmetrics, KID,
precision, recall, density and coverage after their papers. Not here: images and networks."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdcgan.errors import InputError

NEAREST = 5
"""k of precision, recall, density and coverage, as Naeem et al. 2020 choose it."""
IS_SPLITS = 10
ROWS = 512  # rows of a matrix of distances at a time: n x n of them need not fit in memory


@dataclass(frozen=True)
class Scores:
    """How one set of features stands to that of the real images."""

    fid: float
    """Fréchet distance of two Gaussians (Heusel et al. 2017); 0 is best."""
    kid: float
    """Unbiased squared MMD, kernel (x.y/D + 1)^3 (Binkowski et al. 2018); 0 is best, and a good set
    may come out below it. Over all pairs of images at once: the mean over random subsets, which
    other packages give, is the same number with the noise of the draw on it."""
    inception_score: float | None
    """exp E KL(p(y|x) || p(y)) over 10 splits (Salimans et al. 2016); higher is better. None where
    the network has no classifier."""
    precision: float
    """Share of fakes among the real ones, up to 1 (Kynkäänniemi et al. 2019)."""
    recall: float
    """Share of real images among the fakes, up to 1 (the same)."""
    density: float
    """How densely real images lie around a fake, about 1 for real images (Naeem et al. 2020)."""
    coverage: float
    """Share of real images that have a fake next to them, up to 1 (the same)."""


def score(real: Tensor, fake: Tensor, classifier: nn.Module | None) -> Scores:
    """All scores of `fake` beside `real`, computed in float64; the same call gives the same bits.

    Args:
        real, fake: features (N, D), each of 6 images or more, on one device (not MPS, which has no
            float64).
        classifier: features (N, D) in their own dtype -> logits; None: no Inception Score.

    Raises:
        InputError: torchmetrics is not installed, or there are too few images.
    """
    if min(len(real), len(fake)) <= NEAREST:
        raise InputError(
            f"{len(real)} real images and {len(fake)} fakes are too few: "
            f"scores need {NEAREST + 1} of each"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except ImportError:
        raise InputError("scores need torchmetrics: pip install 'fastdcgan[metrics]'") from None
    inception_score = logits = None
    if classifier is not None:
        with torch.no_grad():
            logits = classifier(fake).double()
    real, fake = real.double(), fake.double()
    given = _Given(real.shape[1])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that features are kept in memory
        torch.default_generator.manual_seed(0)  # and no device's, which a training run draws from
        # No sync: under torchrun one process scores a run, and the others would not answer.
        distance = FrechetInceptionDistance(given, sync_on_compute=False).to(real.device)
        distance.update(real, real=True)
        distance.update(fake, real=False)
        fid = float(distance.compute())
        if logits is not None:
            sharpness = InceptionScore(given, splits=IS_SPLITS, sync_on_compute=False)
            sharpness.to(real.device)
            sharpness.update(logits)
            inception_score = float(sharpness.compute()[0])
    return Scores(fid, kernel_distance(real, fake), inception_score, **neighbourhoods(real, fake))


class _Given(nn.Module):
    """What torchmetrics takes for a network: the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID of features (N, D) and (M, D) in float64: the mean kernel of two different real images,
    plus that of two different fakes, minus twice that of a real image and a fake."""

    def total(a: Tensor, b: Tensor) -> float:
        parts = [_kernel(rows, b).sum() for rows in a.split(ROWS)]
        return float(torch.stack(parts).sum())

    def mean_of_pairs(x: Tensor) -> float:
        itself = (x.square().mean(1) + 1).pow(3).sum()
        return (total(x, x) - float(itself)) / (len(x) * (len(x) - 1))

    across = total(real, fake) / (len(real) * len(fake))
    return mean_of_pairs(real) + mean_of_pairs(fake) - 2 * across


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(A, D), (B, D) -> (A, B)."""
    return (a @ b.T / a.shape[1] + 1).pow(3)


def neighbourhoods(real: Tensor, fake: Tensor, nearest: int = NEAREST) -> dict[str, float]:
    """Precision, recall, density and coverage.

    With B(x) the ball around x that reaches to the `nearest`-th other image of x's own set:
    precision is the share of fakes in any B(real), recall the share of real images in any B(fake),
    density the mean number of B(real) that a fake lies in, over `nearest`, and coverage the share
    of B(real) that hold any fake.

    Args:
        real, fake: features (N, D) in float64.
        nearest: k; fewer than there are images of either set.
    """
    middle = real.mean(0)
    real, fake = real - middle, fake - middle  # short vectors: small errors in their distances
    around_real, around_fake = radii_of(real, nearest), radii_of(fake, nearest)
    held = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled = covered = 0
    for start in range(0, len(real), ROWS):
        rows = slice(start, start + ROWS)
        apart = squared_distances(real[rows], fake)
        within = apart <= around_real[rows, None]
        held += within.sum(0)
        covered += int(within.any(1).sum())
        recalled += int((apart <= around_fake).any(1).sum())
    return {
        "precision": float((held > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(held.sum()) / (nearest * len(fake)),
        "coverage": covered / len(real),
    }


def radii_of(features: Tensor, nearest: int) -> Tensor:
    """(N,): the squared distance of each from its `nearest`-th neighbour."""
    radii = []
    for start in range(0, len(features), ROWS):
        apart = squared_distances(features[start : start + ROWS], features)
        apart.diagonal(start).fill_(torch.inf)  # nothing is its own neighbour
        radii.append(apart.kthvalue(nearest, 1).values)
    return torch.cat(radii)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(A, D), (B, D) -> (A, B)."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(lengths, a, b.T, alpha=-2).clamp_(min=0)
