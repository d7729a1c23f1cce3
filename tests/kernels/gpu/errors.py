"""Prints how far the kernels are from float64 for each geometry, in Triton's interpreter, as
Markdown: `python -m tests.kernels.gpu.errors`. It judges nothing; test_geometries.py does."""

import datetime
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import triton

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import conv_pointers, conv_tma, conv_weight
from fastdcgan_kernels.gpu.tile import Operand
from tests import interpreter
from tests.kernels.exact import Draw, convolve, errors
from tests.kernels.geometries import GEOMETRIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gradient_of(large, small, g, shape):
    """The weight's, by PyTorch in the operands' dtype."""
    weight = torch.zeros(shape, dtype=large.dtype, requires_grad=True)
    return torch.autograd.grad(convolve(large, weight, g, False), weight, small)[0]


def three(g, dtype):
    """(kernels' error, PyTorch's error) RMS beside float64: both convolutions, the weight's
    gradient; by descriptors where the layer has them."""
    draw = Draw(dtype)
    small, large = (draw.normal(*shape) for shape in draw.sides(g))
    weight = draw.weight(g)
    tile = Tile(16, 16, 8, engine="descriptors")
    for transposed, x in ((False, large), (True, small)):
        source = Operand(x)
        takes = conv_tma.takes(source, weight, g, transposed=transposed, tile=tile)
        module = conv_tma if takes else conv_pointers
        found = module.convolve(source, weight, g, transposed=transposed, tile=tile).value
        truth = convolve(x.double(), weight.double(), g, transposed)
        plain = convolve(x, weight, g, transposed)
        yield errors(found, truth)[0], errors(plain, truth)[0]
    found = conv_weight.weight_gradient(
        Operand(small), Operand(large), g, tile=tile, dtype=torch.float32
    )
    truth = gradient_of(large.double(), small.double(), g, weight.shape)
    yield errors(found, truth)[0], errors(gradient_of(large, small, g, weight.shape), truth)[0]


def main():
    interpreter.patch_bfloat16()
    print(
        "# Every geometry against float64\n\n"
        "`python -m tests.kernels.gpu.errors`: the kernels' RMS error relative to float64, in "
        "Triton's interpreter, and PyTorch's own in the same dtype in parentheses; 16 and 24 "
        "channels, normal data. *down* is the convolution, *up* the transposed one, by tensor "
        "descriptors where a layer has them, else by pointers; the weight's gradient is float32 "
        "in either dtype, and PyTorch's is rounded to it.\n\n"
        f"torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}.\n"
    )
    heads = [f"{dtype} {what}" for dtype in DTYPES for what in ("down", "up", "weight")]
    print("| geometry (small side; large side) |", " | ".join(heads), "|")
    print("|---" * (1 + len(heads)) + "|")
    for name, g in GEOMETRIES.items():
        cells = [
            f"{ours:.1e} ({plain:.1e})" for d in DTYPES.values() for ours, plain in three(g, d)
        ]
        print(f"| {name} ({g.P}x{g.Q}; {g.H}x{g.W}) |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
