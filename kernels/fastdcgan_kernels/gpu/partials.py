"""Sums over many programs, each channel's: how a program keeps its own, and how they become one.

A program goes over tiles of its channels and keeps (count, first, second) of them: for statistics
count, mean and M2 = sum (y - mean)^2, else two sums. At its end it stores a row of partials
(`finish`), at most two a multiprocessor in all. All rows are then merged, always in the order of
their index: by the last program of these channels to arrive, which a ticket tells, or by a launch
(`merge`). Whoever is last, the bits are the same. Not here: who makes tiles (the families)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import cdiv
from ..choice.targets import target_of
from ..choice.types import Target
from .launch import Launch

POOL = 1 << 16  # tickets of a device
ROWS = tl.constexpr(4096)  # times channels: what of the rows a program has in its registers
OF_STREAM = 256  # tickets of a stream: programs of a launch have as many column tiles at most


KINDS = ("statistics", "gradient", "column")  # of partials; two are epilogues


class Partial(NamedTuple):
    """What a program has of its channels."""

    count: Any  # [] fp32: values of each
    first: Any  # [B] fp32: of statistics mean and M2, of a gradient S1 and S2, of a column its sum
    second: Any


class Place(NamedTuple):
    """Where a program is. Grid: (programs * column tiles, groups, ...)."""

    group: Any
    program: Any  # which of those of its group and channels: it makes the tiles program,
    programs: Any  # program + programs, ...
    column_tile: Any
    channel: Any  # [B]
    channel_mask: Any


class Rows(NamedTuple):
    """Where Partials go; the end of a `Stored`."""

    partials: Any  # [2, groups, rows, C] fp32; [1, groups, rows, C] of a column
    counts: Any  # [column tiles, groups, rows] fp32; of statistics
    merged: Any  # MergedStatistics or MergedSums; (): rows are left as they are


class MergedStatistics(NamedTuple):
    """What statistics become, as a kernel takes it. What there may not be is a tuple of nothing."""

    coef: Any  # [5, groups, C] fp32: mean, scale, shift, 1 / sqrt(var + eps), count
    stats: Any  # [3, groups, C] fp32: mean, biased variance, count
    gamma: Any  # ([C],), any float
    beta: Any  # ([C],), any float
    running: Any  # (mean, var), each [C], any float: the groups move them in turn
    batches: Any  # ([],) int64: how many the buffers have seen, moved too
    momenta: Any  # ([groups],) fp32: the momentum of each group,
    momentum: Any  # or that of all
    eps: Any
    correction: Any  # fp32: 1 where the running variance is unbiased, else 0
    tickets: Any = ()  # [column tiles] int32: 0, before and after


class MergedSums(NamedTuple):
    """What S1 = sum dz and S2 = sum dz * (y - mean) become, as a kernel takes it: coef's gradients.

    Plainly of mean, scale and shift: -scale * S1, S2 and S1. With `norm` they go the way on through
    mean and variance, too: with B = -scale * rstd^2 * S2 / count and C = -scale * S1 / count -
    B * mean the planes of `out` are 0, B, C of dy = gy + B * (y - 0) + C, and, in the first group,
    the sums over all groups of dgamma = rstd * S2 and dbeta = S1. They add up where several take
    the same y. With neither, `out` [groups, C] is S1."""

    out: Any  # fp32, like the coef of which it is the gradient
    plain: Any  # (coef [3, groups, C],)
    norm: Any  # (coef [5, groups, C] as statistics become,)
    tickets: Any = ()  # [column tiles] int32: 0, before and after


def rows_of(tiles: int, groups: int, device: torch.device) -> int:
    """Programs among which a group's tiles are dealt, and so its rows of partials: at most two a
    multiprocessor in all groups."""
    target: Target | None = target_of(device)
    assert target is not None, f"no kernels for {device}"
    return min(tiles, max(1, 2 * target.multiprocessors // groups))


def kind_of(merged: MergedStatistics | MergedSums) -> str:
    """What is merged: "statistics"; of sums "gradient", both S1 and S2, or "column", S1 alone."""
    if isinstance(merged, MergedStatistics):
        return "statistics"
    return "gradient" if merged.plain or merged.norm else "column"


def merge(partials: Tensor, counts: Tensor | None, merged: MergedStatistics | MergedSums) -> None:
    """Merges rows [*, groups, rows, C], any number of them, with counts [groups, rows]: a launch of
    its own, where the one that made them left them. Its programs share the rows, as others share
    tiles."""
    planes, groups, rows, channels = partials.shape
    block = min(16, max(8, 1 << (channels - 1).bit_length()))
    column_tiles = cdiv(channels, block)
    programs = rows_of(cdiv(rows, ROWS.value // block), groups, partials.device)
    end = Rows(
        partials.new_empty((planes, groups, programs, channels)),
        partials.new_empty((column_tiles, groups, programs)),
        merged._replace(tickets=tickets(partials.device, column_tiles)),
    )
    Launch(
        merge_rows, (programs * column_tiles, groups), {
            "partials": partials, "counts": partials if counts is None else counts, "end": end,
            "groups": groups, "rows": rows, "C": channels, "BLOCK_C": block,
            "KIND": kind_of(merged),
        }).run(partials.device)  # fmt: skip


# --- Tickets --------------------------------------------------------------------------------------


class _Pool:
    """The tickets of one device, and who has which."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._taken = device, 0
        self._of_stream: dict[int, Tensor] = {}
        # By a thread and a stream of their own: a memory pool that this thread allocates from for
        # the time being, as torch.compile's CUDA graphs have it do, would take them for its own.
        with ThreadPoolExecutor(1) as thread:
            self._zeros = thread.submit(self._make).result()

    def _make(self) -> Tensor:
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream()):
            zeros = torch.zeros(POOL, dtype=torch.int32, device=self._device)
            torch.cuda.current_stream().synchronize()
        return zeros

    def take(self, n: int) -> Tensor | None:
        """Of those that no one has; None: there are too few."""
        if self._taken + n > POOL:
            return None
        self._taken += n
        return self._zeros[self._taken - n : self._taken]

    def of_stream(self, stream: int, n: int) -> Tensor | None:
        """Of this stream's."""
        if n > OF_STREAM:
            return None
        if stream not in self._of_stream:
            own = self.take(OF_STREAM)
            if own is None:
                return None
            self._of_stream[stream] = own
        return self._of_stream[stream][:n]


_pools: dict[int, _Pool] = {}
_lock = threading.Lock()


def tickets(device: torch.device, n: int) -> Tensor:
    """[n] int32, all 0, for one launch, which leaves them 0.

    On a GPU they are part of a pool that was set to 0 once. No two launches that may run at one
    time have the same ones: those of a stream run one after the other, and share the stream's. A
    launch that a CUDA graph captures may be replayed beside any other, in any stream: its tickets
    are never handed out again. A graph is never replayed beside itself. Where the pool is used up,
    or a capture is the first to ask, they are set to 0 in the stream, ahead of the launch."""
    if device.type == "meta":  # set to 0 once, not here
        return torch.empty(n, dtype=torch.int32, device=device)
    found = from_pool(device, n) if device.type == "cuda" else None
    return torch.zeros(n, dtype=torch.int32, device=device) if found is None else found


def from_pool(device: torch.device, n: int) -> Tensor | None:
    """Of the device's pool; None: there are none that this launch may have."""
    with _lock, torch.cuda.device(device):
        capturing, index = torch.cuda.is_current_stream_capturing(), torch.cuda.current_device()
        if index not in _pools:
            if capturing:
                return None
            _pools[index] = _Pool(torch.device("cuda", index))
        pool = _pools[index]
        if capturing:
            return pool.take(n)
        return pool.of_stream(torch.cuda.current_stream().cuda_stream, n)


# --- In Triton ------------------------------------------------------------------------------------


@triton.jit
def place_of(C: tl.constexpr, BLOCK: tl.constexpr):
    """The Place of this program."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    column_tile = tl.program_id(0) % COLUMN_TILES
    program, programs = tl.program_id(0) // COLUMN_TILES, tl.num_programs(0) // COLUMN_TILES
    channel = column_tile * BLOCK + tl.arange(0, BLOCK)
    return Place(tl.program_id(1), program, programs, column_tile, channel, channel < C)


@triton.jit
def turns_of(program, programs, tiles, ONE: tl.constexpr):
    """How many tiles this program makes: program, program + programs, ... Where each has ONE the
    compiler sees it: there is no loop, across which a product's registers would be held."""
    turns = tl.cdiv(tiles - program, programs)
    if ONE:
        turns = 1
    return turns


@triton.jit
def moments(y, mask, count, AXIS: tl.constexpr):
    """(mean, M2) of y along an axis, where the mask is: `count` values in each."""
    y = tl.where(mask, y, 0.0)
    mean = tl.sum(y, axis=AXIS) / tl.maximum(count, 1.0)
    centred = tl.where(mask, y - tl.expand_dims(mean, AXIS), 0.0)
    return mean, tl.sum(centred * centred, axis=AXIS)


@triton.jit
def nothing(BLOCK: tl.constexpr):
    """The Partial of no values."""
    zero = tl.zeros((BLOCK,), dtype=tl.float32)
    return Partial(0.0, zero, zero)


@triton.jit
def join(one, other, KIND: tl.constexpr):
    """The Partial of both: of statistics by Chan's formula, else sums. Of epilogues that make none,
    the first."""
    if KIND == "statistics":
        count = one.count + other.count
        share = other.count / tl.maximum(count, 1.0)
        delta = other.first - one.first
        m2 = one.second + (other.second + delta * delta * one.count * share)
        one = Partial(count, one.first + delta * share, m2)
    elif KIND == "gradient" or KIND == "column":
        count = one.count + other.count
        one = Partial(count, one.first + other.first, one.second + other.second)
    return one


@triton.jit
def finish(
    own,  # Partial
    end,  # Rows or Stored
    at,  # Place
    groups, C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Stores this program's Partial, if it has one, in its row; the last program of these channels
    to do so merges all rows, if that is what the launch does."""
    if KIND == "statistics" or KIND == "gradient" or KIND == "column":
        rows = groups * at.programs  # of these channels
        row = at.group * at.programs + at.program
        counts = end.counts + at.column_tile * rows
        to = end.partials + row * C + at.channel
        tl.store(to, own.first, mask=at.channel_mask)
        if KIND != "column":
            tl.store(to + rows * C, own.second, mask=at.channel_mask)
        if KIND == "statistics":
            tl.store(counts + row, own.count)
        if len(end.merged) > 0 and arrives_last(end.merged.tickets + at.column_tile, rows):
            merge_all(
                end.partials, counts, end.merged, groups, at.programs, at.column_tile, at.channel,
                at.channel_mask, C, KIND,
            )  # fmt: skip


@triton.jit
def arrives_last(ticket, arrivals):
    """Whether all other programs, of so many, were here before; what they stored before is seen
    from here on. The ticket is 0 again for the next launch."""
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def merge_all(
    partials, counts, merged, groups, rows, column_tile, channel, channel_mask, C: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """All rows of these channels. `counts` [groups, rows]."""
    if KIND == "statistics":
        merge_statistics(
            partials, counts, merged, groups, rows, column_tile, channel, channel_mask, C
        )
    else:
        merge_sums(partials, merged, groups, rows, channel, channel_mask, C, KIND)


@triton.jit
def store_planes(to, plane, offsets, mask, values, FIRST: tl.constexpr = 0):
    """A tuple of values, each to its plane of a tensor, from the plane FIRST on."""
    for i in tl.static_range(len(values)):
        tl.store(to + (FIRST + i) * plane + offsets, values[i], mask=mask)


@triton.jit
def block_of_rows(
    partials, counts,  # [2, groups, rows, C]; [groups, rows]
    group, groups, start, rows, channel, channel_mask, C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A Partial of each of a group's rows from `start` on, as many as registers hold: [R, B], of
    counts [R, 1]. They are not read from an L1, which may have what was there before."""
    row = start + tl.arange(0, ROWS // channel.shape[0])
    first, plane = group * rows, groups * rows * C
    offsets = ((first + row) * C)[:, None] + channel[None, :]
    mask = (row < rows)[:, None] & channel_mask[None, :]
    ones = tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    twos, count = ones, 0.0
    if KIND != "column":
        twos = tl.load(partials + plane + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    if KIND == "statistics":
        count = tl.load(counts + first + row, mask=row < rows, other=0.0, cache_modifier=".cg")
        count = count[:, None]
    return Partial(count, ones, twos)


@triton.jit
def all_rows(
    partials, counts, group, groups, program, programs, rows, channel, channel_mask,
    C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The Partial of a group's rows, of which a program takes the blocks program, program +
    programs, ... Blocks are joined place by place and the places at the end: a sum over threads
    takes far longer than a load of the next rows."""
    R: tl.constexpr = ROWS // channel.shape[0]
    whole = block_of_rows(
        partials, counts, group, groups, program * R, rows, channel, channel_mask, C, KIND
    )
    for block in range(program + programs, tl.cdiv(rows, R), programs):
        found = block_of_rows(
            partials, counts, group, groups, block * R, rows, channel, channel_mask, C, KIND
        )
        whole = join(whole, found, KIND)
    count, first, second = whole.count, whole.first, whole.second
    if KIND == "statistics":
        n = tl.sum(count)
        # In two steps: the first one's rounding is a share of the mean, not of what is around it.
        mean = tl.sum(count * first, axis=0) / tl.maximum(n, 1.0)
        mean += tl.sum(count * (first - mean[None, :]), axis=0) / tl.maximum(n, 1.0)
        centred = first - mean[None, :]
        own = Partial(n, mean, tl.sum(second + count * centred * centred, axis=0))
    else:
        own = Partial(0.0, tl.sum(first, axis=0), tl.sum(second, axis=0))
    return own


@triton.jit
def merge_statistics(
    partials,  # [2, groups, rows, C] fp32: mean and M2 of each row
    counts,  # [groups, rows] fp32
    merged,  # MergedStatistics
    groups, rows, column_tile, channel, channel_mask, C: tl.constexpr,
):  # fmt: skip
    """Chan's formula over the rows; the running buffers see the groups one after the other."""
    BLOCK_C: tl.constexpr = channel.shape[0]
    moves: tl.constexpr = len(merged.running) > 0
    own_mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    own_var = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if moves:
        own_mean = tl.load(merged.running[0] + channel, mask=channel_mask, other=0.0)
        own_mean = own_mean.to(tl.float32)
        own_var = tl.load(merged.running[1] + channel, mask=channel_mask, other=0.0)
        own_var = own_var.to(tl.float32)
    for group in range(groups):
        whole = all_rows(
            partials, counts, group, groups, 0, 1, rows, channel, channel_mask, C, "statistics"
        )
        n, mean = whole.count, whole.first
        var = whole.second / tl.maximum(n, 1.0)
        # By division: an approximate rsqrt would not be float32's last digits.
        rstd = 1.0 / tl.sqrt_rn(var + merged.eps)
        scale = rstd
        if len(merged.gamma) > 0:
            scale *= tl.load(merged.gamma[0] + channel, mask=channel_mask, other=0.0).to(tl.float32)
        shift = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if len(merged.beta) > 0:
            shift = tl.load(merged.beta[0] + channel, mask=channel_mask, other=0.0).to(tl.float32)
        at = group * C + channel
        count_row = var * 0.0 + n
        plane = groups * C
        store_planes(merged.coef, plane, at, channel_mask, (mean, scale, shift, rstd, count_row))
        store_planes(merged.stats, plane, at, channel_mask, (mean, var, count_row))
        if moves:
            share = merged.momentum
            if len(merged.momenta) > 0:
                share = tl.load(merged.momenta[0] + group)
            own_mean = own_mean * (1.0 - share) + mean * share
            own_var = own_var * (1.0 - share) + var * (n / (n - merged.correction)) * share
    if moves:  # in the buffers' dtype
        tl.store(merged.running[0] + channel, own_mean, mask=channel_mask)
        tl.store(merged.running[1] + channel, own_var, mask=channel_mask)
    if len(merged.batches) > 0 and column_tile == 0:
        tl.store(merged.batches[0], tl.load(merged.batches[0]) + groups)


@triton.jit
def merge_sums(
    partials,  # [2, groups, rows, C] fp32; [1, groups, rows, C] of a column
    merged,  # MergedSums
    groups, rows, channel, channel_mask, C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Sums over the rows."""
    BLOCK_C: tl.constexpr = channel.shape[0]
    dgamma = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbeta = tl.zeros((BLOCK_C,), dtype=tl.float32)
    plane = groups * C
    for group in range(groups):
        whole = all_rows(
            partials, partials, group, groups, 0, 1, rows, channel, channel_mask, C, KIND
        )
        s1, s2 = whole.first, whole.second
        at = group * C + channel
        out = merged.out
        if len(merged.norm) > 0:
            coef = merged.norm[0]
            mean = tl.load(coef + at, mask=channel_mask, other=0.0)
            scale = tl.load(coef + plane + at, mask=channel_mask, other=0.0)
            rstd = tl.load(coef + 3 * plane + at, mask=channel_mask, other=0.0)
            count = tl.load(coef + 4 * plane + at, mask=channel_mask, other=1.0)
            b = -scale * rstd * rstd * s2 / count
            zero = tl.zeros((BLOCK_C,), dtype=tl.float32)
            store_planes(out, plane, at, channel_mask, (zero, b, -scale * s1 / count - b * mean))
            if group > 0:
                store_planes(out, plane, at, channel_mask, (zero, zero), 3)
            dgamma += rstd * s2
            dbeta += s1
        elif len(merged.plain) > 0:
            scale = tl.load(merged.plain[0] + plane + at, mask=channel_mask, other=0.0)
            store_planes(out, plane, at, channel_mask, (-scale * s1, s2, s1))
        else:
            tl.store(out + at, s1, mask=channel_mask)
    if len(merged.norm) > 0:
        store_planes(merged.out, plane, channel, channel_mask, (dgamma, dbeta), 3)


@triton.jit(do_not_specialize=["rows"])
def merge_rows(
    partials,  # [*, groups, rows, C] fp32
    counts,  # [groups, rows] fp32; of statistics
    end,  # Rows, fewer of them
    groups, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Rows that are there already: programs share them in blocks, by `Place`."""
    at = place_of(C, BLOCK_C)
    own = all_rows(
        partials, counts, at.group, groups, at.program, at.programs, rows, at.channel,
        at.channel_mask, C, KIND,
    )  # fmt: skip
    finish(own, end, at, groups, C, KIND)
