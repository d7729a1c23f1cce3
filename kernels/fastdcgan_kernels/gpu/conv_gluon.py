"""The convolutions of stride 2 for Hopper, written in Gluon: persistent and warp-specialised. No
GPU has run them yet: they are compiled and, in tests, emulated; a tile says that they are wanted.

Output channels are the rows of a product, a box of small pixels its columns. One warp asks TMA for
the operands of one step after the other, into a ring of stages; a stage has two barriers, `full`
and `empty`. Consumers multiply: one of eight warps ("together"), or two of four warps ("in turn"),
each with a tile of its own, so that one's epilogue runs under the other's products. A program goes
over many tiles, and loads run ahead over their borders. Nothing is added by atomics.

Not here: other targets, prologues, sums in parts, stride 1. Gluon is experimental: where it cannot
be imported, neither can this file, and gpu/blocks.py goes on without it.

Rules of Triton 3.6 that this file keeps. A variable that is set to another carried variable and
changed later counts as unchanged, and a loop does not carry it. `static_range` takes a name of its
own. One thread arrives at a barrier for all warps of its partition; the compiler puts a barrier of
these warps before it, and inspect/ looks for that (`unordered`). An accumulator that is carried
over tiles spills: a tile's first step stands before its loop.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..choice.geometry import Geometry, Tile, box_of, empty
from ..choice.persistent import DTYPES, Plan, plan_of
from ..choice.targets import target_of
from .descriptors import fits_descriptors, large_box
from .launch import Launch
from .partials import merge
from .tile import Epilogue, Operand, Result, activate, activation_derivative

PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


def takes(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> bool:  # fmt: skip
    """Whether `convolve` can run this: on sm_90, in 16 bits, without a prologue, and the tile fits
    the layer."""
    fits = fits_descriptors(precision, source.value, epilogue.aux, weight)
    plain = source.prologue == "none" and source.value.dtype in DTYPES
    return (
        fits and plain and _plan(source, geometry, transposed, tile, epilogue, groups) is not None
    )


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> Result:  # fmt: skip
    """The convolution with its epilogue, as `conv_pointers.convolve`, of what `takes` accepts."""
    g, plan = geometry, _plan(source, geometry, transposed, tile, epilogue, groups)
    target = target_of(weight.device)
    assert plan is not None
    assert target is not None
    shape = g.shape(transposed)
    out = empty(g.N, shape.CO, shape.HO, shape.WO, source.value)
    images = g.N // groups
    rows = plan.boxes(images) * plan.PHASE**2
    result = epilogue.result(out, groups, rows, 1)
    pixels = [*plan.box, plan.BLOCK_K]
    piece = [*box_of(plan.BLOCK_M // plan.PIECES, g), plan.BLOCK_N]
    block = [plan.BLOCK_K, plan.BLOCK_N] if transposed else [plan.BLOCK_N, plan.BLOCK_K]
    ends = replace(epilogue, merged=None).arguments(result, 1)
    aux = out if epilogue.kind != "gradient" else epilogue.aux
    assert aux is not None
    Launch(
        gather_gluon, (min(target.multiprocessors, rows * groups * (plan.CO // plan.BLOCK_N)),), {
            "x": _described(source.value, g, not transposed, pixels),
            "w": _descriptor(weight, [g.CS, 16 * g.CL], block),
            "out": _described(out, g, transposed, piece),
            "aux": _described(aux, g, transposed, piece),
            "end": ends["end"], "groups": groups, "images": images, "slope": ends["slope"],
            "S": plan,
        }, plan.WARPS, plan.STAGES).run(weight.device)  # fmt: skip
    if epilogue.merged is not None:
        assert result.partials is not None
        counts = None if result.counts is None else result.counts[0]
        merge(result.partials, counts, epilogue.merged)
    return result


def _plan(
    source: Operand, geometry: Geometry, transposed: bool, tile: Tile, epilogue: Epilogue,
    groups: int,
) -> Plan | None:  # fmt: skip
    target = target_of(source.value.device)
    if target is None:
        return None
    return plan_of(
        geometry, tile, target, transposed=transposed, groups=groups, epilogue=epilogue.kind,
        activation=epilogue.activation, has_bias=epilogue.bias is not None,
    )  # fmt: skip


def _described(t: Tensor, geometry: Geometry, large: bool, box: list[int]) -> Any:
    """An image's descriptor, of a box of small pixels and channels; that of the large side as
    descriptors.py has it."""
    n, c, h, w = t.shape
    if not large:
        return _descriptor(t, [n, h, w, c], box)
    return _descriptor(t, [n, h // 2, 2, w // 2, 2 * c], [*box[:2], 1, *box[2:]])


def _descriptor(t: Tensor, shape: list[int], box: list[int]) -> Any:
    """As descriptors.py makes them, in Gluon's class. The rows of all boxes here are of 128 bytes
    or more: the widest swizzle."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
    return TensorDescriptor(t, shape, strides, box, layout)


class Place(NamedTuple):
    """Where a tile is."""

    channel: Any  # its first channel of the result
    r: Any  # its phase
    s: Any
    n: Any  # its box's first small pixel, n over all groups
    p: Any
    q: Any
    own: Any  # n in its group
    row: Any  # of partials, over all groups


class Ring(NamedTuple):
    """Which stage comes next, and how often the ring has gone round, mod 2."""

    stage: Any
    turn: Any


class Job(NamedTuple):
    """What all warps see."""

    x: Any  # descriptors
    w: Any
    out: Any
    aux: Any
    end: Any  # Stored
    groups: Any
    images: Any
    slope: Any
    tiles: Any  # of the launch
    x_ring: Any  # [STAGES, *box of x]
    w_ring: Any  # [STAGES, *box of w]
    buffers: Any  # [CONSUMERS * BUFFERS, *box of out]: what goes out, and what comes in of aux
    full: Any  # barriers [STAGES]: its operands are there
    empty: Any  # [STAGES]: they have been multiplied
    order: Any  # [2]: it is this consumer's turn to multiply
    given: Any  # [2]: what it needs of aux is there


@gluon.constexpr_function
def accumulator_of(S):
    """The layout of a tile [channels, pixels]: 16 channels a warp, while there are that many, so
    64 a warpgroup; other warps have other pixels."""
    rows = min(S.WARPS, S.BLOCK_N // 16)
    wide = S.WARPS // rows
    return gl.NVMMADistributedLayout([3, 0], [rows, wide], [16, min(256, S.BLOCK_M // wide), 16])


@gluon.jit
def boxes_of(images, S: gl.constexpr):
    """Boxes of pixels in a group."""
    return gl.cdiv(images, S.BOX_N) * (S.P // S.BOX_P * (S.Q // S.BOX_Q))


@gluon.jit
def place_of(tile, images, S: gl.constexpr):
    """Tiles are counted by channels first, then phases, then boxes: programs that run side by side
    read the same pixels."""
    COLUMNS: gl.constexpr = S.CO // S.BLOCK_N
    PHASES: gl.constexpr = S.PHASE * S.PHASE
    channel = tile % COLUMNS * S.BLOCK_N
    phase = tile // COLUMNS % PHASES
    box = tile // (COLUMNS * PHASES)
    boxes = boxes_of(images, S)
    inner = box % boxes
    q = inner % (S.Q // S.BOX_Q) * S.BOX_Q
    p = inner // (S.Q // S.BOX_Q) % (S.P // S.BOX_P) * S.BOX_P
    own = inner // (S.Q // S.BOX_Q * (S.P // S.BOX_P)) * S.BOX_N
    n = box // boxes * images + own
    return Place(channel, phase // S.PHASE, phase % S.PHASE, n, p, q, own, box * PHASES + phase)


@gluon.jit
def ring_at(step, S: gl.constexpr):
    """Where the ring is after so many steps."""
    return Ring(step % S.STAGES, step // S.STAGES % 2)


@gluon.jit
def following(ring, S: gl.constexpr):
    """The ring one step later."""
    last = ring.stage == S.STAGES - 1
    stage = gl.where(last, 0, ring.stage + 1)
    turn = gl.where(last, ring.turn ^ 1, ring.turn)
    return Ring(stage, turn)


@gluon.jit
def produce(job, S: gl.constexpr):
    """One warp: the operands of every tile of this program, in the order they are multiplied."""
    BYTES: gl.constexpr = 2 * S.BLOCK_K * (S.BLOCK_M + S.BLOCK_N)
    ring = ring_at(gl.to_tensor(0), S)
    for tile in range(gl.program_id(0), job.tiles, gl.num_programs(0)):
        at = place_of(tile, job.images, S)
        for tap in range(S.SIDE * S.SIDE):
            th = tap // S.SIDE
            tw = tap % S.SIDE
            for c in range(0, S.CI, S.BLOCK_K):
                full = job.full.index(ring.stage)
                # A fresh barrier counts as having completed the turn before its first.
                mbarrier.wait(job.empty.index(ring.stage), ring.turn ^ 1)
                mbarrier.expect(full, BYTES)
                if S.TRANSPOSED:
                    kh = 3 - 2 * th - at.r
                    kw = 3 - 2 * tw - at.s
                    pixels = at.n, at.p + th - 1 + at.r, at.q + tw - 1 + at.s, c
                    weights = c, (kh * 4 + kw) * S.CL + at.channel
                else:
                    pixels = large_box(at.n, at.p, at.q, th, tw * S.CL + c, S)
                    weights = at.channel, (th * 4 + tw) * S.CL + c
                tma.async_copy_global_to_shared(job.x, pixels, full, job.x_ring.index(ring.stage))
                tma.async_copy_global_to_shared(job.w, weights, full, job.w_ring.index(ring.stage))
                ring = following(ring, S)


@gluon.jit
def multiply(job, ring, acc, use_acc, S: gl.constexpr):
    """Starts a stage's product as soon as the stage is full."""
    mbarrier.wait(job.full.index(ring.stage), ring.turn)
    pixels = job.x_ring.index(ring.stage).reshape([S.BLOCK_M, S.BLOCK_K])
    weight = job.w_ring.index(ring.stage)
    if S.TRANSPOSED:
        weight = weight.permute([1, 0])
    return warpgroup_mma(weight, pixels.permute([1, 0]), acc, use_acc=use_acc, is_async=True)


@gluon.jit
def release(job, ring, S: gl.constexpr):
    """The stage before this one may be filled again."""
    before = gl.where(ring.stage == 0, S.STAGES - 1, ring.stage - 1)
    mbarrier.arrive(job.empty.index(before), count=1)


@gluon.jit
def consume(job, WHO: gl.constexpr, S: gl.constexpr):
    """Every CONSUMERS-th tile of this program, from its WHO-th on."""
    STEPS: gl.constexpr = S.SIDE * S.SIDE * (S.CI // S.BLOCK_K)
    programs = gl.num_programs(0)
    first = gl.to_tensor(WHO * STEPS)  # this tile's first step, counted over the program's tiles
    turn = gl.to_tensor(1 ^ WHO)  # the first consumer's first turn is there at once
    came = gl.to_tensor(0)  # how often aux was given, mod 2
    for tile in range(gl.program_id(0) + WHO * programs, job.tiles, S.CONSUMERS * programs):
        at = place_of(tile, job.images, S)
        ring = ring_at(first, S)
        if S.EPILOGUE == "gradient":
            request(job, WHO, at, S)  # comes under the products
        if S.CONSUMERS == 2:
            # A barrier tells only neighbouring turns of the ring from each other: who comes next
            # must not look at a stage before the other has seen its own last one full.
            mbarrier.wait(job.order.index(WHO), turn)
            turn ^= 1
        zero = gl.full([S.BLOCK_N, S.BLOCK_M], 0.0, gl.float32, accumulator_of(S))
        acc = warpgroup_mma_wait(1, deps=(multiply(job, ring, zero, False, S),))
        ring = following(ring, S)
        for _ in range(1, STEPS):
            acc = multiply(job, ring, acc, True, S)
            # One product stays in flight; the stage of the one before it is free again.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            release(job, ring, S)
            ring = following(ring, S)
        if S.CONSUMERS == 2:
            mbarrier.arrive(job.order.index(1 - WHO), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(job, ring, S)
        first += S.CONSUMERS * STEPS
        if S.EPILOGUE == "gradient":
            mbarrier.wait(job.given.index(WHO), came)
            came ^= 1
            store_gradient(acc, job, WHO, at, S)
        else:
            store(acc, job, WHO, at, S)
    tma.store_wait(0)


@gluon.jit
def piece_at(at, PIECE: gl.constexpr, S: gl.constexpr):
    """Where this piece of a tile is in the tensor that is written."""
    FIRST: gl.constexpr = PIECE * (S.BLOCK_M // S.PIECES)
    n = at.n + FIRST // (S.BOX_P * S.BOX_Q)
    p = at.p + FIRST // S.BOX_Q % S.BOX_P
    q = at.q + FIRST % S.BOX_Q
    if S.TRANSPOSED:
        return n, p, at.r, q, at.s * S.CL + at.channel
    else:
        return n, p, q, at.channel


@gluon.jit
def pieces_of(tile, S: gl.constexpr):
    """A tile [channels, pixels] in its pieces, first pixels first, in the registers they are in."""
    if S.PIECES == 1:
        return (tile,)
    elif S.PIECES == 2:
        return halves(tile)
    else:
        front, back = halves(tile)
        return halves(front) + halves(back)


@gluon.jit
def halves(tile):
    """The first and the last pixels."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@gluon.jit
def buffer_of(job, WHO: gl.constexpr, PIECE: gl.constexpr, S: gl.constexpr):
    """Where this piece of a consumer's tile lies on its way."""
    return job.buffers.index(WHO * S.BUFFERS + PIECE % S.BUFFERS)


@gluon.jit
def as_tile(buffer, S: gl.constexpr):
    """A buffer as [channels, pixels]; they lie the other way round."""
    return buffer.reshape([S.BLOCK_M // S.PIECES, S.BLOCK_N]).permute([1, 0])


@gluon.jit
def store_piece(piece, job, WHO: gl.constexpr, at, PIECE: gl.constexpr, S: gl.constexpr):
    """A piece [channels, pixels] to memory, through its buffer, which is free."""
    buffer = buffer_of(job, WHO, PIECE, S)
    as_tile(buffer, S).store(piece)
    fence_async_shared()
    tma.async_copy_shared_to_global(job.out, piece_at(at, PIECE, S), buffer)


@gluon.jit
def store(acc, job, WHO: gl.constexpr, at, S: gl.constexpr):
    """A tile to memory with the epilogues store and statistics (tile.py: store_tile)."""
    PIECES: gl.constexpr = S.PIECES
    ACTIVATION: gl.constexpr = S.ACTIVATION
    if S.HAS_BIAS:
        within: gl.constexpr = gl.SliceLayout(1, accumulator_of(S))
        channel = at.channel + gl.arange(0, S.BLOCK_N, layout=within)
        acc += gl.load(job.end.bias + channel).to(gl.float32)[:, None]
    if S.EPILOGUE == "store":
        acc = activate(acc, job.slope, ACTIVATION)
    stored = acc.to(job.out.dtype)
    parts = pieces_of(stored, S)
    for i in gl.static_range(PIECES):
        tma.store_wait(0)  # what the buffer held has been read
        store_piece(parts[i], job, WHO, at, i, S)
    if S.EPILOGUE == "statistics":  # while the stores are on their way
        store_statistics(stored, job, at, S)


@gluon.jit
def store_statistics(stored, job, at, S: gl.constexpr):
    """Mean and M2 of each row of [channels, pixels], as rounded for storage."""
    y = stored.to(gl.float32)
    if S.RAGGED:
        pixel = gl.arange(0, S.BLOCK_M, layout=gl.SliceLayout(0, accumulator_of(S)))
        there = (at.own + pixel // (S.BOX_P * S.BOX_Q) < job.images)[None, :]
        images = gl.minimum(job.images - at.own, S.BOX_N)
        count = (images * (S.BOX_P * S.BOX_Q)).to(gl.float32)
        mean = gl.sum(gl.where(there, y, 0.0), axis=1) / count
        apart = gl.where(there, y - mean[:, None], 0.0)
    else:
        count = gl.to_tensor(S.BLOCK_M).to(gl.float32)
        mean = gl.sum(y, axis=1) * (1.0 / S.BLOCK_M)  # a power of two: exact
        apart = y - mean[:, None]
    store_partials(mean, gl.sum(apart * apart, axis=1), job, at, S)
    if at.channel == 0:
        gl.store(job.end.counts + at.row, count)


@gluon.jit
def store_partials(one, two, job, at, S: gl.constexpr):
    """Both sums of a tile's channels, to their row of the two planes."""
    within: gl.constexpr = gl.SliceLayout(1, accumulator_of(S))
    channel = at.channel + gl.arange(0, S.BLOCK_N, layout=within)
    plane = job.groups * boxes_of(job.images, S) * (S.PHASE * S.PHASE * S.CO)
    to = job.end.partials + at.row * S.CO + channel
    gl.store(to, one)
    gl.store(to + plane, two)


@gluon.jit
def request(job, WHO: gl.constexpr, at, S: gl.constexpr):
    """Asks TMA for what is under a tile in aux, once the last tile has left these buffers."""
    BYTES: gl.constexpr = 2 * S.BLOCK_N * S.BLOCK_M
    PIECES: gl.constexpr = S.PIECES
    given = job.given.index(WHO)
    tma.store_wait(0)
    mbarrier.expect(given, BYTES)
    for i in gl.static_range(PIECES):
        buffer = buffer_of(job, WHO, i, S)
        tma.async_copy_global_to_shared(job.aux, piece_at(at, i, S), given, buffer)


@gluon.jit
def store_gradient(acc, job, WHO: gl.constexpr, at, S: gl.constexpr):
    """A tile to memory with the epilogue gradient (tile.py: store_gradient). In pieces, each with a
    buffer of its own, where its aux is: the whole tile would spill."""
    PIECES: gl.constexpr = S.PIECES
    ACTIVATION: gl.constexpr = S.ACTIVATION
    parts = pieces_of(acc, S)
    layout: gl.constexpr = parts[0].type.layout
    within: gl.constexpr = gl.SliceLayout(1, layout)
    channel = at.channel + gl.arange(0, S.BLOCK_N, layout=within)
    plane = job.groups * S.CO
    coef = job.end.coef + at.n // job.images * S.CO + channel
    mean = gl.load(coef)[:, None]
    scale = gl.load(coef + plane)[:, None]
    shift = gl.load(coef + 2 * plane)[:, None]
    one = gl.full([S.BLOCK_N], 0.0, gl.float32, within)
    two = gl.full([S.BLOCK_N], 0.0, gl.float32, within)
    for i in gl.static_range(PIECES):
        y = as_tile(buffer_of(job, WHO, i, S), S).load(layout).to(gl.float32)
        apart = y - mean
        o = activate(scale * apart + shift, job.slope, ACTIVATION)
        dz = parts[i] * activation_derivative(o, job.slope, ACTIVATION)
        store_piece((scale * dz).to(job.out.dtype), job, WHO, at, i, S)
        one += gl.sum(dz, axis=1)
        two += gl.sum(dz * apart, axis=1)
    whole: gl.constexpr = gl.SliceLayout(1, accumulator_of(S))
    store_partials(gl.convert_layout(one, whole), gl.convert_layout(two, whole), job, at, S)


@gluon.jit(do_not_specialize=["groups", "images"])
def gather_gluon(
    x,  # descriptor of the side that is read
    w,  # descriptor [CS, 16 * CL], dtype of x
    out,  # descriptor of the side that is written, of a piece of a tile
    aux,  # the same of the epilogue's aux, for gradient
    end,  # Stored
    groups, images,  # N / groups
    slope, S: gl.constexpr,  # Plan
):  # fmt: skip
    """Grid: (any number of programs), which share the tiles; one a multiprocessor is meant."""
    x_box: gl.constexpr = x.block_type.shape
    w_box: gl.constexpr = w.block_type.shape
    out_box: gl.constexpr = out.block_type.shape
    x_ring = gl.allocate_shared_memory(x.dtype, [S.STAGES] + x_box, x.layout)  # noqa: RUF005
    w_ring = gl.allocate_shared_memory(w.dtype, [S.STAGES] + w_box, w.layout)  # noqa: RUF005
    buffers = gl.allocate_shared_memory(
        out.dtype, [S.CONSUMERS * S.BUFFERS] + out_box, out.layout  # noqa: RUF005
    )  # fmt: skip
    full = gl.allocate_shared_memory(gl.int64, [S.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S.STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    STAGES: gl.constexpr = S.STAGES
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
        mbarrier.init(given.index(i), count=1)
    fence_async_shared()
    tiles = groups * boxes_of(images, S) * (S.PHASE * S.PHASE * (S.CO // S.BLOCK_N))
    job = Job(
        x, w, out, aux, end, groups, images, slope, tiles, x_ring, w_ring, buffers, full, empty,
        order, given,
    )  # fmt: skip
    if S.CONSUMERS == 1:
        gl.warp_specialize([(consume, (job, 0, S)), (produce, (job, S))], [1], [PRODUCER_REGISTERS])
    else:
        gl.warp_specialize(
            [(consume, (job, 0, S)), (consume, (job, 1, S)), (produce, (job, S))],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
