"""Gradient of a layer's weight: for each tap, small^T large over all small pixels, with the large
side gathered as in the convolutions (conv_pointers.py). Not here: the layers with a three-channel
side (conv_image.py); descriptors and their boxes (descriptors.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Tile, box_is_rows, box_of, bucket, cdiv, empty
from .descriptors import box_pixels, described, descriptor, fits_descriptors, large_box, load_box
from .launch import Launch
from .tile import Loaded, Operand, apply, load_operand, of_group, parts_like, pixels, reduce


def weight_gradient(
    small: Operand, large: Operand, geometry: Geometry, *, tile: Tile, dtype: torch.dtype,
    groups: int = 1, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """d weight [CS, CL, K, K] in `dtype`: per tap, small^T large over all pixels. `tile.rows` are
    of CS, `tile.columns` of CL, `tile.depth` pixels at a time; `tile.split` parts, summed in their
    order. By descriptors a tile of more columns than CL has two taps side by side."""
    g, columns = geometry, min(tile.columns, max(16, bucket(geometry.CL)))
    kernel, taps = weight_gradient_pointers, 1
    loads: dict[str, Any] = {"small": small.loaded, "large": large.loaded}
    if takes_descriptors(small, large, g, tile, groups, precision):
        kernel = weight_gradient_descriptors
        taps = 2 if tile.columns > columns and g.kernel % 2 == 0 else 1
        box = box_of(tile.depth, g)
        loads = described("large", large, g, True, box, columns) | {"TAPS": taps}
        rows, block = [g.N * g.P * g.Q, g.CS], [tile.depth, tile.rows]
        loads["small"], loads["small_aux"] = (descriptor(t, rows, block) for t in small.loaded[:2])
        loads["small_coef"] = small.loaded.coef
    out = empty(g.CS, g.CL, g.kernel, g.kernel, small.value, dtype)
    store = parts_like(out, tile.split)
    Launch(
        kernel, (g.kernel**2 // taps * cdiv(g.CS, tile.rows) * cdiv(g.CL, columns), tile.split), {
            **loads, "out": store, "groups": groups, "images": g.N // groups,
            "small_slope": float(small.slope), "large_slope": float(large.slope), "S": g.shape(),
            "SMALL_PROLOGUE": small.prologue, "SMALL_ACTIVATION": small.activation,
            "LARGE_PROLOGUE": large.prologue, "LARGE_ACTIVATION": large.activation,
            "SPLIT": tile.split, "BLOCK_M": tile.rows, "BLOCK_N": columns, "BLOCK_K": tile.depth,
            "PRECISION": precision,
        }, tile.warps, tile.stages).run(out.device)  # fmt: skip
    return out if tile.split == 1 else reduce(store, out).value


def takes_descriptors(
    small: Operand, large: Operand, geometry: Geometry, tile: Tile, groups: int, precision: str
) -> bool:
    """Whether loads are by descriptors: the tile is for them, the tensors and the layer fit them, a
    box has one group's pixels, which follow one another in the small side's memory."""
    tensors = small.value, small.aux, large.value, large.aux
    by_descriptors = tile.engine == "descriptors" and box_is_rows(tile.depth, geometry, groups)
    return by_descriptors and geometry.has_view and fits_descriptors(precision, *tensors)


@triton.jit(do_not_specialize=["images"])
def weight_gradient_pointers(
    small,  # Loaded [N, P, Q, CS]: Conv2d's output gradient, ConvTranspose2d's input
    large,  # Loaded [N, H, W, CL]: Conv2d's input, ConvTranspose2d's output gradient
    out,  # [CS, K, K, CL], or fp32 [SPLIT, like that]
    groups, images,  # N / groups
    small_slope, large_slope, S: tl.constexpr, SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr, LARGE_PROLOGUE: tl.constexpr, LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (K * K taps * tiles of CS * tiles of CL, SPLIT); the second axis cuts the blocks of
    pixels, of which none has those of two groups, into SPLIT ranges."""
    sum_pixels(
        small, large, small_slope, large_slope, out, groups, images, S, None, SMALL_PROLOGUE,
        SMALL_ACTIVATION, LARGE_PROLOGUE, LARGE_ACTIVATION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images"])
def weight_gradient_descriptors(
    small,  # descriptor of [N * P * Q, CS]; what each side is: as by pointers
    small_aux,
    small_coef,  # [3, groups, CS] fp32
    large,  # descriptor of the large side
    large_aux,
    large_coef,  # [3, groups, CL] fp32
    out,  # [CS, K, K, CL], or fp32 [SPLIT, like that]
    groups, images,  # N / groups
    small_slope, large_slope, S: tl.constexpr, BOX: tl.constexpr, SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr, LARGE_PROLOGUE: tl.constexpr, LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same grid, where TAPS is 2 with half the programs: each has two taps of a row. A block is
    a box of BLOCK_K pixels; BOX's images divide a group's unless there is one group: no box holds
    another group's pixels. The small side is a matrix, so that matrix instructions read both
    operands from shared memory, as in conv_tma.py."""
    sum_pixels(
        Loaded(small, small_aux, small_coef), Loaded(large, large_aux, large_coef), small_slope,
        large_slope, out, groups, images, S, BOX,
        SMALL_PROLOGUE, SMALL_ACTIVATION, LARGE_PROLOGUE, LARGE_ACTIVATION, SPLIT, BLOCK_M, BLOCK_N,
        BLOCK_K, PRECISION, TAPS,
    )  # fmt: skip


@triton.jit
def sum_pixels(
    small, large, small_slope, large_slope, out, groups, images, S: tl.constexpr, BOX: tl.constexpr,
    SMALL_PROLOGUE: tl.constexpr, SMALL_ACTIVATION: tl.constexpr, LARGE_PROLOGUE: tl.constexpr,
    LARGE_ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TAPS: tl.constexpr = 1,
):  # fmt: skip
    """One program of either kernel; BOX is None by pointers."""
    L_TILES: tl.constexpr = (S.CL + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    l_tile = pid % L_TILES
    tap = (pid // L_TILES) % (S.K * S.K // TAPS) * TAPS
    s_tile = pid // (L_TILES * (S.K * S.K // TAPS))
    kh, kw = tap // S.K, tap % S.K
    split = tl.program_id(1)

    cs = s_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cl = l_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cs_mask, cl_mask = cs < S.CS, cl < S.CL
    if BOX is None:
        blocks = tl.cdiv(images * (S.P * S.Q), BLOCK_K)
    else:
        blocks = tl.cdiv(images, BOX[0]) * ((S.P // BOX[1]) * (S.Q // BOX[2]))
    share = tl.cdiv(groups * blocks, SPLIT)
    first = split * share

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    next_acc = acc  # of the next tap
    for group in range(groups):
        start = group * blocks
        for block in range(max(first, start) - start, min(first + share - start, blocks)):
            if BOX is None:
                n, p, q, m_mask = pixels(block, group, images, S, BLOCK_K)
            else:
                n0, p0, q0, image, p, q = box_pixels(block, group, images, S, BOX)
                m_mask = image < images
            h, v = p * S.STRIDE - S.PAD + kh, q * S.STRIDE - S.LEFT + kw
            inside = m_mask & (h >= 0) & (h < S.H) & (v >= 0) & (v < S.W)
            large_group = of_group(large, group, S.CL)
            if BOX is None:
                a = load_operand(
                    of_group(small, group, S.CS), small_slope, groups * S.CS,
                    (((n * S.P + p) * S.Q + q) * S.CS)[:, None] + cs[None, :],
                    m_mask[:, None] & cs_mask[None, :], cs[None, :], cs_mask[None, :],
                    SMALL_PROLOGUE, SMALL_ACTIVATION,
                )  # fmt: skip
                b = load_operand(
                    large_group, large_slope, groups * S.CL,
                    (((n * S.H + h) * S.W + v) * S.CL)[:, None] + cl[None, :],
                    inside[:, None] & cl_mask[None, :], cl[None, :], cl_mask[None, :],
                    LARGE_PROLOGUE, LARGE_ACTIVATION,
                )  # fmt: skip
            else:
                at = (n0 * S.P + p0) * S.Q + q0, s_tile * BLOCK_M
                a, second = load_box(small.value, small.aux, at, BLOCK_K, BLOCK_M, SMALL_PROLOGUE)
                a = apply(
                    of_group(small, group, S.CS), small_slope, groups * S.CS, a, second,
                    m_mask[:, None] & cs_mask[None, :], cs[None, :], cs_mask[None, :],
                    SMALL_PROLOGUE, SMALL_ACTIVATION,
                )  # fmt: skip
                at = large_box(n0, p0, q0, kh, kw * S.CL + l_tile * BLOCK_N, S)
                b, second = load_box(large.value, large.aux, at, BLOCK_K, BLOCK_N, LARGE_PROLOGUE)
                b = apply(
                    large_group, large_slope, groups * S.CL, b, second,
                    inside[:, None] & cl_mask[None, :], cl[None, :], cl_mask[None, :],
                    LARGE_PROLOGUE, LARGE_ACTIVATION,
                )  # fmt: skip
                if TAPS == 2:
                    at = large_box(n0, p0, q0, kh, (kw + 1) * S.CL + l_tile * BLOCK_N, S)
                    c, second = load_box(
                        large.value, large.aux, at, BLOCK_K, BLOCK_N, LARGE_PROLOGUE
                    )
                    inside = m_mask & (h >= 0) & (h < S.H) & (v + 1 >= 0) & (v + 1 < S.W)
                    c = apply(
                        large_group, large_slope, groups * S.CL, c, second,
                        inside[:, None] & cl_mask[None, :], cl[None, :], cl_mask[None, :],
                        LARGE_PROLOGUE, LARGE_ACTIVATION,
                    )  # fmt: skip
                    next_acc = tl.dot(tl.trans(a), c, next_acc, input_precision=PRECISION)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    offsets = (cs * (S.K * S.K * S.CL) + tap * S.CL).to(tl.int64)[:, None] + cl[None, :]
    offsets += split.to(tl.int64) * (S.CS * S.K * S.K * S.CL)
    mask = cs_mask[:, None] & cl_mask[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)
    if TAPS == 2:
        tl.store(out + offsets + S.CL, next_acc.to(out.dtype.element_ty), mask=mask)
