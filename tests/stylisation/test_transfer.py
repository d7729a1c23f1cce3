"""Restyling: the statistics against NumPy, and that a look is transferred while edges stay."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastdcgan import models
from fastdcgan.stylisation.edges import edge_correlation, edge_map
from fastdcgan.stylisation.gram import (
    discriminator_features,
    gram,
    gram_distance,
    lite0_features,
    style_of,
)
from fastdcgan.stylisation.transfer import recoloured, restyle


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    netG, netD = models.build("dcgan", size=32, nz=4, ngf=4, ndf=4, channels=3)
    for _ in range(3):
        netD(netG(torch.randn(32, 4)))
    return netG.eval(), netD.eval()


@pytest.fixture(scope="module")
def pictures():
    """A shape on a blue ground, and a brown texture: (content, style)."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    shape = ((y - 16) ** 2 + (x - 14) ** 2 < 80)[..., None]
    content = np.where(shape, (60, 120, 200), (20, 40, 110)) + random.integers(-4, 5, (32, 32, 3))
    style = np.array((190, 150, 100)) + random.integers(-30, 31, (32, 32, 1))
    return tuple(image.clip(0, 255).astype(np.uint8)[None] for image in (content, style))


def test_gram_is_numpys():
    features = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    flat = features.reshape(2, 5, 12)
    expected = np.einsum("nip,njp->nij", flat, flat) / 12
    assert np.allclose(gram(torch.from_numpy(features)), expected)


def test_gram_distance_is_relative_and_forgets_places():
    random = np.random.default_rng(0)
    layers = [torch.from_numpy(random.normal(size=(2, k, 4, 4))) for k in (3, 5)]
    style = [gram(layer[:1])[0] for layer in layers]
    each = gram_distance(layers, style)
    assert each.shape == (2, 2)
    distance = each.mean(1)
    pairs = zip([gram(layer)[1] for layer in layers], style, strict=True)
    expected = np.mean([((g - s) ** 2).sum() / (s**2).sum() for g, s in pairs])
    assert distance[0] < 1e-20
    assert distance[1] == pytest.approx(expected)
    moved = [layer.roll((1, 2), (2, 3)) for layer in layers]
    assert torch.allclose(gram_distance(moved, style), each)
    nothing = gram_distance([0 * layer for layer in layers], style)
    assert nothing[0].tolist() == pytest.approx([1, 1])


def test_the_look_of_a_set_is_the_mean_of_its_looks(nets):
    features = discriminator_features(nets[1])
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = style_of(images, [features])
    apart = [style_of(image[None], [features]) for image in images]
    for layer, style in enumerate(together):
        mean = torch.stack([one[layer] for one in apart]).mean(0)
        assert torch.allclose(style, mean, atol=1e-5)


def test_features_are_the_discriminators_activations(nets):
    netD = nets[1]
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = discriminator_features(netD)(images)
    assert torch.equal(found[0], (images + 1) / 2)
    with torch.no_grad():
        first = netD.main[:2](images)
        second = netD.main[:5](images)
    assert len(found) == 3, "colours, 16 x 16 and 8 x 8; at 4 x 4 there are no places left"
    assert torch.allclose(found[1], first, atol=1e-5)
    assert torch.allclose(found[2], second, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lite0_gives_features_with_gradients(channels):
    images = torch.zeros(1, channels, 32, 32, requires_grad=True)
    found = lite0_features(torch.device("cpu"))(images)
    assert [f.shape[1:] for f in found] == [
        (16, 64, 64), (24, 32, 32), (40, 16, 16), (80, 8, 8), (112, 8, 8)
    ]  # fmt: skip
    sum(f.square().sum() for f in found).backward()
    assert images.grad.abs().sum() > 0


def test_edges_are_scipys_sobel():
    image = np.random.default_rng(0).uniform(-1, 1, (1, 1, 9, 11))
    across, down = (ndimage.sobel(image[0, 0], axis)[1:-1, 1:-1] / 8 for axis in (1, 0))
    found = edge_map(torch.from_numpy(image))[0]
    assert np.allclose(found, np.hypot(across, down), atol=1e-4)


def test_edge_correlation_is_numpys():
    random = np.random.default_rng(0)
    a, b = (torch.from_numpy(random.uniform(-1, 1, (2, 3, 12, 12))) for _ in range(2))
    found = edge_correlation(a, b)
    for n in range(2):
        expected = np.corrcoef(edge_map(a)[n].flatten(), edge_map(b)[n].flatten())[0, 1]
        assert found[n] == pytest.approx(expected)
    assert torch.allclose(edge_correlation(a, -0.5 * a + 0.1), torch.ones(2, dtype=torch.float64),
                          atol=1e-4)  # fmt: skip


def test_recoloured_images_have_the_others_means_and_spreads():
    random = np.random.default_rng(0)
    images, others = random.normal(size=(2, 3, 8, 8)), random.normal(3, 2, size=(4, 3, 8, 8))
    found = recoloured(torch.from_numpy(images), torch.from_numpy(others)).numpy()
    for n in range(2):
        assert np.allclose(found[n].mean((1, 2)), others.mean((0, 2, 3)))
        assert np.allclose(found[n].std((1, 2), ddof=1), others.std((0, 2, 3), ddof=1))
        assert np.corrcoef(found[n, 1].ravel(), images[n, 1].ravel())[0, 1] == pytest.approx(1)


def test_a_look_is_transferred_and_edges_stay(nets, pictures):
    features = discriminator_features(nets[1])
    content, style = pictures
    device = torch.device("cpu")
    found = restyle(content, style, [features], device=device, steps=120)
    assert found.after < found.before / 10
    assert found.edges > 0.9
    assert abs(found.images.mean((0, 1, 2)) - style.mean((0, 1, 2))).max() < 25
    held = restyle(content, style, [features], device=device, steps=60, strength=0.1)
    free = restyle(content, style, [features], device=device, steps=60, strength=1.0)
    assert held.edges > free.edges
    assert held.after > free.after


def test_in_the_latent_space_the_result_is_the_generators(nets, pictures):
    netG, netD = nets
    content, style = pictures
    features = discriminator_features(netD)
    found = restyle(
        content, style, [features], netG=netG, device=torch.device("cpu"), steps=30, strength=1.0,
        restarts=2, pool=64,
    )  # fmt: skip
    assert found.images.shape == content.shape
    assert found.after < found.before
