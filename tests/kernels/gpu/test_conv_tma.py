"""The convolution and the transposed one by tensor descriptors (in the interpreter) against plain
PyTorch in float64, and what they do not take."""

from functools import partial

import pytest
import torch
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_tma, descriptors
from fastdcgan_kernels.gpu.tile import Operand
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, EPILOGUES, PROLOGUES, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


# (transposed, layer): pixels of whole 16 bytes, and where it is not transposed whole depths.
KINDS = {
    "convolution": (False, layer(2, 2, 6, 24, 32)),
    "transposed": (True, layer(2, 2, 6, 24, 40)),
    "collapse": (False, layer(6, 1, 1, 8, 32, stride=1)),
    "project": (True, layer(6, 1, 1, 24, 40, stride=1)),
}
tile_of = partial(Tile, engine="descriptors")


def convolve(source, weight, g, *, transposed, tile, **more):
    assert conv_tma.takes(source, weight, g, transposed=transposed, tile=tile)
    return conv_tma.convolve(source, weight, g, transposed=transposed, tile=tile, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prologue", "epilogue"), list(zip(PROLOGUES, EPILOGUES, strict=True)))
def test_every_prologue_and_epilogue(kind, prologue, epilogue):
    exact.check_pair(convolve, *KINDS[kind], prologue, epilogue, tile_of(16, 32, 32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("epilogue", "rows", "columns"),
    [("gradient", 256, 32), ("actgrad", 256, 32), ("statistics", 64, 64)],
)
def test_tiles_that_are_stored_in_parts(transposed, epilogue, rows, columns):
    """Four parts, and two; the last tile is not full, nor is its last part."""
    g = layer(5, 8, 8, 24, 64)
    tile = tile_of(rows, columns, 32)
    activations = ("none", "leaky_relu")
    exact.check_gather(
        convolve, transposed, g, torch.float32, "none", epilogue, activations, 1, tile
    )


layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 16, 100]),
    st.sampled_from([32, 64, 100]), st.sampled_from([2, 2, 1]),
)  # fmt: skip
tiles = st.builds(
    tile_of, st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from([32, 64]),
    st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.booleans(), layers, st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES),
    st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2), tiles, st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(transposed, g, prologue, epilogue, activations, tile, by_image, seed):
    assume(transposed or g.CL % tile.depth == 0)
    exact.check_gather(
        convolve, transposed, g, torch.float32, prologue, epilogue, activations,
        g.N if by_image else 1, tile, seed,
    )  # fmt: skip


TILE = tile_of(16, 32, 32)


def takes(g, transposed=False, dtype=torch.bfloat16, tile=TILE, shift=0, **more):
    """Of tensors that start `shift` elements behind a multiple of 16 bytes."""

    def image(n, c, h, w):
        memory = torch.empty(n * c * h * w + 64, dtype=dtype)
        first = -memory.data_ptr() % 64 // memory.element_size() + shift
        return memory[first:][: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)

    sides = Draw(dtype).sides(g)
    source, weight = Operand(image(*sides[not transposed])), image(g.CS, g.CL, 4, 4)
    return conv_tma.takes(source, weight, g, transposed=transposed, tile=tile, **more)


def test_what_it_takes():
    fits = layer(2, 2, 6, 24, 32)
    assert takes(fits)
    assert not takes(fits, tile=Tile(16, 32, 32))  # a tile for pointers
    assert not takes(fits, shift=4)
    assert not takes(layer(2, 2, 6, 24, 36))  # pixels of 72 bytes
    assert takes(layer(2, 2, 6, 24, 40), transposed=True)
    assert not takes(layer(2, 2, 6, 24, 40))  # a box of 32 channels would hold two taps


VERSIONS = {"3.6.0": False, "3.7.1": True, "3.10.0+git1": True, "4.0": True, "unknown": False}


@pytest.mark.parametrize("version", VERSIONS)
def test_tf32_where_triton_rounds_it(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(descriptors, "triton_version", descriptors.triton_version.__wrapped__)
    fits = layer(2, 2, 6, 24, 32)
    assert takes(fits, dtype=torch.float32, precision="tf32") == VERSIONS[version]
    assert takes(fits, dtype=torch.float32)
