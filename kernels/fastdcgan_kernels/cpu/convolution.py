"""Convolutions in float32 of channels_last tensors on a CPU: by the C++ of this folder where it has
a kernel that is faster, by PyTorch elsewhere. Not here: autograd (ops.py), normalisation.

Sides and weights are named as in geometry.py. Whether a kernel runs depends on shapes alone, and
under autocast on the processor.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import convolution as plain
from ..choice.geometry import Geometry, cdiv, empty
from .build import library

LAST = torch.channels_last

# Channels come in panels of two vectors, of at most 16 floats; images take theirs 16 at a time.
PANEL, CHUNK = 32, 16
# Fewer small pixels in a batch of a doubling layer, and PyTorch is as fast (docs/cpu.md).
PIXELS = 256
# Tiles whose products take about as long as transforming the weights, and reading them.
WEIGHTS = 25


def is_end(geometry: Geometry) -> bool:
    """Whether it joins one pixel and as many as the kernel has taps."""
    g = geometry
    return g.pad == g.left == 0 and g.P == g.Q == 1 and g.H == g.W == g.kernel


def has_winograd(geometry: Geometry) -> bool:
    """Whether the weight gradient has a kernel for this layer, and multiplies less than a direct
    one, which skips what is outside: tiles may be larger than the sides are."""
    g = geometry
    known = g.kernel in (4, 5) or (g.kernel, g.stride) == (3, 1)
    if not known or g.CS % PANEL or g.CL % PANEL:
        return False
    if g.is_standard:
        return 3 * _tiles(g, 2) * 2 * 2 <= 4 * g.P * g.Q
    return min(products(g, side) * _tiles(g, side) for side in (2, 4)) <= _met(g)


def pays(geometry: Geometry) -> bool:
    """Whether both convolutions have, too, and the pixels are worth the weights' transformation."""
    g = geometry
    if not has_winograd(g):
        return False
    if g.is_standard:
        return g.N * g.P * g.Q >= PIXELS
    return _cost(g, tile(g)) < g.N * _met(g)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _bfloat16() -> float:
    """The time of a multiplication in bfloat16, by this processor's instructions for it, beside one
    in float32: half of it, or so little that nothing beats it. Without any, more."""
    # PyTorch has these without a public name.
    supported = (
        getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()
        for name in ("amx_tile", "avx512_bf16")
    )
    has_tiles, has_vectors = supported
    return 0.0 if has_tiles else 0.5 if has_vectors else 1.0


def beats_bfloat16(geometry: Geometry) -> bool:
    """Whether float32 with fewer multiplications takes less time than all of them in bfloat16. In
    DCGAN's own layers it takes as long, and sampling a little more."""
    g = geometry
    return pays(g) and not g.is_standard and _cost(g, tile(g)) < _bfloat16() * g.N * _met(g)


def tile(geometry: Geometry) -> int:
    """Side of a tile of the small side: 4x4 tiles multiply less, but fit less well and have more
    matrices of weights."""
    g = geometry
    if g.is_standard:
        return 4 if g.P % 4 == g.Q % 4 == 0 and g.CS * g.CL <= 256 * 128 else 2
    return 4 if _cost(g, 4) <= _cost(g, 2) else 2


def products(geometry: Geometry, side: int) -> int:
    """Multiplications of a tile with so many pixels a side, for a channel of each side of the
    layer. Taps make two pieces, a small kernel's of stride 1 one (winograd.cpp)."""
    g = geometry
    pieces = 1 if g.kernel == 3 else 2
    return (pieces * (side - 1) + g.kernel) ** 2


def _tiles(g: Geometry, side: int) -> int:
    """Of an image."""
    return cdiv(g.P, side) * cdiv(g.Q, side)


def _cost(g: Geometry, side: int) -> int:
    """Multiplications of a batch with tiles of that side, weights counted as tiles."""
    return products(g, side) * (g.N * _tiles(g, side) + WEIGHTS)


def _met(g: Geometry) -> int:
    """Pairs of a pixel of the small side and a tap that meets one of the large side; an image's."""

    def along(small: int, large: int, pad: int) -> int:
        ends = ((cdiv(pad - k, g.stride), (large - 1 + pad - k) // g.stride)
                for k in range(g.kernel))  # fmt: skip
        return sum(max(0, min(small - 1, last) - max(0, first) + 1) for first, last in ends)

    return along(g.P, g.H, g.pad) * along(g.Q, g.W, g.left)


def _shape(g: Geometry) -> tuple[int, ...]:
    """As the C++ takes it."""
    return g.N, g.P, g.Q, g.CS, g.H, g.W, g.CL, g.kernel, g.stride, g.pad, g.left


def has_image_up(geometry: Geometry) -> bool:
    """Whether `image_up` has a kernel for this layer."""
    g = geometry
    return g.CL <= 4 and g.kernel in (3, 4, 5) and g.CS % CHUNK == 0 and not is_end(g)


def convolve(
    x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool, bias: Tensor | None = None,
    slope: float = 1.0, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """leaky_relu(convolution, or transposed one, of x + bias, slope), channels_last; slope 0 is
    ReLU, 1 nothing. x and what comes of it, in `dtype`, are float32 or bfloat16."""
    g = geometry
    if pays(g) or (transposed and has_image_up(g)):
        sides = (g.N, g.CL, g.H, g.W) if transposed else (g.N, g.CS, g.P, g.Q)
        out = empty(*sides, x, dtype if pays(g) else torch.float32)
        if pays(g):
            name = "up" if transposed else "down"
            call(name, *given(x), weight, bias, *given(out), tile(g), *_shape(g), slope)
        else:
            call("image_up", *given(x), weight, bias, out, *_shape(g), slope)
        return out.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast("cpu", enabled=False):
        if is_end(g):
            y = _end(x, weight, g, transposed)
            y = y if bias is None else y.add_(bias[:, None, None])
        else:
            bias = None if bias is None else bias.to(dtype)
            # With one channel the format is in the strides alone, and PyTorch answers in it.
            weight = weight.as_strided(weight.shape, _strides(g.CL, g.kernel))
            y = plain.convolve(x, weight, bias, g.stride, g.sides(transposed), transposed)
            y = y.contiguous(memory_format=LAST)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def _end(x: Tensor, weight: Tensor, g: Geometry, transposed: bool) -> Tensor:
    """Where one side is a pixel the taps are columns, and the layer a matrix product."""
    matrix = _rows(weight)
    out = empty(g.N, g.CL, g.H, g.W, x) if transposed else empty(g.N, g.CS, 1, 1, x)
    torch.mm(_rows(x), matrix if transposed else matrix.T, out=_rows(out))
    return out


def _strides(c: int, kernel: int) -> tuple[int, ...]:
    """Of a channels_last weight [., c, kernel, kernel]."""
    return kernel * kernel * c, 1, kernel * c, c


def _rows(x: Tensor) -> Tensor:
    """channels_last [N, C, H, W] as the matrix [N, H W C] that it is in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


def weight_gradient(small: Tensor, large: Tensor, geometry: Geometry) -> Tensor:
    """Gradient [CS, CL, K, K] of the weight, float32 channels_last: one side, the other's gradient,
    each float32 or bfloat16."""
    g = geometry
    shape = g.CS, g.CL, g.kernel, g.kernel
    if has_winograd(g):
        out = empty(*shape, small, torch.float32)
        call("weight_gradient", *given(small), *given(large), out, tile(g), *_shape(g))
        return out
    if small.dtype != large.dtype:
        small, large = small.float(), large.float()
    out = empty(*shape, small)
    with torch.autocast("cpu", enabled=False):
        if is_end(g):
            torch.mm(_rows(small).T, _rows(large), out=_rows(out))
        else:
            sides = g.sides(False)
            _, gw = plain.gradients(small, large, out, g.stride, sides, False, need_x=False)
            assert gw is not None
            out = gw
    return out.float().contiguous(memory_format=LAST)


def given(x: Tensor) -> tuple[Tensor, bool]:
    """As the C++ takes a tensor of either dtype."""
    return x, x.dtype == torch.bfloat16


def call(name: str, *arguments: Any) -> None:
    """Run a function of the library on PyTorch's threads; tensors are given by where they are."""
    found: ctypes.CDLL | None = library()
    assert found is not None, "no library"
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(found, f"fastdcgan_{name}")(*values, torch.get_num_threads())
