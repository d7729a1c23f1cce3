"""Filling: the losses against their formulas, the blending against a dense solver, and what must
not be touched or read."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from fastdcgan import models
from fastdcgan.inpainting import scores
from fastdcgan.inpainting.blending import blend, trust
from fastdcgan.inpainting.filling import contextual_loss, fill, prior_loss, shrink
from fastdcgan.inpainting.masks import make_mask


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    netG, netD = models.build("dcgan", size=32, nz=4, ngf=4, ndf=4, channels=3)
    for _ in range(3):
        netD(netG(torch.randn(32, 4)))
    return netG.eval(), netD.eval()


@pytest.fixture(scope="module")
def images():
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def test_contextual_loss_is_the_papers_formula():
    random = np.random.default_rng(0)
    made, seen = random.uniform(-1, 1, (2, 3, 2, 8, 8))
    weights = make_mask("center", 8).weights
    expected = [sum((weights * abs(a - b)).sum() for a, b in zip(*pair, strict=True)) / 2
                for pair in zip(made, seen, strict=True)]  # fmt: skip
    found = contextual_loss(*map(torch.from_numpy, (made, seen, weights)))
    assert np.allclose(found, expected, rtol=1e-12)


def test_prior_loss_is_log_of_one_minus_d():
    logits = torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)
    assert torch.allclose(prior_loss(logits), torch.log(1 - torch.sigmoid(logits)))


def test_shrinking_takes_means():
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    expected = image.reshape(2, 3, 2, 4, 2, 4).mean((3, 5))
    assert np.allclose(shrink(torch.from_numpy(image), 4), expected)


@pytest.mark.parametrize("kind", ["center", "left", "random"])
def test_blending_minimises_the_difference_of_gradients(kind):
    """Beside a dense least squares solution over every pair of neighbours."""
    random = np.random.default_rng(0)
    made, given = random.uniform(0, 255, (2, 2, 8, 8, 3))
    hole = make_mask(kind, 8, seed=1).hole
    strengths = np.array([1.0, 0.4])
    found = blend(made, given, hole, strengths)
    assert np.array_equal(found[:, ~hole], given[:, ~hole])
    index = np.arange(64).reshape(8, 8)
    pairs = [*zip(index[1:].flat, index[:-1].flat, strict=True),
             *zip(index[:, 1:].flat, index[:, :-1].flat, strict=True)]  # fmt: skip
    inside = hole.ravel()
    for n in range(2):
        for channel in range(3):
            g, f = made[n, ..., channel].ravel(), given[n, ..., channel].ravel()
            rows, right = [], []
            for p, q in pairs:
                row = np.zeros(64)
                row[p], row[q] = 1, -1
                rows.append(row)
                right.append(strengths[n] * (g[p] - g[q]))
            matrix = np.array(rows)
            known = matrix[:, ~inside] @ f[~inside]
            best = np.linalg.lstsq(matrix[:, inside], np.array(right) - known, rcond=None)[0]
            assert np.allclose(found[n, ..., channel].ravel()[inside], best)


def test_trust_is_how_far_gradients_agree_where_they_are_seen():
    random = np.random.default_rng(0)
    given = random.uniform(0, 255, (1, 8, 8, 1))
    hole = make_mask("center", 8).hole
    made = given * 2
    made[:, hole] = random.uniform(0, 255, (1, 16, 1))  # what is hidden has no say
    assert trust(made, given, hole) == pytest.approx([0.5])
    assert trust(given / 2, given, hole) == pytest.approx([1.0]), "clipped"
    assert trust(255 - given, given, hole) == pytest.approx([0.0])
    assert trust(given * 0, given, hole) == pytest.approx([0.0])


@pytest.mark.parametrize("kind", ["center", "left", "random", "grid"])
def test_what_is_seen_stays_and_what_is_hidden_is_not_read(nets, images, kind):
    mask = make_mask(kind, 32)
    hole = mask.hole
    other = images.copy()
    other[:, hole] = 255 - other[:, hole]
    for blending in ("none", "poisson"):
        options = {"restarts": 2, "pool": 16, "steps": 3, "blending": blending}
        found = fill(*nets, images, mask, **options)
        assert found.images.dtype == np.uint8
        assert np.array_equal(found.images[:, ~hole], images[:, ~hole])
        blind = fill(*nets, other, mask, **options)
        assert np.array_equal(blind.images[:, hole], found.images[:, hole])
        if blending == "none":
            assert np.array_equal(found.images[:, hole], found.generated[:, hole])


def test_whole_images_are_the_generators(nets):
    netG, _ = nets
    with torch.no_grad():
        made = netG(torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    truth = ((made + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for kind in ("full", "lowres"):
        found = fill(*nets, truth, make_mask(kind, 32), steps=150, prior=0, restarts=4, pool=256)
        assert np.array_equal(found.images, found.generated)
        spread = truth.astype(float).std()
        assert abs(found.images.astype(float) - truth).mean() < 0.15 * spread, kind


def test_more_weight_for_the_discriminator_pleases_it_more(nets, images):
    netG, netD = nets
    mask = make_mask("center", 32)
    logits = []
    for prior in (0.0, 10.0):
        found = fill(netG, netD, images, mask, prior=prior, steps=20, restarts=1, pool=8)
        made = torch.from_numpy(found.generated).permute(0, 3, 1, 2).float() / 127.5 - 1
        logits.append(netD(made).mean().item())
    assert logits[1] > logits[0]


def test_the_mean_of_all_restarts(nets, images):
    mask = make_mask("center", 32)
    options = {"restarts": 3, "pool": 16, "steps": 2, "prior": 0}
    best, mean = (fill(*nets, images, mask, combine=c, **options) for c in ("best", "mean"))
    assert torch.equal(best.losses, mean.losses)
    assert not np.array_equal(best.generated, mean.generated)


def test_scores_are_scikit_images_inside_the_mask(images):
    mask = make_mask("center", 32)
    other = images.copy()
    other[:, mask.hole] = np.roll(images, 3, axis=1)[:, mask.hole]
    found = scores.inside(other, images, mask)
    psnr, ssim = [], []
    for a, b in zip(images.astype(float), other.astype(float), strict=True):
        psnr.append(10 * np.log10(255**2 / ((a - b)[mask.hole] ** 2).mean()))
        whole = structural_similarity(a, b, channel_axis=2, data_range=255, full=True)[1]
        ssim.append(whole[8:24, 8:24].mean())
    assert found["psnr"] == pytest.approx(np.mean(psnr))
    assert found["ssim"] == pytest.approx(np.mean(ssim))
    assert scores.inside(images, images, mask) == {"psnr": 100.0, "ssim": pytest.approx(1)}


@pytest.mark.parametrize("channels", [1, 3])
def test_rivals_fill_the_hole_alone_and_do_not_look_into_it(channels):
    truth = np.random.default_rng(0).integers(0, 256, (2, 32, 32, channels), dtype=np.uint8)
    mask = make_mask("center", 32)
    blind = np.where(mask.hole[None, :, :, None], np.uint8(9), truth)
    for name, filled in scores.rivals(truth, mask).items():
        assert filled.shape == truth.shape
        assert np.array_equal(filled[:, ~mask.hole], truth[:, ~mask.hole])
        assert np.array_equal(filled, scores.rivals(blind, mask)[name])
    mean = truth[1][~mask.hole].mean(0).round()
    assert np.array_equal(scores.rivals(truth, mask)["mean"][1, 16, 16], mean)
    assert set(scores.rivals(truth, make_mask("lowres", 32))) == {"bicubic"}
    assert scores.rivals(truth, make_mask("full", 32)) == {}
