"""Shapes of layers and of tiles; imports no Triton, so that plans and shapes cost nothing.

A layer joins a small side [N, CS, P, Q] and a large side [N, CL, H, W] by the taps of a weight
[CS, CL, K, K]: Conv2d goes from large to small, ConvTranspose2d from small to large. Small pixel
(p, q) meets large pixel (p * stride - pad + kh, q * stride - left + kw) at tap (kh, kw); what lies
outside is 0. So padding on the other sides is in the sides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Engine: TypeAlias = Literal["pointers", "descriptors", "gluon"]
Sides: TypeAlias = tuple[int, int, int, int]
Padding: TypeAlias = int | Sequence[int]
KERNEL = 7  # the largest side of a kernel that layers have


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
    kernel: int = 4
    skew: int = 0  # columns of padding on the left beyond `pad`, the rows above

    @property
    def left(self) -> int:
        """Columns of padding on the left."""
        return self.pad + self.skew

    def sides(self, transposed: bool) -> Sides:
        """(top, left, bottom, right): a padding that gives the convolution these sides, on both
        ends the same where that does; or what the transposed one's result is cut by."""
        ends = []
        axes = (self.P, self.H, self.pad), (self.Q, self.W, self.left)
        for small, large, before in axes:
            behind = (small - 1) * self.stride + self.kernel - large - before
            same = (large + 2 * before - self.kernel) // self.stride + 1 == small
            ends.append(behind if transposed else before if same else max(behind, 0))
        return self.pad, self.left, ends[0], ends[1]

    def is_image(self, transposed: bool) -> bool:
        """Whether the large side is an image of few channels, and the convolution from it (with the
        weight's gradient), or the transposed one to it, has a kernel that merges taps."""
        return self.CL <= 4 and (self.is_standard or not transposed)

    @property
    def window(self) -> int:
        """Values of an image that a small pixel meets, up to a power of two: a DCGAN's are 4 rows
        of 16, of up to 4 channels."""
        return 64 if self.is_standard else max(16, bucket(self.kernel**2 * self.CL))

    @property
    def has_view(self) -> bool:
        """Whether the pixels of the large side that one tap meets are neighbours in a view of it,
        which a tensor descriptor may have."""
        return self.stride == 1 or (self.H % 2 == 0 and self.W % 2 == 0)

    @property
    def is_standard(self) -> bool:
        """Whether it is a DCGAN's: a 4x4 kernel of stride 2 with padding 1, even sides."""
        doubled = (self.H, self.W) == (2 * self.P, 2 * self.Q)
        return doubled and (self.kernel, self.stride, self.pad, self.left) == (4, 2, 1, 1)

    def reads_once(self, transposed: bool) -> bool:
        """Whether the convolution, or the transposed one, loads each value of its input about once,
        whatever its tiles: to an image, or to a few numbers."""
        if transposed:
            return self.is_image(transposed)
        return self.CS <= 16 and (self.P == self.Q == 1 or self.kernel == 1)

    def shape(self, transposed: bool = False) -> Shape:
        """As the kernels' constants, for the convolution or the transposed one."""
        small, large = (self.CS, self.P, self.Q), (self.CL, self.H, self.W)
        phase, side, rows, columns = 1, self.kernel, self.P, self.Q
        if transposed:
            # From one pixel each output pixel has one tap: all are phases.
            one = self.P == self.Q == 1 and self.stride == 1 and self.pad == self.left == 0
            phase = self.kernel if one else self.stride
            side = 1 if one else cdiv(self.kernel, phase)
            rows, columns = cdiv(self.H, phase), cdiv(self.W, phase)
        return Shape(
            rows, columns, self.CS, self.H, self.W, self.CL, self.stride, self.pad, self.left,
            self.kernel, transposed, *(small if transposed else large),
            *(large if transposed else small), PHASE=phase, SIDE=side,
            UNEVEN=transposed and side * phase != self.kernel,
            RAGGED=transposed and (self.H % phase != 0 or self.W % phase != 0),
            WINDOW=self.window if self.CL <= 4 else 0, STANDARD=self.is_standard,
        )  # fmt: skip


class Shape(NamedTuple):
    """One direction of a layer as a kernel's constants. Everything that a kernel reads is a field:
    by them Triton tells one compilation from another."""

    P: int  # rows and columns of places: pixels of the small side, or those of the large side
    Q: int  # that are one of each phase
    CS: int
    H: int
    W: int
    CL: int
    STRIDE: int
    PAD: int
    LEFT: int
    K: int
    TRANSPOSED: bool  # from the small side to the large one
    CI: int  # channels, rows and columns of what is read,
    HI: int
    WI: int
    CO: int  # and of what is written
    HO: int
    WO: int
    PHASE: int  # along each axis, the output pixels that have the same taps are every PHASE-th
    SIDE: int  # taps that an output pixel has along each axis, or at most
    UNEVEN: bool  # some phases have a tap less
    RAGGED: bool  # the last place is in some phases outside
    WINDOW: int  # of an image
    STANDARD: bool


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


def box_of(pixels: int, shape: Geometry | Shape) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of so many pixels of P x Q, a power of two: the widest whose
    sides divide these."""
    columns = min(pixels, shape.Q & -shape.Q)
    rows = min(pixels // columns, shape.P & -shape.P)
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


def sides_of(padding: Padding, output_padding: Padding = 0) -> Sides:
    """(top, left, bottom, right) of a padding, which is one number, that of rows and that of
    columns, or these four; of a transposed convolution it is what is cut off, and its
    output_padding is cut off less."""
    given = [padding] * 2 if isinstance(padding, int) else list(padding)
    rows, columns = [output_padding] * 2 if isinstance(output_padding, int) else output_padding
    top, left, bottom, right = given * 2 if len(given) == 2 else given
    return top, left, bottom - rows, right - columns


def geometry_of(
    x: Tensor, weight: Tensor, transposed: bool, stride: int, padding: Sequence[int]
) -> Geometry:
    """Of the layer that takes x [N, C, *, *] by this weight, with these `sides_of` its padding."""
    n, _, h, w = x.shape
    small, large, k = weight.shape[0], weight.shape[1], weight.shape[2]
    top, left, bottom, right = padding
    if transposed:
        p, q = h, w
        h, w = (p - 1) * stride + k - top - bottom, (q - 1) * stride + k - left - right
    else:
        p, q = (h + top + bottom - k) // stride + 1, (w + left + right - k) // stride + 1
    return Geometry(n, p, q, small, h, w, large, stride, top, k, left - top)


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


def empty_output(
    x: Tensor, weight: Tensor, transposed: bool, stride: int, padding: Sequence[int]
) -> Tensor:
    """Uninitialised output of the layer; right on fake and meta tensors too."""
    g = geometry_of(x, weight, transposed, stride, padding)
    return empty(g.N, g.CL, g.H, g.W, x) if transposed else empty(g.N, g.CS, g.P, g.Q, x)
