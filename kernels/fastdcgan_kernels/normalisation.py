"""BatchNorm's kernels as functions of tensors: shapes in, launches out. Not here: the statistics
that a convolution's epilogue makes on its way (convolution.py).

All images are channels_last; `groups` are equal batches one after the other, each with its own
statistics. Sums over tiles are taken in a fixed order: the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Running:
    """Buffers [C] that the groups of a batch move in turn, in place, by a momentum for all or one
    for each [groups], fp32; `batches`: an int64 count of them, moved too, or None."""

    mean: Tensor
    var: Tensor
    momentum: float | Tensor
    batches: Tensor | None = None


def finalize_statistics(
    result: Result, gamma: Tensor | None, beta: Tensor | None, eps: float, sync: str = "",
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """coef [5, groups, C]: mean, scale = gamma / sqrt(var + eps), shift = beta, and for the way
    back 1 / sqrt(var + eps) and count; and stats [3, groups, C]: mean, biased variance, count;
    fp32, from a result's partials. `running` moves on the way. With `sync`, the name of a process
    group, the batches of its processes count as one, of whatever sizes."""
    assert result.partials is not None
    assert result.counts is not None
    if sync:
        _, own = _merge(result.partials, result.counts, None, None, eps, None)
        every = _gather(own, sync)  # [processes, 3, groups, C]
        mean, var, count = (every[:, row].transpose(0, 1) for row in range(3))
        partials = torch.stack([mean, var * count])
        return _merge(partials, count[:, :, 0].contiguous(), gamma, beta, eps, running)
    return _merge(result.partials, result.counts, gamma, beta, eps, running)


def _merge(
    partials: Tensor, counts: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    running: Running | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, groups, tiles, channels = partials.shape
    coef, stats = (partials.new_empty((planes, groups, channels)) for planes in (5, 3))
    block = _block(channels, 16)
    mean = var = momenta = coef
    momentum, batches = 0.0, None
    if running is not None:
        mean, var = running.mean.contiguous(), running.var.contiguous()
        batches = running.batches
        if isinstance(running.momentum, Tensor):
            momenta = running.momentum.float().expand(groups).contiguous()
        else:
            momentum = running.momentum
    Launch(
        norm.merge_statistics,
        (cdiv(channels, block),),
        {
            "partials": partials, "counts": counts, "gamma": coef if gamma is None else gamma,
            "beta": coef if beta is None else beta, "coef": coef, "stats": stats,
            "running_mean": mean, "running_var": var,
            "batches": coef if batches is None else batches, "momenta": momenta,
            "groups": groups, "tiles": tiles, "eps": eps, "momentum": float(momentum),
            "C": channels, "HAS_GAMMA": gamma is not None, "HAS_BETA": beta is not None,
            "RUNNING": running is not None, "BATCHES": batches is not None,
            "MOMENTA": momenta is not coef, "BLOCK_T": TILES, "BLOCK_C": block,
        },
    ).run(partials.device)  # fmt: skip
    if running is not None and mean is not running.mean:  # buffers with gaps, which nobody has
        running.mean.copy_(mean)
        running.var.copy_(var)
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
    """Gradient of coef from the partials of sum dz and sum dz * (y - mean): of mean, scale and
    shift where it has these 3 planes; else (0, B, C, dgamma, dbeta), of which `norm_gradient` makes
    the gradients of what coef was made of (`jit.norm.sum_partials`)."""
    out = torch.empty_like(coef)
    _sum(partials, coef, out, columns=False)
    return out


def _sum(partials: Tensor, coef: Tensor, out: Tensor, columns: bool) -> None:
    _, groups, tiles, channels = partials.shape
    block = _block(channels, 16)
    Launch(
        norm.sum_partials,
        (cdiv(channels, block),),
        {
            "partials": partials, "coef": coef, "out": out, "groups": groups, "tiles": tiles,
            "C": channels, "COLUMNS": columns, "NORM": not columns and coef.shape[0] == 5,
            "BLOCK_T": TILES, "BLOCK_C": block,
        },
    ).run(partials.device)  # fmt: skip


def norm_gradient(gcoef: Tensor, sync: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """(dcoef [3, groups, C], dgamma [C], dbeta [C]): dy = gy + B * (y - 0) + C with dcoef =
    (0, B, C), views of what `finalize_gradient` made. With `sync`, dcoef is the sum over all
    processes; dgamma and dbeta are this process's share."""
    dcoef = gcoef[:3]
    if sync:
        dcoef = dcoef.clone()
        dist.all_reduce(dcoef, group=process_group(sync))
    return dcoef, gcoef[3, 0], gcoef[4, 0]
