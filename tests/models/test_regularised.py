"""Spectral norm and the minibatch's deviation: against the SVD and the formula; and discriminators
that have them, fused, saved and read again."""

import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.models.regularised import MinibatchStd, power_iteration, spectrally_normalise
from fastdcgan_kernels import findings, fuse
from fastdcgan_kernels.modules.block import stat_groups
from fastdcgan_kernels.modules.copies import WorkingCopies


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 4, bias=False), nn.Linear(12, 5)])
def test_the_largest_singular_value_becomes_one(layer):
    torch.manual_seed(0)  # the iteration's speed is that of the two largest values' ratio
    layer.reset_parameters()
    net = nn.Sequential(layer).double().to(memory_format=torch.channels_last)
    spectrally_normalise(net)
    assert torch.equal(layer.weight, layer.weight), "a pass moves nothing"
    before = layer.weight
    for _ in range(300):
        power_iteration(net)
    weight = layer.weight.detach()
    assert not torch.equal(before, weight)
    largest = torch.linalg.matrix_norm(weight.flatten(1), 2)
    assert largest.item() == pytest.approx(1, abs=1e-6)
    original = layer.parametrizations.weight.original
    true = torch.linalg.matrix_norm(original.detach().flatten(1), 2)
    torch.testing.assert_close(weight * true, original, rtol=1e-6, atol=1e-8)
    assert weight.stride() == original.stride()


def test_gradients_go_through_the_norm():
    """d/dW of <A, W / sigma>: (A - <A, W/sigma> u v^T) / sigma, Miyato et al., equation 12."""
    conv = nn.Conv2d(2, 3, 2, bias=False).double()
    spectrally_normalise(conv)
    for _ in range(500):
        power_iteration(conv)
    weight = conv.weight
    a = torch.randn_like(weight)
    original = conv.parametrizations.weight.original
    (found,) = torch.autograd.grad((a * weight).sum(), original)
    u, s, v = torch.linalg.svd(original.detach().flatten(1))
    outer = (u[:, :1] @ v[:1]).view_as(a)
    expected = (a - (a * weight.detach()).sum() * outer) / s[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_deviation_is_one_number_a_batch():
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    y = MinibatchStd()(x)
    assert torch.equal(y[:, :4], x)
    expected = x.numpy().std(0).mean()
    assert y[:, 4].flatten().tolist() == pytest.approx([expected] * 45)
    one = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MinibatchStd()(one).sum(), one)
    assert gradient.isfinite().all(), "of a batch of one, which does not deviate"


KINDS = [
    {"norm": "none"},
    {"spectral_norm": True},
    {"norm": "none", "spectral_norm": True, "minibatch_std": True},
    {"minibatch_std": True},
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_discriminator_is_built_again_from_its_weights(kind):
    torch.manual_seed(0)
    net = models.Discriminator(32, 4, 3, **kind)
    x = torch.randn(3, 3, 32, 32)
    net(x)
    again = models.discriminator_from(net.state_dict())
    assert again.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(again.eval()(x), net.eval()(x))
    other = models.Discriminator(32, 4, 3, **kind)
    models.load_weights(other, net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))


def test_the_tutorials_discriminator_is_too():
    net = models.TF28Discriminator(1, spectral_norm=True)
    again = models.discriminator_from(net.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.eval()(x), net.eval()(x))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_fused_it_computes_the_same(impl, monkeypatch):
    """By the C++ kernels of the CPU, or by Triton's in the interpreter; both batches in one pass,
    each with a deviation of its own; and no copies are kept of weights that are computed."""
    if impl == "auto":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    torch.manual_seed(0)
    net = models.Discriminator(32, 16, 3, norm="none", spectral_norm=True, minibatch_std=True)
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = net.eval()(x[:2]), net(x[2:])
    (a.sum() + b.square().sum()).backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    fuse(net)
    assert [f.fused for f in findings(net)] == [True] * 4
    monkeypatch.setenv("FASTDCGAN_IMPL", impl)
    with stat_groups(2), WorkingCopies(net, torch.float32):
        out = net(x)
    torch.testing.assert_close(out, torch.cat([a, b]), rtol=1e-4, atol=1e-5)
    (out[:2].sum() + out[2:].square().sum()).backward()
    for p, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)
    assert net.state_dict().keys() == start.keys()
