"""The DCGAN nets against the PyTorch example's, and their shapes at every size."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.models import Discriminator, Generator, begin_as_resizing, build, weights_init


def same_bits(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_sizes_are_the_examples():
    netG, netD = Generator(), Discriminator()
    assert (len(netG.state_dict()), parameters(netG)) == (25, 3_576_704)
    assert (len(netD.state_dict()), parameters(netD)) == (20, 2_765_568)


def test_initial_bits_are_the_examples(example_nets):
    theirG, theirD = example_nets(7)
    after = torch.rand(4)
    torch.manual_seed(7)
    netG, netD = build("dcgan", size=64, nz=100, ngf=64, ndf=64, channels=3)
    same_bits(netG, theirG)
    same_bits(netD, theirD)
    assert torch.equal(torch.rand(4), after), "the nets drew more or fewer numbers"


def test_weights_init_repeats_the_draws_of_the_example(example_nets):
    netG = Generator()
    theirs, _ = example_nets(1)
    torch.manual_seed(2)
    netG.apply(weights_init)
    torch.manual_seed(2)
    theirs.main[0].weight.data.normal_(0, 0.02)
    assert torch.equal(netG.main[0].weight, theirs.main[0].weight)


@pytest.mark.parametrize("which", [0, 1], ids=["netG", "netD"])
def test_checkpoints_load_both_ways(example_nets, tmp_path, which):
    theirs = example_nets(1)[which]
    ours = build("dcgan", size=64, nz=100, ngf=64, ndf=64, channels=3)[which]
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True), strict=True)
    same_bits(ours, theirs)
    ours.apply(weights_init)
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    same_bits(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_are_the_examples(example_nets, training):
    theirG, theirD = (net.train(training) for net in example_nets(3))
    netG, netD = Generator().train(training), Discriminator().train(training)
    netG.load_state_dict(theirG.state_dict())
    netD.load_state_dict(theirD.state_dict())
    z = torch.randn(3, 100, 1, 1)
    images, expected = netG(z), theirG(z)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(netG.eval()(z[:, :, 0, 0]), theirG.eval()(z), rtol=0, atol=1e-6)
    images = images.detach()
    torch.testing.assert_close(netD.probability(images), theirD(images), rtol=0, atol=1e-6)
    for ours, theirs in ((netG, theirG), (netD, theirD)):
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_discriminator_returns_logits(example_nets):
    _, theirD = example_nets(3)
    netD = Discriminator()
    netD.load_state_dict(theirD.state_dict())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(netD.eval()(x), torch.logit(theirD.eval()(x)), rtol=1e-4, atol=1e-4)


@given(
    size=st.sampled_from([32, 64, 128, 256]),
    nz=st.integers(1, 7),
    ngf=st.integers(1, 5),
    ndf=st.integers(1, 5),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    flat=st.booleans(),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_shapes_and_memory_format(size, nz, ngf, ndf, channels, dtype, flat):
    netG, netD = build("dcgan", size=size, nz=nz, ngf=ngf, ndf=ndf, channels=channels)
    netG.to(dtype=dtype, memory_format=torch.channels_last)
    netD.to(dtype=dtype, memory_format=torch.channels_last)
    z = torch.randn(2, nz, dtype=dtype) if flat else torch.randn(2, nz, 1, 1, dtype=dtype)
    images = netG(z)
    assert images.shape == (2, channels, size, size)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.abs().max() <= 1
    logits = netD(images)
    assert (logits.shape, logits.dtype) == ((2,), dtype)
    assert (netG.size, netG.nz, netG.ngf, netG.channels) == (size, nz, ngf, channels)
    assert (netD.size, netD.ndf, netD.channels) == (size, ndf, channels)
    assert netG.main[0].weight.shape == (nz, ngf * size // 8, 4, 4)
    assert netD.main[-1].weight.shape == (1, ndf * size // 8, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_default_widths_keep_channels_last_inside(channels):
    """Every layer's output, not the last one's alone: one NCHW layer would cost two copies."""
    netG = Generator(64, channels=channels).to(memory_format=torch.channels_last)
    netD = Discriminator(64, channels=channels).to(memory_format=torch.channels_last)
    formats = []

    def note(module, args, output):
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in (*netG.main, *netD.main):
        module.register_forward_hook(note)
    netD(netG(torch.randn(2, 100)))
    assert len(formats) == 26
    assert all(formats)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Generator(size=50), "image size 50 was given; the DCGAN nets make 32, 64, 128"),
        (lambda: Discriminator(size=16), "image size 16"),
        (lambda: Generator(nz=0), "nz=0 was given"),
        (lambda: Generator(ngf=2.5), "ngf=2.5 was given"),
        (lambda: Discriminator(ndf=-1), "ndf=-1 was given"),
        (lambda: Generator(channels=5), "channels=5 was given"),
        (lambda: Discriminator(channels=0), "channels=0 was given"),
        (lambda: Generator(32, 5, 1)(torch.zeros(2, 6)), r"shape \(2, 6\) .* nz=5"),
        (lambda: Generator(32, 5, 1)(torch.zeros(2, 5, 1)), r"shape \(2, 5, 1\)"),
        (lambda: Generator(32, 5, 1)(torch.zeros(5)), r"shape \(5,\)"),
        (lambda: Discriminator(32, 1)(torch.zeros(2, 3, 64, 64)), r"\(2, 3, 64, 64\)"),
        (lambda: Discriminator(32, 1)(torch.zeros(3, 32, 32)), r"\(3, 32, 32\)"),
        (
            lambda: build("dcgan", size=28, nz=1, ngf=1, ndf=1, channels=1),
            "image size 28 was given",
        ),
        (lambda: build("tf28", size=64, nz=1, ngf=1, ndf=1, channels=1), "tf28 nets make 28"),
        (lambda: build("vae", size=64, nz=1, ngf=1, ndf=1, channels=1), "net='vae' was given"),
    ],
)
def test_wrong_values_are_one_line(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("net", ["dcgan", "tf28"])
def test_nets_trace_as_one_graph(net):
    size = 32 if net == "dcgan" else 28
    netG, netD = build(net, size=size, nz=4, ngf=2, ndf=2, channels=1)
    torch.manual_seed(0)
    step = torch.compile(lambda z: netD(netG(z)), fullgraph=True, backend="eager")
    z = torch.randn(3, 4)
    before = {k: v.clone() for k, v in netG.state_dict().items()}
    torch.manual_seed(1)
    compiled = step(z)
    netG.load_state_dict(before)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled, netD(netG(z)))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_beginning_as_resizing_is_an_enlargement_and_a_convolution(norm):
    """Its weights are found again by least squares; the enlargement is PyTorch's."""
    netG = Generator(32, 4, 6, 3, norm=norm)
    before = [p.detach().clone() for p in netG.parameters()]
    begin_as_resizing(netG)
    layers = [m for m in netG.main if isinstance(m, nn.ConvTranspose2d)]
    assert torch.equal(before[0], layers[0].weight), "no layer from 1x1"
    for layer in layers[1:]:
        (old,) = (w for w in before if w.shape == layer.weight.shape)
        assert not torch.equal(old, layer.weight)
        assert layer.weight.std().item() == pytest.approx(old.std().item(), rel=1e-5)
        weight = layer.weight.detach().double()
        ones = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
        for i, j in itertools.product(range(3), range(3)):
            ones[i, j, i : i + 2, j : j + 2] = 1
        kernel = weight.flatten(2) @ torch.linalg.pinv(ones.flatten(2).flatten(0, 1))
        kernel = kernel.unflatten(2, (3, 3))
        x = torch.randn(2, layer.in_channels, 5, 7, dtype=torch.float64)
        larger = F.interpolate(x, scale_factor=2, mode="nearest")
        expected = F.conv2d(larger, kernel.flip(2, 3).transpose(0, 1), padding=1)
        found = F.conv_transpose2d(x, weight, stride=2, padding=1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
