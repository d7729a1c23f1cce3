"""The convolution and the transposed one by pointers, and their stride-1 ends project and collapse
(in the interpreter) against plain PyTorch in float64: every prologue, epilogue and dtype, groups,
splits and shapes. Full-width layers are in test_layers.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu.conv_pointers import convolve
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, EPILOGUES, PROLOGUES, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


# (transposed, layer): ragged in rows, columns and depth, also in each of two groups.
KINDS = {
    "convolution": (False, layer(2, 3, 5, 20, 18)),
    "transposed": (True, layer(2, 3, 5, 20, 18)),
    "collapse": (False, layer(6, 1, 1, 5, 18, stride=1)),
    "project": (True, layer(6, 1, 1, 20, 18, stride=1)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_prologue_and_epilogue(kind, prologue, epilogue):
    exact.check_pair(convolve, *KINDS[kind], prologue, epilogue, Tile(16, 32, 16))


@KIND
@pytest.mark.parametrize("split", [1, 5])
def test_without_bias(kind, split):
    """Of the parts of a sum, some may get nothing."""
    tile = Tile(16, 16, 32, split)
    for epilogue in ("store", "statistics"):
        exact.check_gather(
            convolve, *KINDS[kind], torch.float32, "none", epilogue, ("none", "none"), 1, tile,
            bias=False,
        )  # fmt: skip


@KIND
def test_statistics_of_values_far_from_zero(kind):
    """Mean 1000, standard deviation 1: in float32 E[y^2] - E[y]^2 has not one right digit."""
    transposed, g = KINDS[kind]
    draw = Draw(torch.float32)
    small, large = (draw.normal(*shape) for shape in draw.sides(g))
    weight = draw.weight(g)
    bias = draw.normal(g.CL if transposed else g.CS, offset=1000.0)
    result = convolve(
        Operand(small if transposed else large), weight, g, transposed=transposed,
        tile=Tile(16, 32, 32), epilogue=Epilogue("statistics", bias),
    )  # fmt: skip
    y = result.value.double()
    (mean, m2), count = result.partials.double()[:, 0], result.counts.double()[0, 0, :, None]
    total = (count * mean).sum(0) / count.sum()
    var = (m2 + count * (mean - total).square()).sum(0) / count.sum()
    torch.testing.assert_close(total, y.mean((0, 2, 3)), rtol=5e-7, atol=0)
    # Each tile's mean is a float32 near 1000, 3e-5 off at most.
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@KIND
def test_the_same_bits_twice(kind):
    transposed, g = KINDS[kind]
    found = []
    for draw in (Draw(torch.bfloat16), Draw(torch.bfloat16)):
        sides, weight = draw.sides(g), draw.weight(g)
        source = draw.operand(sides[0 if transposed else 1], 2, "activate", "relu")
        result = convolve(
            source, weight, g, transposed=transposed, tile=Tile(16, 32, 16, 3), groups=2,
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
    st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.booleans(), layers, st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES),
    st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2), tiles, st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(transposed, g, prologue, epilogue, activations, tile, by_image, seed):
    exact.check_gather(
        convolve, transposed, g, torch.float32, prologue, epilogue, activations,
        g.N if by_image else 1, tile, seed,
    )  # fmt: skip
