"""Loads by tensor descriptors (TMA), for the convolutions and the weight's gradient: one box for a
tap of a tile of pixels, no index arithmetic. What a box takes from outside the tensor is 0, which
is the padding.

A tile of pixels is a BOX of small pixels (images, rows, columns), of which the rows divide P and
the columns Q. Where STRIDE is 2 the large side's descriptor is the view [N, H/2, 2, W/2, 2 * CL] of
[N, H, W, CL]: the pixels that one tap meets are neighbours in it. Else a descriptor is the tensor
as it lies in memory, NHWC.

Not here: tensors whose rows are no multiple of 16 bytes, and large sides that are odd where STRIDE
is 2.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..choice.geometry import Geometry
from .tile import Operand


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor; (0, 0) for one that does not say."""
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def fits_descriptors(precision: str, *tensors: Tensor | None) -> bool:
    """Whether each starts at a multiple of 16 bytes, and so does each of its pixels: what a tensor
    descriptor asks for. And whether their products are then as exact as by pointers: before 3.7
    Triton rounds to TF32 only what goes through registers, and the hardware cuts off the rest."""
    if precision == "tf32" and triton_version() < (3, 7):
        return False
    return all(
        t is None or (t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0)
        for t in tensors
    )


def descriptor(t: Tensor, shape: list[int], box: list[int]) -> Any:
    """Of the memory of `t`, without gaps, in this shape."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return TensorDescriptor(t, shape, strides, box)


def described(
    name: str, operand: Operand, geometry: Geometry, large: bool, box: tuple[int, int, int],
    channels: int,
) -> dict[str, Any]:  # fmt: skip
    """`Operand.loaded` as three arguments of a kernel, with descriptors of its tensors, of which a
    box has these channels of its pixels; and the BOX."""
    n, c, h, w = operand.value.shape
    shape, block = [n, h, w, c], [*box, channels]
    if large and geometry.stride == 2:
        shape, block = [n, h // 2, 2, w // 2, 2 * c], [*box[:2], 1, box[2], channels]
    value, aux, coef = operand.loaded
    return {
        name: descriptor(value, shape, block), f"{name}_aux": descriptor(aux, shape, block),
        f"{name}_coef": coef, "BOX": box,
    }  # fmt: skip


@triton.jit
def box_pixels(
    at, group, images, S: tl.constexpr, BOX: tl.constexpr, PART: tl.constexpr = 0,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """(image, row, column) of a box's first place, and [pixels] of each, or of those in one
    of PARTS of the box; the images of these are counted from the group's first."""
    q0 = at % (S.Q // BOX[2]) * BOX[2]
    p0 = at // (S.Q // BOX[2]) % (S.P // BOX[1]) * BOX[1]
    own = at // ((S.Q // BOX[2]) * (S.P // BOX[1])) * BOX[0]
    n0 = group * images + own
    pixels: tl.constexpr = BOX[0] * BOX[1] * BOX[2] // PARTS
    row = PART * pixels + tl.arange(0, pixels)
    q = q0 + row % BOX[2]
    p = p0 + row // BOX[2] % BOX[1]
    return n0, p0, q0, own + row // (BOX[2] * BOX[1]), p, q


@triton.jit
def load_box(x, aux, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROLOGUE: tl.constexpr):
    """[ROWS, COLUMNS] of the box at these indices, and of aux where the prologue reads it."""
    tile = x.load(at).reshape(ROWS, COLUMNS)
    second = tile
    if PROLOGUE == "normgrad" or PROLOGUE == "actgrad":
        second = aux.load(at).reshape(ROWS, COLUMNS)
    return tile, second


@triton.jit
def large_box(n, p, q, kh, along, S: tl.constexpr):
    """Where in the large side's descriptor the box is that small pixels from (n, p, q) on meet at
    the kernel's row kh, at channel `along` of its taps' kw * CL + c. Past a tap's last channel a
    box holds a neighbour."""
    if S.STRIDE == 2:
        # Counted from UP and BACK pairs of pixels before the first, so that nothing is negative.
        UP: tl.constexpr = (S.PAD + 1) // 2
        BACK: tl.constexpr = (S.LEFT + 1) // 2
        row, at = kh + (2 * UP - S.PAD), along + (2 * BACK - S.LEFT) * S.CL
        return n, p + row // 2 - UP, row % 2, q + at // (2 * S.CL) - BACK, at % (2 * S.CL)
    else:
        return n, p + kh - S.PAD, q + along // S.CL - S.LEFT, along % S.CL
