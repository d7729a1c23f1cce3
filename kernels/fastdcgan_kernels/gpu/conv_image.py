"""Layers whose large side is an image of 1 to 4 channels. A GEMM over single taps would be nearly
all padding here, so these kernels merge taps. Not here: wider layers (conv_pointers.py,
conv_tma.py, conv_weight.py); kernels other than a DCGAN's to the image (conv_pointers.py).

From the image all taps of a small pixel are one sum: its window. Of a DCGAN's 4x4 kernel a row is
4 * CL values that lie together in memory, and 4 rows of up to 16 values make a window of 64; of any
other kernel a window is its K * K * CL values in the weight's order.

To the image, the product of a small pixel with all of its taps has as many values: each small pixel
is read and multiplied once, and a pixel of the image is the sum of 4 such values, of neighbours in
the tile.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Shape, Tile, cdiv, empty
from ..placing import empty_or_placed
from .launch import Launch
from .partials import finish, join, nothing, place_of, turns_of
from .tile import Epilogue, Operand, Result, load_operand, of_group, parts_like, pixels, reduce

# isort: split
from .tile import store_pixels, store_tile


def _shape(g: Geometry, transposed: bool = False) -> Shape:
    assert g.is_image(transposed)
    return g.shape(transposed)


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> Result:  # fmt: skip
    """The convolution with its epilogue: from the image a window, `tile.depth` at a time; to the
    image (`transposed`) all columns at once, whatever `tile.columns`. `tile.split` is not read."""
    g, shape = geometry, _shape(geometry, transposed)
    images = g.N // groups
    sizes = {"BLOCK_M": tile.rows, "BLOCK_K": tile.depth}
    if transposed:
        kernel, column_tiles = image_up, 1
        sizes["STRIP"], of_image = strips(g.P, g.Q, tile.rows)
        tiles = images * of_image
    else:
        kernel, column_tiles = image_down, cdiv(g.CS, tile.columns)
        sizes |= {"BLOCK_N": tile.columns, "BLOCK_K": min(tile.depth, g.window)}
        tiles = cdiv(images * g.P * g.Q, tile.rows)
    out = empty_or_placed(g.N, shape.CO, shape.HO, shape.WO, source.value)
    programs = epilogue.programs(tiles, groups, out.device)
    result = epilogue.result(out, groups, programs, column_tiles)
    Launch(
        kernel, (programs * column_tiles, groups), {
            "x": source.loaded, "w": weight, "out": out,
            **epilogue.arguments(result, column_tiles), "ONE": programs == tiles,
            "groups": groups, "images": images, "x_slope": float(source.slope), "S": shape,
            "PROLOGUE": source.prologue, "X_ACTIVATION": source.activation, **sizes,
            "PRECISION": precision,
        }, tile.warps, tile.stages).run(out.device)  # fmt: skip
    return result


@functools.cache
def strips(p: int, q: int, rows: int) -> tuple[int, int]:
    """How `image_up` cuts an image of p x q small pixels: (columns of corners in a strip, tiles of
    `rows` places in all strips). There are (p + 1) x (q + 1) corners, between and around pixels.

    A place is a corner and the small pixel at its top left; that is 0 above and left of the image.
    A strip is places row by row, and a tile stores the corners of all but its last width + 1: a
    corner takes from the place after it and from two below. For that a strip has a column more than
    corners, unless it is the only one: the next row starts with the 0 that would be there. As few
    tiles as can be, then as few places.
    """

    def cost(strip: int) -> tuple[int, int]:
        count = cdiv(q + 1, strip)
        width = strip + (count > 1)
        tiles = cdiv(p * width + strip, rows - width - 1)
        return count * tiles, count * (p * width + tiles * (width + 1))

    best = min(range(1, min(q + 1, rows // 2) + 1), key=cost)
    return best, cost(best)[0]


def weight_gradient(
    small: Operand, large: Operand, geometry: Geometry, *, tile: Tile, dtype: torch.dtype,
    groups: int = 1, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """d weight [CS, CL, K, K]. `tile.rows` are of CS, `tile.depth` pixels at a time; all columns
    are one tile."""
    g, shape = geometry, _shape(geometry)
    out = empty(g.CS, g.CL, g.kernel, g.kernel, small.value, dtype)
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
def window_taps(k, S: tl.constexpr):
    """For columns k of `load_windows`: where in [K, K, CL] each one's weight is, and which columns
    have one."""
    taps, used = k, k < S.K * S.K * S.CL
    if S.STANDARD:
        j = k % 16 - S.CL % 2
        taps, used = k // 16 * (4 * S.CL) + j, (j >= 0) & (j < 4 * S.CL)
    return taps, used


@triton.jit
def load_windows(
    x, slope,  # Loaded, [N, H, W, CL]
    group, groups,
    n, p, q, row_mask,  # [A]: as of `pixels`
    k,  # [B]: columns, of WINDOW
    S: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """[A, B]: columns of the windows of small pixels. Columns without a tap hold 0 or, of a
    DCGAN's, a neighbour."""
    if S.STANDARD:
        loaded = load_standard(
            x, slope, group, groups, n, p, q, row_mask, k, S.P, S.Q, S.CL, PROLOGUE, ACTIVATION
        )
    else:
        kh, kw, c = k // (S.K * S.CL), k // S.CL % S.K, k % S.CL
        h, v = p * S.STRIDE - S.PAD, q * S.STRIDE - S.LEFT
        row, column = h[:, None] + kh[None, :], v[:, None] + kw[None, :]
        used = (k < S.K * S.K * S.CL)[None, :]
        inside = (row >= 0) & (row < S.H) & (column >= 0) & (column < S.W)
        corner = ((n * S.H + h) * S.W + v) * S.CL
        loaded = load_operand(
            of_group(x, group, S.CL), slope, groups * S.CL,
            corner[:, None] + ((kh * S.W + kw) * S.CL + c)[None, :],
            row_mask[:, None] & inside & used, c[None, :], used, PROLOGUE, ACTIVATION,
        )  # fmt: skip
    return loaded


@triton.jit
def load_standard(
    x, slope,  # Loaded, [N, 2P, 2Q, C]
    group, groups,
    n, p, q, row_mask,  # [A]: as of `pixels`
    k,  # [B]: columns, of 64
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """[A, B]: columns of 4x4 windows, which have 16 for each of their rows.

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
def load_taps(w, taps, used, channel, channel_mask, S: tl.constexpr):
    """[columns, channels] of a weight [channels, K, K, CL]; 0 in columns without a tap."""
    return tl.load(
        w + taps[:, None] + (channel * (S.K * S.K * S.CL))[None, :],
        mask=used[:, None] & channel_mask[None, :], other=0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images"])
def image_down(
    x,  # Loaded, [N, H, W, CL]
    w,  # [CS, K, K, CL]
    out,  # [N, P, Q, CS]
    end,  # Stored, like out
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    ONE: tl.constexpr,  # tile a program
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the image. Grid: (programs * column tiles, groups). Rows are small pixels of a group;
    BLOCK_K divides WINDOW."""
    WINDOW: tl.constexpr = S.WINDOW
    at = place_of(S.CS, BLOCK_N)
    tiles = tl.cdiv(images * (S.P * S.Q), BLOCK_M)
    own = nothing(BLOCK_N)
    for turn in range(turns_of(at.program, at.programs, tiles, ONE)):
        tile = at.program + turn * at.programs
        n, p, q, row_mask = pixels(tile, at.group, images, S, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(WINDOW // BLOCK_K):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            taps, used = window_taps(k, S)
            a = load_windows(
                x, x_slope, at.group, groups, n, p, q, row_mask, k, S, PROLOGUE, X_ACTIVATION
            )  # fmt: skip
            # Not only the weight: a neighbour's NaN times 0 is NaN.
            a = tl.where(used[None, :], a, 0.0)
            b = load_taps(w, taps, used, at.channel, at.channel_mask, S)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        found = store_pixels(
            acc, out, n, p, q, 0, 0, row_mask, at, end, slope, groups, images, 0, S, 1, HAS_BIAS,
            EPILOGUE, ACTIVATION,
        )  # fmt: skip
        own = join(own, found, EPILOGUE)
    finish(own, end, at, groups, S.CS, EPILOGUE)


@triton.jit(do_not_specialize=["images"])
def image_up(
    x,  # Loaded, [N, P, Q, CS]
    w,  # [CS, 4, 4, CL]
    out,  # [N, 2P, 2Q, CL]
    end,  # Stored, like out
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    ONE: tl.constexpr,  # tile a program
    STRIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """To the image. Grid: (programs, groups), which share (images of a group * strips * tiles of a
    strip); see `strips`.

    Corner (i, j) is where the small pixels (i - 1, j - 1) to (i, j) meet. Each of these 4 pixels
    has 4 of its 16 taps in the 2x2 square of the image around the corner.
    """
    WINDOW: tl.constexpr = S.WINDOW
    CHUNKS: tl.constexpr = (S.CS + BLOCK_K - 1) // BLOCK_K
    STRIPS: tl.constexpr = (S.Q + STRIP) // STRIP
    WIDTH: tl.constexpr = STRIP + (STRIPS > 1)
    STORED: tl.constexpr = BLOCK_M - WIDTH - 1
    TILES: tl.constexpr = (S.P * WIDTH + STRIP + STORED - 1) // STORED
    at = place_of(S.CO, 4)
    own = nothing(4)
    for turn in range(turns_of(at.program, at.programs, images * (STRIPS * TILES), ONE)):
        tile = at.program + turn * at.programs
        first = tile % TILES * STORED
        left = tile // TILES % STRIPS * STRIP
        n = (at.group * images + tile // (TILES * STRIPS)).to(tl.int64)

        # The products of each small pixel with all of its taps. Rows are (meeting, r, s, channel of
        # 4): the pixel is at the corner's bottom right, bottom left, top right or top left, and
        # (r, s) is the square's pixel.
        k = tl.arange(0, WINDOW)
        up, before, r, s = k // 32, k // 16 % 2, k // 8 % 2, k // 4 % 2
        used = k % 4 < S.CL
        taps = ((2 * up + r) * 4 + 2 * before + s) * S.CL + k % 4
        place = first + tl.arange(0, BLOCK_M)
        p, q = place // WIDTH - 1, left + place % WIDTH - 1
        inside = (p >= 0) & (p < S.P) & (q >= 0) & (q < S.Q)
        # One image has fewer than 2^31 elements.
        pixel = n * (S.P * S.Q * S.CS) + (p * S.Q + q) * S.CS
        acc = tl.zeros((WINDOW, BLOCK_M), dtype=tl.float32)
        for step in range(CHUNKS):
            c = step * BLOCK_K + tl.arange(0, BLOCK_K)
            c_mask = c < S.CS
            a = tl.load(
                w + (c * (16 * S.CL))[None, :] + taps[:, None],
                mask=used[:, None] & c_mask[None, :], other=0.0,
            )  # fmt: skip
            b = load_operand(
                of_group(x, at.group, S.CS), x_slope, groups * S.CS, pixel[:, None] + c[None, :],
                inside[:, None] & c_mask[None, :], c[None, :], c_mask[None, :], PROLOGUE,
                X_ACTIVATION,
            )  # fmt: skip
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

        # Each corner's sum of what its 4 pixels have for it. The corner at a place of the tile is
        # the bottom right one of the pixel there; the last WIDTH + 1 have neighbours in the next.
        to = WIDTH * (1 - up) + 1 - before
        meet = tl.gather(acc, (tl.arange(0, BLOCK_M)[None, :] + to[:, None]) % BLOCK_M, 1)
        square = tl.sum(meet.reshape(4, 2, 8, BLOCK_M), axis=0)
        result = square.permute(0, 2, 1).reshape(4 * BLOCK_M, 4)

        row = tl.arange(0, 4 * BLOCK_M)  # (r, corner, s)
        corner = row // 2 % BLOCK_M
        place = first + corner
        h = 2 * (place // WIDTH) - 1 + row // (2 * BLOCK_M)
        v = 2 * (left + place % WIDTH) - 1 + row % 2
        row_mask = (corner < STORED) & (place % WIDTH < STRIP)
        row_mask &= (h >= 0) & (h < S.HO) & (v >= 0) & (v < S.WO)
        out_row = n * (S.HO * S.WO * S.CO) + (h * S.WO + v) * S.CO
        found = store_tile(
            result, out, out_row[:, None] + at.channel[None, :], row_mask, at, end, slope, groups,
            S.CO, HAS_BIAS, EPILOGUE, ACTIVATION,
        )  # fmt: skip
        own = join(own, found, EPILOGUE)
    finish(own, end, at, groups, S.CO, EPILOGUE)


@triton.jit(do_not_specialize=["images"])
def image_weight_gradient(
    small,  # Loaded, [N, P, Q, CS]
    large,  # Loaded, [N, H, W, CL]
    out,  # [CS, K, K, CL], or fp32 [SPLIT, like that]
    groups, images,  # N / groups
    small_slope, large_slope, S: tl.constexpr, SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr, LARGE_PROLOGUE: tl.constexpr, LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of CS, SPLIT). The second axis cuts the blocks of pixels into SPLIT ranges; no
    block has pixels of two groups. All taps at once: the columns are those of the window."""
    WINDOW: tl.constexpr = S.WINDOW
    s_tile, split = tl.program_id(0), tl.program_id(1)
    cs = s_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cs_mask = cs < S.CS
    k = tl.arange(0, WINDOW)
    taps, used = window_taps(k, S)
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
                large, large_slope, group, groups, n, p, q, m_mask, k, S, LARGE_PROLOGUE,
                LARGE_ACTIVATION,
            )  # fmt: skip
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    offsets = (cs * (S.K * S.K * S.CL)).to(tl.int64)[:, None] + taps[None, :]
    offsets += split.to(tl.int64) * (S.CS * S.K * S.K * S.CL)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=cs_mask[:, None] & used[None, :])
