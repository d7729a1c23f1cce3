"""The CPU's own kernels against plain PyTorch in float64: convolutions of any shape, whole blocks
with gradients of two orders, nets that were fused, training steps; and life without a compiler."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdcgan import models
from fastdcgan_kernels import functional, fuse, reference
from fastdcgan_kernels.choice.geometry import Geometry
from fastdcgan_kernels.cpu import build, convolution
from fastdcgan_kernels.modules.block import stat_groups

CL = torch.channels_last


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Blocks run here as they do for users: by this folder's kernels, or this test says so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTDCGAN_IMPL", raising=False)
    torch.manual_seed(0)
    assert build.library() is not None


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    plain = convolution.call

    def call(name, *arguments):
        names.append(name)
        plain(name, *arguments)

    for module in ("convolution", "ops"):
        monkeypatch.setattr(sys.modules[f"fastdcgan_kernels.cpu.{module}"], "call", call)
    return names


def error(ours, exact):
    """RMS error beside the RMS of the exact values; where these are all 0, so must ours be."""
    off, size = ((t.double().square().mean().sqrt()) for t in (ours.double() - exact, exact))
    return (off / size.clamp(min=1e-30)).item()


def sides(n, p, q, cs, cl):
    """(small, large, weight) of a layer, channels_last."""
    shapes = (n, cs, p, q), (n, cl, 2 * p, 2 * q), (cs, cl, 4, 4)
    return [torch.randn(shape).to(memory_format=CL) for shape in shapes]


def all_three(small, large, weight):
    """Down, up and weight gradient by PyTorch, in the dtype given."""
    gradient = torch.ops.aten.convolution_backward(
        small, large, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return (
        F.conv2d(large, weight, None, 2, 1),
        F.conv_transpose2d(small, weight, None, 2, 1),
        gradient,
    )


def ours(small, large, weight):
    """The same by the kernels, whatever `has_winograd` thinks of the shape."""
    n, cs, p, q = small.shape
    g = Geometry(n, p, q, cs, 2 * p, 2 * q, large.shape[1], 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "has_winograd", lambda geometry: True)
        patch.setattr(convolution, "pays", lambda geometry: True)
        return (
            convolution.convolve(large, weight, g, transposed=False),
            convolution.convolve(small, weight, g, transposed=True),
            convolution.weight_gradient(small, large, g),
        )


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5), p=st.integers(1, 9), q=st.integers(1, 9),
    cs=st.sampled_from([32, 64, 160]), cl=st.sampled_from([32, 96]), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_any_sides_are_as_exact_as_float32(n, p, q, cs, cl, seed):
    torch.manual_seed(seed)
    tensors = sides(n, p, q, cs, cl)
    exact = all_three(*(t.double() for t in tensors))
    for got, plain, expected in zip(ours(*tensors), all_three(*tensors), exact, strict=True):
        assert got.shape == expected.shape
        assert got.is_contiguous(memory_format=CL)
        assert error(got, expected) < 1e-7 + 8 * error(plain, expected)


# (kernel, stride) that have kernels.
KERNELS = (3, 1), (4, 1), (4, 2), (5, 1), (5, 2)


@st.composite
def geometries(draw, channels):
    """Of any sides, padded by up to two pixels on each, with rows that no tap meets."""
    kernel, stride = draw(st.sampled_from(KERNELS))
    small = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    before = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    large = [
        max(1, (side - 1) * stride + kernel - pad - draw(st.integers(1 - stride, 2)))
        for side, pad in zip(small, before, strict=True)
    ]
    n, cs, cl = draw(st.tuples(st.integers(1, 4), *map(st.sampled_from, channels)))
    return Geometry(n, *small, cs, *large, cl, stride, before[0], kernel, before[1] - before[0])


def random(g):
    """(small, large, weight) of a layer, channels_last."""
    shapes = (g.N, g.CS, g.P, g.Q), (g.N, g.CL, g.H, g.W), (g.CS, g.CL, g.kernel, g.kernel)
    return [torch.randn(shape).to(memory_format=CL) for shape in shapes]


def plain_three(g, small, large, weight):
    """Down, up and weight gradient of any layer by PyTorch, in the dtype given."""
    large, weight = large.detach().requires_grad_(), weight.detach().requires_grad_()
    below = (g.P - 1) * g.stride + g.kernel - g.pad - g.H
    right = (g.Q - 1) * g.stride + g.kernel - g.left - g.W
    y = F.conv2d(F.pad(large, (g.left, right, g.pad, below)), weight, None, g.stride)
    return y.detach(), *torch.autograd.grad(y, (large, weight), small)


def winograd_three(g, small, large, weight, tile=None, biases=(None, None), slope=1.0):
    """The same by Winograd's kernels, whatever the rules say, into memory of NaN."""

    def empty(n, c, h, w, like, dtype):
        return torch.full((n, c, h, w), torch.nan, dtype=dtype).to(memory_format=CL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "empty", empty)
        patch.setattr(convolution, "has_winograd", lambda geometry: True)
        patch.setattr(convolution, "pays", lambda geometry: True)
        if tile:
            patch.setattr(convolution, "tile", lambda geometry: tile)
        return (
            convolution.convolve(large, weight, g, False, biases[0], slope),
            convolution.convolve(small, weight, g, True, biases[1], slope),
            convolution.weight_gradient(small, large, g),
        )


@settings(max_examples=60, deadline=None)
@given(
    g=geometries(([32, 64, 160], [32, 96])), tile=st.sampled_from([2, 4]), biased=st.booleans(),
    slope=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_layers_of_any_geometry(g, tile, biased, slope, seed):
    torch.manual_seed(seed)
    tensors = random(g)
    biases = [torch.randn(c) if biased else None for c in (g.CS, g.CL)]
    got = winograd_three(g, *tensors, tile, biases, slope)
    exact = list(plain_three(g, *(t.double() for t in tensors)))
    for i, bias in enumerate(biases):
        shift = 0 if bias is None else bias.double()[:, None, None]
        exact[i] = F.leaky_relu(exact[i] + shift, slope)
    for ours, expected in zip(got, exact, strict=True):
        assert ours.is_contiguous(memory_format=CL)
        assert error(ours, expected) < (5e-6 if tile == 4 else 2e-6)


@pytest.mark.parametrize("batch", [8, 37])
@pytest.mark.parametrize("kernel", [3, 5])
def test_weight_gradients_of_many_tiles(kernel, batch):
    """Of one phase, in parts of the tiles: 128 and 592, tasks of several shapes."""
    for cs, cl in ((32, 64), (96, 128)):
        g = Geometry(batch, 15, 14, cs, 15, 14, cl, 1, kernel // 2, kernel)
        tensors = random(g)
        exact = plain_three(g, *(t.double() for t in tensors))[2]
        assert error(winograd_three(g, *tensors, tile=4)[2], exact) < 3e-6


def test_what_earlier_layers_left_in_memory_does_not_matter():
    for kernel, stride in KERNELS:
        g = Geometry(3, 7, 5, 32, 6 * stride + 2, 4 * stride + 3, 64, stride, 1, kernel)
        tensors = random(g)
        wide = Geometry(8, 9, 9, 64, 9 * stride, 9 * stride, 64, stride, 1, kernel)
        for tile in (2, 4):
            first = winograd_three(g, *tensors, tile)
            winograd_three(wide, *(t.fill_(torch.nan) for t in random(wide)), tile)
            for a, b in zip(first, winograd_three(g, *tensors, tile), strict=True):
                assert torch.equal(a, b)


# (N, P, Q, CS, H, W, CL, stride, pad, kernel), whether both ways run here and whether the weight
# gradient does, and the tile.
RULES = {
    "tutorial_down": ((64, 7, 7, 128, 14, 14, 64, 2, 1, 5), True, True, 4),
    "tutorial_one_image": ((1, 7, 7, 128, 14, 14, 64, 2, 1, 5), False, True, 2),
    "tutorial_stride_1": ((64, 7, 7, 256, 7, 7, 128, 1, 2, 5), True, True, 4),
    "critic_32": ((1, 32, 32, 64, 32, 32, 64, 1, 1, 3), True, True, 4),
    "critic_4": ((16, 4, 4, 512, 4, 4, 512, 1, 1, 3), True, True, 2),
    "critic_4_batch_64": ((64, 4, 4, 512, 4, 4, 512, 1, 1, 3), True, True, 4),
    "five_pixels": ((64, 5, 5, 128, 5, 5, 128, 1, 2, 5), False, False, 2),
    "one_pixel": ((64, 1, 1, 64, 1, 1, 64, 1, 1, 3), False, False, 2),
    "odd_channels": ((64, 8, 8, 48, 8, 8, 64, 1, 1, 3), False, False, 4),
    "3x3_stride_2": ((64, 8, 8, 64, 16, 16, 64, 2, 1, 3), False, False, 4),
    "6x6": ((64, 8, 8, 64, 16, 16, 64, 2, 2, 6), False, False, 4),
    "dcgan": ((64, 8, 8, 256, 16, 16, 128, 2, 1, 4), True, True, 4),
    "dcgan_large_weights": ((64, 4, 4, 512, 8, 8, 256, 2, 1, 4), True, True, 2),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_of_shapes(name, called):
    sides, both, gradient, tile = RULES[name]
    g = Geometry(*sides)
    assert (convolution.pays(g), convolution.has_winograd(g)) == (both, gradient)
    if gradient:
        assert convolution.tile(g) == tile
    g = Geometry(1, *sides[1:])
    small, large, weight = random(g)
    convolution.weight_gradient(small, large, g)
    convolution.convolve(large, weight, g, False)
    expected = ["weight_gradient"] * gradient + ["down"] * convolution.pays(g)
    assert called == expected


def test_small_batches_are_left_to_pytorch(called):
    _, large, weight = sides(3, 8, 8, 32, 32)
    for n, kernels in ((3, []), (4, ["down"])):
        x = large[:n] if n == 3 else torch.cat([large, large[:1]])
        g = Geometry(n, 8, 8, 32, 16, 16, 32, 2, 1)
        y = convolution.convolve(x.contiguous(memory_format=CL), weight, g, transposed=False)
        assert error(y, F.conv2d(x.double(), weight.double(), None, 2, 1)) < 3e-6
        assert called == kernels


@pytest.mark.parametrize("layer", [(16, 64, 128), (8, 128, 256), (4, 256, 512)])
def test_the_nets_layers_are_as_exact_as_float32(layer):
    side, cl, cs = layer
    tensors = sides(4, side, side, cs, cl)
    exact = all_three(*(t.double() for t in tensors))
    for got, plain, expected in zip(ours(*tensors), all_three(*tensors), exact, strict=True):
        assert error(got, expected) < 6 * error(plain, expected)


@settings(max_examples=40, deadline=None)
@given(
    g=geometries(([16, 48], [1, 2, 3, 4])), slope=st.sampled_from([0.0, 0.2, 1.0]),
    biased=st.booleans(),
)  # fmt: skip
def test_up_to_an_image(g, slope, biased):
    small, large, weight = random(g)
    bias = torch.randn(g.CL) if biased else None
    assert convolution.has_image_up(g) or convolution.is_end(g)
    got = convolution.convolve(small, weight, g, True, bias, slope)
    x = plain_three(g, small.double(), large.double(), weight.double())[1]
    x = x if bias is None else x + bias.double()[:, None, None]
    assert error(got, F.leaky_relu(x, slope)) < 1e-6


# (transposed, stride, x, weight): with kernels, and at the ends.
LAYERS = {
    "down": (False, 2, (12, 32, 12, 8), (64, 32, 4, 4)),
    "up": (True, 2, (14, 64, 5, 4), (64, 32, 4, 4)),
    "odd": (False, 2, (4, 24, 6, 6), (16, 24, 4, 4)),
    "collapse": (False, 1, (24, 32, 4, 4), (16, 32, 4, 4)),
    "project": (True, 1, (4, 20, 1, 1), (20, 32, 4, 4)),
    "image_down": (False, 2, (4, 3, 8, 8), (64, 3, 4, 4)),
    "image_up": (True, 2, (4, 64, 8, 6), (64, 3, 4, 4)),
}


def leaves(*shapes):
    return [None if shape is None else torch.randn(shape, requires_grad=True) for shape in shapes]


def wide(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def names(layer):
    transposed, stride, _, weight = LAYERS[layer]
    return ("conv_transpose" if transposed else "conv"), weight[1 if transposed else 0], stride


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "image_up"])
def test_blocks_with_norm_and_their_gradients(layer, activation, groups, called):
    prefix, c, stride = names(layer)
    tensors = leaves(*LAYERS[layer][2:], (c,), (c,), (c,))
    twins = wide(tensors)
    options = {
        "stride": stride, "padding": stride - 1, "training": True, "momentum": 0.3, "eps": 1e-4,
        "activation": activation, "slope": 0.2,
    }  # fmt: skip
    buffers = torch.zeros(c), torch.ones(c)
    exact_buffers = [b.double() for b in buffers]
    op = getattr(functional, f"{prefix}_bn_act")
    out = op(*tensors, *buffers, **options, stat_groups=groups)
    assert "norm" in called
    parts = twins[0].chunk(groups)  # in order: the running buffers depend on it
    twin = getattr(reference, f"{prefix}_bn_act")
    expected = torch.cat([twin(x, *twins[1:], *exact_buffers, **options) for x in parts])
    assert error(out, expected) < 3e-6
    assert out.is_contiguous(memory_format=CL)
    for mine, theirs in zip(buffers, exact_buffers, strict=True):
        assert error(mine, theirs) < 2e-6
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        if mine is tensors[2]:  # a bias ahead of a norm does nothing
            assert mine.grad.abs().max() < 1e-3
        else:
            assert error(mine.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_without_norm_and_their_gradients(layer, activation):
    prefix, c, stride = names(layer)
    tensors = leaves(*LAYERS[layer][2:], (c,))
    twins = wide(tensors)
    options = {"stride": stride, "padding": stride - 1, "activation": activation, "slope": 0.2}
    out = getattr(functional, f"{prefix}_act")(*tensors, **options)
    expected = getattr(reference, f"{prefix}_act")(*twins, **options)
    assert error(out, expected) < 3e-6
    upstream = torch.randn(out.shape[::-1]).permute(3, 2, 1, 0)  # of any strides
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        assert error(mine.grad, theirs.grad) < 1e-5


# (transposed, stride, padding, x, weight)
MORE_LAYERS = {
    "tutorial_up": (True, 2, (1, 1, 2, 2), (48, 64, 7, 7), (64, 32, 5, 5)),
    "tutorial_down": (False, 2, (1, 1, 2, 2), (48, 32, 14, 14), (64, 32, 5, 5)),
    "tutorial_same": (True, 1, 2, (32, 64, 7, 7), (64, 32, 5, 5)),
    "tutorial_image": (True, 2, (1, 1, 2, 2), (2, 32, 14, 14), (32, 1, 5, 5)),
    "critic": (False, 1, 1, (4, 32, 16, 16), (64, 32, 3, 3)),
    "critic_image": (False, 1, 1, (4, 3, 16, 16), (64, 3, 3, 3)),
}


@pytest.mark.parametrize("layer", MORE_LAYERS)
def test_blocks_of_other_kernels_and_their_gradients(layer, called):
    transposed, stride, padding, *shapes = MORE_LAYERS[layer]
    op = "conv_transpose_act" if transposed else "conv_act"
    tensors = leaves(*shapes, (shapes[1][1 if transposed else 0],))
    twins = wide(tensors)
    options = {"stride": stride, "padding": padding, "activation": "leaky_relu", "slope": 0.2}
    out = getattr(functional, op)(*tensors, **options)
    expected = getattr(reference, op)(*twins, **options)
    assert error(out, expected) < 4e-6
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    kernels = {"image_up"} if "image" in layer else {"up", "down", "weight_gradient"}
    assert set(called) == kernels
    for mine, theirs in zip(tensors, twins, strict=True):
        assert error(mine.grad, theirs.grad) < 1e-5


def block(**more):
    """A differentiable block of x, weight, gamma and beta."""
    options = {
        "stride": 2, "padding": 1, "training": True, "momentum": 0.1, "eps": 1e-5,
        "activation": "leaky_relu", "slope": 0.2, **more,
    }  # fmt: skip

    def run(x, weight, gamma, beta):
        return functional.conv_bn_act(x, weight, None, gamma, beta, None, None, **options)

    return run


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "elu"])
def test_an_instance_norm_is_a_group_for_each_image(activation, affine, called):
    """Output and both orders of gradients."""
    shapes = (16, 32, 8, 8), (32, 32, 4, 4), *[(32,) if affine else None] * 2
    found = []
    tensors = leaves(*shapes)
    for x, weight, gamma, beta in (tensors, wide(tensors)):
        if x.dtype == torch.float32:
            run = block(activation=activation, slope=0.7, stat_groups=16)
            out = run(x, weight, gamma, beta)
        else:
            y = F.instance_norm(F.conv2d(x, weight, None, 2, 1), weight=gamma, bias=beta, eps=1e-5)
            out = F.elu(y, 0.7) if activation == "elu" else getattr(F, activation)(y)
        wanted = [t for t in (x, weight, gamma, beta) if t is not None]
        first = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted)
        found.append((out, *first, *second))
    assert "norm" in called
    for mine, theirs in zip(*found, strict=True):
        assert error(mine, theirs) < 1e-4
    called.clear()
    out = block(activation=activation, slope=0.7, stat_groups=16)(*tensors)
    out.sum().backward()
    assert "norm_gradient" in called


def test_gradient_of_a_gradient_is_plain_pytorchs(called):
    def penalty(run, x, *parameters):
        (g,) = torch.autograd.grad(run(x, *parameters).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), parameters)

    tensors = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    found = penalty(block(), *tensors)
    assert "norm" in called
    for mine, theirs in zip(found, penalty(block(), *wide(tensors)), strict=True):
        assert error(mine, theirs) < 1e-4


def test_only_gradients_that_are_needed_are_made(called):
    x, weight, gamma, beta = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    block()(x, weight.detach(), gamma.detach(), beta.detach()).sum().backward()
    assert called == ["down", "norm", "norm_gradient", "up"]
    called.clear()
    block()(x.detach(), weight, gamma, beta).sum().backward()
    assert called == ["down", "norm", "norm_gradient", "weight_gradient"]


def test_inputs_may_have_any_strides():
    x, weight, gamma, beta = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    straight = block()(x, weight, gamma, beta)
    padded = torch.zeros(16, 40, 9, 16)[:, 3:35, 1:, ::2]
    padded.copy_(x.detach())
    crooked = block()(padded, weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
                      gamma.detach().repeat_interleave(2)[::2], beta)  # fmt: skip
    assert torch.equal(straight, crooked)
    one = block()(torch.ones(1, 1, 1, 1).expand(16, 32, 8, 8), weight, gamma, beta)
    assert torch.isfinite(one).all()


@pytest.mark.parametrize(
    ("channels", "dtype", "variable"),
    [
        (32, torch.float32, ("FASTDCGAN_IMPL", "reference")),
        (32, torch.float32, ("TRITON_INTERPRET", "1")),
        (33, torch.float32, None),
        (32, torch.float64, None),
    ],
)
def test_elsewhere_blocks_are_plain_pytorch(channels, dtype, variable, called, monkeypatch):
    if variable:
        monkeypatch.setenv(*variable)
    x, weight, gamma = (
        torch.ones(s, dtype=dtype) for s in ((16, 32, 8, 8), (channels, 32, 4, 4), (channels,))
    )
    assert block()(x, weight, gamma, gamma).shape == (16, channels, 4, 4)
    assert not called


@pytest.mark.parametrize("cost", [0.0, 10.0])
def test_autocast_leaves_to_pytorch_what_bfloat16_does_as_fast(cost, called, monkeypatch):
    """A DCGAN's own layer; any, where a processor multiplies tiles of bfloat16."""
    monkeypatch.setattr(convolution, "_bfloat16", lambda: cost)
    x, weight, gamma, beta = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    _, stride, padding, *shapes = MORE_LAYERS["critic"]
    critic = leaves(*shapes)
    options = {"stride": stride, "padding": padding, "activation": "relu"}
    with torch.autocast("cpu", torch.bfloat16):
        assert block()(x, weight, gamma, beta).dtype == torch.bfloat16
        assert not called
        functional.conv_act(*critic, **options)
        assert called == ["down"] * (cost > 0)
    called.clear()
    # A model in bfloat16 is no autocast's, and two dtypes are PyTorch's error.
    narrow = [t.detach().bfloat16() for t in critic]
    assert functional.conv_act(*narrow, **options).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        functional.conv_act(narrow[0], critic[1], **options)
    assert not called


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "silu"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layer", ["tutorial_up", "tutorial_down", "tutorial_image", "critic"])
def test_under_autocast(layer, norm, activation, called, monkeypatch):
    """Dtypes are PyTorch's; values and gradients, of a graph of the gradient as well, no further
    from float64 than PyTorch's in bfloat16."""
    monkeypatch.setattr(convolution, "_bfloat16", lambda: 0.6)  # for small batches
    transposed, stride, padding, *shapes = MORE_LAYERS[layer]
    c = shapes[1][1 if transposed else 0]
    if norm and c % 16:
        return
    tensors = leaves(*shapes, (c,), *[(c,)] * (2 * norm))
    op = f"conv_{'transpose_' * transposed}{'bn_' * norm}act"
    options = {"stride": stride, "padding": padding, "activation": activation, "slope": 0.2}
    if norm:
        options |= {"training": True, "momentum": 0.1, "eps": 1e-5}
    buffers = [None, None] if norm else []

    def run(tensors):
        out = getattr(functional, op)(*tensors, *buffers, **options)
        wanted = [t for at, t in enumerate(tensors) if at != 2 or not norm]
        torch.manual_seed(1)
        upstream = torch.randn(out.shape).to(out.dtype)
        first = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
        (dx,) = torch.autograd.grad(out, tensors[0], upstream, create_graph=True)
        second = torch.autograd.grad(dx.float().square().sum(), tensors[1])
        return [out, *first, *second]

    exact = run(wide(tensors))
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(tensors)
        kernels = list(called)
        monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
        plain = run(tensors)
    wanted = {"image_up"} if "image" in layer else {"up", "down", "weight_gradient"}
    assert wanted <= set(kernels)
    assert called == kernels
    for mine, theirs, expected in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.is_contiguous(memory_format=CL) or mine.dim() < 4 or mine is not ours[0]
        assert error(mine, expected) < 1.1 * error(theirs, expected) + 1e-4


def test_meta_tensors_have_shapes():
    tensors = [
        t.detach().to("meta").requires_grad_() for t in leaves((16, 32, 8, 8), (32, 32, 4, 4))
    ]
    out = functional.conv_act(*tensors, stride=2, padding=1, activation="relu")
    out.sum().backward()
    assert out.shape == (16, 32, 4, 4)
    assert tensors[1].grad.shape == (32, 32, 4, 4)


def test_one_value_a_channel_is_refused():
    x, weight, gamma, beta = leaves((1, 32, 4, 4), (32, 32, 4, 4), (32,), (32,))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block()(x[:, :, :2, :2], weight, gamma, beta)


def test_compiles_whole(called):
    tensors = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    twins = [t.detach().clone().requires_grad_() for t in tensors]
    compiled = torch.compile(block(), fullgraph=True, backend="aot_eager")
    eager, got = block()(*tensors), compiled(*twins)
    assert torch.equal(eager, got)
    eager.sin().sum().backward()
    got.sin().sum().backward()
    assert called.count("weight_gradient") == 2
    for mine, theirs in zip(twins, tensors, strict=True):
        assert error(mine.grad, theirs.grad) < 1e-6


def test_compiles_whole_under_autocast():
    """A layer other than DCGAN's asks the processor what its bfloat16 costs."""
    torch._dynamo.reset()
    conv = nn.Conv2d(32, 32, 3, padding=1)
    net = fuse(nn.Sequential(conv, nn.LeakyReLU(0.1))).to(memory_format=torch.channels_last)
    x = torch.randn(16, 32, 32, 32).to(memory_format=torch.channels_last)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), net(x))


def small_nets():
    """Both nets at 32x32 with 32 features, as users fuse them, and plain twins."""
    torch.manual_seed(0)
    plain = models.Generator(32, 20, 32), models.Discriminator(32, 32)
    return plain, [fuse(copy.deepcopy(net).to(memory_format=CL)) for net in plain]


def train(nets, steps, dtype=torch.float32):
    """So many steps of the GAN with one pass of D over real and fake; parameters and buffers."""
    netG, netD = (net.to(dtype) for net in nets)
    random = torch.Generator().manual_seed(1)
    optimisers = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (netG, netD)]
    for _ in range(steps):
        real = torch.rand(8, 3, 32, 32, generator=random).mul(2).sub(1).to(dtype)
        fake = netG(torch.randn(8, 20, 1, 1, generator=random).to(dtype))
        netD.zero_grad()
        if nets[0].__class__ is models.Generator:
            logits = torch.cat([netD(real), netD(fake.detach())])
        else:
            with stat_groups(2):
                logits = netD(torch.cat([real, fake.detach()]))
        targets = torch.ones_like(logits)
        targets[8:] = 0
        F.binary_cross_entropy_with_logits(logits, targets).mul(2).backward()
        optimisers[1].step()
        netG.zero_grad()
        logits = netD(fake)
        F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
        optimisers[0].step()
    return {
        f"{i}.{name}": value.detach().clone()
        for i, net in enumerate((netG, netD))
        for name, value in net.state_dict().items()
    }


def test_steps_of_fused_nets_are_plain_pytorchs(called):
    """Three: in more of them rounding moves a value across the kink of its activation, sooner by
    Winograd's than by PyTorch's, and from there on the two train other nets."""
    plain, fused = small_nets()
    start = {f"{i}.{k}": v.clone() for i, n in enumerate(plain) for k, v in n.state_dict().items()}
    exact = train(copy.deepcopy(plain), 3, torch.float64)
    own, got = train(plain, 3), train(fused, 3)
    assert {"up", "down", "image_up", "weight_gradient", "norm_gradient"} <= set(called)
    assert own.keys() == got.keys()
    for name, value in exact.items():
        moved = (value - start[name]).double().norm() + 1e-12
        plain_error, our_error = ((v[name].double() - value).norm() for v in (own, got))
        assert our_error <= 10 * plain_error + 1e-3 * moved, name


def kernels_own():
    """Results of every kernel: all Winograd layers and tiles, up to an image, norms there and
    back."""
    torch.manual_seed(0)
    results = [*ours(*sides(5, 7, 6, 160, 96)), *ours(*sides(4, 8, 8, 64, 128))]
    for kernel, stride in KERNELS:
        g = Geometry(37, 12, 11, 64, 12 * stride, 11 * stride, 32, stride, 1, kernel)
        results += [t for tile in (2, 4) for t in winograd_three(g, *random(g), tile)]
    x = torch.randn(6, 32, 16, 16).to(memory_format=CL).requires_grad_()
    weight, image = (torch.randn(32, c, 4, 4).to(memory_format=CL) for c in (64, 3))
    gamma = torch.ones(64, requires_grad=True)
    out = functional.conv_transpose_bn_act(
        x, weight, None, gamma, None, None, None, stride=2, padding=1, training=True,
        momentum=0.1, eps=1e-5, activation="leaky_relu", slope=0.2, stat_groups=2,
    )  # fmt: skip
    with torch.no_grad():
        picture = functional.conv_transpose_act(x, image, stride=2, padding=1, activation="tanh")
    return [*results, picture, out, *torch.autograd.grad(out.square().sum(), (x, gamma))]


def test_same_bits_twice_and_for_any_number_of_threads():
    """Of the kernels: the matrix products at the nets' ends are PyTorch's."""
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_cpu as t;"
        "import hashlib;"
        "s = [v.detach() for v in t.kernels_own()];"
        "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in s)).hexdigest())"
    )

    def digest(threads):
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, os.path.dirname(__file__)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    found = digest("1")
    assert len(found) == 65
    assert digest("1") == found
    assert digest("2") == found


def test_evaluation_folds_the_norm(called):
    plain, fused = small_nets()
    z = torch.randn(8, 20, 1, 1)
    for net in (*plain, *fused):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                torch.manual_seed(module.num_features)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        net.eval()
    with torch.no_grad():
        expected = plain[0].double()(z.double())
        assert error(fused[0](z), expected) < 3e-6
    assert "up" in called
    assert "norm" not in called


@pytest.fixture
def fresh():
    """The library is looked for anew, before and after."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_warning_and_plain_pytorch(
    compiler, fresh, called, monkeypatch, tmp_path
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FASTDCGAN_CACHE", str(tmp_path))
    tensors = leaves((16, 32, 8, 8), (32, 32, 4, 4), (32,), (32,))
    with pytest.warns(UserWarning, match=f"CPU kernels are off.*{compiler}.*plain PyTorch") as seen:
        outs = [block()(*tensors) for _ in range(2)]
    assert len(seen) == 1
    assert not called
    assert error(outs[1], block()(*wide(tensors))) < 1e-6
    assert not list(tmp_path.iterdir())


def test_a_library_is_compiled_once_and_again_for_other_sources(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDCGAN_CACHE", str(tmp_path))
    runs = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: runs.append(command) or run(command))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library() is not None
        build.library.cache_clear()
        assert build.library() is not None
    assert sum("--version" not in command for command in runs) == 1
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    build.library.cache_clear()
    assert build.library() is not None
    assert len(list(tmp_path.glob("cpu-*.so"))) == 2
