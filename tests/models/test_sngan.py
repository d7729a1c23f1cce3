"""SNGAN's discriminator beside its paper's table written out, and a generator without norm."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastdcgan.models import SNGANDiscriminator, build
from fastdcgan.models.dcgan import Generator
from fastdcgan_kernels import fuse, share

# Output channels, kernel and stride of each convolution at 32 pixels; then a dense layer to 1.
TABLE = [(64, 3, 1), (64, 4, 2), (128, 3, 1), (128, 4, 2), (256, 3, 1), (256, 4, 2), (512, 3, 1)]


def paper():
    """Table 3 of the paper for 32 pixels, under torch's own spectral norm."""
    layers, before = [], 3
    for channels, kernel, stride in TABLE:
        layers += [spectral_norm(nn.Conv2d(before, channels, kernel, stride, 1)), nn.LeakyReLU(0.1)]
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(512 * 4 * 4, 1)))


def weights(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_it_is_the_papers_at_32_pixels():
    torch.manual_seed(0)
    ours, theirs = SNGANDiscriminator(32).double(), paper().double()
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        norm, torchs = mine.parametrizations.weight, other.parametrizations.weight
        with torch.no_grad():
            mine.bias.normal_()
            other.bias.copy_(mine.bias)
            torchs.original.copy_(norm.original.reshape(torchs.original.shape))
            # The same vectors; ours has a weight's columns in the order of channels_last.
            kernel = norm.original.shape[2:]
            torchs[0]._u.copy_(norm[0].u)
            torchs[0]._v.copy_(norm[0].v.unflatten(0, (*kernel, -1)).movedim(-1, 0).flatten())
    theirs.eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x).flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (32, [1, 1, 2, 2, 4, 4, 8, 1]),
        (64, [1, 1, 2, 2, 4, 4, 8, 8, 8, 1]),
        (128, [1, 1, 2, 2, 4, 4, 8, 8, 8, 8, 8, 1]),
    ],
)
def test_larger_images_have_more_stages(size, widths):
    netD = SNGANDiscriminator(size, ndf=6)
    found = [conv.out_channels for conv in weights(netD)]
    assert found == [6 * width for width in widths[:-1]] + [1]
    assert netD(torch.zeros(3, 3, size, size)).shape == (3,)
    assert not [m for m in netD.modules() if isinstance(m, nn.BatchNorm2d)]


def test_every_weight_is_under_spectral_norm_and_fused(monkeypatch):
    netD = SNGANDiscriminator(32, ndf=8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    plain = netD(x)
    for conv in weights(netD):
        largest = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
        assert largest.item() == pytest.approx(1, rel=0.05)
    fuse(netD)
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    assert share(netD, x) == 1
    torch.testing.assert_close(netD(x), plain, rtol=1e-5, atol=1e-6)


def test_labels_move_the_logit():
    netD = SNGANDiscriminator(32, 4, 1, classes=("a", "b"))
    x = torch.randn(4, 1, 32, 32)
    logits = [netD(x, torch.full((4,), label)) for label in (0, 1)]
    assert logits[0].shape == (4,)
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_features_keep_their_variance_without_norm(size):
    """But for what the zeros around a small image take."""
    torch.manual_seed(1)
    netG = Generator(size, 100, 16, 3, norm="none").double()
    strength, x = [], torch.randn(64, 100, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        for layer in netG.main:
            if isinstance(layer, nn.Tanh):
                strength.append(x.square().mean())
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                strength.append(x.square().mean())
    assert all(0.35 < value < 1.2 for value in strength), strength
    assert not [m for m in netG.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.bias is not None for m in netG.main if isinstance(m, nn.ConvTranspose2d))


def test_the_examples_nets_are_what_they_were():
    torch.manual_seed(3)
    netG, netD = build("dcgan", size=32, nz=4, ngf=4, ndf=4, channels=3)
    torch.manual_seed(3)
    againG, otherD = build("dcgan", size=32, nz=4, ngf=4, ndf=4, channels=3, net_d="sngan")
    assert torch.equal(netG.main[0].weight, againG.main[0].weight)
    assert type(otherD) is SNGANDiscriminator
    assert type(netD) is not SNGANDiscriminator
