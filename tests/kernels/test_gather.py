"""The convolutions down and up, and their stride-1 ends project and collapse (in the interpreter)
against plain PyTorch in float64: every prologue, epilogue and dtype, groups, splits and shapes; and
the layers of a DCGAN at their full width."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels import convolution, image
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
    "project": (True, layer(6, 1, 1, 20, 18, stride=1)),
}
# What tensor descriptors take: pixels of whole 16 bytes, and going down whole depths.
DESCRIBED = {
    "down": (False, layer(2, 2, 6, 24, 32)),
    "up": (True, layer(2, 2, 6, 24, 40)),
    "collapse": (False, layer(6, 1, 1, 8, 32, stride=1)),
    "project": (True, layer(6, 1, 1, 24, 40, stride=1)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def check(layer, *args, **more):
    up, g = layer
    return exact.check_gather(partial(gather, up=up), up, g, *args, **more)


def check_pair(layer, prologue, epilogue, descriptors=False):
    """Over all pairs also every dtype, 1 and 2 groups, 1 and 3 parts of the sum with each of them,
    and every activation on either side."""
    p, e = PROLOGUES.index(prologue), EPILOGUES.index(epilogue)
    dtype = DTYPES[(p + e) % 3]
    activations = ACTIVATIONS[(p + e) % 4], ACTIVATIONS[(p + e // 2) % 4]
    groups, split = 1 + (p // 2 + e) % 2, 1 + 2 * ((p + e // 2) % 2)
    tile = Tile(16, 32, 32 if descriptors else 16, split, descriptors=descriptors)
    check(layer, dtype, prologue, epilogue, activations, groups, tile)


@KIND
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_prologue_and_epilogue(kind, prologue, epilogue):
    check_pair(KINDS[kind], prologue, epilogue)


@KIND
@pytest.mark.parametrize(
    ("prologue", "epilogue"), list(zip(PROLOGUES, [*EPILOGUES, "store"], strict=True))
)
def test_every_prologue_and_epilogue_by_descriptors(kind, prologue, epilogue, monkeypatch):
    monkeypatch.setattr(convolution, "gather_pointers", None)
    check_pair(DESCRIBED[kind], prologue, epilogue, descriptors=True)


@KIND
@pytest.mark.parametrize("split", [1, 5])
def test_without_bias(kind, split):
    """Of the parts of a sum, some may get nothing."""
    tile = Tile(16, 16, 32, split)
    for epilogue in ("store", "statistics"):
        check(KINDS[kind], torch.float32, "none", epilogue, ("none", "none"), 1, tile, bias=False)


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


channels = st.sampled_from([1, 3, 16, 17, 32, 65, 100])
layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), channels, channels,
    st.sampled_from([2, 2, 1]),
)  # fmt: skip
tiles = st.builds(
    Tile, st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from([32, 64]),
    st.integers(1, 3), descriptors=st.booleans(),
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
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
FULL = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)


def check_layer(g, up, dtype, tile, x, dy):
    """Forward, input gradient and weight gradient; x and dy: prologue and epilogue of the way there
    and of the way back."""
    kernels = partial(gather, up=False), partial(gather, up=True), weight_gradient
    if g.CL == 3:
        kernels = image.image_down, image.image_up, image.image_weight_gradient
    before, after = ("relu", "none"), ("none", "relu" if dy[1] == "gradient" else "none")
    exact.check_gather(kernels[up], up, g, dtype, *x, before, 1, tile, bias=False)
    exact.check_gather(kernels[not up], not up, g, dtype, *dy, after, 1, tile, bias=False)
    order = 1 if up else -1  # the input is the small side going up
    exact.check_weight_gradient(
        kernels[2], g, dtype, (x[0], dy[0])[::order], before[::order], 1, tile, dtype
    )


@FULL
@pytest.mark.parametrize("name", GENERATOR)
def test_layers_of_the_generator(name, dtype):
    """By pointers; each layer normalises and activates as it loads."""
    x, dy = ("activate", "statistics"), ("normgrad", "gradient")
    check_layer(GENERATOR[name], True, dtype, Tile(128, 256, 256), x, dy)


@FULL
@pytest.mark.parametrize("name", DISCRIMINATOR)
def test_layers_of_the_discriminator(name, dtype):
    """By descriptors, but for 3 channels and 1; operands as they are."""
    tile = Tile(128, 256, 64, descriptors=True)
    check_layer(DISCRIMINATOR[name], False, dtype, tile, ("none", "statistics"), ("none", "store"))
