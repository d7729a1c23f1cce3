"""BatchNorm's own kernels: what is left of it once the convolutions form the partial statistics.
Not here: the convolutions; what the epilogues and prologues do (tile.py)."""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import load_operand, store_tile


@triton.jit(do_not_specialize=["rows"])
def reduce_splits(
    parts,  # [SPLITS, groups, rows, C] fp32
    out,  # [groups, rows, C]
    bias,
    out_aux,
    out_coef,
    partials,
    counts,
    groups,
    rows,
    slope,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Parts of a sum added in their order, then the epilogue. Grid: (row tiles * column tiles,
    groups)."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    column_tile = tl.program_id(0) % COLUMN_TILES
    row_tile = tl.program_id(0) // COLUMN_TILES
    group = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    first = group.to(tl.int64) * rows
    offsets = ((first + row) * C)[:, None] + channel[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    plane = (groups * rows).to(tl.int64) * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts + split * plane + offsets, mask=mask, other=0.0)
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
        out_coef + group * C,
        groups * C,
        slope,
        partials,
        (group * tiles + row_tile) * C + channel,
        groups * tiles * C,
        HAS_BIAS,
        EPILOGUE,
        ACTIVATION,
    )
    if EPILOGUE == "statistics" and column_tile == 0:
        tl.store(counts + group * tiles + row_tile, count)


@triton.jit(do_not_specialize=["rows"])
def partial_statistics(
    y,  # [groups, rows, C]
    partials,  # [2, groups, tiles, C] fp32: mean and M2 of each tile
    counts,  # [groups, tiles] fp32
    groups,
    rows,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What the epilogue `statistics` makes, of a tensor that is already there. Grid: (row tiles *
    column tiles, groups)."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    column_tile = tl.program_id(0) % COLUMN_TILES
    row_tile = tl.program_id(0) // COLUMN_TILES
    group = tl.program_id(1)
    tiles = tl.num_programs(0) // COLUMN_TILES
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    offsets = ((group.to(tl.int64) * rows + row) * C)[:, None] + channel[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.sum(row_mask.to(tl.float32), axis=0)
    mean = tl.sum(value, axis=0) / tl.maximum(count, 1.0)
    apart = tl.where(mask, value - mean[None, :], 0.0)
    to = (group * tiles + row_tile) * C + channel
    tl.store(partials + to, mean, mask=channel_mask)
    tl.store(partials + groups * tiles * C + to, tl.sum(apart * apart, axis=0), mask=channel_mask)
    if column_tile == 0:
        tl.store(counts + group * tiles + row_tile, count)


@triton.jit(do_not_specialize=["tiles"])
def merge_statistics(
    partials,  # [2, groups, tiles, C] fp32: mean and M2 of each tile
    counts,  # [groups, tiles] fp32
    gamma,  # [C], any float; read where HAS_GAMMA
    beta,  # [C], any float; read where HAS_BETA
    coef,  # [3, groups, C] fp32: mean, scale, shift
    stats,  # [3, groups, C] fp32: mean, biased variance, count
    groups,
    tiles,
    eps,
    C: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over the tiles, BLOCK_T of them at a time and always in the same order. Grid:
    (channel tiles, groups)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    group = tl.program_id(1)
    plane = groups * tiles * C
    n = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & channel_mask[None, :]
        offsets = ((group * tiles + tile) * C)[:, None] + channel[None, :]
        count = tl.load(counts + group * tiles + tile, mask=tile < tiles, other=0.0)
        means = tl.load(partials + offsets, mask=mask, other=0.0)
        m2s = tl.load(partials + plane + offsets, mask=mask, other=0.0)
        # The block by itself, its means taken from that of its first tile ...
        origin = tl.load(
            partials + (group * tiles + first) * C + channel, mask=channel_mask, other=0.0
        )
        block_n = tl.sum(count, axis=0)
        block_mean = tl.sum(count[:, None] * (means - origin[None, :]), axis=0)
        block_mean = origin + block_mean / tl.maximum(block_n, 1.0)
        apart = means - block_mean[None, :]
        block_m2 = tl.sum(m2s + count[:, None] * apart * apart, axis=0)
        # ... and then into what was before it.
        total = n + block_n
        share = block_n / tl.maximum(total, 1.0)
        delta = block_mean - mean
        mean += delta * share
        m2 += block_m2 + delta * delta * n * share
        n = total
    var = m2 / tl.maximum(n, 1.0)
    # By division: an approximate rsqrt would not be float32's last digits.
    scale = 1.0 / tl.sqrt_rn(var + eps)
    if HAS_GAMMA:
        scale *= tl.load(gamma + channel, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BETA:
        shift = tl.load(beta + channel, mask=channel_mask, other=0.0).to(tl.float32)
    row = group * C + channel
    tl.store(coef + row, mean, mask=channel_mask)
    tl.store(coef + groups * C + row, scale, mask=channel_mask)
    tl.store(coef + 2 * groups * C + row, shift, mask=channel_mask)
    tl.store(stats + row, mean, mask=channel_mask)
    tl.store(stats + groups * C + row, var, mask=channel_mask)
    tl.store(stats + 2 * groups * C + row, var * 0.0 + n, mask=channel_mask)


@triton.jit(do_not_specialize=["rows"])
def apply_prologue(
    value,  # [groups, rows, C]
    aux,  # like value
    coef,  # [3, groups, C] fp32
    out,  # like value
    partials,  # [2, groups, tiles, C] fp32, of which plane 0 is written, where SUM
    groups,
    rows,
    slope,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """An operand as its consumer would see it, written out; or, where SUM, only its column sums of
    each tile. Grid: (row tiles * column tiles, groups)."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    column_tile = tl.program_id(0) % COLUMN_TILES
    row_tile = tl.program_id(0) // COLUMN_TILES
    group = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    offsets = ((group.to(tl.int64) * rows + row) * C)[:, None] + channel[None, :]
    mask = (row < rows)[:, None] & channel_mask[None, :]
    tile = load_operand(
        value,
        aux,
        coef + group * C,
        groups * C,
        offsets,
        mask,
        channel[None, :],
        channel_mask[None, :],
        slope,
        PROLOGUE,
        ACTIVATION,
    )
    if SUM:
        tiles = tl.num_programs(0) // COLUMN_TILES
        tl.store(
            partials + (group * tiles + row_tile) * C + channel,
            tl.sum(tile.to(tl.float32), axis=0),
            mask=channel_mask,
        )
    else:
        tl.store(out + offsets, tile, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def activation_gradient(
    g,  # [groups, rows, C]: gradient of act(z)
    y,  # like g: z = scale * (y - mean) + shift
    coef,  # [3, groups, C] fp32
    out,  # like g: scale * dz
    partials,  # [2, groups, tiles, C] fp32: sum dz, sum dz * (y - mean)
    groups,
    rows,
    slope,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue `gradient`, on a gradient that is already there. Grid: (row tiles * column
    tiles, groups)."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    column_tile = tl.program_id(0) % COLUMN_TILES
    row_tile = tl.program_id(0) // COLUMN_TILES
    group = tl.program_id(1)
    tiles = tl.num_programs(0) // COLUMN_TILES
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    channel = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    offsets = ((group.to(tl.int64) * rows + row) * C)[:, None] + channel[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    store_tile(
        tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32),
        out,
        offsets,
        row_mask,
        channel,
        channel_mask,
        out,
        y,
        coef + group * C,
        groups * C,
        slope,
        partials,
        (group * tiles + row_tile) * C + channel,
        groups * tiles * C,
        False,
        "gradient",
        ACTIVATION,
    )


@triton.jit(do_not_specialize=["tiles"])
def sum_partials(
    partials,  # [2, groups, tiles, C] fp32
    coef,  # [3, groups, C] fp32: mean, scale, shift; read unless COLUMNS
    out,  # [3, groups, C] fp32: gradients of mean, scale, shift; [groups, C] where COLUMNS
    groups,
    tiles,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the tiles, always in the same order: of plane 0 alone where COLUMNS, else S1 = sum
    dz and S2 = sum dz * (y - mean), the gradients of shift and scale; that of mean is
    -scale * S1. Grid: (channel tiles, groups)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    group = tl.program_id(1)
    s1 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & channel_mask[None, :]
        offsets = ((group * tiles + tile) * C)[:, None] + channel[None, :]
        s1 += tl.sum(tl.load(partials + offsets, mask=mask, other=0.0), axis=0)
        if not COLUMNS:
            second = partials + groups * tiles * C + offsets
            s2 += tl.sum(tl.load(second, mask=mask, other=0.0), axis=0)
    row = group * C + channel
    if COLUMNS:
        tl.store(out + row, s1, mask=channel_mask)
    else:
        scale = tl.load(coef + groups * C + row, mask=channel_mask, other=0.0)
        tl.store(out + row, -scale * s1, mask=channel_mask)
        tl.store(out + groups * C + row, s2, mask=channel_mask)
        tl.store(out + 2 * groups * C + row, s1, mask=channel_mask)


@triton.jit
def norm_gradient(
    gcoef,  # [3, groups, C] fp32: gradients of mean, scale and shift, of this process
    total,  # [3, groups, C] fp32: the same over all processes; read where SYNC
    stats,  # [3, groups, C] fp32: mean, biased variance, count
    gamma,  # [C]; read where HAS_GAMMA
    dcoef,  # [3, groups, C] fp32: mean, B, C of dy = gy + B * (y - mean) + C
    dgamma,  # [C] fp32
    dbeta,  # [C] fp32
    groups,
    eps,
    C: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    SYNC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The way back through mean and variance: B = -gamma * rstd^3 * dscale / M, C = dmean / M.
    Grid: (channel tiles,)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < C
    plane = groups * C
    weight = tl.zeros((BLOCK_C,), dtype=tl.float32) + 1.0
    if HAS_GAMMA:
        weight = tl.load(gamma + channel, mask=mask, other=0.0).to(tl.float32)
    sum_gamma = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_beta = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for group in range(groups):
        row = group * C + channel
        mean = tl.load(stats + row, mask=mask, other=0.0)
        var = tl.load(stats + plane + row, mask=mask, other=0.0)
        count = tl.load(stats + 2 * plane + row, mask=mask, other=1.0)
        rstd = 1.0 / tl.sqrt_rn(var + eps)
        gscale = tl.load(gcoef + plane + row, mask=mask, other=0.0)
        sum_gamma += rstd * gscale
        sum_beta += tl.load(gcoef + 2 * plane + row, mask=mask, other=0.0)
        source = gcoef
        if SYNC:
            source = total
        gmean = tl.load(source + row, mask=mask, other=0.0)
        gscale = tl.load(source + plane + row, mask=mask, other=0.0)
        tl.store(dcoef + row, mean, mask=mask)
        tl.store(dcoef + plane + row, -weight * rstd * rstd * rstd * gscale / count, mask=mask)
        tl.store(dcoef + 2 * plane + row, gmean / count, mask=mask)
    tl.store(dgamma + channel, sum_gamma, mask=mask)
    tl.store(dbeta + channel, sum_beta, mask=mask)
