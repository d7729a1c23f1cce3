"""The sum of a sum's parts (in the interpreter) against PyTorch in float64."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.launch import recording, watching
from fastdcgan_kernels.gpu.tile import Epilogue, Operand, reduce
from tests.kernels import exact
from tests.kernels.exact import DTYPES, EPILOGUES, EVERY, OF_INPUT, Draw


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


def check(splits, shape, dtype, kind, activation, groups, bias, seed=0):
    """Partials, too; a sum of parts is as exact as one of 32 bits."""
    draw = Draw(dtype, seed)
    parts = draw.normal(splits, shape.numel(), dtype=torch.float32)
    n, c, h, w = shape
    whole = parts.double().sum(0).view(n, h, w, c).permute(0, 3, 1, 2)
    epilogue = draw.epilogue(shape, groups, kind, activation)
    if not bias:
        epilogue = Epilogue(kind, None, epilogue.aux, epilogue.coef, epilogue.activation, 0.2)
    out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    result = reduce(parts, out, epilogue, groups)
    assert result.value is out
    truth, sums = exact.finish(whole, epilogue, torch.float64)
    eager = None
    if dtype != torch.float32:
        eager = exact.finish(whole.float(), epilogue, torch.float32)[0].to(dtype)
    exact.close(out, truth, eager)
    if kind == "statistics":
        exact.check_statistics(result, groups)
    if kind == "gradient":
        exact.close(result.partials.double().sum(2), sums)


shapes = st.tuples(*[st.integers(1, 4)] * 4).map(
    lambda s: torch.Size((2 * s[0], 5 * s[1] - 4, s[2], s[3]))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 300), shapes, st.sampled_from(DTYPES), st.sampled_from(EPILOGUES),
    st.sampled_from(EVERY), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 100),
)  # fmt: skip
def test_any_sum_of_parts(splits, shape, dtype, kind, activation, groups, bias, seed):
    if kind == "actgrad" and activation in OF_INPUT:
        reject()
    check(splits, shape, dtype, kind, activation, groups, bias, seed)


@pytest.mark.parametrize("splits", [2, 32, 132, 256, 300])
@pytest.mark.parametrize("shape", [(64, 3, 4, 4), (5, 1, 4, 4), (20, 7, 4, 4)], ids=str)
def test_weights_in_many_parts(shape, splits):
    check(splits, torch.Size(shape), torch.float32, "store", "none", 1, False)


def test_many_parts_of_a_small_weight_are_much_parallel_work():
    """64 parts at a time; programs for all of its 3072 elements in full rows of 64."""
    parts, seen = torch.ones(132, 64 * 3 * 16), []
    with watching(lambda launch: seen.append((launch.grid, launch.named))):
        out = reduce(parts, torch.empty(64, 3, 4, 4, memory_format=torch.channels_last)).value
    assert torch.equal(out, torch.full_like(out, 132.0))
    ((grid, given),) = seen
    assert grid == (48, 1)
    assert (given["C"], given["BLOCK_S"]) == (64, 64)


def test_the_kernel_in_gluon_is_left_what_needs_the_outputs_derivative_alone():
    """It makes a gradient from the activation's output."""
    pixels, side = {"device": "meta", "dtype": torch.bfloat16}, torch.channels_last
    small = torch.empty(16, 64, 8, 8, **pixels).to(memory_format=side)
    large = torch.empty(16, 64, 16, 16, **pixels).to(memory_format=side)
    weight = torch.empty(64, 64, 4, 4, **pixels).to(memory_format=side)
    coef, ran = torch.empty(5, 1, 64, device="meta"), []
    tile = Tile(128, 64, 64, 1, 4, 4, "gluon")
    for activation in ("leaky_relu", "elu", "silu", "gelu"):
        epilogue = Epilogue("gradient", None, large, coef, activation, 0.2)
        with targets.assume(targets.TARGETS["sm_90"]), recording() as launches:
            blocks.convolve(
                Operand(small), weight, Geometry(16, 8, 8, 64, 16, 16, 64, 2, 1), transposed=True,
                epilogue=epilogue, tile=tile,
            )  # fmt: skip
        ran.append(launches[0].kernel.fn.__name__)
    assert ran == ["gather_gluon"] * 2 + ["gather_descriptors"] * 2


def test_the_same_bits_twice():
    parts = torch.randn(77, 48 * 20, generator=torch.Generator().manual_seed(0))
    first, second = (reduce(parts, torch.empty(20, 3, 4, 4)).value for _ in range(2))
    assert torch.equal(first, second)
