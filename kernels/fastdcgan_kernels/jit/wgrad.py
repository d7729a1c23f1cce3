"""Gradient of a layer's weight: for each tap, small^T large over all small pixels, with the large
side gathered as in gather.py. Not here: the layers with a three-channel side (image.py)."""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import load_operand


@triton.jit(do_not_specialize=["images"])
def weight_gradient_pointers(
    small,  # [N, P, Q, CS]: Conv2d's output gradient, ConvTranspose2d's input
    small_aux,
    small_coef,  # [3, groups, CS] fp32
    large,  # [N, H, W, CL]: Conv2d's input, ConvTranspose2d's output gradient
    large_aux,
    large_coef,  # [3, groups, CL] fp32
    out,  # [CS, 4, 4, CL], or fp32 [SPLIT, like that]
    groups,
    images,  # N / groups
    small_slope,
    large_slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr,
    LARGE_PROLOGUE: tl.constexpr,
    LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (16 taps * tiles of CS * tiles of CL, SPLIT); the second axis cuts the blocks of
    pixels, of which none has those of two groups, into SPLIT ranges."""
    L_TILES: tl.constexpr = (CL + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    l_tile = pid % L_TILES
    tap = (pid // L_TILES) % 16
    s_tile = pid // (L_TILES * 16)
    kh = tap // 4
    kw = tap % 4
    split = tl.program_id(1)

    cs = s_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cl = l_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cs_mask = cs < CS
    cl_mask = cl < CL
    pixels = images * (P * Q)
    blocks = tl.cdiv(pixels, BLOCK_K)
    share = tl.cdiv(groups * blocks, SPLIT)
    first = split * share

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(groups):
        start = group * blocks
        for block in range(max(first, start) - start, min(first + share - start, blocks)):
            m = block * BLOCK_K + tl.arange(0, BLOCK_K)
            m_mask = m < pixels
            q = m % Q
            p = (m // Q) % P
            n = (group * images + m // (P * Q)).to(tl.int64)
            h = p * STRIDE - PAD + kh
            v = q * STRIDE - PAD + kw
            inside = m_mask & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            a = load_operand(
                small,
                small_aux,
                small_coef + group * CS,
                groups * CS,
                (((n * P + p) * Q + q) * CS)[:, None] + cs[None, :],
                m_mask[:, None] & cs_mask[None, :],
                cs[None, :],
                cs_mask[None, :],
                small_slope,
                SMALL_PROLOGUE,
                SMALL_ACTIVATION,
            )
            b = load_operand(
                large,
                large_aux,
                large_coef + group * CL,
                groups * CL,
                (((n * H + h) * W + v) * CL)[:, None] + cl[None, :],
                inside[:, None] & cl_mask[None, :],
                cl[None, :],
                cl_mask[None, :],
                large_slope,
                LARGE_PROLOGUE,
                LARGE_ACTIVATION,
            )
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    offsets = (cs * (16 * CL) + tap * CL).to(tl.int64)[:, None] + cl[None, :]
    offsets += split.to(tl.int64) * (CS * 16 * CL)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=cs_mask[:, None] & cl_mask[None, :])
