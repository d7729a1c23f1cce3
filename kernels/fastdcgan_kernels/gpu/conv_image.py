"""Layers whose large side is an image of 1 to 4 channels, with stride 2. A GEMM over single taps
would be nearly all padding here, so these kernels merge taps. Not here: wider layers
(conv_pointers.py, conv_tma.py, conv_weight.py).

From the image, a kernel row of 4 pixels is 4 * CL values that lie together in memory: 4 rows of up
to 16 values make one sum of 64. To the image, the four phases share a 3x3 window of small pixels:
one GEMM, 9 * CS deep, with the columns (r, s, channel).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Shape, Tile, cdiv, empty
from .launch import Launch
from .tile import Epilogue, Operand, Result, load_operand, of_group, parts_like, pixels, program

# isort: split
from .tile import reduce, store_pixels, store_tile

COLUMNS = 16  # to the image: four phases of up to 4 channels
WINDOW = tl.constexpr(64)  # columns of a 4x4 window: 4 rows of up to 16 values


def _shape(g: Geometry, transposed: bool = False) -> Shape:
    assert (g.H, g.W, g.stride, g.pad) == (2 * g.P, 2 * g.Q, 2, 1)
    assert g.CL <= 4
    return g.shape(transposed)


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> Result:  # fmt: skip
    """The convolution with its epilogue: from the image a sum of 64, `tile.depth` at a time; to the
    image (`transposed`) all columns at once, whatever `tile.columns`. `tile.split` is not read."""
    g, shape = geometry, _shape(geometry, transposed)
    images = g.N // groups
    row_tiles = cdiv(images * g.P * g.Q, tile.rows)
    columns = COLUMNS if transposed else tile.columns
    out = empty(g.N, shape.CO, shape.HO, shape.WO, source.value)
    result = epilogue.result(out, groups, row_tiles * shape.PHASE**2)
    Launch(
        image_up if transposed else image_down, (row_tiles * cdiv(shape.CO, columns), groups), {
            "x": source.loaded, "w": weight, "out": out, **epilogue.arguments(result),
            "groups": groups, "images": images, "x_slope": float(source.slope), "S": shape,
            "PROLOGUE": source.prologue, "X_ACTIVATION": source.activation, "BLOCK_M": tile.rows,
            "BLOCK_N": columns,
            "BLOCK_K": tile.depth if transposed else min(tile.depth, WINDOW.value),
            "PRECISION": precision,
        }, tile.warps, tile.stages).run(out.device)  # fmt: skip
    return result


def weight_gradient(
    small: Operand, large: Operand, geometry: Geometry, *, tile: Tile, dtype: torch.dtype,
    groups: int = 1, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """d weight [CS, CL, 4, 4]. `tile.rows` are of CS, `tile.depth` pixels at a time; all columns
    are one tile."""
    g, shape = geometry, _shape(geometry)
    out = empty(g.CS, g.CL, 4, 4, small.value, dtype)
    store = parts_like(out, tile.split)
    Launch(
        image_weight_gradient, (cdiv(g.CS, tile.rows), tile.split), {
            "small": small.loaded, "large": large.loaded, "out": store, "groups": groups,
            "images": g.N // groups, "small_slope": float(small.slope),
            "large_slope": float(large.slope), "S": shape, "SMALL_PROLOGUE": small.prologue,
            "SMALL_ACTIVATION": small.activation, "LARGE_PROLOGUE": large.prologue,
            "LARGE_ACTIVATION": large.activation, "SPLIT": tile.split, "BLOCK_M": tile.rows,
            "BLOCK_K": tile.depth, "PRECISION": precision,
        }, tile.warps, tile.stages).run(out.device)  # fmt: skip
    return out if tile.split == 1 else reduce(store, out).value


@triton.jit
def window_taps(k, C: tl.constexpr):
    """For columns k of `load_windows`: where in [4, 4, C] each one's weight is, and which columns
    have one."""
    j = k % 16 - C % 2
    return k // 16 * (4 * C) + j, (j >= 0) & (j < 4 * C)


@triton.jit
def load_windows(
    x, slope,  # Loaded, [N, 2P, 2Q, C]
    group, groups,
    n, p, q, row_mask,  # [A]: as of `pixels`
    k,  # [B]: columns, of 64
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """[A, B]: columns of the 4x4 windows of small pixels, which have 16 for each of their rows.

    A window row starts at pixel 2q - 1, so for odd C at an odd element. Its first column is the
    element before that: then all start at an even one, and values are copied two at a time, as an
    asynchronous copy of 16-bit values needs. Columns without a tap hold a neighbour or 0.
    """
    LEAD: tl.constexpr = C % 2
    kh, j = k // 16, k % 16
    h = (2 * p - 1)[:, None] + kh[None, :]
    # Only a window's first pixel can be left of the image, and only its last one right of it.
    left = (q > 0)[:, None] | (j >= LEAD + C)[None, :]
    right = (q < Q - 1)[:, None] | (j < LEAD + 3 * C)[None, :]
    used = (j < 4 * C + 2 * LEAD)[None, :]
    corner = ((n * (2 * P) + 2 * p - 1) * Q + q) * (2 * C) - (C + LEAD)
    return load_operand(
        of_group(x, group, C), slope, groups * C, corner[:, None] + (kh * (2 * Q * C) + j)[None, :],
        row_mask[:, None] & (h >= 0) & (h < 2 * P) & left & right & used,
        ((j + C - LEAD) % C)[None, :], used, PROLOGUE, ACTIVATION,
    )  # fmt: skip


@triton.jit
def load_taps(w, taps, used, channel, channel_mask, C: tl.constexpr):
    """[columns, channels] of a weight [channels, 4, 4, C]; 0 in columns without a tap."""
    return tl.load(
        w + taps[:, None] + (channel * (16 * C))[None, :],
        mask=used[:, None] & channel_mask[None, :], other=0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images"])
def image_down(
    x,  # Loaded, [N, 2P, 2Q, CL]
    w,  # [CS, 4, 4, CL]
    out,  # [N, P, Q, CS]
    end,  # Stored, like out
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the image. Grid: (row tiles * column tiles, groups). Rows are small pixels of a group;
    BLOCK_K divides 64."""
    row_tile, _, column_tile, group, _ = program(S, BLOCK_N)
    n, p, q, row_mask = pixels(row_tile, group, images, S, BLOCK_M)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < S.CS

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(WINDOW // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        taps, used = window_taps(k, S.CL)
        a = load_windows(
            x, x_slope, group, groups, n, p, q, row_mask, k, S.P, S.Q, S.CL, PROLOGUE, X_ACTIVATION
        )
        # Not only the weight: a neighbour's NaN times 0 is NaN.
        a = tl.where(used[None, :], a, 0.0)
        b = load_taps(w, taps, used, channel, channel_mask, S.CL)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    store_pixels(
        acc, out, n, p, q, 0, 0, row_mask, channel, channel_mask, end, slope, groups, images, S, 1,
        HAS_BIAS, EPILOGUE, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images"])
def image_up(
    x,  # Loaded, [N, P, Q, CS]
    w,  # [CS, 4, 4, CL]
    out,  # [N, 2P, 2Q, CL]
    end,  # Stored, like out; 4 tiles, one a phase, for each tile of rows
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """To the image. Grid: (row tiles, groups). Rows are small pixels of a group; BLOCK_N is 16."""
    CHUNKS: tl.constexpr = (S.CS + BLOCK_K - 1) // BLOCK_K
    row_tile, group = tl.program_id(0), tl.program_id(1)
    n, p, q, row_mask = pixels(row_tile, group, images, S, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    column_mask = column < 4 * S.CL
    phase, channel = column // S.CL, column % S.CL
    r, s = phase // 2, phase % 2
    corner = ((n * S.P + p - 1) * S.Q + q - 1) * S.CS

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(9 * CHUNKS):
        window = step // CHUNKS
        c = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_mask = c < S.CS
        dy, dx = window // 3, window % 3
        h, v = p - 1 + dy, q - 1 + dx
        inside = row_mask & (h >= 0) & (h < S.P) & (v >= 0) & (v < S.Q)
        a = load_operand(
            of_group(x, group, S.CS), x_slope, groups * S.CS,
            (corner + (dy * S.Q + dx) * S.CS)[:, None] + c[None, :],
            inside[:, None] & c_mask[None, :], c[None, :], c_mask[None, :], PROLOGUE, X_ACTIVATION,
        )  # fmt: skip
        # Phase (r, s) meets this pixel of the window at the tap (th, tw) of its own 2x2, if at all.
        th, tw = dy - r, dx - s
        meets = column_mask & (th >= 0) & (th < 2) & (tw >= 0) & (tw < 2)
        tap = (3 - 2 * th - r) * 4 + (3 - 2 * tw - s)
        b = tl.load(
            w + (c * (16 * S.CL))[:, None] + (tap * S.CL + channel)[None, :],
            mask=c_mask[:, None] & meets[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    out_row = (((n * S.P + p) * (2 * S.Q) + q) * (2 * S.CL))[:, None]
    tiles = tl.num_programs(0) * 4
    count = store_tile(
        acc, out, out_row + ((r * (2 * S.Q) + s) * S.CL + channel)[None, :], row_mask, channel,
        column_mask, end, slope, group, groups, row_tile * 4 + phase, tiles, S.CL, HAS_BIAS,
        EPILOGUE, ACTIVATION,
    )  # fmt: skip
    if EPILOGUE == "statistics":
        four = tl.arange(0, 4)
        tl.store(end.counts + group * tiles + row_tile * 4 + four, count + four * 0.0)


@triton.jit(do_not_specialize=["images"])
def image_weight_gradient(
    small,  # Loaded, [N, P, Q, CS]
    large,  # Loaded, [N, 2P, 2Q, CL]
    out,  # [CS, 4, 4, CL], or fp32 [SPLIT, like that]
    groups, images,  # N / groups
    small_slope, large_slope, S: tl.constexpr, SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr, LARGE_PROLOGUE: tl.constexpr, LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of CS, SPLIT). The second axis cuts the blocks of pixels into SPLIT ranges; no
    block has pixels of two groups. All taps at once: the columns are 4 kernel rows of 16."""
    s_tile, split = tl.program_id(0), tl.program_id(1)
    cs = s_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cs_mask = cs < S.CS
    k = tl.arange(0, WINDOW)
    taps, used = window_taps(k, S.CL)
    blocks = tl.cdiv(images * (S.P * S.Q), BLOCK_K)
    share = tl.cdiv(groups * blocks, SPLIT)
    first = split * share

    acc = tl.zeros((BLOCK_M, WINDOW), dtype=tl.float32)
    for group in range(groups):
        start = group * blocks
        for block in range(max(first, start) - start, min(first + share - start, blocks)):
            n, p, q, m_mask = pixels(block, group, images, S, BLOCK_K)
            a = load_operand(
                of_group(small, group, S.CS), small_slope, groups * S.CS,
                (((n * S.P + p) * S.Q + q) * S.CS)[:, None] + cs[None, :],
                m_mask[:, None] & cs_mask[None, :], cs[None, :], cs_mask[None, :],
                SMALL_PROLOGUE, SMALL_ACTIVATION,
            )  # fmt: skip
            b = load_windows(
                large, large_slope, group, groups, n, p, q, m_mask, k, S.P, S.Q, S.CL,
                LARGE_PROLOGUE, LARGE_ACTIVATION,
            )  # fmt: skip
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    offsets = (cs * (16 * S.CL)).to(tl.int64)[:, None] + taps[None, :]
    offsets += split.to(tl.int64) * (S.CS * 16 * S.CL)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=cs_mask[:, None] & used[None, :])
