"""The default tile of a kernel's task, by shapes and the target's figures, and the tiles near it.
Predictions: no GPU has timed them. Not here: what was measured (measured.py)."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .geometry import Engine, Tile, cdiv
from .types import Target, Task

WITHOUT_SPLIT = ("image_conv", "image_conv_transposed")  # their sums are one part


def bucket(n: int) -> int:
    """The power of two at or above n: batches of 65 to 128 share one decision. By comparisons, so
    that torch.compile, too, asks no more of a batch than these bounds."""
    power = 1
    while power < n:
        power *= 2
    return power


def shared_bytes(task: Task, tile: Tile) -> int:
    """Estimate of the shared memory that a program takes: its operands, in every stage."""
    operands = 2 if task.prologue != "none" else 1
    return tile.stages * operands * (tile.rows + tile.columns) * tile.depth * task.dtype.itemsize


def neighbours(task: Task, target: Target) -> list[Tile]:
    """The default tile, then those one step away from it that fit: what the tuner tries."""
    first = default_tile(task, target)
    steps = {  # least and most; a step is a factor of 2
        "rows": (64 if target.name in ("sm_90", "sm_100") else 16, 256), "columns": (16, 256),
        "depth": (16, 128 // task.dtype.itemsize), "split": (1, 64), "stages": (2, 4),
    }  # fmt: skip
    if task.op in ("image_conv_transposed", "image_weight_gradient"):
        del steps["columns"]  # not read
    if task.op in WITHOUT_SPLIT:
        del steps["split"]
    found = [replace(first, warps=12 - first.warps)]
    if target.descriptors and not task.op.startswith("image_"):
        other = "pointers" if first.engine == "descriptors" else "descriptors"
        found.append(replace(first, engine=other))
    for name, (least, most) in steps.items():
        value = getattr(first, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                tile = replace(first, **{name: other})
                found.append(replace(tile, warps=_warps(task, tile.rows, tile.columns)))
    fit = [
        tile
        for tile in found
        if shared_bytes(task, tile) <= target.shared_bytes
        and tile.rows * tile.columns <= 128 * 256
        and tile.warps >= _warps(task, tile.rows, tile.columns)
    ]
    return list(dict.fromkeys([first, *fit]))


def _warps(task: Task, rows: int, columns: int) -> int:
    """4, and 8 where so few threads would spill (docs/inspect.md)."""
    most = 64 * 64 if task.epilogue == "gradient" else 128 * 64
    if task.prologue != "none":
        most = 64 * 32
    if task.dtype == torch.float32:
        most = 32 * 32
    return 8 if rows * columns > most else 4


def _power(n: int, least: int, most: int) -> int:
    """The smallest power of two that covers n, within bounds."""
    return max(least, min(most, bucket(n)))


@functools.lru_cache(maxsize=4096)
def default_tile(task: Task, target: Target) -> Tile:
    """Large tiles while there are programs for every multiprocessor and room for their operands;
    then smaller ones, then parts of the sum. Start: 128 x 128 x 64 with 8 warps and 3 stages, which
    compiles without spills for all GEMMs here (docs/inspect.md)."""
    g, op, image = task.geometry, task.op.removeprefix("image_"), task.op.startswith("image_")
    size, groups, copies = task.dtype.itemsize, task.groups, 1
    m = g.N // groups * g.P * g.Q
    # m x n x k of the product and how often it is there; the channels that a step of k runs along
    if op == "weight_gradient":  # the groups are one sum
        m, n, k, groups = g.CS, 64 if image else g.CL, groups * m, 1
        copies, along = 1 if image else 16, 8
    elif op == "conv":
        n, k, along = g.CS, 64 if image else 16 * g.CL, g.CL
    else:
        shape = g.shape(transposed=True)
        n, k, along = 64 if image else g.CL, (1 if image else shape.SIDE**2) * g.CS, g.CS
        copies = 1 if image else shape.PHASE**2
    deep = k if op == "weight_gradient" or (image and op == "conv") else along
    if target.name == "interpreter":  # what an operation costs hardly depends on its size
        rows, columns, depth = _power(m, 16, 512), _power(n, 16, 128), _power(deep, 16, 512)
        return Tile(rows, columns, depth, warps=1, stages=1)
    rows, columns, depth = _power(m, 16, 128), _power(n, 16, 128), _power(deep, 16, 128 // size)
    if target.name in ("sm_90", "sm_100"):
        rows = max(rows, 64)  # the least that their matrix instructions take
    busy = task.prologue != "none" or task.epilogue == "gradient"
    if busy:
        columns = min(columns, 64)  # operands or another tile in registers: more would spill

    def programs() -> int:
        return cdiv(m, rows) * cdiv(n, columns) * copies * groups

    while programs() < target.multiprocessors and max(rows, columns) > 64:
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    split, steps = 1, cdiv(k, depth)
    if task.op not in WITHOUT_SPLIT:
        # A sum in parts is written, read and added once more: not for the last quarter.
        while split < 32 and programs() * split < target.multiprocessors * 3 // 4:
            if steps // (2 * split) < 4:
                break
            split *= 2
    warps = 8 if along * size % 16 else _warps(task, rows, columns)
    # 8 also without 16-byte loads: the addresses of smaller ones take registers. And a prologue
    # works on registers: then the way through them is no detour.
    few = target.name == "sm_100" or (target.name == "sm_120" and busy and size == 4)
    if task.op == "image_conv_transposed" and few:
        warps = 4  # 8 would spill a few bytes
    engine: Engine = "pointers"
    if target.descriptors and not image and task.prologue == "none":
        engine = "descriptors"
    tile = Tile(rows, columns, depth, split, warps, 2 if busy else 3, engine)
    while shared_bytes(task, tile) > target.shared_bytes * 3 // 4:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.depth > 16:
            tile = replace(tile, depth=tile.depth // 2)
        else:
            break
    return tile
