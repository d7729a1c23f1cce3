"""Scores beside independent ones on the same features (published formulas in float64, and
torch-fidelity), and what they say of images that are known to be worse."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from fastdcgan.errors import InputError
from fastdcgan.metrics import scores
from fastdcgan.metrics.features import extract
from fastdcgan.metrics.scores import neighbourhoods, score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_sets():
    """Two overlapping clouds that are no Gaussians, 400 and 300 points of 24 numbers, float32."""
    random = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=random)
    real = torch.randn(400, 24, generator=random).relu() @ mix
    fake = torch.randn(300, 24, generator=random).relu() @ (mix * 0.9) + 0.3
    return real, fake


def test_fid_is_the_published_formula(two_sets):
    real, fake = (x.double().numpy() for x in two_sets)
    covariances = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    away = np.square(real.mean(0) - fake.mean(0)).sum()
    expected = away + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root)
    assert score(*two_sets, None).fid == pytest.approx(expected, rel=1e-6)


def test_kid_is_the_published_formula(two_sets):
    x, y = (features.double().numpy() for features in two_sets)

    def kernel(a, b):
        return (a @ b.T / 24 + 1) ** 3

    def others(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert score(*two_sets, None).kid == pytest.approx(expected, rel=1e-9)


def test_inception_score_is_the_published_formula(two_sets, monkeypatch):
    monkeypatch.setattr(scores, "IS_SPLITS", 1)  # the papers' ten depend on a random order
    classifier = nn.Linear(24, 10).requires_grad_(False)
    p = classifier(two_sets[1]).double().softmax(1).numpy()
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    found = score(*two_sets, classifier).inception_score
    assert found == pytest.approx(expected, rel=1e-6)
    theirs = isc_features_to_metric(classifier(two_sets[1]), splits=1)
    assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert score(*two_sets, None).inception_score is None


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_torchmetrics_and_torch_fidelity_agree(two_sets):
    """On KID where one subset is all; of random subsets they have the mean, but for the draw."""
    real, fake = (x.double() for x in two_sets)
    found = score(*two_sets, None)
    statistics = [fid_features_to_statistics(x) for x in (real, fake)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)
    assert found.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    metric = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=300)
    metric.update(real[:300], real=True)
    metric.update(fake, real=False)
    same = score(two_sets[0][:300], two_sets[1], None)
    assert same.kid == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    options = {"kid_subset_size": 300, "verbose": False}
    theirs = kid_features_to_metric(real[:300], fake, kid_subsets=1, **options)
    assert same.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    drawn = kid_features_to_metric(real, fake, kid_subsets=400, **options)
    noise = drawn["kernel_inception_distance_std"] / 400**0.5
    assert abs(found.kid - drawn["kernel_inception_distance_mean"]) < 4 * noise
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    ours = neighbourhoods(real, fake, nearest=3)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


@pytest.mark.parametrize("rows", [512, 7])
def test_neighbourhoods_are_those_of_the_papers(two_sets, monkeypatch, rows):
    """Every distance by itself, every ball by its definition."""
    monkeypatch.setattr(scores, "ROWS", rows)
    real, fake = (x.double().numpy()[:150] for x in two_sets)

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[
            4
        ]

    reach = [radius(real, i) for i in range(len(real))]
    reach_fake = [radius(fake, j) for j in range(len(fake))]
    apart = np.array([[np.linalg.norm(x - y) for y in fake] for x in real])
    in_real = np.array([[d <= reach[i] for d in row] for i, row in enumerate(apart)])
    in_fake = np.array([[d <= reach_fake[j] for j, d in enumerate(row)] for row in apart])
    expected = {
        "precision": np.mean([any(in_real[:, j]) for j in range(len(fake))]),
        "recall": np.mean([any(row) for row in in_fake]),
        "density": in_real.sum() / (5 * len(fake)),
        "coverage": np.mean([any(row) for row in in_real]),
    }
    found = neighbourhoods(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["coverage"] < 1, "else the test shows nothing"
    assert 0 < expected["recall"] < 1


def test_the_same_call_gives_the_same_bits_and_draws_no_numbers(two_sets):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = score(*two_sets, None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert score(*two_sets, None) == first


def test_too_few_images_are_refused(two_sets):
    with pytest.raises(InputError, match="too few"):
        score(two_sets[0][:5], two_sets[1], None)


# ---- images that are known to be worse -----------------------------------------------------------


def blurred(images):
    """By a Gaussian of 0.7 pixels."""
    taps = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * 0.7**2))
    taps = (taps / taps.sum()).repeat(3, 1, 1)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    x = nn.functional.conv2d(x, taps[:, :, None], groups=3)
    x = nn.functional.conv2d(x, taps[:, :, :, None], groups=3)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def noisy(images):
    """With a standard deviation of 5 of 255."""
    noise = np.random.default_rng(0).normal(0, 5, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def shuffled(images):
    """Their 16 patches each in a random order."""
    random = np.random.default_rng(0)
    n, side, _, channels = images.shape
    patches = images.reshape(n, 4, side // 4, 4, side // 4, channels).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(n, 16, side // 4, side // 4, channels)
    mixed = np.stack([image[random.permutation(16)] for image in patches])
    mixed = mixed.reshape(n, 4, 4, side // 4, side // 4, channels).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(mixed.reshape(images.shape))


def test_fid_and_kid_put_worse_images_in_their_order(tiles, features, lite0):
    """Another half of the map, and this half blurred, noisy, shuffled: each worse than the last."""
    real, half = features[:200], tiles[200:]
    sets = [features[200:], *(extract([f(half)], lite0, CPU) for f in (blurred, noisy, shuffled))]
    found = [score(real, fake, lite0.classifier) for fake in sets]
    for name in ("fid", "kid"):
        values = [getattr(s, name) for s in found]
        assert values == sorted(values), name
        assert values[3] > 2 * values[1], name
    assert abs(found[0].kid) < 0.005, "unbiased: about 0 for real images"
    assert found[0].coverage > 0.8 > 0.5 > found[3].coverage


def test_a_collapsed_generator_is_seen_by_recall_and_coverage(features):
    """Ten real images again and again: mostly as good as real, and nothing else."""
    real, others = features[:200], features[200:]
    collapsed = others[:10].repeat(20, 1)
    good, bad = score(real, others, None), score(real, collapsed, None)
    assert bad.precision > 0.5
    assert bad.density > 0.9
    assert bad.recall < 0.05 < 0.5 < good.recall
    assert bad.coverage < 0.4 < 0.8 < good.coverage
    assert bad.fid > 2 * good.fid
