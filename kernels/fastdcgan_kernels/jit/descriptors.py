"""The kernels of gather.py and wgrad.py with loads by tensor descriptors (TMA): one box for a tap
of a tile of pixels, no index arithmetic. What a box takes from outside the tensor is 0, which is
the padding.

A tile of rows is a box of small pixels: BOX_N images, BOX_P rows, BOX_Q columns, of which the rows
divide P and the columns Q. Where STRIDE is 2
the large side's descriptor is the view [N, P, 2, Q, 2 * CL] of [N, H, W, CL]: the pixels that one
tap meets are neighbours in it. Else a descriptor is the tensor as it lies in memory, NHWC.

Not here: tensors whose rows are no multiple of 16 bytes.
"""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import coefficients, store_tile, transform


@triton.jit
def load_small(side, n, p, q, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: a box of the small side at (n, p, q, c)."""
    return side.load([n, p, q, c]).reshape(ROWS, COLUMNS)


@triton.jit
def load_large(
    side,
    n,
    p,  # of the small pixel
    q,
    kh,
    kw,
    c,
    CL: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS]: what a box of small pixels at (n, p, q) meets at tap (kh, kw), from channel
    c on. Past channel CL it holds a neighbour."""
    if STRIDE == 2:
        box = side.load(
            [n, p + (kh + 1) // 2 - 1, (kh + 1) % 2, q + (kw + 1) // 2 - 1, (kw + 1) % 2 * CL + c]
        )
    else:
        box = side.load([n, p + kh, q + kw, c])
    return box.reshape(ROWS, COLUMNS)


@triton.jit
def apply(
    tile,  # [A, B] in storage dtype
    aux,  # like tile
    coef,  # pointer at the group's row, [3, groups, C] fp32
    plane,  # groups * C
    inside,  # [A]: rows that are not padding
    channels,  # [B]
    channel_mask,  # [B]
    slope,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`tile.load_operand`, of a tile that is already here."""
    if PROLOGUE != "none":
        mean, scale, shift = 0.0, 0.0, 0.0
        if PROLOGUE != "actgrad":
            mean, scale, shift = coefficients(coef, plane, channels[None, :], channel_mask[None, :])
        changed = transform(tile, aux, mean, scale, shift, slope, PROLOGUE, ACTIVATION)
        keep = inside[:, None] & channel_mask[None, :]
        tile = tl.where(keep, changed, 0.0).to(tile.dtype)
    return tile


@triton.jit(do_not_specialize=["images"])
def gather_descriptors(
    x,  # descriptor of the source: the large side going down, the small side going up
    x_aux,  # descriptor of the same shape, for its prologue
    x_coef,  # [3, groups, channels of x] fp32
    w,  # descriptor [CS, 16 * CL], dtype of x
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
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (row tiles * phases * column tiles, groups, SPLIT). BLOCK_M = BOX_N * BOX_P * BOX_Q;
    going down BLOCK_K divides CL."""
    if UP:
        CI: tl.constexpr = CS
        CO: tl.constexpr = CL
        HO: tl.constexpr = H
        WO: tl.constexpr = W
        PHASES: tl.constexpr = STRIDE * STRIDE if STRIDE > 1 else 16
        SIDE: tl.constexpr = 2 if STRIDE > 1 else 1
    else:
        CI: tl.constexpr = CL
        CO: tl.constexpr = CS
        HO: tl.constexpr = P
        WO: tl.constexpr = Q
        PHASES: tl.constexpr = 1
        SIDE: tl.constexpr = 4
    COLUMN_TILES: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    P_TILES: tl.constexpr = P // BOX_P
    Q_TILES: tl.constexpr = Q // BOX_Q
    CHUNKS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = SIDE * SIDE * CHUNKS
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT

    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    phase = (pid // COLUMN_TILES) % PHASES
    row_tile = pid // (COLUMN_TILES * PHASES)
    group = tl.program_id(1)
    split = tl.program_id(2)

    q0 = row_tile % Q_TILES * BOX_Q
    p0 = row_tile // Q_TILES % P_TILES * BOX_P
    own = row_tile // (Q_TILES * P_TILES) * BOX_N  # within the group
    n0 = group * images + own
    row = tl.arange(0, BLOCK_M)
    q = q0 + row % BOX_Q
    p = p0 + row // BOX_Q % BOX_P
    image = own + row // (BOX_Q * BOX_P)
    row_mask = image < images
    col0 = column_tile * BLOCK_N
    channel = col0 + tl.arange(0, BLOCK_N)
    channel_mask = channel < CO

    if UP:
        PHASE_SIDE: tl.constexpr = STRIDE if STRIDE > 1 else 4
        r = phase // PHASE_SIDE
        s = phase % PHASE_SIDE
    else:
        r = 0
        s = 0

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        tap = step // CHUNKS
        c0 = step % CHUNKS * BLOCK_K
        th = tap // SIDE
        tw = tap % SIDE
        aux = 0.0
        if UP:
            top = 0
            left = 0
            kh = r
            kw = s
            if STRIDE > 1:
                top = th - 1 + r
                left = tw - 1 + s
                kh = 3 - 2 * th - r
                kw = 3 - 2 * tw - s
            a = load_small(x, n0, p0 + top, q0 + left, c0, BLOCK_M, BLOCK_K)
            if PROLOGUE == "normgrad" or PROLOGUE == "actgrad":
                aux = load_small(x_aux, n0, p0 + top, q0 + left, c0, BLOCK_M, BLOCK_K)
            inside = (p + top >= 0) & (p + top < P) & (q + left >= 0) & (q + left < Q)
        else:
            kh = th
            kw = tw
            a = load_large(x, n0, p0, q0, kh, kw, c0, CL, STRIDE, BLOCK_M, BLOCK_K)
            if PROLOGUE == "normgrad" or PROLOGUE == "actgrad":
                aux = load_large(x_aux, n0, p0, q0, kh, kw, c0, CL, STRIDE, BLOCK_M, BLOCK_K)
            h = p * STRIDE - PAD + kh
            v = q * STRIDE - PAD + kw
            inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
        c = c0 + tl.arange(0, BLOCK_K)
        a = apply(
            a,
            aux,
            x_coef + group * CI,
            groups * CI,
            inside & row_mask,
            c,
            c < CI,
            x_slope,
            PROLOGUE,
            X_ACTIVATION,
        )
        if UP:
            b = w.load([c0, (kh * 4 + kw) * CL + col0])
        else:
            b = tl.trans(w.load([col0, (kh * 4 + kw) * CL + c0]))
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    n = (group * images + image).to(tl.int64)
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


@triton.jit(do_not_specialize=["images"])
def weight_gradient_descriptors(
    small,  # descriptor of [N, P, Q, CS]: Conv2d's output gradient, ConvTranspose2d's input
    small_aux,
    small_coef,  # [3, groups, CS] fp32
    large,  # descriptor of the large side: Conv2d's input, ConvTranspose2d's output gradient
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
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (16 taps * tiles of CS * tiles of CL, SPLIT); the second axis cuts the boxes of all
    groups into SPLIT ranges. BLOCK_K = BOX_N * BOX_P * BOX_Q; BOX_N divides images unless
    there is one group: no box holds another group's pixels."""
    L_TILES: tl.constexpr = (CL + BLOCK_N - 1) // BLOCK_N
    P_TILES: tl.constexpr = P // BOX_P
    Q_TILES: tl.constexpr = Q // BOX_Q
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
    row = tl.arange(0, BLOCK_K)
    boxes = tl.cdiv(images, BOX_N) * (P_TILES * Q_TILES)
    share = tl.cdiv(groups * boxes, SPLIT)
    first = split * share

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(groups):
        start = group * boxes
        for box in range(max(first, start) - start, min(first + share - start, boxes)):
            q0 = box % Q_TILES * BOX_Q
            p0 = box // Q_TILES % P_TILES * BOX_P
            own = box // (Q_TILES * P_TILES) * BOX_N
            n0 = group * images + own
            h = (p0 + row // BOX_Q % BOX_P) * STRIDE - PAD + kh
            v = (q0 + row % BOX_Q) * STRIDE - PAD + kw
            whole = own + row // (BOX_Q * BOX_P) < images
            a = load_small(small, n0, p0, q0, s_tile * BLOCK_M, BLOCK_K, BLOCK_M)
            aux = 0.0
            if SMALL_PROLOGUE == "normgrad" or SMALL_PROLOGUE == "actgrad":
                aux = load_small(small_aux, n0, p0, q0, s_tile * BLOCK_M, BLOCK_K, BLOCK_M)
            a = apply(
                a,
                aux,
                small_coef + group * CS,
                groups * CS,
                whole,
                cs,
                cs_mask,
                small_slope,
                SMALL_PROLOGUE,
                SMALL_ACTIVATION,
            )
            c0 = l_tile * BLOCK_N
            b = load_large(large, n0, p0, q0, kh, kw, c0, CL, STRIDE, BLOCK_K, BLOCK_N)
            other = 0.0
            if LARGE_PROLOGUE == "normgrad" or LARGE_PROLOGUE == "actgrad":
                other = load_large(large_aux, n0, p0, q0, kh, kw, c0, CL, STRIDE, BLOCK_K, BLOCK_N)
            b = apply(
                b,
                other,
                large_coef + group * CL,
                groups * CL,
                whole & (h >= 0) & (h < H) & (v >= 0) & (v < W),
                cl,
                cl_mask,
                large_slope,
                LARGE_PROLOGUE,
                LARGE_ACTIVATION,
            )
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    offsets = (cs * (16 * CL) + tap * CL).to(tl.int64)[:, None] + cl[None, :]
    offsets += split.to(tl.int64) * (CS * 16 * CL)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=cs_mask[:, None] & cl_mask[None, :])
