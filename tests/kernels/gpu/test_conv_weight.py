"""The weight's gradient (in the interpreter) against plain PyTorch in float64: prologues on either
side, dtypes, groups, splits and shapes. Full-width layers are in test_layers.py."""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_weight
from fastdcgan_kernels.gpu.conv_weight import weight_gradient
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, DTYPES, PROLOGUES, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


check = partial(exact.check_weight_gradient, weight_gradient)
PAIRS = list(product(PROLOGUES, PROLOGUES))
# Ragged in both channels and in pixels, also in each of two groups.
STRIDES = {"stride 2": layer(2, 3, 5, 20, 18), "stride 1": layer(6, 1, 1, 20, 18, stride=1)}
# What tensor descriptors take: pixels of whole 16 bytes, boxes that lie in a row in memory and have
# pixels of one group. Boxes of 16 here: 4 images of 6, half an image, half a row; 16 images of 6.
DESCRIBED = {
    "images": layer(6, 2, 2, 24, 40), "rows": layer(3, 8, 4, 24, 40),
    "columns": layer(2, 3, 32, 24, 40), "stride 1": layer(6, 1, 1, 24, 40, stride=1),
}  # fmt: skip
STRIDE = pytest.mark.parametrize("stride", STRIDES)


@STRIDE
@pytest.mark.parametrize("prologues", PAIRS, ids="-".join)
def test_every_pair_of_prologues(stride, prologues):
    """Along them every dtype and activation, 1 and 2 groups, 1 and 3 parts of the sum."""
    first, second = (PROLOGUES.index(prologue) for prologue in prologues)
    dtype = DTYPES[(first + second) % 3]
    activations = ACTIVATIONS[(first + second) % 4], ACTIVATIONS[(first + 2 * second) % 4]
    tile = Tile(32, 32, 16, split=1 + 2 * (first % 2))
    check(STRIDES[stride], dtype, prologues, activations, 1 + second % 2, tile, out_dtype=dtype)


@pytest.mark.parametrize("g", DESCRIBED.values(), ids=DESCRIBED)
@pytest.mark.parametrize("p", range(4), ids=PROLOGUES)
def test_every_prologue_by_descriptors(g, p, monkeypatch):
    """With one tap a tile, and with two."""
    monkeypatch.setattr(conv_weight, "weight_gradient_pointers", None)
    prologues = PROLOGUES[p], PROLOGUES[(p + 1) % 4]
    activations = ACTIVATIONS[p], ACTIVATIONS[(p + 2) % 4]
    for columns in (32, 128):
        tile = Tile(32, columns, 16, split=1 + p // 2, engine="descriptors")
        check(g, DTYPES[p % 3], prologues, activations, 1, tile, out_dtype=DTYPES[p % 3])


def test_groups_by_descriptors(monkeypatch):
    """A box of 16 pixels is 4 images here: all of a group."""
    monkeypatch.setattr(conv_weight, "weight_gradient_pointers", None)
    tile, prologues = Tile(32, 32, 16, split=2, engine="descriptors"), ("normgrad", "activate")
    check(layer(8, 2, 2, 24, 40), torch.float32, prologues, ("none", "tanh"), 2, tile)


@pytest.mark.parametrize(
    ("g", "groups"),
    [
        (layer(4, 2, 6, 24, 40), 1),  # boxes of 2 columns of 6,
        (layer(4, 6, 2, 24, 40), 1),  # of 2 rows of 6 in more than one image,
        (layer(8, 2, 2, 24, 40), 4),  # of two groups' images
    ],
)
def test_boxes_that_are_no_rows_of_one_group_are_left_to_pointers(g, groups, monkeypatch):
    monkeypatch.setattr(conv_weight, "weight_gradient_descriptors", None)
    tile = Tile(32, 64, 16, engine="descriptors")
    check(g, torch.float32, ("none", "none"), ("none", "none"), groups, tile)


@STRIDE
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_gradient_of_16_bit_operands_is_not_rounded(stride, dtype):
    check(STRIDES[stride], dtype, ("activate", "none"), ("leaky_relu", "none"))


@STRIDE
@pytest.mark.parametrize("split", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_and_splits(stride, groups, split):
    """Parts that get no pixels add nothing."""
    tile = Tile(64, 32, 16, split)
    prologues, activations = ("normgrad", "activate"), ("none", "relu")
    check(STRIDES[stride], torch.float32, prologues, activations, groups, tile)


channels = st.sampled_from([1, 3, 16, 17, 32, 65, 100])
layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), channels, channels,
    st.sampled_from([2, 2, 1]),
)  # fmt: skip
tiles = st.builds(
    Tile, st.just(64), st.sampled_from([32, 64]), st.sampled_from([16, 32]),
    st.integers(1, 3), engine=st.sampled_from(["pointers", "descriptors"]),
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    layers, st.tuples(*[st.sampled_from(PROLOGUES)] * 2),
    st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2), tiles, st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(g, prologues, activations, tile, by_image, seed):
    groups = g.N if by_image else 1
    check(g, torch.float32, prologues, activations, groups, tile, seed=seed)


@STRIDE
def test_the_same_bits_twice(stride):
    g, found = STRIDES[stride], []
    for draw in (Draw(torch.bfloat16), Draw(torch.bfloat16)):
        small, large = (draw.operand(side, 2, "activate", "relu") for side in draw.sides(g))
        tile = Tile(32, 32, 16, split=2)
        found.append(weight_gradient(small, large, g, tile=tile, dtype=torch.float32, groups=2))
    assert torch.equal(*found)
