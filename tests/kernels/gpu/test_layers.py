"""The layers of a DCGAN at their full width (in the interpreter) against plain PyTorch in float64:
forward and both gradients, by the families of kernels that take them."""

import pytest

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_image, conv_pointers, conv_tma, conv_weight
from tests.kernels import exact
from tests.kernels.exact import DTYPES, layer


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


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


def convolve(source, weight, g, *, transposed, tile, **more):
    how = {"transposed": transposed, "tile": tile}
    family = conv_tma if conv_tma.takes(source, weight, g, **how) else conv_pointers
    family = conv_image if g.CL == 3 else family
    return family.convolve(source, weight, g, **how, **more)


def check_layer(g, transposed, dtype, tile, x, dy):
    """Forward, input gradient and weight gradient; x and dy: prologue and epilogue of the way there
    and of the way back."""
    before, after = ("relu", "none"), ("none", "relu" if dy[1] == "gradient" else "none")
    exact.check_gather(convolve, transposed, g, dtype, *x, before, 1, tile, bias=False)
    exact.check_gather(convolve, not transposed, g, dtype, *dy, after, 1, tile, bias=False)
    order = 1 if transposed else -1  # the transposed convolution's input is the small side
    exact.check_weight_gradient(
        (conv_image if g.CL == 3 else conv_weight).weight_gradient, g, dtype,
        (x[0], dy[0])[::order], before[::order], 1, tile, dtype,
    )  # fmt: skip


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
    tile = Tile(128, 256, 64, engine="descriptors")
    check_layer(DISCRIMINATOR[name], False, dtype, tile, ("none", "statistics"), ("none", "store"))
