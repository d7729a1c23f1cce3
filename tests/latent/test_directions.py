"""Principal directions: against the singular vectors of the first layer, asked as a black box."""

import pytest
import torch

from fastdcgan import models
from fastdcgan.latent.directions import principal_directions


@pytest.mark.parametrize(("net", "size"), [("dcgan", 32), ("tf28", 28)])
def test_they_are_the_principal_components_of_the_first_layer(net, size):
    torch.manual_seed(0)
    netG, _ = models.build(net, size=size, nz=7, ngf=4, ndf=4, channels=1)
    netG = netG.double().eval()
    norm = netG.main[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4)
    norm.weight.data.uniform_(0.2, 3)
    found = principal_directions(netG, 5)
    ends = torch.cat([torch.eye(7, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.float64)])
    with torch.no_grad():
        shape = (8, 7, 1, 1) if net == "dcgan" else (8, 7)
        outputs = netG.main[:2](ends.view(shape)).flatten(1)
    u, s, _ = torch.linalg.svd(outputs[:-1] - outputs[-1], full_matrices=False)
    expected = u.T[:5]
    expected *= expected.gather(1, expected.abs().argmax(1, keepdim=True)).sign()
    torch.testing.assert_close(found.vectors.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.shares.double(), s[:5] ** 2 / (s**2).sum(), rtol=1e-6, atol=0)
    assert found.vectors.dtype == torch.float32


def test_the_net_is_left_as_it_was():
    torch.manual_seed(0)
    netG, _ = models.build("dcgan", size=32, nz=6, ngf=4, ndf=4, channels=3)
    before = {name: value.clone() for name, value in netG.state_dict().items()}
    assert principal_directions(netG).vectors.shape == (6, 6)
    assert netG.training
    assert all(torch.equal(value, before[name]) for name, value in netG.state_dict().items())
