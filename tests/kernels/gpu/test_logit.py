"""The way back through a layer with one output and the norm before it (in the interpreter) against
plain PyTorch's autograd in float64: gradients of y, of gamma and beta, and of the weight."""

import pytest
import torch
import torch.nn.functional as F

from fastdcgan_kernels import reference
from fastdcgan_kernels.gpu import logit
from fastdcgan_kernels.gpu.tile import Operand
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, DTYPES, SLOPE, Draw


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


def check(n, channels, dtype, activation, groups=1):
    draw = Draw(dtype)
    upstream, w = draw.normal(n, 1, 1, 1), draw.normal(1, channels, 4, 4)
    y = draw.normal(n, channels, 4, 4, offset=0.5)
    y64, gamma, beta = (
        t.double().requires_grad_() for t in (y, draw.normal(channels), draw.normal(channels))
    )
    coef = reference.coefficients(reference.statistics(y64, groups), gamma, beta, 1e-5)
    logits = F.conv2d(reference.activate(y64, coef, activation, SLOPE), w.double())
    truth = torch.autograd.grad(logits, (y64, gamma, beta), upstream.double())

    source = Operand(y, "activate", None, coef.detach().float(), activation, SLOPE)
    gy, sums = logit.backward(upstream, w, source, groups)
    assert gy.is_contiguous(memory_format=torch.channels_last)
    # Through two sums over what is as large as the result: a digit less.
    apart = exact.errors(gy, truth[0])
    rounding = exact.errors(truth[0].to(dtype), truth[0])
    assert apart[0] <= 1e-5 + 1.5 * rounding[0], apart
    assert apart[1] <= 1e-4 + 1.5 * rounding[1], apart
    sides = exact.seen(source), (1, channels, 4, 4), upstream.double()
    gw = torch.nn.grad.conv2d_weight(*sides)
    exact.close(sums[:16].view(1, 4, 4, -1).permute(0, 3, 1, 2), gw)
    exact.close(sums[16:], torch.stack(truth[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype):
    check(5, 17, dtype, activation)


@pytest.mark.parametrize(
    ("n", "channels", "groups"), [(33, 3, 1), (70, 20, 2), (6, 65, 3), (1, 1, 1)]
)
def test_images_groups_and_channels(n, channels, groups):
    """More than 32 images are several steps, more than 16 channels several tiles."""
    check(n, channels, torch.float32, "leaky_relu", groups)
