"""The kernels of the layers with an image side (in the interpreter) against plain PyTorch in
float64: every prologue, epilogue and dtype, 1 to 4 channels, odd shapes, groups and splits."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_image
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, DTYPES, EPILOGUES, PROLOGUES, TILE, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


SMALL = layer(2, 3, 5, 7, 3)


check_gather = partial(exact.check_gather, conv_image.convolve)
check_weight_gradient = partial(exact.check_weight_gradient, conv_image.weight_gradient)


GATHERS = list(product(PROLOGUES, EPILOGUES, DTYPES))
PAIRS = list(product(PROLOGUES, PROLOGUES))
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["from", "to"])


@TRANSPOSED
@pytest.mark.parametrize("case", range(len(GATHERS)), ids=lambda i: "-".join(map(str, GATHERS[i])))
def test_every_prologue_epilogue_and_dtype(transposed, case):
    prologue, epilogue, dtype = GATHERS[case]
    activations = ACTIVATIONS[case % 4], ACTIVATIONS[case // 4 % 4]
    check_gather(transposed, SMALL, dtype, prologue, epilogue, activations)


@TRANSPOSED
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(transposed, activation):
    for prologue, epilogue in [("activate", "store"), ("actgrad", "gradient")]:
        check_gather(transposed, SMALL, torch.float32, prologue, epilogue, (activation, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologues", PAIRS, ids="-".join)
def test_weight_gradient_with_every_pair_of_prologues(prologues, dtype):
    case = PAIRS.index(prologues)
    activations = ACTIVATIONS[(case + 1) % 4], ACTIVATIONS[case // 4]
    check_weight_gradient(SMALL, dtype, prologues, activations, out_dtype=dtype)


@pytest.mark.parametrize("cs", [3, 16, 65])
@pytest.mark.parametrize("cl", [1, 2, 3, 4])
def test_channels_of_either_side(cl, cs):
    g = layer(2, 2, 3, cs, cl)
    for transposed, epilogue in [(False, "statistics"), (False, "gradient"), (True, "statistics")]:
        check_gather(transposed, g, torch.float32, "activate", epilogue, ("tanh", "leaky_relu"))
    check_weight_gradient(g, torch.float32, ("normgrad", "activate"), ("none", "tanh"))


SHAPES = {
    "one pixel": (1, 1, 1),
    "one column": (1, 6, 1),
    "one row": (1, 1, 6),
    "tall": (1, 9, 2),
    "wide": (3, 2, 9),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pixels(shape):
    """Padding stays 0, though act(shift) is not."""
    for cl in (1, 2, 3, 4):
        g = layer(*shape, 5, cl)
        check_gather(False, g, torch.float32, "activate", "store", ("tanh", "none"))
        check_weight_gradient(g, torch.float32, ("activate", "activate"), ("tanh", "tanh"))
    check_gather(True, g, torch.float32, "activate", "store", ("tanh", "none"))


@TRANSPOSED
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_groups_have_their_own_coefficients_and_tiles(transposed, epilogue):
    g, tile = layer(4, 3, 3, 6, 3), Tile(16, 16, 16)
    check_gather(transposed, g, torch.float32, "normgrad", epilogue, ("none", "relu"), 2, tile)


@pytest.mark.parametrize("split", [1, 3, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_and_splits_of_the_weight_gradient(groups, split):
    """Parts that get no pixels add nothing."""
    g, tile = layer(4, 3, 5, 20, 3), Tile(16, 64, 16, split)
    check_weight_gradient(
        g, torch.float32, ("activate", "normgrad"), ("relu", "none"), groups, tile
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layers_of_a_dcgan(dtype):
    """As its two networks run them, 64 features wide."""
    tile = Tile(128, 64, 64, split=3)
    first, last = layer(2, 8, 8, 64, 3), layer(2, 16, 16, 64, 3)
    check_gather(False, last, dtype, "none", "store", ("none", "leaky_relu"), 1, tile)
    check_gather(True, last, dtype, "activate", "store", ("relu", "tanh"), 1, tile)
    check_gather(True, first, dtype, "actgrad", "store", ("leaky_relu", "none"), 1, tile)
    check_gather(False, first, dtype, "actgrad", "gradient", ("tanh", "relu"), 1, tile)
    check_weight_gradient(last, dtype, ("actgrad", "none"), ("leaky_relu", "none"), 1, tile)
    check_weight_gradient(first, dtype, ("activate", "actgrad"), ("relu", "tanh"), 1, tile)


layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 20),
    st.integers(1, 4),
)  # fmt: skip
tiles = st.builds(
    Tile, st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([16, 32]),
    st.integers(1, 4),
)  # fmt: skip
sizes = st.integers(1, 20)
small_images = st.builds(
    layer, st.integers(1, 2), sizes, sizes, st.integers(1, 40), st.integers(1, 4)
)
two_activations = st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2)
seeds = st.integers(0, 1000)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.booleans(), layers, st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES[:3]),
    two_activations, tiles, st.booleans(), seeds,
)  # fmt: skip
def test_any_gather(transposed, g, prologue, epilogue, activations, tile, by_image, seed):
    groups = g.N if by_image else 1
    check_gather(transposed, g, torch.float32, prologue, epilogue, activations, groups, tile, seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    small_images, st.sampled_from(PROLOGUES), st.sampled_from(["store", "statistics"]),
    two_activations, st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32]), st.booleans(),
    seeds,
)  # fmt: skip
def test_any_image_in_strips_and_tiles(
    g, prologue, epilogue, activations, rows, depth, by_image, seed
):
    groups, tile = g.N if by_image else 1, Tile(rows, 16, depth)
    check_gather(True, g, torch.float32, prologue, epilogue, activations, groups, tile, seed)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("p", "q", "rows"), [(2, 37, 32), (37, 2, 16), (9, 16, 64)])
def test_strips_of_groups(p, q, rows, epilogue):
    g, tile = layer(4, p, q, 20, 3), Tile(rows, 16, 16)
    check_gather(True, g, torch.float32, "activate", epilogue, ("relu", "leaky_relu"), 2, tile)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    layers, st.tuples(*[st.sampled_from(PROLOGUES)] * 2), two_activations, tiles,
    st.integers(1, 300), st.booleans(), seeds,
)  # fmt: skip
def test_any_weight_gradient(g, prologues, activations, tile, split, by_image, seed):
    groups, tile = g.N if by_image else 1, replace(tile, split=split)
    check_weight_gradient(g, torch.float32, prologues, activations, groups, tile, seed=seed)


# Small pixels, a tile's rows; how often a feature is loaded, on average.
READS = [
    (32, 32, 128, 1.17), (32, 32, 256, 1.13), (8, 8, 128, 1.0), (20, 100, 256, 1.09),
    (100, 3, 32, 1.18),
]  # fmt: skip


@pytest.mark.parametrize(("p", "q", "rows", "reads"), READS)
def test_features_are_loaded_once_but_at_borders_of_tiles(monkeypatch, p, q, rows, reads):
    g, draw = layer(2, p, q, 3, 3), Draw(torch.float32)
    x = draw.normal(2, 3, p, q)
    load, loaded = InterpreterBuilder.create_masked_load, np.zeros(x.numel(), dtype=int)

    def seen(self, ptrs, mask, *rest):
        at = (ptrs.data[mask.data].astype(np.int64) - x.data_ptr()) // x.itemsize
        np.add.at(loaded, at[(at >= 0) & (at < len(loaded))], 1)
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", seen)
    conv_image.convolve(Operand(x), draw.weight(g), g, transposed=True, tile=Tile(rows, 16, 16))
    assert loaded.min() == 1
    assert loaded.max() <= 4  # in a corner of a strip's tile
    assert loaded.mean() == pytest.approx(reads, abs=0.01)


@pytest.mark.parametrize("cl", [1, 2, 3, 4])
def test_nan_reaches_only_what_it_meets(cl):
    """Values are loaded in pairs, of which one may be a neighbour's."""
    where = list(product((0, 3), range(8), {0, cl - 1}))
    g = layer(len(where), 2, 4, 5, cl)
    draw = Draw(torch.float32)
    weight = draw.weight(g)
    small, large = (draw.normal(*shape) for shape in draw.sides(g))
    for n, (h, w, channel) in enumerate(where):
        large[n, channel, h, w] = torch.nan
    ours = conv_image.convolve(
        Operand(large), weight, g, transposed=False, tile=Tile(128, 16, 16)
    ).value
    assert torch.equal(ours.isnan(), F.conv2d(large, weight, None, 2, 1).isnan())
    bad = small.clone(memory_format=torch.channels_last)
    for n in range(8):  # each small pixel
        bad[n, n % 5, n // 4, n % 4] = torch.nan
    ours = conv_image.convolve(
        Operand(bad), weight, g, transposed=True, tile=Tile(16, 16, 16)
    ).value
    assert torch.equal(ours.isnan(), F.conv_transpose2d(bad, weight, None, 2, 1).isnan())
    one = layer(1, 2, 4, 5, cl)
    for n in (0, len(where) - 1):
        x, y = (side[n : n + 1] for side in (large, small))
        ours = conv_image.weight_gradient(
            Operand(y), Operand(x), one, tile=TILE, dtype=torch.float32
        )
        assert torch.equal(
            ours.isnan(), torch.nn.grad.conv2d_weight(x, weight.shape, y, 2, 1).isnan()
        )


def test_the_same_bits_twice():
    g, tile = layer(4, 3, 5, 9, 3), Tile(32, 32, 16, 2)
    more = {"tile": tile, "groups": 2}
    found = []
    for draw in (Draw(torch.bfloat16), Draw(torch.bfloat16)):
        shapes, weight = draw.sides(g), draw.weight(g)
        small, large = (draw.operand(shape, 2, "activate", "relu") for shape in shapes)
        gradient = conv_image.weight_gradient(small, large, g, dtype=torch.bfloat16, **more)
        found.append([gradient])
        for source, transposed in [(large, False), (small, True)]:
            result = conv_image.convolve(
                source, weight, g, transposed=transposed, epilogue=Epilogue("statistics"), **more
            )
            found[-1] += [result.value, result.partials]
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
