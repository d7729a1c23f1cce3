"""Inversion: a generator whose inverse is known is inverted, and rows do not see each other."""

import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.latent.draw import latents
from fastdcgan.latent.projection import best_draws, descend, frozen, nearest_images, project, rounds


class Linear(nn.Module):
    """Images of 4 x 4 whose inverse is a transposition: z times an orthogonal matrix."""

    def __init__(self, nz=16):
        super().__init__()
        self.nz = nz
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(nz, 16, dtype=torch.float64)))

    def forward(self, z):
        return (z @ self.weight).view(-1, 1, 4, 4)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return Linear()


def test_a_generator_with_a_known_inverse_is_inverted(linear):
    z = torch.randn(3, 16, dtype=torch.float64)
    found = nearest_images(linear, linear(z).detach(), restarts=2, pool=64, steps=400, lr=0.1)
    assert torch.allclose(found.z, z, atol=1e-3)
    assert found.losses.max() < 1e-6
    assert linear.weight.grad is None
    assert linear.weight.requires_grad


def test_a_dcgan_finds_its_own_image_again():
    torch.manual_seed(0)
    netG = models.Generator(32, nz=4, ngf=4, channels=1).double()
    netG(torch.randn(64, 4, dtype=torch.float64))
    netG.eval()
    with torch.no_grad():
        images = netG(torch.randn(2, 4, dtype=torch.float64))
    found = nearest_images(netG, images, restarts=4, pool=128, steps=150)
    with torch.no_grad():
        again = netG(found.z)
    apart = (again - images).square().mean((1, 2, 3))
    assert torch.allclose(apart, found.losses[:, 0])
    assert (apart < 0.02 * images.var((1, 2, 3))).all()


def test_rows_are_as_if_alone():
    torch.manual_seed(0)
    start, targets = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def objective(rows):
        return lambda x: (x - targets[rows]).square().sum(1) + x.sin().sum(1)

    together, losses = descend(start, objective(slice(None)), steps=20)
    for row in range(4):
        alone, loss = descend(start[row : row + 1], objective([row]), steps=20)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(loss[0], losses[row])


def test_descent_is_pytorchs_adam_with_a_cosine_and_keeps_the_best():
    start = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.5)
    seen = []
    for step in range(13):
        adam.param_groups[0]["lr"] = 0.25 * (1 + torch.tensor(torch.pi * step / 12).cos().item())
        loss = x.square().sum()
        seen.append((loss.item(), x.detach().clone()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    best, least = descend(start, lambda p: p.square().sum(1), steps=12, lr=0.5)
    expected = min(seen, key=lambda pair: pair[0])
    assert least.item() == pytest.approx(expected[0], rel=1e-6)
    assert torch.allclose(best, expected[1], rtol=1e-6)
    start = torch.full((2, 1), 1e-3)  # one step leads far beyond the minimum
    worse, loss = descend(start, lambda p: p.square().sum(1), steps=1, lr=0.5)
    assert torch.equal(worse, start)
    assert torch.allclose(loss, torch.full((2,), 1e-6))


def test_starts_are_the_best_of_the_draws(linear):
    targets = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def compare(images):
        return (images[None] - targets[:, None]).square().mean((2, 3, 4))

    found = best_draws(linear, compare, 3, pool=300, seed=5)
    draws = torch.cat(list(latents(300, 16, seed=5))).flatten(1).double()
    order = compare(linear(draws)).argsort(1)[:, :3]
    assert torch.equal(found, draws[order])


def test_the_best_restart_comes_first_whatever_the_batch(linear):
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)

    def measure(made, which):
        return (made - images[which]).square().mean((1, 2, 3))

    ticks = []
    options = {"restarts": 4, "pool": 32, "steps": 5}
    net = frozen(linear)
    found = project(net, measure, 3, batch=5, advance=ticks.append, **options)
    assert len(ticks) == rounds(3, restarts=4, steps=5, batch=5) == 15
    assert torch.equal(found.losses, found.losses.sort(1).values)
    losses = torch.stack([measure(net(found.restarts[:, r]), torch.arange(3)) for r in range(4)], 1)
    assert torch.allclose(losses, found.losses)
    other = project(net, measure, 3, batch=256, **options)
    assert torch.allclose(other.restarts, found.restarts)


def test_a_frozen_net_is_the_net_and_leaves_it_alone():
    torch.manual_seed(0)
    netG = models.Generator(32, nz=4, ngf=4)
    netG(torch.randn(8, 4))
    net = frozen(netG)
    z = torch.randn(3, 4, requires_grad=True)
    assert netG.training
    assert all(p.requires_grad for p in netG.parameters())
    netG.eval()
    assert torch.allclose(net(z), netG(z), atol=1e-5)
    (mine,) = torch.autograd.grad(net(z).square().sum(), z)
    (plain,) = torch.autograd.grad(netG(z).square().sum(), z)
    assert torch.allclose(mine, plain, atol=1e-4 * plain.abs().max())


@pytest.mark.parametrize("wrong", [{"restarts": 0}, {"pool": 3}, {"steps": -1}, {"lr": 0.0}])
def test_numbers_out_of_range_are_named(linear, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        project(frozen(linear), lambda images, which: images.mean((1, 2, 3)), 1, **wrong)
