"""BatchNorm's own kernels (in the interpreter) against plain PyTorch in float64: statistics and
their merge, prologues and sums as passes of their own, and the way back through the norm."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels import reference
from fastdcgan_kernels.choice.spec import Buffers
from fastdcgan_kernels.gpu import batchnorm as norm
from fastdcgan_kernels.gpu import partials
from fastdcgan_kernels.gpu.tile import Operand
from tests.kernels import exact
from tests.kernels.exact import DTYPES, EPS, EVERY, OF_INPUT, PROLOGUES, SLOPE, Draw, close

# More than one tile of 128 rows and of 64 channels; the last of each is ragged, in two groups too.
# The interpreter has one multiprocessor: at most two programs share the row tiles of all groups.
SHAPE = (4, 70, 9, 9)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ACTIVATION = pytest.mark.parametrize("activation", EVERY)
GROUPS = pytest.mark.parametrize("groups", [1, 2])


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


def columns(y, groups):
    """[groups, rows, C] in float64."""
    return y.double().unflatten(0, (groups, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)


def finalize(y, groups=1, gamma=None, beta=None, running=None):
    """(coef, stats) of y, in one launch."""
    with norm.without_gaps(running) as moved:
        merged = norm.merged_statistics(y, groups, y.shape[1], gamma, beta, EPS, moved)
        norm.statistics(y, groups, merged)
    return merged.coef, merged.stats


@GROUPS
@DTYPE
def test_statistics(dtype, groups):
    y = Draw(dtype).normal(*SHAPE, offset=3.0)
    exact.check_statistics(norm.statistics(y, groups), groups)


def partials_of(values, sizes):
    """Partials [2, 1, rows, C] and counts [1, rows] of values [*, C], rows of these sizes."""
    tiles = values.double().split(sizes)
    mean = torch.stack([tile.mean(0) for tile in tiles])
    m2 = torch.stack([tile.var(0, correction=0) * len(tile) for tile in tiles])
    counts = torch.tensor([sizes], dtype=torch.float32)
    return torch.stack([mean, m2])[:, None].float(), counts


@pytest.mark.parametrize("tiles", [1, 2, 64, 65, 200])
def test_tiles_of_any_number_and_size_are_merged(tiles):
    """65 are the first that are merged in more than one step."""
    sizes = [1 + 7 * i % 5 for i in range(tiles)]
    draw = Draw(torch.float32)
    trend = torch.linspace(-2, 4, sum(sizes))[:, None]  # tiles differ
    values = draw.normal(sum(sizes), 20) + trend
    merged = norm.merged_statistics(values, 1, 20, None, None, EPS)
    partials.merge(*partials_of(values, sizes), merged)
    coef, stats = merged.coef, merged.stats
    wide = values.double()
    mean, var = wide.mean(0), wide.var(0, correction=0)
    close(stats[0, 0], mean)
    close(stats[1, 0], var)
    assert (stats[2] == sum(sizes)).all()
    assert torch.equal(coef[0], stats[0])
    close(coef[1, 0], (var + EPS).rsqrt())
    assert (coef[2] == 0).all()


@GROUPS
@DTYPE
def test_coefficients_have_scale_and_shift(dtype, groups):
    """Parameters may have another dtype than the statistics."""
    draw = Draw(torch.float32)
    y, gamma, beta = draw.normal(*SHAPE), *(Draw(dtype, seed).normal(70) for seed in (1, 2))
    coef, stats = finalize(y, groups, gamma, beta)
    wide = columns(y, groups)
    close(stats[1], wide.var(1, correction=0))
    close(coef[0], wide.mean(1))
    close(coef[1], gamma.double() * (wide.var(1, correction=0) + EPS).rsqrt())
    assert torch.equal(coef[2], beta.float().expand(groups, -1))


def test_variance_of_values_far_from_zero():
    """Mean 1000, standard deviation 1: in float32 E[y^2] - E[y]^2 has not one right digit."""
    y = Draw(torch.float32).normal(2, 5, 50, 50, offset=1000.0)
    coef, stats = finalize(y)
    (wide,) = columns(y, 1)
    torch.testing.assert_close(stats[0, 0].double(), wide.mean(0), rtol=5e-7, atol=0)
    # Each tile's mean is a float32 near 1000, 3e-5 off at most.
    torch.testing.assert_close(stats[1, 0].double(), wide.var(0, correction=0), rtol=1e-4, atol=0)
    normal = norm.pointwise(Operand(y, "activate", coef=coef))
    expected = F.batch_norm(y.double(), None, None, training=True, eps=EPS)
    torch.testing.assert_close(normal.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_buffer_gets_the_unbiased_variance_and_the_norm_the_biased_one(momentum):
    """Two groups of 4 values each, where 4 / 3 is far from 1; the buffers see them in turn, also by
    a cumulative average, whose momentum is another for each; in the kernel and in its twin."""
    y = Draw(torch.float32).normal(2, 70, 2, 2)
    module = torch.nn.BatchNorm2d(70, momentum=momentum).double()
    own, twin = ([torch.zeros(70), torch.ones(70)] for _ in range(2))
    share = torch.tensor([1.0, 1 / 2]) if momentum is None else momentum
    batches = torch.tensor(5)
    running = norm.Running(*own, share, batches)
    coef, stats = finalize(y, 2, running=running)
    wide = columns(y, 2)
    close(coef[1], (wide.var(1, correction=0) + EPS).rsqrt())
    assert torch.equal(coef[3], coef[1])
    assert (coef[4] == 4).all()
    for image in y.double():
        module(image[None])
    reference.update_running(Buffers(*twin), stats, share)
    for buffers in (own, twin):
        close(buffers[0], module.running_mean)
        close(buffers[1], module.running_var)
    assert batches.item() == 7


def test_running_buffers_in_half_precision_and_with_gaps():
    y = Draw(torch.float32).normal(3, 20, 4, 4, offset=1.0)
    module = torch.nn.BatchNorm2d(20).double()
    module(y.double())
    for make in (lambda t: t.bfloat16(), lambda t: t.repeat_interleave(2)[::2]):
        mean, var = make(torch.zeros(20)), make(torch.ones(20))
        finalize(y, running=norm.Running(mean, var, 0.1))
        tolerance = 2**-8 if mean.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(mean.double(), module.running_mean, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(var.double(), module.running_var, rtol=tolerance, atol=0)


@GROUPS
@pytest.mark.parametrize("prologue", PROLOGUES)
@ACTIVATION
def test_prologues_as_a_pass_and_their_column_sums(activation, prologue, groups):
    """In bfloat16 and float16 the operand is rounded as it is for a convolution, also for sums."""
    if prologue == "actgrad" and activation in OF_INPUT:
        return  # it has no derivative from the output
    for dtype in DTYPES:
        operand = Draw(dtype).operand(SHAPE, groups, prologue, activation)
        ours, truth = norm.pointwise(operand, groups), exact.prepared(operand, torch.float64)
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        eager = exact.prepared(operand, torch.float32).to(dtype)
        close(ours, truth, None if dtype == torch.float32 else eager)
        close(norm.column_sum(operand, groups), exact.seen(operand).sum((0, 2, 3)))


@GROUPS
@ACTIVATION
def test_gradient_of_normalise_and_activate(activation, groups):
    """Of y and of each coefficient, against autograd."""
    for dtype in DTYPES:
        draw = Draw(dtype)
        g, y, coef = draw.normal(*SHAPE), draw.normal(*SHAPE), draw.coef(groups, 70)
        ours, gcoef = norm.activation_backward(g, y, coef, activation, SLOPE, groups)
        found = {}
        for wide in (torch.float64, torch.float32):
            leaves = [t.to(wide).requires_grad_() for t in (y, coef)]
            out = reference.activate(*leaves, activation, SLOPE)
            found[wide] = torch.autograd.grad(out, leaves, g.to(wide))
        truth, gcoef_truth = found[torch.float64]
        eager = found[torch.float32][0].to(dtype)
        close(ours, truth, None if dtype == torch.float32 else eager)
        for row in range(3):
            close(gcoef[row], gcoef_truth[row])


EXTREMES = [0.0, -0.0, 1e-8, -1e-8, -1e-3, -0.25, -0.26, 1.0, -1.0, 9.0, -9.0, 90.0, -90.0, 1e4,
            -1e4, float("nan")]  # fmt: skip


@ACTIVATION
def test_activations_and_derivatives_at_the_extremes(activation):
    """Without an overflow; at 0 the derivative is PyTorch's; NaN stays NaN."""
    y = torch.tensor(EXTREMES)[None, :, None, None]
    coef = torch.stack([torch.zeros(1, 16), torch.ones(1, 16), torch.zeros(1, 16)])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out = norm.pointwise(Operand(y, "activate", None, coef, activation, SLOPE))
        dz, _ = norm.activation_backward(torch.ones_like(y), y, coef, activation, SLOPE, 1)
    z = y.double().requires_grad_()
    right = exact.act(z, activation)
    (derivative,) = torch.autograd.grad(right.sum(), z)
    least = 5e-8 if activation == "tanh" else 1e-12  # (1 - e) / (1 + e) loses digits near 0
    torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=least, equal_nan=True)
    known = ~y.isnan()
    torch.testing.assert_close(dz[known].double(), derivative[known], rtol=1e-6, atol=2e-7)
    assert dz[~known].isnan().all() or activation in ("relu", "leaky_relu", "none")


def test_elu_near_0_has_all_digits():
    """exp(z) - 1 would have none at 1e-7."""
    y = -torch.logspace(-7, 0, 160).view(10, 16, 1, 1)
    coef = torch.stack([torch.zeros(1, 16), torch.ones(1, 16), torch.zeros(1, 16)])
    out = norm.pointwise(Operand(y, "activate", None, coef, "elu", 1.5))
    torch.testing.assert_close(out.double(), 1.5 * y.double().expm1(), rtol=3e-7, atol=0)


def test_sums_over_more_tiles_than_one_step_takes():
    """72 tiles of 64 rows; 64 are one step."""
    draw = Draw(torch.float32)
    shape = (2, 3, 48, 48)
    g, y, coef = draw.normal(*shape, offset=1.0), draw.normal(*shape), draw.coef(1, 3)
    gcoef = norm.activation_backward(g, y, coef, "none", 0.0, 1)[1][:, 0]
    (wide,), (apart,) = columns(g, 1), columns(y, 1) - coef[0].double()
    close(gcoef[0], -coef[1, 0].double() * wide.sum(0))
    close(gcoef[1], (wide * apart).sum(0))
    close(gcoef[2], wide.sum(0))
    close(norm.column_sum(Operand(g)), wide.sum(0))


@GROUPS
@pytest.mark.parametrize("affine", [True, False])
def test_gradient_through_the_batch_statistics(affine, groups):
    """mean and rstd depend on y: the whole way back is PyTorch's batch_norm."""
    draw = Draw(torch.float32)
    y, g = draw.normal(*SHAPE, offset=2.0), draw.normal(*SHAPE)
    gamma, beta = (draw.normal(70), draw.normal(70)) if affine else (None, None)
    coef, _ = finalize(y, groups, gamma, beta)
    gy, gcoef = norm.activation_backward(g, y, coef, "tanh", 0.0, groups)
    assert (gcoef[3:, 1:] == 0).all()  # dgamma and dbeta are of all groups
    dcoef, dgamma, dbeta = norm.norm_gradient(gcoef)
    dy = norm.pointwise(Operand(gy, "normgrad", y, dcoef), groups)

    leaves = [t.double().requires_grad_() for t in (y, gamma, beta) if t is not None]
    parts = leaves[0].chunk(groups)
    out = torch.cat(
        [F.batch_norm(part, None, None, *leaves[1:], training=True, eps=EPS) for part in parts]
    )
    truth = torch.autograd.grad(out.tanh(), leaves, g.double())
    close(dy, truth[0])
    if affine:
        close(dgamma, truth[1])
        close(dbeta, truth[2])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.sampled_from([1, 3, 16, 65, 100]), st.integers(1, 9),
    st.integers(1, 9), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(n, c, h, w, dtype, by_image, seed):
    groups, draw = n if by_image else 1, Draw(dtype, seed)
    y, g = draw.normal(n, c, h, w), draw.normal(n, c, h, w)
    result = norm.statistics(y, groups)
    exact.check_statistics(result, groups)
    coef, stats = finalize(y, groups)
    close(stats[0], columns(y, groups).mean(1))
    operand = Operand(y, "activate", coef=coef, activation="leaky_relu", slope=SLOPE)
    assert torch.equal(
        norm.pointwise(operand, groups), exact.prepared(operand, torch.float32).to(dtype)
    )
    _, gcoef = norm.activation_backward(g, y, coef[:3], "none", 0.0, groups)
    close(gcoef[2], columns(g, groups).sum(1))


def test_the_same_bits_twice():
    found = []
    for draw in (Draw(torch.float32), Draw(torch.float32)):
        y, g = draw.normal(*SHAPE), draw.normal(*SHAPE)
        coef, stats = finalize(y, 2)
        gy, gcoef = norm.activation_backward(g, y, coef, "tanh", 0.0, 2)
        found.append([coef, stats, gy, *norm.norm_gradient(gcoef)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
