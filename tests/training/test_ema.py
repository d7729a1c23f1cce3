"""The averaged generator's own statistics, beside those measured layer by layer."""

import copy

import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.training import ema
from fastdcgan.training.ema import settled
from fastdcgan_kernels import fuse

NETS = {
    "dcgan": lambda: models.Generator(32, 6, 4),
    "classes": lambda: models.Generator(32, 6, 4, classes=("a", "b", "c")),
    "tf28": lambda: models.TF28Generator(6),
}


def measured(net):
    """Of each BatchNorm, the mean over batches of its input's mean and variance (unbiased, Keras's
    biased): what running statistics are that count each batch the same."""
    net = copy.deepcopy(net).double().train()
    sums, norms = {}, [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        keras = "Keras" in type(norm).__name__

        def look(norm, inputs, keras=keras):
            (x,) = inputs
            over = (0, 2, 3)[: x.dim() - 1]
            found = torch.stack([x.mean(over), x.var(over, unbiased=not keras)])
            sums[norm] = sums.get(norm, 0) + found

        norm.register_forward_pre_hook(look)
    z = torch.randn(ema.LATENTS, net.nz, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    batches = z.split(ema.BATCH)
    for index, batch in enumerate(batches):
        labels = torch.arange(index * ema.BATCH, (index + 1) * ema.BATCH) % len(net.classes or "x")
        with torch.no_grad():
            net(batch, *(() if net.classes is None else (labels,)))
    return [sums[norm] / len(batches) for norm in norms]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_statistics_are_those_of_its_own_features(kind, fused):
    torch.manual_seed(0)
    net = NETS[kind]()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(2, 3)
    expected, before = measured(net), copy.deepcopy(net.state_dict())
    if fused:
        fuse(net)
    found = settled(net)
    assert not found.training
    norms = [m for m in found.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm, (mean, variance) in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-6)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), "the average stays as it is"
        if "running" not in key:
            assert torch.equal(found.state_dict()[key], value), key
    momenta = [[m.momentum for m in n.modules() if hasattr(m, "momentum")] for n in (net, found)]
    assert momenta[0] == momenta[1]


def test_a_net_without_norm_is_copied():
    net = models.Generator(32, 6, 4, norm="none")
    found = settled(net)
    assert found is not net
    for key, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


def test_images_of_an_average_are_those_of_batches_again():
    """Of a net whose running statistics are wrong, as an average's are."""
    torch.manual_seed(1)
    net = models.Generator(32, 6, 16)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(2.0)
    z = torch.randn(512, 6)
    batch = models.sample(net, z, statistics="batch")
    off = [float((models.sample(n, z) - batch).norm() / batch.norm()) for n in (net, settled(net))]
    assert off[1] < 0.15 < 0.5 < off[0]
