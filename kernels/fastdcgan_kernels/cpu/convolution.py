"""Convolutions of float32 channels_last tensors on a CPU: by the C++ of this folder where it has a
kernel that is faster, by PyTorch elsewhere. Not here: autograd (ops.py), normalisation.

Sides and weights are named as in geometry.py. Whether a kernel runs depends on shapes alone.
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
# Fewer small pixels in a batch, and PyTorch is as fast (docs/cpu.md).
PIXELS = 256


def is_doubled(geometry: Geometry) -> bool:
    """Whether it is a 4x4 kernel of stride 2 between sides of which one is twice the other."""
    g = geometry
    return g.is_standard and (g.H, g.W) == (2 * g.P, 2 * g.Q)


def is_end(geometry: Geometry) -> bool:
    """Whether it joins one pixel and as many as the kernel has taps."""
    g, k = geometry, geometry.kernel
    return g.pad == g.left == 0 and (g.P, g.Q, g.H, g.W) == (1, 1, k, k)


def has_winograd(geometry: Geometry) -> bool:
    """Whether the weight gradient has a kernel for this layer. Tiles are 2x2 small pixels or more:
    a side of 1 or 3 would waste what they save."""
    g = geometry
    tiled = 4 * cdiv(g.P, 2) * cdiv(g.Q, 2)
    fits = is_doubled(g) and g.CS % PANEL == 0 and g.CL % PANEL == 0
    return fits and 3 * tiled <= 4 * g.P * g.Q


def tile(geometry: Geometry) -> int:
    """Side of a tile of the small side: large where they fit and the weights, of which there are 25
    matrices, are not too many."""
    g = geometry
    return 4 if g.P % 4 == g.Q % 4 == 0 and g.CS * g.CL <= 256 * 128 else 2


def _shape(g: Geometry) -> tuple[int, ...]:
    """As the C++ takes it."""
    return g.N, g.P, g.Q, g.CS, g.H, g.W, g.CL, g.kernel, g.stride, g.pad, g.left


def pays(geometry: Geometry) -> bool:
    """Whether both convolutions have, too, and the pixels are worth the weights' transformation."""
    g = geometry
    return has_winograd(g) and g.N * g.P * g.Q >= PIXELS


def has_image_up(geometry: Geometry) -> bool:
    """Whether `image_up` has a kernel for this layer."""
    return geometry.is_image and geometry.CS % CHUNK == 0


def convolve(
    x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool, bias: Tensor | None = None,
    slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """leaky_relu(convolution, or transposed one, of x + bias, slope), channels_last; slope 0 is
    ReLU, 1 nothing."""
    g = geometry
    if pays(g) or (transposed and has_image_up(g)):
        out = empty(g.N, g.CL, g.H, g.W, x) if transposed else empty(g.N, g.CS, g.P, g.Q, x)
        if pays(g):
            name = "up" if transposed else "down"
            call(name, x, weight, bias, out, tile(g), *_shape(g), slope)
        else:
            call("image_up", x, weight, bias, out, g.N, g.P, g.Q, g.CS, g.CL, slope)
        return out
    with torch.autocast("cpu", enabled=False):
        if is_end(g):
            y = _end(x, weight, g, transposed)
            y = y if bias is None else y.add_(bias[:, None, None])
        else:
            y = plain.convolve(x, weight, bias, g.stride, g.sides(transposed), transposed)
            y = y.contiguous(memory_format=LAST)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def _end(x: Tensor, weight: Tensor, g: Geometry, transposed: bool) -> Tensor:
    """Where one side is a pixel the taps are columns, and the layer a matrix product."""
    matrix = _rows(weight)
    out = empty(g.N, g.CL, g.H, g.W, x) if transposed else empty(g.N, g.CS, 1, 1, x)
    torch.mm(_rows(x), matrix if transposed else matrix.T, out=_rows(out))
    return out


def _rows(x: Tensor) -> Tensor:
    """channels_last [N, C, H, W] as the matrix [N, H W C] that it is in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


def weight_gradient(small: Tensor, large: Tensor, geometry: Geometry) -> Tensor:
    """Gradient [CS, CL, K, K] of the weight, channels_last: one side, the other's gradient."""
    g, out = geometry, empty(geometry.CS, geometry.CL, geometry.kernel, geometry.kernel, small)
    if has_winograd(g):
        call("weight_gradient", small, large, out, tile(g), *_shape(g))
        return out
    with torch.autocast("cpu", enabled=False):
        if is_end(g):
            torch.mm(_rows(small).T, _rows(large), out=_rows(out))
            return out
        _, gw = plain.gradients(small, large, out, g.stride, g.sides(False), False, need_x=False)
        assert gw is not None
    return gw.contiguous(memory_format=LAST)


def call(name: str, *arguments: Any) -> None:
    """Run a function of the library on PyTorch's threads; tensors are given by where they are."""
    found: ctypes.CDLL | None = library()
    assert found is not None, "no library"
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(found, f"fastdcgan_{name}")(*values, torch.get_num_threads())
