"""The convolutions of conv_pointers.py with loads by tensor descriptors (TMA).

The product is the other way round: its rows are output channels, its columns the box of pixels. So
Hopper's and Blackwell's matrix instructions take both operands from shared memory as TMA leaves
them there (only the second operand's box may have more than two axes), and the sums of statistics
are along a thread's own values.

Not here: the descriptors and their boxes (descriptors.py); tensors that do not fit them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Tile, box_of, cdiv
from .descriptors import box_pixels, described, descriptor, fits_descriptors, large_box, load_box
from .partials import finish, join, nothing, place_of, turns_of
from .tile import Epilogue, Loaded, Operand, Result, apply, gather_launch, is_there, store_pixels

# isort: split
from .tile import row_of, taps_of


def takes(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    precision: str = "ieee",
) -> bool:  # fmt: skip
    """Whether `convolve` can run this: the tile is for descriptors, which the tensors and the layer
    fit, and no box of the large side holds two taps."""
    whole_taps = transposed or (geometry.CL % tile.depth == 0 and geometry.has_view)
    tensors = source.value, source.aux, weight
    by_descriptors = tile.engine != "pointers"  # those of "gluon" that it does not take, too
    return by_descriptors and whole_taps and fits_descriptors(precision, *tensors)


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> Result:  # fmt: skip
    """The convolution with its epilogue, as `conv_pointers.convolve`, of what `takes` accepts."""
    g, shape = geometry, geometry.shape(transposed)
    box = box_of(tile.rows, shape)
    block = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
    loads = described("x", source, g, not transposed, box, tile.depth)
    loads["w"] = descriptor(weight, [g.CS, g.kernel**2 * g.CL], block)
    row_tiles = cdiv(g.N // groups, box[0]) * (shape.P // box[1]) * (shape.Q // box[2])
    launch, result = gather_launch(
        gather_descriptors, loads, row_tiles, source, g, transposed, tile, epilogue, groups,
        precision,
    )  # fmt: skip
    launch.run(weight.device)
    return result()


@triton.jit
def halves(tile):
    """The first and the last pixels of a tile [channels, pixels]."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def parts_of(tile, EPILOGUE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The tile in parts, one stored after the other. An epilogue that reads a tile like this one
    would not have the registers for all of both at once; that of statistics has not quite, on the
    way up, where a tile is small and the compiler saves registers."""
    CHANNELS: tl.constexpr = tile.shape[0]
    PIXELS: tl.constexpr = tile.shape[1]
    if EPILOGUE == "gradient" or EPILOGUE == "actgrad":
        parts = halves(tile)
        if PIXELS >= 256:
            parts = halves(parts[0]) + halves(parts[1])
    elif EPILOGUE == "statistics" and TRANSPOSED and CHANNELS * PIXELS == 64 * 64:
        parts = halves(tile)
    else:
        parts = (tile,)
    return parts


@triton.jit(do_not_specialize=["images"])
def gather_descriptors(
    x,  # descriptor of the side that is read
    x_aux,  # descriptor of the same shape, for its prologue
    x_coef,  # [3, groups, CI] fp32
    w,  # descriptor [CS, K * K * CL], dtype of x
    out,  # the side that is written, NHWC; with SPLIT > 1 fp32 [SPLIT, like that]
    end,  # Stored, like out
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, BOX: tl.constexpr, PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, ONE: tl.constexpr,  # tile a program
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (programs * column tiles, groups, SPLIT). A box has BLOCK_M pixels; each phase of it is
    a tile of the product, [BLOCK_N, BLOCK_M]; but for the transposed convolution BLOCK_K divides
    CL."""
    CHUNKS: tl.constexpr = (S.CI + BLOCK_K - 1) // BLOCK_K
    BOXES_OF_IMAGES: tl.constexpr = (S.P // BOX[1]) * (S.Q // BOX[2])
    PHASES: tl.constexpr = S.PHASE * S.PHASE
    at = place_of(S.CO, BLOCK_N)
    split, col0 = tl.program_id(2), at.column_tile * BLOCK_N
    tiles = tl.cdiv(images, BOX[0]) * (BOXES_OF_IMAGES * PHASES)
    own = nothing(BLOCK_N)
    for turn in range(turns_of(at.program, at.programs, tiles, ONE)):
        tile = at.program + turn * at.programs
        r, s = tile % PHASES // S.PHASE, tile % S.PHASE
        n0, p0, q0, image, p, q = box_pixels(tile // PHASES, at.group, images, S, BOX)
        row_mask = image < images
        down, across, from_p, from_q, first_tap = S.SIDE, S.SIDE, 0, 0, 0
        if S.TRANSPOSED:
            taps, from_p = taps_of(r, S, S.PAD)
            side, from_q = taps_of(s, S, S.LEFT)
            if S.UNEVEN:
                down, across = taps, side
            first_h, first_w = row_of(0, down, r, S, S.PAD), row_of(0, across, s, S, S.LEFT)
            first_tap = (first_h * S.K + first_w) * S.CL + col0
        steps = down * across * CHUNKS
        share = (steps + SPLIT - 1) // SPLIT

        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(split * share, min(split * share + share, steps)):
            if S.TRANSPOSED:
                tap, c0 = step % (down * across), step // (down * across) * BLOCK_K
                th, tw = tap // across, tap % across
                corner = n0, p0 + from_p + th, q0 + from_q + tw, c0
                a = w.load([c0, first_tap - S.STRIDE * (S.K * th + tw) * S.CL])
                h, v = p + from_p + th, q + from_q + tw
            else:  # a row of taps is one row of K * CL channels, here as in the weight
                kh, along = step // (S.K * CHUNKS), step % (S.K * CHUNKS) * BLOCK_K
                corner = large_box(n0, p0, q0, kh, along, S)
                a = w.load([col0, step * BLOCK_K])
                h, v = p * S.STRIDE - S.PAD + kh, q * S.STRIDE - S.LEFT + along // S.CL
                c0 = along % S.CL
            b, second = load_box(x, x_aux, corner, BLOCK_M, BLOCK_K, PROLOGUE)
            inside = (h >= 0) & (h < S.HI) & (v >= 0) & (v < S.WI) & row_mask
            c = c0 + tl.arange(0, BLOCK_K)
            b = apply(
                Loaded(x, x_aux, x_coef + at.group * S.CI), x_slope, groups * S.CI, b, second,
                inside[:, None] & (c < S.CI)[None, :], c[None, :], (c < S.CI)[None, :], PROLOGUE,
                X_ACTIVATION,
            )  # fmt: skip
            if S.TRANSPOSED:
                a = tl.trans(a)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

        parts = parts_of(acc, EPILOGUE, S.TRANSPOSED)
        for part in tl.static_range(len(parts)):
            _, _, _, image, p, q = box_pixels(
                tile // PHASES, at.group, images, S, BOX, part, len(parts)
            )
            n = (at.group * images + image).to(tl.int64)
            part_mask = image < images
            if S.RAGGED:
                part_mask &= is_there(p, q, r, s, S)
            found = store_pixels(
                parts[part], out, n, p, q, r, s, part_mask, at, end, slope, groups, images,
                split, S, SPLIT, HAS_BIAS, EPILOGUE, ACTIVATION, ROWS=1,
            )  # fmt: skip
            own = join(own, found, EPILOGUE)
    finish(own, end, at, groups, S.CO, EPILOGUE)
