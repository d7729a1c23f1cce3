"""BatchNorm's own kernels: what is left of it once the convolutions form the partial statistics.
Not here: the convolutions; what the epilogues and prologues do (tile.py)."""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import store_tile


@triton.jit
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
