"""BatchNorm's kernels as functions of tensors: shapes in, launches out. Not here: the statistics
that a convolution's epilogue makes on its way (convolution.py).

All images are channels_last; `groups` are equal batches one after the other, each with its own
statistics. Sums over tiles are taken in a fixed order: the same bits on every run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastdcgan_kernels.convolution import Operand, Result
from fastdcgan_kernels.geometry import cdiv
from fastdcgan_kernels.jit import norm
from fastdcgan_kernels.launch import Launch
from fastdcgan_kernels.reference import process_group

# A row of 64 channels is 128 bytes or more; 64 rows keep a program's tile in its registers.
ROWS, COLUMNS, TILES = 64, 64, 64


def _block(channels: int, most: int = COLUMNS) -> int:
    return min(most, max(16, 1 << (channels - 1).bit_length()))


def _rows(y: Tensor, groups: int) -> tuple[int, int, int]:
    """(rows of a group, channels, row tiles)."""
    n, channels, h, w = y.shape
    rows = n * h * w // groups
    return rows, channels, cdiv(rows, ROWS)


def statistics(y: Tensor, groups: int = 1) -> Result:
    """Partials (mean, M2) [2, groups, tiles, C] and counts [groups, tiles] of y."""
    rows, channels, tiles = _rows(y, groups)
    partials = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    counts = y.new_empty((groups, tiles), dtype=torch.float32)
    Launch(
        norm.partial_statistics,
        (tiles * cdiv(channels, _block(channels)), groups),
        {
            "y": y, "partials": partials, "counts": counts, "groups": groups, "rows": rows,
            "C": channels, "BLOCK_M": ROWS, "BLOCK_N": _block(channels),
        },
    ).run(y.device)  # fmt: skip
    return Result(y, partials, counts)


def finalize_statistics(
    result: Result, gamma: Tensor | None, beta: Tensor | None, eps: float, sync: str = ""
) -> tuple[Tensor, Tensor]:
    """coef [3, groups, C]: mean, scale = gamma / sqrt(var + eps), shift = beta; and stats
    [3, groups, C]: mean, biased variance, count; fp32, from a result's partials. With `sync`, the
    name of a process group, the batches of its processes count as one, of whatever sizes."""
    assert result.partials is not None
    assert result.counts is not None
    if sync:
        _, own = _merge(result.partials, result.counts, None, None, eps)
        every = _gather(own, sync)  # [processes, 3, groups, C]
        mean, var, count = (every[:, row].transpose(0, 1) for row in range(3))
        partials = torch.stack([mean, var * count])
        coef, stats = _merge(partials, count[:, :, 0].contiguous(), gamma, beta, eps)
        return coef, stats
    return _merge(result.partials, result.counts, gamma, beta, eps)


def _merge(
    partials: Tensor, counts: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _, groups, tiles, channels = partials.shape
    coef, stats = (partials.new_empty((3, groups, channels)) for _ in range(2))
    block = _block(channels, 16)
    Launch(
        norm.merge_statistics,
        (cdiv(channels, block), groups),
        {
            "partials": partials, "counts": counts, "gamma": coef if gamma is None else gamma,
            "beta": coef if beta is None else beta, "coef": coef, "stats": stats,
            "groups": groups, "tiles": tiles, "eps": eps, "C": channels,
            "HAS_GAMMA": gamma is not None, "HAS_BETA": beta is not None,
            "BLOCK_T": TILES, "BLOCK_C": block,
        },
    ).run(partials.device)  # fmt: skip
    return coef, stats


def _gather(own: Tensor, sync: str) -> Tensor:
    """`own` of every process, stacked in the order of their ranks."""
    group = process_group(sync)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return torch.stack(every)


def pointwise(operand: Operand, groups: int = 1) -> Tensor:
    """The operand with its prologue applied, written out."""
    value = operand.value
    out = torch.empty_like(value, memory_format=torch.channels_last)
    _apply(operand, groups, out, out, sums=False)
    return out


def column_sum(operand: Operand, groups: int = 1) -> Tensor:
    """[C] fp32: the sum over all pixels of the operand with its prologue applied."""
    _, channels, tiles = _rows(operand.value, groups)
    partials = operand.value.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    _apply(operand, groups, operand.value, partials, sums=True)
    out = partials.new_empty((1, channels))
    # The tiles of all groups are one row of tiles.
    _sum(partials.view(2, 1, groups * tiles, channels), out, out, columns=True)
    return out[0]


def _apply(operand: Operand, groups: int, out: Tensor, partials: Tensor, sums: bool) -> None:
    value = operand.value
    rows, channels, tiles = _rows(value, groups)
    Launch(
        norm.apply_prologue,
        (tiles * cdiv(channels, _block(channels)), groups),
        {
            "value": value, "aux": value if operand.aux is None else operand.aux,
            "coef": value if operand.coef is None else operand.coef, "out": out,
            "partials": partials, "groups": groups, "rows": rows, "slope": float(operand.slope),
            "C": channels, "PROLOGUE": operand.prologue, "ACTIVATION": operand.activation,
            "SUM": sums, "BLOCK_M": ROWS, "BLOCK_N": _block(channels),
        },
    ).run(value.device)  # fmt: skip


def activation_gradient(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float, groups: int
) -> tuple[Tensor, Tensor]:
    """With g the gradient of act(z), z = scale * (y - mean) + shift and dz = g * act'(z):
    scale * dz, and partials [2, groups, tiles, C] of sum dz and sum dz * (y - mean)."""
    rows, channels, tiles = _rows(y, groups)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    partials = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    Launch(
        norm.activation_gradient,
        (tiles * cdiv(channels, _block(channels)), groups),
        {
            "g": g, "y": y, "coef": coef, "out": out, "partials": partials, "groups": groups,
            "rows": rows, "slope": float(slope), "C": channels, "ACTIVATION": activation,
            "BLOCK_M": ROWS, "BLOCK_N": _block(channels),
        },
    ).run(y.device)  # fmt: skip
    return out, partials


def finalize_gradient(partials: Tensor, coef: Tensor) -> Tensor:
    """Gradient [3, groups, C] of coef (mean, scale, shift) from the partials of sum dz and
    sum dz * (y - mean)."""
    out = torch.empty_like(coef)
    _sum(partials, coef, out, columns=False)
    return out


def _sum(partials: Tensor, coef: Tensor, out: Tensor, columns: bool) -> None:
    _, groups, tiles, channels = partials.shape
    block = _block(channels, 16)
    Launch(
        norm.sum_partials,
        (cdiv(channels, block), groups),
        {
            "partials": partials, "coef": coef, "out": out, "groups": groups, "tiles": tiles,
            "C": channels, "COLUMNS": columns, "BLOCK_T": TILES, "BLOCK_C": block,
        },
    ).run(partials.device)  # fmt: skip


def norm_gradient(
    gcoef: Tensor, stats: Tensor, gamma: Tensor | None, eps: float, sync: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """(dcoef [3, groups, C], dgamma [C], dbeta [C]): dy = gy + B * (y - mean) + C with dcoef =
    (mean, B, C), from the gradients of mean, scale and shift. With `sync`, those of all processes
    are summed for dcoef; dgamma and dbeta are this process's share."""
    _, groups, channels = gcoef.shape
    total = gcoef
    if sync:
        total = gcoef.clone()
        dist.all_reduce(total, group=process_group(sync))
    dcoef = torch.empty_like(gcoef)
    dgamma, dbeta = (gcoef.new_empty(channels) for _ in range(2))
    block = _block(channels)
    Launch(
        norm.norm_gradient,
        (cdiv(channels, block),),
        {
            "gcoef": gcoef, "total": total, "stats": stats,
            "gamma": gcoef if gamma is None else gamma, "dcoef": dcoef, "dgamma": dgamma,
            "dbeta": dbeta, "groups": groups, "eps": eps, "C": channels,
            "HAS_GAMMA": gamma is not None, "SYNC": bool(sync), "BLOCK_C": block,
        },
    ).run(gcoef.device)  # fmt: skip
    return dcoef, dgamma, dbeta
