"""Convolutions as implicit GEMMs that gather: nothing is unfolded, the padding is never stored.

A layer joins a small side [N, P, Q, CS] and a large side [N, H, W, CL], both NHWC in memory, by
16 taps; its weight is [CS, 4, 4, CL] in memory, whichever PyTorch layer it comes from. Small pixel
(p, q) meets large pixel (p * STRIDE - PAD + kh, q * STRIDE - PAD + kw) at tap (kh, kw).

down  large to small: Conv2d's output, ConvTranspose2d's input gradient.
up    small to large: ConvTranspose2d's output, Conv2d's input gradient. With STRIDE 2 the output
      falls into 4 phases (r, s), each a 2x2 convolution; with STRIDE 1 (small side 1x1, large side
      4x4) into 16 phases of one tap.

Not here: which tile; the layers with a three-channel side (image.py); the weight's gradient.
"""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import load_operand, store_tile


@triton.jit
def gather_sum(
    x,
    x_aux,
    x_coef,  # at the group's row
    plane,  # groups * channels of x
    w,
    n,  # [BLOCK_M] int64: image,
    p,  # row and
    q,  # column of small pixels
    row_mask,
    r,  # phase, going up
    s,
    channel,  # [BLOCK_N]: of out
    channel_mask,
    split,
    x_slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    UP: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32: a tile of the convolution, or of one part of SPLIT of its sum.
    Loads by pointers, which the compiler turns into asynchronous copies."""
    if UP:
        CI: tl.constexpr = CS
        CO: tl.constexpr = CL
        HI: tl.constexpr = P
        WI: tl.constexpr = Q
        SIDE: tl.constexpr = 2 if STRIDE > 1 else 1
    else:
        CI: tl.constexpr = CL
        CO: tl.constexpr = CS
        HI: tl.constexpr = H
        WI: tl.constexpr = W
        SIDE: tl.constexpr = 4
    CHUNKS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = SIDE * SIDE * CHUNKS
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT

    if UP and STRIDE > 1:
        top = p - 1 + r
        left = q - 1 + s
    elif UP:
        top = p
        left = q
    else:
        top = p * STRIDE - PAD
        left = q * STRIDE - PAD
    corner = ((n * HI + top) * WI + left) * CI

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        tap = step // CHUNKS
        c = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_mask = c < CI
        th = tap // SIDE
        tw = tap % SIDE
        if UP and STRIDE > 1:
            kh = 3 - 2 * th - r
            kw = 3 - 2 * tw - s
        elif UP:
            kh = r
            kw = s
        else:
            kh = th
            kw = tw
        h = top + th
        v = left + tw
        inside = row_mask & (h >= 0) & (h < HI) & (v >= 0) & (v < WI)
        a = load_operand(
            x,
            x_aux,
            x_coef,
            plane,
            (corner + (th * WI + tw) * CI)[:, None] + c[None, :],
            inside[:, None] & c_mask[None, :],
            c[None, :],
            c_mask[None, :],
            x_slope,
            PROLOGUE,
            X_ACTIVATION,
        )
        if UP:
            w_offsets = (c * (16 * CO) + (kh * 4 + kw) * CO)[:, None] + channel[None, :]
        else:
            w_offsets = (kh * 4 + kw) * CI + c[:, None] + (channel * (16 * CI))[None, :]
        b = tl.load(w + w_offsets, mask=c_mask[:, None] & channel_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["images"])
def gather_pointers(
    x,  # source: down [N, H, W, CL], up [N, P, Q, CS]
    x_aux,  # same shape as x, for its prologue
    x_coef,  # [3, groups, channels of x] fp32
    w,  # [CS, 4, 4, CL], dtype of x
    out,  # down [N, P, Q, CS], up [N, H, W, CL]; with SPLIT > 1 fp32 [SPLIT, like that]
    bias,  # [channels of out]
    out_aux,  # like out: raw y of the producer, for EPILOGUE gradient
    out_coef,  # [3, groups, channels of out] fp32
    partials,  # [2, groups, tiles, channels of out] fp32
    counts,  # [groups, tiles] fp32: rows in each tile
    groups,
    images,  # N / groups
    x_slope,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    UP: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (row tiles * phases * column tiles, groups, SPLIT). Rows are small pixels of a
    group."""
    if UP:
        CI: tl.constexpr = CS
        CO: tl.constexpr = CL
        HO: tl.constexpr = H
        WO: tl.constexpr = W
        PHASES: tl.constexpr = STRIDE * STRIDE if STRIDE > 1 else 16
    else:
        CI: tl.constexpr = CL
        CO: tl.constexpr = CS
        HO: tl.constexpr = P
        WO: tl.constexpr = Q
        PHASES: tl.constexpr = 1
    COLUMN_TILES: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    phase = (pid // COLUMN_TILES) % PHASES
    row_tile = pid // (COLUMN_TILES * PHASES)
    group = tl.program_id(1)
    split = tl.program_id(2)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < images * (P * Q)
    q = row % Q
    p = (row // Q) % P
    n = (group * images + row // (P * Q)).to(tl.int64)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < CO

    r = 0
    s = 0
    if UP:
        PHASE_SIDE: tl.constexpr = STRIDE if STRIDE > 1 else 4
        r = phase // PHASE_SIDE
        s = phase % PHASE_SIDE
    acc = gather_sum(
        x,
        x_aux,
        x_coef + group * CI,
        groups * CI,
        w,
        n,
        p,
        q,
        row_mask,
        r,
        s,
        channel,
        channel_mask,
        split,
        x_slope,
        P,
        Q,
        CS,
        H,
        W,
        CL,
        STRIDE,
        PAD,
        UP,
        PROLOGUE,
        X_ACTIVATION,
        SPLIT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )

    if UP:
        out_row = (n * HO + (STRIDE * p + r)) * WO + (STRIDE * q + s)
    else:
        out_row = (n * HO + p) * WO + q
    offsets = (out_row * CO)[:, None] + channel[None, :]
    if SPLIT > 1:
        offsets += split * (groups * images).to(tl.int64) * (HO * WO * CO)
    tile = row_tile * PHASES + phase
    tiles = tl.num_programs(0) // COLUMN_TILES
    count = store_tile(
        acc,
        out,
        offsets,
        row_mask,
        channel,
        channel_mask,
        bias,
        out_aux,
        out_coef + group * CO,
        groups * CO,
        slope,
        partials,
        (group * tiles + tile) * CO + channel,
        groups * tiles * CO,
        HAS_BIAS,
        EPILOGUE,
        ACTIVATION,
    )
    if EPILOGUE == "statistics" and column_tile == 0:
        tl.store(counts + group * tiles + tile, count)
