"""The way back through a layer with one output (in the interpreter) against plain PyTorch in
float64: the features' gradient with its sums, and the weight's."""

import pytest
import torch
import torch.nn.functional as F

from fastdcgan_kernels import convolution
from fastdcgan_kernels.convolution import Operand
from tests.kernels import exact
from tests.kernels.exact import ACTIVATIONS, DTYPES, Draw, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


def check(n, channels, dtype, activation, groups=1, weight=True):
    g, draw = layer(n, 1, 1, 1, channels, stride=1), Draw(dtype)
    upstream, w = draw.normal(n, 1, 1, 1), draw.weight(g)
    epilogue = draw.epilogue((n, channels, 4, 4), groups, "gradient", activation)
    wanted = torch.float32 if weight else None
    result, gw = convolution.logit_gradients(upstream, w, g, epilogue, groups=groups, dtype=wanted)
    product = F.conv_transpose2d(upstream.double(), w.double())
    truth, sums = exact.finish(product, epilogue, torch.float64)
    eager = None
    if dtype != torch.float32:
        product = F.conv_transpose2d(upstream, w).float()
        eager = exact.finish(product, epilogue, torch.float32)[0].to(dtype)
    exact.close(result.value, truth, eager)
    assert result.value.is_contiguous(memory_format=torch.channels_last)
    exact.close(result.partials.double().sum(2), sums)
    assert (gw is not None) == weight
    if weight:
        features = Operand(epilogue.aux, "activate", None, epilogue.coef, activation, exact.SLOPE)
        sides = exact.seen(features), (1, channels, 4, 4), upstream.double()
        exact.close(gw, torch.nn.grad.conv2d_weight(*sides))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype):
    check(5, 17, dtype, activation)


@pytest.mark.parametrize(
    ("n", "channels", "groups", "weight"),
    [(130, 3, 1, True), (130, 70, 2, True), (6, 65, 3, True), (2, 16, 2, False), (1, 1, 1, True)],
)
def test_images_groups_and_channels(n, channels, groups, weight):
    """More than 64 images are several steps, more than 64 channels several tiles."""
    check(n, channels, torch.float32, "leaky_relu", groups, weight)
