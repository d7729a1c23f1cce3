"""The tiles that a kernel's task may have; among them, by the model, the default and those that the
tuner tries. The defaults were timed on an H200 (benchmarks/results/gpu). Not here: the model
(model.py); what was measured (measured.py)."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from .geometry import Engine, Tile, box_is_rows, bucket, cdiv
from .model import READING, is_busy, predicted_seconds, shared_bytes, work_of
from .types import Target, Task

STAGES = {  # by backend, and whether operands or a second tile go through registers
    ("cuda", False): (3, 4), ("cuda", True): (2, 3), ("hip", False): (2, 3), ("hip", True): (2,),
}  # fmt: skip
SUMMING = ("conv", "statistics")
SPLITS = tuple(2**power for power in range(1, 9))
RESERVED = 1024  # bytes of shared memory that are no operands: barriers
TRIED, OF_A_SIZE = 12, 3  # tiles that the tuner tries; among them, most that have one size


@functools.lru_cache(maxsize=4096)
def default_tile(task: Task, target: Target) -> Tile:
    """The fastest candidate by the model."""
    return _ranked(task, target)[0]


def neighbours(task: Task, target: Target) -> list[Tile]:
    """What the tuner tries: the default, then the next by the model, of OF_A_SIZE tiles of one size
    at most; and the best of each engine."""
    found: list[Tile] = []
    sizes: Counter[tuple[str, int, int]] = Counter()
    ranked = _ranked(task, target)
    for tile in ranked:
        size = tile.engine, tile.rows, tile.columns
        if sizes[size] < OF_A_SIZE:
            sizes[size] += 1
            found.append(tile)
    best = {tile.engine: tile for tile in reversed(ranked)}
    others = [tile for tile in best.values() if tile not in found[:TRIED]]
    return found[: TRIED - len(others)] + others


@functools.lru_cache(maxsize=256)
def _ranked(task: Task, target: Target) -> tuple[Tile, ...]:
    """All candidates, the fastest by the model first."""
    if target.name == "interpreter":
        return tuple(dict.fromkeys(_interpreted(task)))
    seconds = {tile: predicted_seconds(task, tile, target) for tile in candidates(task, target)}
    return tuple(sorted(seconds, key=seconds.__getitem__))


def _interpreted(task: Task) -> Iterator[Tile]:
    """Few large tiles: what an operation of the interpreter costs hardly depends on its size."""
    work = work_of(task)
    rows, columns, depth = bucket(work.m), bucket(work.n), bucket(work.along)
    first = Tile(
        max(16, min(512, rows)), max(16, min(128, columns)), max(16, min(512, depth)), 1, 1, 1
    )
    yield first
    yield replace(first, rows=max(16, first.rows // 2))
    yield replace(first, depth=max(16, first.depth // 2))


def engines(task: Task, target: Target) -> tuple[Engine, ...]:
    """Whose kernels take the task. Descriptors read pixels of whole 16 bytes, and of a large side
    that has a view for its stride; and a prologue works on registers, so that they would be a
    detour."""
    g, size = task.geometry, task.dtype.itemsize
    read = (g.CL,) if task.op == "conv" else (g.CL, g.CS)
    whole = all(channels * size % 16 == 0 for channels in read)
    whole = whole and (g.has_view or task.op == "conv_transposed")
    if not target.descriptors or task.prologue != "none" or _is_image(task) or not whole:
        return ("pointers",)
    return "descriptors", "pointers"


def candidates(task: Task, target: Target) -> Iterator[Tile]:
    """All tiles that fit the target and, by docs/inspect.md, compile without a spill."""
    work, stages = work_of(task), STAGES[target.backend, is_busy(task)]
    if task.prologue != "none" and task.epilogue in READING:
        stages = stages[:1]  # both go through registers
    for engine in engines(task, target):
        for rows, columns, depth in _sizes(task, target, engine):
            warps = _warps(task, target, engine, rows, columns)
            for each, stage in itertools.product(warps, stages):
                tile = Tile(rows, columns, depth, 1, each, stage, engine)
                if shared_bytes(task, tile, target) + RESERVED <= target.shared_bytes:
                    splits = _splits(task, work.programs(tile), work.steps(depth), target)
                    yield from (replace(tile, split=split) for split in splits)


def _splits(task: Task, programs: int, steps: int, target: Target) -> list[int]:
    """Parts of a sum, none of them empty: one, and more as long as they are for an eighth of the
    multiprocessors to two for each."""
    if task.op in ("image_conv", "image_conv_transposed"):
        return [1]  # whose kernels make it in one
    least, most = target.multiprocessors // 8, 2 * target.multiprocessors
    some = [split for split in SPLITS if least <= programs * split <= most]
    return [1, *(split for split in some if cdiv(steps, cdiv(steps, split)) == split)]


def _sizes(task: Task, target: Target, engine: Engine) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, depth) of an engine's tiles, powers of two. Least: on sm_90 and sm_100 64 of
    the first operand, by descriptors a convolution's weight. Most: what fits a program's
    registers."""
    work, size, op = work_of(task), task.dtype.itemsize, task.op
    descriptors, sums_pixels = engine == "descriptors", op.endswith("weight_gradient")
    whole = target.name in ("sm_90", "sm_100")
    first = 64 if whole else 16
    least_rows, least_columns = (16, first) if descriptors and not sums_pixels else (first, 16)
    most_rows, most_columns, results = 128, 128, 128 * 128
    n, wide = work.n, descriptors and size == 2
    if wide:
        most_rows, results = 256, (256 if whole else 128) * 128
        n = 2 * bucket(n) if work.pairs else n  # two taps side by side
    elif is_busy(task):
        both = task.prologue != "none" and task.epilogue in READING
        most_columns, results = 64, (64 if both and target.name == "sm_100" else 128) * 64
    if _is_image(task):
        spills = target.name == "sm_120" and task.epilogue == "gradient"
        most_rows = 64 if sums_pixels or spills else 128
        least_columns = most_columns = min(64, n)  # of two kernels it is what they have
    elif _is_irregular(task) and (
        engine == "pointers" or target.name == "sm_100" or (op, task.epilogue) == SUMMING
    ):
        results = max(64 * 64, results // 2)
    deep = max(16, min(128 // size, bucket(work.along)))
    rows_of = _powers(work.m, least_rows, most_rows)
    columns_of = _powers(n, least_columns, most_columns)
    for depth in (deep, deep // 2) if deep > 16 else (deep,):
        if descriptors and op == "conv" and work.along % depth:
            continue  # a box would hold two taps
        if descriptors and sums_pixels and not box_is_rows(depth, task.geometry, task.groups):
            continue
        for rows, columns in itertools.product(rows_of, columns_of):
            if rows * columns <= results:
                yield rows, columns, depth


def _powers(n: int, least: int, most: int) -> list[int]:
    """Powers of two from 64 on to the one that covers n, or that alone, within bounds."""
    top = max(least, min(most, bucket(n)))
    return [power for power in (16, 32, 64, 128, 256) if min(64, top) <= power <= top]


def _warps(task: Task, target: Target, engine: Engine, rows: int, columns: int) -> tuple[int, ...]:
    """4 and 8, or one of them where the other would spill (docs/inspect.md). Without loads of 16
    bytes it is 8: the addresses of smaller ones take registers."""
    g, op, size = task.geometry, task.op.removeprefix("image_"), task.dtype.itemsize
    few = target.name == "sm_100" or (target.name == "sm_120" and is_busy(task) and size == 4)
    if task.op == "image_conv_transposed" and few:
        return (4,)
    along = {"conv": g.CL, "conv_transposed": g.CS, "weight_gradient": 8}[op]
    most = 128 * 64
    if _is_irregular(task) and (engine == "pointers" or target.name == "sm_120"):
        most = 64 * 64 if engine == "pointers" else 32 * 64
    if task.epilogue in READING:
        most = most // 2 if engine == "pointers" else most
        most = 32 * 64 if target.name == "sm_120" else most
    if task.prologue != "none":
        most = 64 * 32
    if task.dtype == torch.float32:
        most = 32 * 32
    return (8,) if rows * columns > most or along * size % 16 else (4, 8)


def _is_irregular(task: Task) -> bool:
    """Whether finding a tap or a pixel divides by no power of two, which takes registers."""
    shape = task.geometry.shape(task.op == "conv_transposed")
    return any(n & (n - 1) for n in (shape.K, shape.P, shape.Q))


def _is_image(task: Task) -> bool:
    return task.op.startswith("image_")
