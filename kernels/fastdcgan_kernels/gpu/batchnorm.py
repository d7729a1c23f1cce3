"""BatchNorm's own kernels: what is left of it once the convolutions form the partial statistics.
Not here: the convolutions; what the epilogues and prologues do (tile.py).

Two kinds of kernel: by rows, where a program has a tile of rows x channels of one group; and by
channels, where it has some channels and goes over the partials of all tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import cdiv
from ..reference import process_group
from .launch import Launch
from .tile import Epilogue, Operand, Result, load_operand, of_group, place_of, store_tile

# A row of 64 channels is 128 bytes or more; 64 rows keep a program's tile in its registers.
ROWS, COLUMNS, TILES = 64, 64, 64


def _block(channels: int, most: int) -> int:
    return min(most, max(16, 1 << (channels - 1).bit_length()))


def _tiles(y: Tensor, groups: int) -> int:
    """Row tiles of a group."""
    return cdiv(y.numel() // y.shape[1] // groups, ROWS)


def _by_rows(kernel: Any, y: Tensor, groups: int, /, **arguments: Any) -> None:
    """Launch a kernel whose programs have tiles of rows x channels of y."""
    channels = y.shape[1]
    block = _block(channels, COLUMNS)
    grid = _tiles(y, groups) * cdiv(channels, block), groups
    rows = y.numel() // channels // groups
    tile = {"C": channels, "BLOCK_M": ROWS, "BLOCK_N": block}
    Launch(kernel, grid, {**arguments, "groups": groups, "rows": rows, **tile}).run(y.device)


def _by_channels(kernel: Any, partials: Tensor, /, **arguments: Any) -> None:
    """Launch a kernel whose programs have all partials [*, groups, tiles, C] of their channels."""
    _, groups, tiles, channels = partials.shape
    block = _block(channels, 16)
    tile = {"C": channels, "BLOCK_T": TILES, "BLOCK_C": block}
    arguments |= {"partials": partials, "groups": groups, "tiles": tiles, **tile}
    Launch(kernel, (cdiv(channels, block),), arguments).run(partials.device)


def statistics(y: Tensor, groups: int = 1) -> Result:
    """Partials (mean, M2) [2, groups, tiles, C] and counts [groups, tiles] of y."""
    made = Epilogue("statistics").result(y, groups, _tiles(y, groups))
    _by_rows(partial_statistics, y, groups, y=y, partials=made.partials, counts=made.counts)
    return made


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
    partials, counts = result.partials, result.counts
    assert partials is not None
    assert counts is not None
    if sync:
        _, own = finalize_statistics(result, None, None, eps)
        group = process_group(sync)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        mean, var, count = torch.stack(every, 2)  # each [groups, processes, C]
        partials, counts = torch.stack([mean, var * count]), count[:, :, 0].contiguous()
    _, groups, _, channels = partials.shape
    coef, stats = (partials.new_empty((planes, groups, channels)) for planes in (5, 3))
    moved = running or Running(coef, coef, 0.0)
    mean, var, momentum = moved.mean.contiguous(), moved.var.contiguous(), moved.momentum
    momenta: Tensor | None = None
    if isinstance(momentum, Tensor):
        momenta, momentum = momentum.float().expand(groups).contiguous(), 0.0
    read = {"gamma": gamma, "beta": beta, "batches": moved.batches, "momenta": momenta}
    _by_channels(
        merge_statistics, partials, counts=counts, coef=coef, stats=stats, running_mean=mean,
        running_var=var, **{name: coef if t is None else t for name, t in read.items()},
        eps=eps, momentum=float(momentum), HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None,
        RUNNING=running is not None, BATCHES=moved.batches is not None, MOMENTA=momenta is not None,
    )  # fmt: skip
    if mean is not moved.mean:  # buffers that are not contiguous
        moved.mean.copy_(mean)
        moved.var.copy_(var)
    return coef, stats


def pointwise(operand: Operand, groups: int = 1) -> Tensor:
    """The operand with its prologue applied, written out."""
    out = torch.empty_like(operand.value, memory_format=torch.channels_last)
    _apply(operand, groups, out, sums=False)
    return out


def column_sum(operand: Operand, groups: int = 1) -> Tensor:
    """[C] fp32: the sum over all pixels of the operand with its prologue applied."""
    y = operand.value
    # The tiles of all groups are one row of tiles.
    tiles, channels = groups * _tiles(y, groups), y.shape[1]
    partials = y.new_empty((1, 1, tiles, channels), dtype=torch.float32)
    _apply(operand, groups, partials, sums=True)
    out = partials.new_empty((1, channels))
    _by_channels(sum_partials, partials, coef=out, out=out, COLUMNS=True, NORM=False)
    return out[0]


def _apply(operand: Operand, groups: int, out: Tensor, sums: bool) -> None:
    _by_rows(
        apply_prologue, operand.value, groups, x=operand.loaded, out=out,
        slope=float(operand.slope), PROLOGUE=operand.prologue, ACTIVATION=operand.activation,
        SUM=sums,
    )  # fmt: skip


def activation_backward(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float, groups: int
) -> tuple[Tensor, Tensor]:
    """With g the gradient of act(z), z = scale * (y - mean) + shift and dz = g * act'(z):
    scale * dz, and partials [2, groups, tiles, C] of sum dz and sum dz * (y - mean)."""
    out = torch.empty_like(y, memory_format=torch.channels_last)
    epilogue = Epilogue("gradient", None, y, coef, activation, slope)
    result = epilogue.result(out, groups, _tiles(y, groups))
    assert result.partials is not None
    end = epilogue.arguments(result)["end"]
    _by_rows(
        activation_gradient, y, groups, g=g, out=out, end=end, slope=float(slope),
        ACTIVATION=activation,
    )  # fmt: skip
    return out, result.partials


def finalize_gradient(partials: Tensor, coef: Tensor) -> Tensor:
    """Gradient of coef from the partials of sum dz and sum dz * (y - mean): of mean, scale and
    shift where it has these 3 planes; else (0, B, C, dgamma, dbeta), of which `norm_gradient` makes
    the gradients of what coef was made of (`sum_partials`)."""
    out = torch.empty_like(coef)
    norm = coef.shape[0] == 5
    _by_channels(sum_partials, partials, coef=coef, out=out, COLUMNS=False, NORM=norm)
    return out


def norm_gradient(gcoef: Tensor, sync: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """(dcoef [3, groups, C], dgamma [C], dbeta [C]): dy = gy + B * (y - 0) + C with dcoef =
    (0, B, C), views of what `finalize_gradient` made. With `sync`, dcoef is the sum over all
    processes; dgamma and dbeta are this process's share."""
    dcoef = gcoef[:3]
    if sync:
        dcoef = dcoef.clone()
        dist.all_reduce(dcoef, group=process_group(sync))
    return dcoef, gcoef[3, 0], gcoef[4, 0]


@triton.jit
def store_planes(to, plane, offsets, mask, values, FIRST: tl.constexpr = 0):
    """A tuple of values, each to its plane of a tensor, from the plane FIRST on."""
    for i in tl.static_range(len(values)):
        tl.store(to + (FIRST + i) * plane + offsets, values[i], mask=mask)


@triton.jit(do_not_specialize=["rows"])
def partial_statistics(
    y,  # [groups, rows, C]
    partials,  # [2, groups, tiles, C] fp32: mean and M2 of each tile
    counts,  # [groups, tiles] fp32
    groups, rows, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the epilogue `statistics` makes, of a tensor that is already there. By rows."""
    at = place_of(rows, C, BLOCK_M, BLOCK_N)
    value = tl.load(y + at.offsets, mask=at.mask, other=0.0).to(tl.float32)
    count = tl.sum(at.row_mask.to(tl.float32), axis=0)
    mean = tl.sum(value, axis=0) / tl.maximum(count, 1.0)
    apart = tl.where(at.mask, value - mean[None, :], 0.0)
    to = (at.group * at.tiles + at.tile) * C + at.channel
    mask = at.channel_mask
    tl.store(partials + to, mean, mask=mask)
    tl.store(partials + groups * at.tiles * C + to, tl.sum(apart * apart, axis=0), mask=mask)
    if at.column_tile == 0:
        tl.store(counts + at.group * at.tiles + at.tile, count)


@triton.jit(do_not_specialize=["rows"])
def apply_prologue(
    x,  # Loaded: [groups, rows, C]; [3, groups, C] coefficients
    out,  # like x.value; where SUM [groups, tiles, C] fp32
    groups, rows, slope, C: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """An operand as its consumer would see it, written out; or, where SUM, only its column sums of
    each tile. By rows."""
    at = place_of(rows, C, BLOCK_M, BLOCK_N)
    tile = load_operand(
        of_group(x, at.group, C), slope, groups * C, at.offsets, at.mask, at.channel[None, :],
        at.channel_mask[None, :], PROLOGUE, ACTIVATION,
    )  # fmt: skip
    if SUM:
        to = out + (at.group * at.tiles + at.tile) * C + at.channel
        tl.store(to, tl.sum(tile.to(tl.float32), axis=0), mask=at.channel_mask)
    else:
        tl.store(out + at.offsets, tile, mask=at.mask)


@triton.jit(do_not_specialize=["rows"])
def activation_gradient(
    g,  # [groups, rows, C]: gradient of act(z)
    out,  # like g: scale * dz
    end,  # Stored, like g
    groups, rows, slope, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue `gradient`, on a gradient that is already there. By rows."""
    at = place_of(rows, C, BLOCK_M, BLOCK_N)
    store_tile(
        tl.load(g + at.offsets, mask=at.mask, other=0.0).to(tl.float32), out, at.offsets,
        at.row_mask, at.channel, at.channel_mask, end, slope, at.group, groups, at.tile,
        at.tiles, C, False, "gradient", ACTIVATION,
    )  # fmt: skip


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
    eps,
    momentum,  # that of all groups, unless MOMENTA
    groups, tiles, C: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    RUNNING: tl.constexpr, BATCHES: tl.constexpr, MOMENTA: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's formula over the tiles, BLOCK_T of them at a time and always in the same order; the
    running buffers see the groups one after the other. By channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    next_plane = groups * tiles * C
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
            m2s = tl.load(partials + next_plane + offsets, mask=mask, other=0.0)
            # The block by itself, its means taken from that of its first tile ...
            origin = partials + (group * tiles + first) * C + channel
            origin = tl.load(origin, mask=channel_mask, other=0.0)
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
        plane = groups * C
        store_planes(coef, plane, row, channel_mask, (mean, scale, shift, rstd, count_row))
        store_planes(stats, plane, row, channel_mask, (mean, var, count_row))
        if RUNNING:
            share_new = momentum
            if MOMENTA:
                share_new = tl.load(momenta + group)
            own_mean = own_mean * (1.0 - share_new) + mean * share_new
            own_var = own_var * (1.0 - share_new) + var * (n / (n - 1.0)) * share_new
    if RUNNING:
        tl.store(running_mean + channel, own_mean, mask=channel_mask)  # in the buffers' dtype
        tl.store(running_var + channel, own_var, mask=channel_mask)
    if BATCHES and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + groups)


@triton.jit(do_not_specialize=["tiles"])
def sum_partials(
    partials,  # [2, groups, tiles, C] fp32; [1, groups, tiles, C] where COLUMNS
    coef,  # [5, groups, C] fp32 as `merge_statistics` makes it, or its first 3; not if COLUMNS
    out,  # like coef; [groups, C] where COLUMNS
    groups, tiles, C: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles, always in the same order: of plane 0 alone where COLUMNS, else S1 = sum
    dz and S2 = sum dz * (y - mean), the gradients of shift and scale; that of mean is -scale * S1.

    NORM: coef has all its planes, and S1 and S2 go the way on through mean and variance, too. With
    B = -scale * rstd^2 * S2 / count and C = -scale * S1 / count - B * mean the planes of `out` are
    0, B, C of dy = gy + B * (y - 0) + C, and, in the first group, the sums over all groups of
    dgamma = rstd * S2 and dbeta = S1. They add up where several take the same y.

    By channels."""
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
                store_planes(out, plane, row, channel_mask, (zero, b))
                tl.store(out + 2 * plane + row, -scale * s1 / count - b * mean, mask=channel_mask)
                if group > 0:
                    store_planes(out, plane, row, channel_mask, (zero, zero), 3)
                dgamma += rstd * s2
                dbeta += s1
            else:
                store_planes(out, plane, row, channel_mask, (-scale * s1, s2, s1))
    if NORM:
        store_planes(out, plane, channel, channel_mask, (dgamma, dbeta), 3)
