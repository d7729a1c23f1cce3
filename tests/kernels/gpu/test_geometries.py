"""Layers of every kernel size, stride and padding (in the interpreter) against plain PyTorch in
float64, which pads and cuts by hand: both convolutions by pointers and by descriptors, and the
weight's gradient. What a DCGAN's own layers do with prologues, dtypes and splits is in the tests of
each family."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_image, conv_pointers, conv_tma, conv_weight
from tests.kernels import exact
from tests.kernels.exact import EPILOGUES, PROLOGUES
from tests.kernels.geometries import GEOMETRIES, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_by_pointers(name, transposed):
    g, at = GEOMETRIES[name], list(GEOMETRIES).index(name)
    for epilogue, groups, split in (("statistics", 2, 1), (EPILOGUES[at % 4], 1, 3)):
        exact.check_gather(
            conv_pointers.convolve, transposed, g, torch.float32, PROLOGUES[at // 2 % 4], epilogue,
            ("leaky_relu", "relu"), groups, Tile(16, 16, 16, split),
        )  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_by_descriptors(name, transposed):
    g, at = GEOMETRIES[name], list(GEOMETRIES).index(name)
    tile = Tile(16, 16, 8, engine="descriptors")
    source = exact.Draw(torch.float32).operand(exact.Draw.sides(None, g)[0], 1, "none", "relu")
    taken = conv_tma.takes(source, source.value, g, transposed=transposed, tile=tile)
    assert taken == (transposed or g.stride == 1 or g.H % 2 == g.W % 2 == 0)
    if not taken:
        return
    for epilogue, split in (("statistics", 1), (EPILOGUES[at % 4], 2)):
        exact.check_gather(
            conv_tma.convolve, transposed, g, torch.float32, PROLOGUES[at // 2 % 4], epilogue,
            ("leaky_relu", "relu"), 1, Tile(16, 16, 8, split, engine="descriptors"),
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["pointers", "descriptors"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_weights_gradient(name, engine):
    """By descriptors a tile as wide as twice the channels has two taps, where a row has pairs."""
    g = GEOMETRIES[name]
    for columns, split, prologues in ((16, 3, ("normgrad", "activate")), (64, 1, ("none", "none"))):
        tile = Tile(16, columns, 8, split, engine=engine)
        exact.check_weight_gradient(
            conv_weight.weight_gradient, g, torch.float32, prologues, ("relu", "relu"), 1, tile
        )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_from_an_image(name, channels):
    """Where all taps are one sum."""
    g, at = replace(GEOMETRIES[name], CL=channels), list(GEOMETRIES).index(name)
    assert g.is_image(transposed=False)
    prologue, epilogue = PROLOGUES[at // 2 % 4], EPILOGUES[(at + channels) % 4]
    exact.check_gather(
        conv_image.convolve, False, g, torch.float32, prologue, epilogue, ("leaky_relu", "relu"),
        1 + at % 2, Tile(16, 16, 16),
    )  # fmt: skip
    exact.check_weight_gradient(
        conv_image.weight_gradient, g, torch.float32, ("normgrad", prologue), ("relu", "relu"),
        1 + at % 2, Tile(16, 64, 16, 2),
    )  # fmt: skip


paddings = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(-1, 4)] * 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 7), st.sampled_from([1, 2]), paddings, st.tuples(*[st.integers(1, 9)] * 2),
    st.booleans(), st.booleans(), st.sampled_from([3, 8, 20]), st.sampled_from([1, 8, 17]),
    st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_any_geometry(
    kernel, stride, padding, sides, up, transposed, cs, cl, prologue, epilogue, split, seed
):
    if not up:
        padding = tuple(abs(n) for n in padding)
    g = layer(kernel, stride, padding, sides, up, cs=cs, cl=cl)
    if min(g.P, g.Q, g.H, g.W) < 1:
        return
    exact.check_gather(
        conv_pointers.convolve, transposed, g, torch.float32, prologue, epilogue,
        ("tanh", "leaky_relu"), 2, Tile(16, 16, 16, split), seed,
    )  # fmt: skip
    exact.check_weight_gradient(
        conv_weight.weight_gradient, g, torch.float32, ("none", "none"), ("relu", "relu"), 2,
        Tile(16, 16, 16, split), seed=seed,
    )  # fmt: skip
