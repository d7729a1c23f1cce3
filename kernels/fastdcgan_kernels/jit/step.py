"""What a training step has besides convolutions and norms, each in one launch: the loss on logits,
the cropping of uint8 images. Not here: any GEMM; the update of parameters (adam.py)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def bce_rows(
    logits,  # [groups, count]
    targets,  # [groups] fp32
    scale,  # [] fp32; read where SCALED
    row,  # [1 + groups] fp32: the groups' mean losses added, and each one's mean sigmoid
    gradient,  # like logits: of the losses' sum, times share and scale
    count,
    groups,
    share,  # row and gradient are multiplied by it
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Binary cross-entropy on logits, BLOCK of them at a time and always in the same order. Grid:
    (1,)."""
    factor = share / count
    back = factor
    if SCALED:
        back = factor * tl.load(scale)
    total = 0.0
    for group in range(groups):
        target = tl.load(targets + group)
        loss = tl.zeros((BLOCK,), dtype=tl.float32)
        probability = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mask = at < count
            z = tl.load(logits + group * count + at, mask=mask, other=0.0).to(tl.float32)
            e = tl.exp(-tl.abs(z))
            # log(1 + e) to e's own last digits (Kahan): what 1 + e rounds away is divided out.
            u = 1.0 + e
            log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
            p = tl.where(z >= 0, 1.0, e) / u
            loss += tl.where(mask, tl.maximum(z, 0.0) - z * target + log1p, 0.0)
            probability += tl.where(mask, p, 0.0)
            g = (p - target) * back
            to = gradient + group * count + at
            tl.store(to, g.to(gradient.dtype.element_ty), mask=mask)
        total += tl.sum(loss, axis=0)
        tl.store(row + 1 + group, tl.sum(probability, axis=0) * factor)
    tl.store(row, total * factor)


@triton.jit
def crop(
    images,  # [n, HEIGHT, WIDTH, C] uint8
    rows,  # [b] int64: which of them
    top,  # [b] int64: first pixel of the crop; read where MOVED
    left,  # [b] int64
    flipped,  # [b] int64: 1 for from right to left; read where FLIPPED
    out,  # [b, SIZE, SIZE, C]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    MOVED: tl.constexpr,
    FLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
