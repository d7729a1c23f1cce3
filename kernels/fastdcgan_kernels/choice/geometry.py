"""Shapes of layers and of tiles; imports no Triton, so that plans and shapes cost nothing.

A layer joins a small side [N, CS, P, Q] and a large side [N, CL, H, W] by the 16 taps of a weight
[CS, CL, 4, 4]: Conv2d goes from large to small, ConvTranspose2d from small to large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Engine: TypeAlias = Literal["pointers", "descriptors", "gluon"]


@dataclass(frozen=True)
class Geometry:
    """Sides and steps of one layer on one batch."""

    N: int
    P: int
    Q: int
    CS: int
    H: int
    W: int
    CL: int
    stride: int
    pad: int

    def reads_once(self, transposed: bool) -> bool:
        """Whether the convolution, or the transposed one, loads each value of its input about once,
        whatever its tiles: to an image, or to a few numbers."""
        if transposed:
            return self.stride == 2 and self.CL <= 4
        return self.stride == 1 and self.CS <= 16

    def shape(self, transposed: bool = False) -> Shape:
        """As the kernels' constants, for the convolution or the transposed one."""
        small, large = (self.CS, self.P, self.Q), (self.CL, self.H, self.W)
        phase = (self.stride if self.stride > 1 else 4) if transposed else 1
        return Shape(
            self.P, self.Q, self.CS, self.H, self.W, self.CL, self.stride, self.pad, transposed,
            *(small if transposed else large), *(large if transposed else small),
            PHASE=phase, SIDE=4 // phase,
        )  # fmt: skip


class Shape(NamedTuple):
    """One direction of a layer as a kernel's constants. Everything that a kernel reads is a field:
    by them Triton tells one compilation from another."""

    P: int
    Q: int
    CS: int
    H: int
    W: int
    CL: int
    STRIDE: int
    PAD: int
    TRANSPOSED: bool  # from the small side to the large one
    CI: int  # channels, rows and columns of what is read,
    HI: int
    WI: int
    CO: int  # and of what is written
    HO: int
    WO: int
    PHASE: int  # along each axis, the output pixels that have the same taps are every PHASE-th
    SIDE: int  # taps that an output pixel has along each axis


@dataclass(frozen=True)
class Tile:
    """rows x columns of the result a program makes, `depth` of the sum it takes at a time, parts
    the sum is split into, what the compiler is told, and the engine: which kernel makes it, by what
    loads. An engine that does not take the tensors leaves them to the one before it in `Engine`;
    pointers take all."""

    rows: int
    columns: int
    depth: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    engine: Engine = "pointers"


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def bucket(n: int) -> int:
    """The power of two at or above n: batches of 65 to 128 share one decision. By comparisons, so
    that torch.compile, too, asks no more of a batch than these bounds."""
    power = 1
    while power < n:
        power *= 2
    return power


def box_of(pixels: int, geometry: Geometry) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of so many small pixels, a power of two: the widest whose
    sides divide the small side's."""
    columns = min(pixels, geometry.Q & -geometry.Q)
    rows = min(pixels // columns, geometry.P & -geometry.P)
    return pixels // columns // rows, rows, columns


def box_is_rows(pixels: int, geometry: Geometry, groups: int) -> bool:
    """Whether the small pixels of a box are one group's and follow one another in memory: rows of a
    matrix [N * P * Q, CS]."""
    g, (images, rows, columns) = geometry, box_of(pixels, geometry)
    in_a_row = columns == g.Q or images == rows == 1
    whole = (rows == g.P or images == 1) and (groups == 1 or g.N // groups % images == 0)
    return in_a_row and whole


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch's convolutions take a tensor for channels_last: by its strides, as
    c10's `is_channels_last_strides_2d` does; one that is both counts as contiguous."""
    if tensor.dim() != 4:
        return False
    sizes, strides, least = tensor.shape, tensor.stride(), 0
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor as PyTorch's convolutions take it for contiguous: `is_channels_last` is False,
    also with one channel or one pixel, where both formats are one."""
    found = tensor.contiguous()
    return found.clone(memory_format=torch.contiguous_format) if is_channels_last(found) else found


def geometry_of(x: Tensor, weight: Tensor, transposed: bool, stride: int) -> Geometry:
    """Sides of the layer that takes x [N, C, *, *] by this weight."""
    n, _, h, w = x.shape
    small, large = weight.shape[0], weight.shape[1]
    if stride == 1:
        return Geometry(n, 1, 1, small, 4, 4, large, 1, 0)
    if transposed:
        return Geometry(n, h, w, small, 2 * h, 2 * w, large, 2, 1)
    return Geometry(n, h // 2, w // 2, small, h, w, large, 2, 1)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which the gradient of a parameter is wanted: its own, unless it says otherwise."""
    wanted: torch.dtype | None = weight.grad_dtype if weight.is_leaf else None
    return wanted or weight.dtype


def empty(n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last [n, c, h, w] on the device of `like`."""
    return torch.empty(
        (n, c, h, w),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def empty_output(x: Tensor, weight: Tensor, transposed: bool, stride: int) -> Tensor:
    """Uninitialised output of the layer; right on fake and meta tensors too."""
    g = geometry_of(x, weight, transposed, stride)
    return empty(g.N, g.CL, g.H, g.W, x) if transposed else empty(g.N, g.CS, g.P, g.Q, x)
