"""The convolutions down and up, and their stride-1 ends project and collapse (in the interpreter)
against plain PyTorch in float64: every prologue, epilogue and dtype, groups, splits and shapes; and
the layers of a DCGAN at their full width."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels import image
from fastdcgan_kernels.convolution import Epilogue, Operand, gather, weight_gradient
from fastdcgan_kernels.geometry import Tile
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, DTYPES, EPILOGUES, PROLOGUES, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


# (up, layer): ragged in rows, columns and depth, also in each of two groups.
KINDS = {
    "down": (False, layer(2, 3, 5, 20, 18)),
    "up": (True, layer(2, 3, 5, 20, 18)),
    "collapse": (False, layer(6, 1, 1, 5, 18, stride=1)),
    "project": (True, layer(6, 1, 1, 35, 18, stride=1)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def check(kind, *args, **more):
    up, g = KINDS[kind]
    return exact.check_gather(partial(gather, up=up), up, g, *args, **more)


@KIND
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_prologue_and_epilogue(kind, prologue, epilogue):
    """Each of them also with every dtype, 1 and 2 groups, 1 and 3 parts of the sum; and each kind
    of layer with every activation on either side."""
    p, e = PROLOGUES.index(prologue), EPILOGUES.index(epilogue)
    dtype = DTYPES[(p + e) % 3]
    activations = ACTIVATIONS[(p + e) % 4], ACTIVATIONS[(p + e // 2) % 4]
    groups, split = 1 + (p // 2 + e) % 2, 1 + 2 * ((p + e // 2) % 2)
    check(kind, dtype, prologue, epilogue, activations, groups, Tile(16, 32, 16, split))


@KIND
@pytest.mark.parametrize("split", [1, 5])
def test_without_bias(kind, split):
    """Of the parts of a sum, some may get nothing."""
    tile = Tile(16, 16, 32, split)
    for epilogue in ("store", "statistics"):
        check(kind, torch.float32, "none", epilogue, ("none", "none"), 1, tile, bias=False)


@KIND
def test_statistics_of_values_far_from_zero(kind):
    """Mean 1000, standard deviation 1: in float32 E[y^2] - E[y]^2 has not one right digit."""
    up, g = KINDS[kind]
    draw = Draw(torch.float32)
    small, large = (draw.normal(*shape) for shape in draw.sides(g))
    weight = draw.weight(g)
    bias = draw.normal(g.CL if up else g.CS, offset=1000.0)
    result = gather(
        Operand(small if up else large), weight, g, up=up, tile=Tile(16, 32, 32),
        epilogue=Epilogue("statistics", bias),
    )  # fmt: skip
    y = result.value.double()
    (mean, m2), count = result.partials.double()[:, 0], result.counts.double()[0, :, None]
    total = (count * mean).sum(0) / count.sum()
    var = (m2 + count * (mean - total).square()).sum(0) / count.sum()
    torch.testing.assert_close(total, y.mean((0, 2, 3)), rtol=5e-7, atol=0)
    # Each tile's mean is a float32 near 1000, 3e-5 off at most.
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@KIND
def test_the_same_bits_twice(kind):
    up, g = KINDS[kind]
    found = []
    for draw in (Draw(torch.bfloat16), Draw(torch.bfloat16)):
        sides, weight = draw.sides(g), draw.weight(g)
        source = draw.operand(sides[0 if up else 1], 2, "activate", "relu")
        result = gather(
            source, weight, g, up=up, tile=Tile(16, 32, 16, 3), groups=2,
            epilogue=Epilogue("statistics"),
        )  # fmt: skip
        found.append((result.value, result.partials, result.counts))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


channels = st.sampled_from([1, 3, 16, 17, 65, 100])
layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), channels, channels,
    st.sampled_from([2, 2, 1]),
)  # fmt: skip
tiles = st.builds(
    Tile, st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from([32, 64]),
    st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.booleans(), layers, st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES),
    st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2), tiles, st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(up, g, prologue, epilogue, activations, tile, by_image, seed):
    exact.check_gather(
        partial(gather, up=up), up, g, torch.float32, prologue, epilogue, activations,
        g.N if by_image else 1, tile, seed,
    )  # fmt: skip


# The 64x64 nets with 64 features, on 2 images. Large tiles: the interpreter is slow by the tile.
MIDDLE = {
    "512-256": layer(2, 4, 4, 512, 256),
    "256-128": layer(2, 8, 8, 256, 128),
    "128-64": layer(2, 16, 16, 128, 64),
    "64-3": layer(2, 32, 32, 64, 3),
}
GENERATOR = {"100-512": layer(2, 1, 1, 100, 512, stride=1), **MIDDLE}
DISCRIMINATOR = {**MIDDLE, "1-512": layer(2, 1, 1, 1, 512, stride=1)}
WIDE = Tile(128, 256, 256)
FULL = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)


def check_layer(g, up, dtype, x, dy):
    """Forward, input gradient and weight gradient, with prologues of the input and of the output's
    gradient, their epilogues and the input's activation."""
    kernels = partial(gather, up=False), partial(gather, up=True), weight_gradient
    if g.CL == 3:
        kernels = image.image_down, image.image_up, image.image_weight_gradient
    (x_prologue, forward, activation), (dy_prologue, backward) = x, dy
    before, after = (activation, "none"), ("none", activation)
    exact.check_gather(kernels[up], up, g, dtype, x_prologue, forward, before, 1, WIDE, bias=False)
    exact.check_gather(
        kernels[not up], not up, g, dtype, dy_prologue, backward, after, 1, WIDE, bias=False
    )
    sides = 1 if up else -1
    exact.check_weight_gradient(
        kernels[2], g, dtype, (x_prologue, dy_prologue)[::sides], before[::sides], 1, WIDE, dtype
    )


@FULL
@pytest.mark.parametrize("name", GENERATOR)
def test_layers_of_the_generator(name, dtype):
    """Each normalises and activates as it loads."""
    x, dy = ("activate", "statistics", "relu"), ("normgrad", "gradient")
    check_layer(GENERATOR[name], True, dtype, x, dy)


@FULL
@pytest.mark.parametrize("name", DISCRIMINATOR)
def test_layers_of_the_discriminator(name, dtype):
    """Each has its operands materialised."""
    x, dy = ("none", "statistics", "none"), ("none", "store")
    check_layer(DISCRIMINATOR[name], False, dtype, x, dy)
