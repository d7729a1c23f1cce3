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
    coef,  # [5, groups, C] fp32: mean, scale, shift, 1 / sqrt(var + eps), count
    stats,  # [3, groups, C] fp32: mean, biased variance, count
    running_mean,  # [C], any float; moved in place where RUNNING
    running_var,  # [C], any float
    batches,  # [] int64: how many the buffers have seen; moved where BATCHES
    momenta,  # [groups] fp32: the momentum of each group, where MOMENTA
    groups,
    tiles,
    eps,
    momentum,  # that of all groups, unless MOMENTA
    C: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    RUNNING: tl.constexpr,
    BATCHES: tl.constexpr,
    MOMENTA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over the tiles, BLOCK_T of them at a time and always in the same order; the
    running buffers see the groups one after the other. Grid: (channel tiles,)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    plane = groups * tiles * C
    own_mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    own_var = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if RUNNING:
        own_mean = tl.load(running_mean + channel, mask=channel_mask, other=0.0).to(tl.float32)
        own_var = tl.load(running_var + channel, mask=channel_mask, other=0.0).to(tl.float32)
    for group in range(groups):
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
        rstd = 1.0 / tl.sqrt_rn(var + eps)
        scale = rstd
        if HAS_GAMMA:
            scale *= tl.load(gamma + channel, mask=channel_mask, other=0.0).to(tl.float32)
        shift = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if HAS_BETA:
            shift = tl.load(beta + channel, mask=channel_mask, other=0.0).to(tl.float32)
        row = group * C + channel
        count_row = var * 0.0 + n
        tl.store(coef + row, mean, mask=channel_mask)
        tl.store(coef + groups * C + row, scale, mask=channel_mask)
        tl.store(coef + 2 * groups * C + row, shift, mask=channel_mask)
        tl.store(coef + 3 * groups * C + row, rstd, mask=channel_mask)
        tl.store(coef + 4 * groups * C + row, count_row, mask=channel_mask)
        tl.store(stats + row, mean, mask=channel_mask)
        tl.store(stats + groups * C + row, var, mask=channel_mask)
        tl.store(stats + 2 * groups * C + row, count_row, mask=channel_mask)
        if RUNNING:
            share_new = momentum
            if MOMENTA:
                share_new = tl.load(momenta + group)
            own_mean = own_mean * (1.0 - share_new) + mean * share_new
            own_var = own_var * (1.0 - share_new) + var * (n / (n - 1.0)) * share_new
    if RUNNING:
        to = running_mean.dtype.element_ty
        tl.store(running_mean + channel, own_mean.to(to), mask=channel_mask)
        to_var = running_var.dtype.element_ty
        tl.store(running_var + channel, own_var.to(to_var), mask=channel_mask)
    if BATCHES and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + groups)


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
    coef,  # [5, groups, C] fp32 as `merge_statistics` makes it, or its first 3; not if COLUMNS
    out,  # like coef; [groups, C] where COLUMNS
    groups,
    tiles,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the tiles, always in the same order: of plane 0 alone where COLUMNS, else S1 = sum
    dz and S2 = sum dz * (y - mean), the gradients of shift and scale; that of mean is -scale * S1.

    NORM: coef has all its planes, and S1 and S2 go the way on through mean and variance, too. With
    B = -scale * rstd^2 * S2 / count and C = -scale * S1 / count - B * mean the planes of `out` are
    0, B, C of dy = gy + B * (y - 0) + C, and, in the first group, the sums over all groups of
    dgamma = rstd * S2 and dbeta = S1. They add up where several take the same y.

    Grid: (channel tiles,)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    dgamma = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbeta = tl.zeros((BLOCK_C,), dtype=tl.float32)
    plane = groups * C
    for group in range(groups):
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
            scale = tl.load(coef + plane + row, mask=channel_mask, other=0.0)
            if NORM:
                mean = tl.load(coef + row, mask=channel_mask, other=0.0)
                rstd = tl.load(coef + 3 * plane + row, mask=channel_mask, other=0.0)
                count = tl.load(coef + 4 * plane + row, mask=channel_mask, other=1.0)
                b = -scale * rstd * rstd * s2 / count
                zero = tl.zeros((BLOCK_C,), dtype=tl.float32)
                tl.store(out + row, zero, mask=channel_mask)
                tl.store(out + plane + row, b, mask=channel_mask)
                tl.store(out + 2 * plane + row, -scale * s1 / count - b * mean, mask=channel_mask)
                if group > 0:
                    tl.store(out + 3 * plane + row, zero, mask=channel_mask)
                    tl.store(out + 4 * plane + row, zero, mask=channel_mask)
                dgamma += rstd * s2
                dbeta += s1
            else:
                tl.store(out + row, -scale * s1, mask=channel_mask)
                tl.store(out + plane + row, s2, mask=channel_mask)
                tl.store(out + 2 * plane + row, s1, mask=channel_mask)
    if NORM:
        tl.store(out + 3 * plane + channel, dgamma, mask=channel_mask)
        tl.store(out + 4 * plane + channel, dbeta, mask=channel_mask)
