"""BatchNorm's own kernels: what is left of it once the convolutions make the partials. By rows: a
program has tiles of rows x channels of one group. Not here: the convolutions; what epilogues and
prologues do (tile.py); what partials become (partials.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import cdiv
from ..reference import process_group
from .launch import Launch
from .partials import MergedStatistics, MergedSums, Partial, Place, finish, join, merge, moments

# isort: split
from .partials import nothing, place_of, rows_of
from .tile import Epilogue, Operand, Result, load_operand, of_group, rows_at, store_tile

# A row of 64 channels is 128 bytes or more; 32 values a thread stay in its registers.
COLUMNS, ROWS, WARPS = 64, 64, 4
# Where each program leaves a row of partials they are few, and so they are large.
ROWS_WITH_PARTIALS, WARPS_WITH_PARTIALS = 128, 8


class _Grid(NamedTuple):
    """The programs of a kernel by rows."""

    programs: int
    column_tiles: int
    rows: int  # of a tile
    columns: int
    warps: int


def _grid(y: Tensor, groups: int, partials: bool) -> _Grid:
    channels = y.shape[1]
    rows, warps = (ROWS_WITH_PARTIALS, WARPS_WITH_PARTIALS) if partials else (ROWS, WARPS)
    columns = min(COLUMNS, max(16, 1 << (channels - 1).bit_length()))
    tiles = cdiv(y.numel() // channels // groups, rows)
    programs = rows_of(tiles, groups, y.device) if partials else tiles
    return _Grid(programs, cdiv(channels, columns), rows, columns, warps)


def _by_rows(kernel: Any, grid: _Grid, y: Tensor, groups: int, /, **arguments: Any) -> None:
    """Launch a kernel whose programs have tiles of y."""
    channels = y.shape[1]
    rows = y.numel() // channels // groups
    tile = {"C": channels, "BLOCK_M": grid.rows, "BLOCK_N": grid.columns}
    arguments |= {"groups": groups, "rows": rows, **tile}
    programs = grid.programs * grid.column_tiles, groups
    Launch(kernel, programs, arguments, grid.warps).run(y.device)


def statistics(y: Tensor, groups: int = 1, merged: MergedStatistics | None = None) -> Result:
    """The epilogue `statistics`, of a tensor that is already there."""
    grid, epilogue = _grid(y, groups, True), Epilogue("statistics", merged=merged)
    result = epilogue.result(y, groups, grid.programs, grid.column_tiles)
    end = epilogue.arguments(result, grid.column_tiles)["end"]
    _by_rows(partial_statistics, grid, y, groups, y=y, end=end)
    return result


@dataclass(frozen=True)
class Running:
    """Buffers [C] that the groups of a batch move in turn, in place, by a momentum for all or one
    for each [groups], fp32; `batches`: an int64 count of them, moved too, or None."""

    mean: Tensor
    var: Tensor
    momentum: float | Tensor
    batches: Tensor | None = None
    correction: int = 1


@contextmanager
def without_gaps(running: Running | None) -> Iterator[Running | None]:
    """The same with contiguous buffers; what they become inside, the given ones are behind it."""
    if running is None:
        yield None
        return
    mean, var = running.mean.contiguous(), running.var.contiguous()
    yield replace(running, mean=mean, var=var)
    for given, moved in ((running.mean, mean), (running.var, var)):
        if moved is not given:
            given.copy_(moved)


def merged_statistics(
    like: Tensor, groups: int, channels: int, gamma: Tensor | None, beta: Tensor | None,
    eps: float, running: Running | None = None,
) -> MergedStatistics:  # fmt: skip
    """What the statistics of so many channels on the device of `like` become: coef [5, groups, C]:
    mean, scale = gamma / sqrt(var + eps), shift = beta, and for the way back 1 / sqrt(var + eps)
    and count; and stats [3, groups, C]: mean, biased variance, count; fp32. `running`, whose
    buffers are contiguous, moves on the way."""
    coef, stats = (
        like.new_empty((planes, groups, channels), dtype=torch.float32) for planes in (5, 3)
    )
    momentum = 0.0 if running is None else running.momentum
    momenta: tuple[Tensor, ...] = ()
    if isinstance(momentum, Tensor):
        momenta, momentum = (momentum.float().expand(groups).contiguous(),), 0.0
    batches = None if running is None else running.batches
    return MergedStatistics(
        coef, stats, _given(gamma), _given(beta),
        () if running is None else (running.mean, running.var), _given(batches), momenta,
        float(momentum), float(eps), float(1 if running is None else running.correction),
    )  # fmt: skip


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def merge_processes(stats: Tensor, sync: str, merged: MergedStatistics) -> None:
    """Merges the stats of this and of all other processes of the group `sync`, whose batches count
    as one, of whatever sizes."""
    group = process_group(sync)
    every = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, stats, group=group)
    mean, var, count = torch.stack(every, 2)  # each [groups, processes, C]
    merge(torch.stack([mean, var * count]), count[:, :, 0].contiguous(), merged)


def pointwise(operand: Operand, groups: int = 1) -> Tensor:
    """The operand with its prologue applied, written out."""
    y = operand.value
    out = torch.empty_like(y, memory_format=torch.channels_last)
    _by_rows(apply_prologue, _grid(y, groups, False), y, groups, out=out, **_loads(operand))
    return out


def column_sum(operand: Operand, groups: int = 1) -> Tensor:
    """[C] fp32: the sum over all pixels of the operand with its prologue applied."""
    y = operand.value
    grid = _grid(y, groups, True)
    out = y.new_empty((1, y.shape[1]), dtype=torch.float32)
    epilogue = Epilogue("column", merged=MergedSums(out, (), ()))
    # The programs of all groups leave one row after the other.
    result = epilogue.result(y, 1, groups * grid.programs, grid.column_tiles)
    end = epilogue.arguments(result, grid.column_tiles)["end"]
    _by_rows(prologue_sums, grid, y, groups, end=end, **_loads(operand))
    return out[0]


def _loads(operand: Operand) -> dict[str, Any]:
    return {
        "x": operand.loaded, "slope": float(operand.slope), "PROLOGUE": operand.prologue,
        "ACTIVATION": operand.activation,
    }  # fmt: skip


def activation_backward(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float, groups: int
) -> tuple[Tensor, Tensor]:
    """With g the gradient of act(z), z = scale * (y - mean) + shift and dz = g * act'(z):
    scale * dz, and the gradient of coef (`merged_sums`)."""
    out = torch.empty_like(y, memory_format=torch.channels_last)
    grid, merged = _grid(y, groups, True), merged_sums(coef)
    epilogue = Epilogue("gradient", None, y, coef, activation, slope, merged)
    result = epilogue.result(out, groups, grid.programs, grid.column_tiles)
    end = epilogue.arguments(result, grid.column_tiles)["end"]
    _by_rows(
        activation_gradient, grid, y, groups, g=g, out=out, end=end, slope=float(slope),
        ACTIVATION=activation,
    )  # fmt: skip
    return out, merged.out


def merged_sums(coef: Tensor) -> MergedSums:
    """What the sums of an epilogue `gradient` become: `out`, the gradient of coef, of mean, scale
    and shift where it has these 3 planes; else (0, B, C, dgamma, dbeta), of which `norm_gradient`
    makes the gradients of what coef was made of."""
    out, through = torch.empty_like(coef), coef.shape[0] == 5
    return MergedSums(out, () if through else (coef,), (coef,) if through else ())


def norm_gradient(gcoef: Tensor, sync: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """(dcoef [3, groups, C], dgamma [C], dbeta [C]): dy = gy + B * (y - 0) + C with dcoef =
    (0, B, C), views of what `merged_sums` tells. With `sync`, dcoef is the sum over all processes;
    dgamma and dbeta are this process's share."""
    dcoef = gcoef[:3]
    if sync:
        dcoef = dcoef.clone()
        dist.all_reduce(dcoef, group=process_group(sync))
    return dcoef, gcoef[3, 0], gcoef[4, 0]


@triton.jit(do_not_specialize=["rows"])
def partial_statistics(
    y,  # [groups, rows, C]
    end,  # Stored, like y
    groups, rows, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the epilogue `statistics` makes, of a tensor that is already there."""
    at = place_of(C, BLOCK_N)
    own = nothing(BLOCK_N)
    for tile in range(at.program, tl.cdiv(rows, BLOCK_M), at.programs):
        row_mask, offsets, mask = rows_at(at, tile, rows, C, BLOCK_M)
        value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        count = tl.sum(row_mask.to(tl.float32), axis=0)
        mean, m2 = moments(value, row_mask[:, None], count, 0)
        own = join(own, Partial(count, mean, m2), "statistics")
    finish(own, end, at, groups, C, "statistics")


@triton.jit(do_not_specialize=["rows"])
def apply_prologue(
    x,  # Loaded: [groups, rows, C]; [3, groups, C] coefficients
    out,  # like x.value
    groups, rows, slope, C: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """An operand as its consumer would see it, written out. A program has one tile."""
    at = place_of(C, BLOCK_N)
    _, offsets, mask = rows_at(at, at.program, rows, C, BLOCK_M)
    tile = load_operand(
        of_group(x, at.group, C), slope, groups * C, offsets, mask, at.channel[None, :],
        at.channel_mask[None, :], PROLOGUE, ACTIVATION,
    )  # fmt: skip
    tl.store(out + offsets, tile, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def prologue_sums(
    x,  # Loaded: [groups, rows, C]; [3, groups, C] coefficients
    end,  # Stored, of one group
    groups, rows, slope, C: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The column sums of an operand as its consumer would see it, over all groups."""
    at = place_of(C, BLOCK_N)
    own = nothing(BLOCK_N)
    for tile in range(at.program, tl.cdiv(rows, BLOCK_M), at.programs):
        row_mask, offsets, mask = rows_at(at, tile, rows, C, BLOCK_M)
        value = load_operand(
            of_group(x, at.group, C), slope, groups * C, offsets, mask, at.channel[None, :],
            at.channel_mask[None, :], PROLOGUE, ACTIVATION,
        )  # fmt: skip
        count = tl.sum(row_mask.to(tl.float32), axis=0)
        own = join(own, Partial(count, tl.sum(value.to(tl.float32), axis=0), own.second), "column")
    row, rows = at.group * at.programs + at.program, groups * at.programs
    of_all = Place(0, row, rows, at.column_tile, at.channel, at.channel_mask)
    finish(own, end, of_all, 1, C, "column")


@triton.jit(do_not_specialize=["rows"])
def activation_gradient(
    g,  # [groups, rows, C]: gradient of act(z)
    out,  # like g: scale * dz
    end,  # Stored, like g
    groups, rows, slope, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue `gradient`, on a gradient that is already there."""
    at = place_of(C, BLOCK_N)
    own = nothing(BLOCK_N)
    for tile in range(at.program, tl.cdiv(rows, BLOCK_M), at.programs):
        row_mask, offsets, mask = rows_at(at, tile, rows, C, BLOCK_M)
        value = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
        found = store_tile(
            value, out, offsets, row_mask, at, end, slope, groups, C, False, "gradient", ACTIVATION
        )
        own = join(own, found, "gradient")
    finish(own, end, at, groups, C, "gradient")
