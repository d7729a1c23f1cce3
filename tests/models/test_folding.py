"""BatchNorm folded into weights: the same numbers without it, in float64."""

import pytest
import torch
from torch import nn

from fastdcgan import models


def trained(net):
    """Statistics, scales and shifts unlike those of a new net."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.2, 3)
    return net.double().eval()


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (models.Generator(size=32, nz=5, ngf=3), torch.randn(4, 5)),
        (models.Discriminator(size=32, ndf=3), torch.randn(4, 3, 32, 32)),
        (models.TF28Generator(nz=5), torch.randn(4, 5)),
        (models.TF28Discriminator(), torch.randn(4, 1, 28, 28)),
    ],
    ids=lambda v: type(v).__name__,
)
@torch.no_grad()
def test_a_folded_net_computes_the_same(net, x):
    net, x = trained(net), x.double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    expected = net(x)
    folded = models.fold(net)
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-12)
    assert norms(folded) == []
    assert len(folded.main) == len(net.main)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(net(x), expected), "the net itself stays"


@torch.no_grad()
def test_a_norm_behind_anything_else_stays():
    """Padding adds zeros, and an activation bends: neither lets a norm through."""
    for between in (nn.ReLU(), nn.ZeroPad2d(1)):
        net = trained(nn.Sequential(nn.Conv2d(2, 3, 3), between, nn.BatchNorm2d(3)))
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
        folded = models.fold(net)
        assert len(norms(folded)) == 1
        assert torch.equal(folded(x), net(x))


def test_dtype_and_bias_stay():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    nn.init.normal_(net[1].running_mean)
    folded = models.fold(net)
    x = torch.randn(2, 2, 6, 6)
    assert folded[0].weight.dtype == torch.float32
    torch.testing.assert_close(folded(x), net(x))


@torch.no_grad()
def test_a_spectrally_normalised_weight_becomes_plain():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    net = trained(nn.Sequential(conv, nn.BatchNorm2d(3)))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    folded = models.fold(net)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-10, atol=1e-12)
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
