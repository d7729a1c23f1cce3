"""What passes the screen: planted copies of real images do not, other images do; density beside
scikit-learn's neighbours; the discriminator's opinion beside a quantile of its own logits."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from fastdcgan.data import prepare
from fastdcgan.metrics.features import centre, extract
from fastdcgan.metrics.networks import load_network
from fastdcgan.models import Discriminator
from fastdcgan.synthetic_data.screening import (
    BAD,
    COPY,
    KEPT,
    Neighbourhood,
    Opinion,
    Screen,
    copy_radius,
    logits_by,
)  # fmt: skip

CPU = torch.device("cpu")


def test_brightened_copies_are_found_and_other_images_kept():
    """By the default network and quantile, on tiles of the map: half are real, half are not."""
    packed = prepare("blue-marble", size=64, progress=False)
    tiles = centre(packed, np.random.default_rng(5).permutation(packed.n)[:80])
    real, others = tiles[:40], tiles[40:]
    brighter = np.clip(real[:20].astype(int) + 4, 0, 255).astype(np.uint8)
    network = load_network("lite0", CPU)

    def features(images):
        return extract([images], network, CPU)

    near = Neighbourhood.of(features(real), quantile=0.01, nearest=None)
    screen = Screen(features, near, None)
    verdicts = screen.judge(np.concatenate([brighter, real[20:], others]))
    assert (verdicts[:40] == COPY).all()
    assert (verdicts[40:] == COPY).sum() <= 2
    assert (verdicts[40:] != BAD).all()
    off = Neighbourhood.of(features(real), quantile=0, nearest=None)
    assert (off.judge(features(real)) == KEPT).all()


@pytest.mark.parametrize("nearest", [1, 4])
def test_density_and_copies_are_scikit_learns(nearest):
    random = np.random.default_rng(1)
    real = random.normal(3, 1, (60, 5))
    drawn = random.normal(3, 2, (200, 5))
    drawn[:10] = real[:10] + 1e-3
    found = NearestNeighbors(n_neighbors=nearest + 1).fit(real).kneighbors(real)[0]
    radii, radius = found[:, nearest], np.quantile(found[:, 1], 0.1)
    apart = np.linalg.norm(drawn[:, None] - real, axis=2)
    density = (apart <= radii).sum(1) / nearest  # Naeem et al. 2020, of each image
    expected = np.where(apart.min(1) < radius, COPY, np.where(density == 0, BAD, KEPT))
    assert {*expected} == {KEPT, COPY, BAD}
    near = Neighbourhood.of(torch.from_numpy(real), quantile=0.1, nearest=nearest)
    assert near.judge(torch.from_numpy(drawn)).tolist() == expected.tolist()
    assert near.copy_radius == pytest.approx(radius, rel=1e-12)


def test_real_images_that_are_there_twice_do_not_shrink_the_radius():
    real = torch.tensor([[0.0, 0], [0, 0], [3, 4], [30, 40]], dtype=torch.float64)
    assert copy_radius(real, 0.0) == 5.0
    assert copy_radius(torch.zeros(4, 2), 0.5) == 0.0


def test_the_discriminator_drops_the_share_it_finds_least_real():
    torch.manual_seed(0)
    netD = Discriminator(32, 4, 1).eval()
    random = np.random.default_rng(2)
    pilot, images = random.integers(0, 256, (2, 300, 32, 32, 1), np.uint8)
    opinion = Opinion.of(logits_by(netD), pilot, 0.25)
    exact = Discriminator(32, 4, 1).double().eval()
    exact.load_state_dict(netD.state_dict())

    def logits(pixels):
        x = torch.from_numpy(pixels[..., 0]).double()[:, None] / 127.5 - 1
        with torch.no_grad():
            return exact(x).numpy()

    least = np.sort(logits(pilot))[[74, 75]]  # 0.25 * 299 lies between these two
    assert least[0] < opinion.least < least[1]
    bad = logits(images) < opinion.least
    assert 30 < bad.sum() < 150
    assert ((opinion.judge(images) == BAD) == bad).all()
    screen = Screen(None, None, opinion)
    assert ((screen.judge(images) == KEPT) == ~bad).all()
    assert screen.facts() == {"least_logit": opinion.least}


def test_a_discriminator_with_classes_is_asked_for_the_label():
    torch.manual_seed(0)
    netD = Discriminator(32, 4, 1, classes=("a", "b")).eval()
    images = np.random.default_rng(2).integers(0, 256, (9, 32, 32, 1), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for label in (0, 1):
        with torch.no_grad():
            expected = netD(x, torch.full((9,), label))
        assert torch.allclose(logits_by(netD, label)(images), expected, atol=1e-5)
    assert not torch.equal(logits_by(netD, 0)(images), logits_by(netD, 1)(images))


def test_what_is_a_copy_and_bad_counts_as_a_copy():
    near = Neighbourhood.of(torch.eye(4), quantile=0.5, nearest=None)
    opinion = Opinion(lambda images: torch.full((len(images),), -1.0), 0.0)
    images = np.zeros((3, 1, 1, 1), np.uint8)
    screen = Screen(lambda images: torch.eye(4)[: len(images)] * 5, near, opinion)
    assert screen.judge(images).tolist() == [BAD] * 3
    screen = Screen(lambda images: torch.eye(4)[: len(images)], near, opinion)
    assert screen.judge(images).tolist() == [COPY] * 3
