"""Squares of uint8 images as floats from -1 to 1, in one launch. Not here: which squares of
which images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import cdiv
from ..placing import empty_or_placed
from .launch import Launch

BLOCK = 1024


def squares(
    images: Tensor, rows: Tensor, size: int, dtype: torch.dtype, *,
    corner: Sequence[Tensor] | None = None, flipped: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Squares of uint8 images as value / 127.5 - 1, in float32 and rounded once.

    Args:
        images: (n, H, W, C), contiguous.
        rows: (b,) int64: which images.
        size: side of the square in pixels.
        dtype: of the result, floating, at most 32 bits.
        corner: top and left pixel of each square, (b,) int64 each. Default: 0.
        flipped: (b,) int64, 1 where the square is turned from left to right. Default: nowhere.

    Returns:
        (b, C, size, size), channels_last.
    """
    b, (_, height, width, channels) = rows.shape[0], images.shape
    out = empty_or_placed(b, channels, size, size, images, dtype)
    top, left = (rows, rows) if corner is None else (each.contiguous() for each in corner)
    Launch(
        crop,
        (cdiv(size * size * channels, BLOCK), b),
        {
            "images": images, "rows": rows, "top": top, "left": left,
            "flipped": rows if flipped is None else flipped.contiguous(), "out": out,
            "HEIGHT": height, "WIDTH": width, "C": channels, "SIZE": size,
            "MOVED": corner is not None, "FLIPPED": flipped is not None, "BLOCK": BLOCK,
        },
    ).run(images.device)  # fmt: skip
    return out


@triton.jit
def crop(
    images,  # [n, HEIGHT, WIDTH, C] uint8
    rows,  # [b] int64: which of them
    top,  # [b] int64: first pixel of the crop; read where MOVED
    left,  # [b] int64
    flipped,  # [b] int64: 1 for from right to left; read where FLIPPED
    out,  # [b, SIZE, SIZE, C]
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    MOVED: tl.constexpr, FLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value / 127.5 - 1, in float32 and rounded once. Grid: (blocks of an image's values, b)."""
    image = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE * SIZE * C
    c = at % C
    x = at // C % SIZE
    y = at // (C * SIZE)
    if FLIPPED:
        x = tl.where(tl.load(flipped + image) != 0, SIZE - 1 - x, x)
    if MOVED:
        y += tl.load(top + image).to(tl.int32)
        x += tl.load(left + image).to(tl.int32)
    source = tl.load(rows + image) * (HEIGHT * WIDTH * C)
    value = tl.load(images + source + ((y * WIDTH + x) * C + c), mask=mask, other=0)
    value = tl.div_rn(value.to(tl.float32), tl.full((BLOCK,), 127.5, tl.float32)) - 1.0
    to = image.to(tl.int64) * (SIZE * SIZE * C) + at
    tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)
