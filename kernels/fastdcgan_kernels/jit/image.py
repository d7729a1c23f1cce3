"""The layers whose large side is an image of 1 to 4 channels, stride 2: a GEMM over single taps
would be nearly all padding, so taps are merged. Not here: the wider layers (gather.py, wgrad.py).

Going down, a kernel row of 4 pixels is 4 * CL values that lie together in memory: 4 rows of up to
16 values make one sum of 64. Going up, the four phases share a 3x3 window of small pixels: one GEMM
of 9 * CS deep with the columns (r, s, channel). The large side is 2P x 2Q pixels, P x Q the small.

The weight's gradient is small, and its sum can be made where a tile of its operands is already
there: `image_gradients` and `image_weight_gradient_through` are PARTS programs that go over tiles
and keep their own sum.
"""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.gather import gather_sum
from fastdcgan_kernels.jit.tile import (
    load_operand,
    signs_derivative,
    store_gradient,
    store_tile,
)


@triton.jit
def window_taps(k, CL: tl.constexpr):
    """Of columns k of `load_windows`: where in [4, 4, CL] each one's weight is, and which of them
    have one."""
    j = k % 16 - CL % 2
    return k // 16 * (4 * CL) + j, (j >= 0) & (j < 4 * CL)


@triton.jit
def load_windows(
    x,  # pointer, [N, 2P, 2Q, CL]
    aux,  # like x
    coef,  # pointer at the group's row, [3, groups, CL] fp32
    plane,  # groups * CL
    n,  # [A] int64: image,
    p,  # [A]: row and
    q,  # [A]: column of a small pixel
    row_mask,  # [A]
    k,  # [B]: columns, of 64
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CL: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """[A, B]: columns of the 4x4 windows of small pixels, which have 16 for each of their rows.

    A window row starts at pixel 2q - 1, so for odd CL at an odd element. Its first column is the
    element before that: then all start at an even one, and values are copied two at a time, as an
    asynchronous copy of 16-bit values needs. Columns without a tap hold a neighbour or 0.
    """
    LEAD: tl.constexpr = CL % 2
    kh = k // 16
    j = k % 16
    h = (2 * p - 1)[:, None] + kh[None, :]
    # Only a window's first pixel can be left of the image, and only its last one right of it.
    left = (q > 0)[:, None] | (j >= LEAD + CL)[None, :]
    right = (q < Q - 1)[:, None] | (j < LEAD + 3 * CL)[None, :]
    used = (j < 4 * CL + 2 * LEAD)[None, :]
    corner = ((n * (2 * P) + 2 * p - 1) * Q + q) * (2 * CL) - (CL + LEAD)
    return load_operand(
        x,
        aux,
        coef,
        plane,
        corner[:, None] + (kh * (2 * Q * CL) + j)[None, :],
        row_mask[:, None] & (h >= 0) & (h < 2 * P) & left & right & used,
        ((j + CL - LEAD) % CL)[None, :],
        used,
        slope,
        PROLOGUE,
        ACTIVATION,
    )


@triton.jit(do_not_specialize=["images"])
def image_down(
    x,  # [N, 2P, 2Q, CL]
    x_aux,  # like x
    x_coef,  # [3, groups, CL] fp32
    w,  # [CS, 4, 4, CL]
    out,  # [N, P, Q, CS]
    bias,  # [CS]
    out_aux,  # like out
    out_coef,  # [3, groups, CS] fp32
    partials,  # [2, groups, tiles, CS] fp32
    counts,  # [groups, tiles] fp32
    groups,
    images,  # N / groups
    x_slope,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    CL: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (row tiles * column tiles, groups). Rows are small pixels of a group; BLOCK_K divides
    64."""
    COLUMN_TILES: tl.constexpr = (CS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    row_tile = pid // COLUMN_TILES
    group = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < images * (P * Q)
    q = row % Q
    p = (row // Q) % P
    n = (group * images + row // (P * Q)).to(tl.int64)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < CS

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(64 // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        taps, used = window_taps(k, CL)
        a = load_windows(
            x,
            x_aux,
            x_coef + group * CL,
            groups * CL,
            n,
            p,
            q,
            row_mask,
            k,
            x_slope,
            P,
            Q,
            CL,
            PROLOGUE,
            X_ACTIVATION,
        )
        # Not only the weight: a neighbour's NaN times 0 is NaN.
        a = tl.where(used[None, :], a, 0.0)
        b = tl.load(
            w + taps[:, None] + (channel * (16 * CL))[None, :],
            mask=used[:, None] & channel_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    tiles = tl.num_programs(0) // COLUMN_TILES
    count = store_tile(
        acc,
        out,
        (((n * P + p) * Q + q) * CS)[:, None] + channel[None, :],
        row_mask,
        channel,
        channel_mask,
        bias,
        out_aux,
        out_coef + group * CS,
        groups * CS,
        slope,
        partials,
        (group * tiles + row_tile) * CS + channel,
        groups * tiles * CS,
        HAS_BIAS,
        EPILOGUE,
        ACTIVATION,
    )
    if EPILOGUE == "statistics" and column_tile == 0:
        tl.store(counts + group * tiles + row_tile, count)


@triton.jit(do_not_specialize=["images"])
def image_up(
    x,  # [N, P, Q, CS]
    x_aux,  # like x
    x_coef,  # [3, groups, CS] fp32
    w,  # [CS, 4, 4, CL]
    out,  # [N, 2P, 2Q, CL]
    bias,  # [CL]
    out_aux,  # like out
    out_coef,  # [3, groups, CL] fp32
    partials,  # [2, groups, tiles, CL] fp32; 4 tiles, one a phase, for each tile of rows
    counts,  # [groups, tiles] fp32
    groups,
    images,  # N / groups
    x_slope,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    CL: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (row tiles, groups). Rows are small pixels of a group; BLOCK_N is 16."""
    CHUNKS: tl.constexpr = (CS + BLOCK_K - 1) // BLOCK_K
    row_tile = tl.program_id(0)
    group = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < images * (P * Q)
    q = row % Q
    p = (row // Q) % P
    n = (group * images + row // (P * Q)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    column_mask = column < 4 * CL
    phase = column // CL
    channel = column % CL
    r = phase // 2
    s = phase % 2
    corner = ((n * P + p - 1) * Q + q - 1) * CS

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(9 * CHUNKS):
        window = step // CHUNKS
        c = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_mask = c < CS
        dy = window // 3
        dx = window % 3
        h = p - 1 + dy
        v = q - 1 + dx
        inside = row_mask & (h >= 0) & (h < P) & (v >= 0) & (v < Q)
        a = load_operand(
            x,
            x_aux,
            x_coef + group * CS,
            groups * CS,
            (corner + (dy * Q + dx) * CS)[:, None] + c[None, :],
            inside[:, None] & c_mask[None, :],
            c[None, :],
            c_mask[None, :],
            x_slope,
            PROLOGUE,
            X_ACTIVATION,
        )
        # Phase (r, s) meets this pixel of the window at the tap (th, tw) of its own 2x2, if at all.
        th = dy - r
        tw = dx - s
        meets = column_mask & (th >= 0) & (th < 2) & (tw >= 0) & (tw < 2)
        tap = (3 - 2 * th - r) * 4 + (3 - 2 * tw - s)
        b = tl.load(
            w + (c * (16 * CL))[:, None] + (tap * CL + channel)[None, :],
            mask=c_mask[:, None] & meets[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    pixel = (((n * P + p) * (2 * Q) + q) * (2 * CL))[:, None]
    tiles = tl.num_programs(0) * 4
    tile = row_tile * 4 + phase
    count = store_tile(
        acc,
        out,
        pixel + ((r * (2 * Q) + s) * CL + channel)[None, :],
        row_mask,
        channel,
        column_mask,
        bias,
        out_aux,
        out_coef + group * CL,
        groups * CL,
        slope,
        partials,
        (group * tiles + tile) * CL + channel,
        groups * tiles * CL,
        HAS_BIAS,
        EPILOGUE,
        ACTIVATION,
    )
    if EPILOGUE == "statistics":
        four = tl.arange(0, 4)
        tl.store(counts + group * tiles + row_tile * 4 + four, count + four * 0.0)


@triton.jit(do_not_specialize=["images"])
def image_weight_gradient(
    small,  # [N, P, Q, CS]
    small_aux,
    small_coef,  # [3, groups, CS] fp32
    large,  # [N, 2P, 2Q, CL]
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
    CL: tl.constexpr,
    SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACTIVATION: tl.constexpr,
    LARGE_PROLOGUE: tl.constexpr,
    LARGE_ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tiles of CS, SPLIT); the second axis cuts the blocks of pixels, of which none has
    those of two groups, into SPLIT ranges. All taps at once: the columns are 4 kernel rows of
    16."""
    s_tile = tl.program_id(0)
    split = tl.program_id(1)
    cs = s_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cs_mask = cs < CS
    k = tl.arange(0, 64)
    taps, used = window_taps(k, CL)
    pixels = images * (P * Q)
    blocks = tl.cdiv(pixels, BLOCK_K)
    share = tl.cdiv(groups * blocks, SPLIT)
    first = split * share

    acc = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
    for group in range(groups):
        start = group * blocks
        for block in range(max(first, start) - start, min(first + share - start, blocks)):
            m = block * BLOCK_K + tl.arange(0, BLOCK_K)
            m_mask = m < pixels
            q = m % Q
            p = (m // Q) % P
            n = (group * images + m // (P * Q)).to(tl.int64)
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
            b = load_windows(
                large,
                large_aux,
                large_coef + group * CL,
                groups * CL,
                n,
                p,
                q,
                m_mask,
                k,
                large_slope,
                P,
                Q,
                CL,
                LARGE_PROLOGUE,
                LARGE_ACTIVATION,
            )
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    offsets = (cs * (16 * CL)).to(tl.int64)[:, None] + taps[None, :]
    offsets += split.to(tl.int64) * (CS * 16 * CL)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=cs_mask[:, None] & used[None, :])


@triton.jit(do_not_specialize=["images"])
def image_gradients(
    x,  # gradient of the image, [N, 2P, 2Q, CL]
    x_aux,  # like x
    x_coef,  # [3, groups, CL] fp32
    w,  # [CS, 4, 4, CL]
    out,  # [N, P, Q, CS]
    out_aux,  # like out: raw y
    out_coef,  # [3, groups, CS] fp32
    partials,  # [2, groups, PARTS, CS] fp32
    gw,  # fp32 [groups, PARTS, like w]
    groups,
    images,  # N / groups
    x_slope,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    CL: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a layer from features act(z) up to an image: `image_down` with EPILOGUE gradient, and
    parts of the weight's gradient, act(z)^T x. Grid: (column tiles, groups, PARTS)."""
    column_tile = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < CS
    k = tl.arange(0, 64)
    taps, used = window_taps(k, CL)
    b = tl.load(
        w + taps[:, None] + (channel * (16 * CL))[None, :],
        mask=used[:, None] & channel_mask[None, :],
        other=0.0,
    )
    tiles = tl.cdiv(images * (P * Q), BLOCK_M)

    gw_acc = tl.zeros((BLOCK_N, 64), dtype=tl.float32)
    s1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row_tile in range(part, tiles, PARTS):
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < images * (P * Q)
        q = row % Q
        p = (row // Q) % P
        n = (group * images + row // (P * Q)).to(tl.int64)
        a = load_windows(
            x,
            x_aux,
            x_coef + group * CL,
            groups * CL,
            n,
            p,
            q,
            row_mask,
            k,
            x_slope,
            P,
            Q,
            CL,
            PROLOGUE,
            X_ACTIVATION,
        )
        a = tl.where(used[None, :], a, 0.0)
        offsets = (((n * P + p) * Q + q) * CS)[:, None] + channel[None, :]
        mask = row_mask[:, None] & channel_mask[None, :]
        features = load_operand(
            out_aux,
            out_aux,
            out_coef + group * CS,
            groups * CS,
            offsets,
            mask,
            channel[None, :],
            channel_mask[None, :],
            slope,
            "activate",
            ACTIVATION,
        )
        gw_acc = tl.dot(tl.trans(features), a, gw_acc, input_precision=PRECISION)
        dz, dz_apart = store_gradient(
            tl.dot(a, b, input_precision=PRECISION),
            out,
            offsets,
            mask,
            channel,
            channel_mask,
            out_aux,
            out_coef + group * CS,
            groups * CS,
            slope,
            ACTIVATION,
        )
        s1 += dz
        s2 += dz_apart

    own = (group * PARTS + part) * CS + channel
    tl.store(partials + own, s1, mask=channel_mask)
    tl.store(partials + tl.num_programs(1) * PARTS * CS + own, s2, mask=channel_mask)
    to = gw + (group * PARTS + part) * (CS * 16 * CL)
    to += (channel * (16 * CL))[:, None] + taps[None, :]
    tl.store(to, gw_acc, mask=channel_mask[:, None] & used[None, :])


@triton.jit(do_not_specialize=["images"])
def image_weight_gradient_through(
    x,  # gradient of the second layer's output, [N, P, Q, CS]
    x_aux,  # like x
    x_coef,  # [3, groups, CS] fp32
    w,  # the second layer's weight, [CS, 4, 4, CL]
    signs,  # of the first layer's output [N, 2P, 2Q, CL]: uint8, [N, 2P, 2Q, CL / 8]
    image,  # [N, 4P, 4Q, CI]
    gw,  # fp32 [groups, PARTS, CL, 4, 4, CI]
    groups,
    images,  # N / groups
    x_slope,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    CS: tl.constexpr,
    CL: tl.constexpr,
    CI: tl.constexpr,
    PROLOGUE: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of two layers down from an image, of which the first has relu or leaky_relu and no norm:
    parts of the gradient of the first one's weight. The gradient of what is between the layers is
    that of `gather_pointers` with EPILOGUE signed, a tile at a time, and is not stored. Grid:
    (column tiles, groups, PARTS)."""
    column_tile = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < CL
    k = tl.arange(0, 64)
    taps, used = window_taps(k, CI)
    tiles = 4 * tl.cdiv(images * (P * Q), BLOCK_M)

    gw_acc = tl.zeros((BLOCK_N, 64), dtype=tl.float32)
    for tile in range(part, tiles, PARTS):
        r = tile % 4 // 2
        s = tile % 2
        row = tile // 4 * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < images * (P * Q)
        q = row % Q
        p = (row // Q) % P
        n = (group * images + row // (P * Q)).to(tl.int64)
        acc = gather_sum(
            x,
            x_aux,
            x_coef + group * CS,
            groups * CS,
            w,
            n,
            p,
            q,
            row_mask,
            r,
            s,
            channel,
            channel_mask,
            0,
            x_slope,
            P,
            Q,
            CS,
            2 * P,
            2 * Q,
            CL,
            2,
            1,
            True,
            PROLOGUE,
            X_ACTIVATION,
            1,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        h = 2 * p + r
        v = 2 * q + s
        offsets = (((n * (2 * P) + h) * (2 * Q) + v) * CL)[:, None] + channel[None, :]
        mask = row_mask[:, None] & channel_mask[None, :]
        acc *= signs_derivative(signs, offsets, mask, channel, slope, ACTIVATION)
        windows = load_windows(
            image,
            image,
            x_coef,
            0,
            n,
            h,
            v,
            row_mask,
            k,
            slope,
            2 * P,
            2 * Q,
            CI,
            "none",
            "none",
        )
        g = acc.to(windows.dtype)
        gw_acc = tl.dot(tl.trans(g), windows, gw_acc, input_precision=PRECISION)

    to = gw + (group * PARTS + part) * (CL * 16 * CI)
    to += (channel * (16 * CI))[:, None] + taps[None, :]
    tl.store(to, gw_acc, mask=channel_mask[:, None] & used[None, :])
