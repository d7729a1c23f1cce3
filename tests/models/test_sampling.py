"""Sampling: the net comes back bit for bit, and both kinds of statistics are what they say."""

import pytest
import torch
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.models import build, sample


def net_and_latents(net):
    torch.manual_seed(0)
    size = 32 if net == "dcgan" else 28
    netG, _ = build(net, size=size, nz=4, ngf=3, ndf=2, channels=1)
    netG(torch.randn(8, 4))  # running statistics of its own
    netG.main[1].eval()  # flags that differ within the net, too, must come back
    return netG, torch.randn(5, 4)


@pytest.mark.parametrize("net", ["dcgan", "tf28"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_sampling_leaves_the_net_as_it_was(net, training, statistics):
    netG, z = net_and_latents(net)
    if not training:
        netG.eval()
    places = {key: value.data_ptr() for key, value in netG.state_dict().items()}
    flags = [module.training for module in netG.modules()]
    netG(z).sum().backward()  # gradients, too, must stay
    before = {key: value.clone() for key, value in netG.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in netG.parameters()]
    images = sample(netG, z, statistics=statistics)
    assert not images.requires_grad
    assert images.dtype == torch.float32
    assert images.shape == (5, 1, netG.size, netG.size)
    assert images.abs().max() <= 1
    for key, value in netG.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.data_ptr() == places[key], key
    assert [module.training for module in netG.modules()] == flags
    for parameter, gradient in zip(netG.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("net", ["dcgan", "tf28"])
def test_statistics_are_those_of_train_and_eval_mode(net):
    netG, z = net_and_latents(net)
    batch, running = sample(netG, z, statistics="batch"), sample(netG, z)
    netG.eval()
    assert torch.equal(sample(netG, z, statistics="batch"), batch)
    with torch.no_grad():
        assert torch.equal(running, netG(z))
        assert torch.equal(batch, netG.train()(z))
    assert not torch.allclose(batch, running, atol=1e-3)


def test_a_pending_backward_survives():
    netG, z = net_and_latents("dcgan")
    images = netG(z)
    sample(netG, z, statistics="batch")
    images.sum().backward()


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_dropout_is_off(statistics):
    netG = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Tanh()).train()
    z = torch.randn(2, 4, 1, 1)
    with torch.no_grad():
        expected = torch.tanh(netG[0](z))
    assert torch.equal(sample(netG, z, statistics=statistics), expected)
    assert netG[1].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_float32(dtype):
    netG, z = net_and_latents("dcgan")
    images = sample(netG.to(dtype), z.to(dtype), statistics="batch")
    assert images.dtype == torch.float32


def test_errors_leave_the_net_as_it_was():
    netG, z = net_and_latents("tf28")
    flags = [module.training for module in netG.modules()]
    before = {key: value.clone() for key, value in netG.state_dict().items()}
    with pytest.raises(InputError, match="statistics='own' was given"):
        sample(netG, z, statistics="own")
    with pytest.raises(InputError, match=r"shape \(5, 3\)"):
        sample(netG, z[:, :3], statistics="batch")
    with pytest.raises(InputError, match="one image was given"):
        sample(netG, z[:1], statistics="batch")
    assert [module.training for module in netG.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in netG.state_dict().items())
