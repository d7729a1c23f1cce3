"""How long a task takes with a tile, predicted: heuristics.py chooses by it. No GPU has confirmed
the model; it is to order the tiles of a task. Its peaks are the target's (devices.py), and
`python -m benchmarks.gpu` measures them. Not here: which tiles there are (heuristics.py)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .devices import REPLAYED
from .geometry import Tile, cdiv
from .types import Target, Task

# What stands here is ASSUMED or was read from compiled code (docs/inspect.md); no GPU has timed it.
LATENCY = 800  # clocks from a load to its value while others load, too. ASSUMED
WAIT = 40  # clocks that a step of a program by itself waits for its barriers. ASSUMED
OVERLAP = 0.9  # of memory's time and the multiprocessors', what hides in the other. ASSUMED
PART = 4  # times that a byte of a part of a split sum counts: in a close race no split. ASSUMED
SUMMED = 64  # parts of a weight's gradient that are loaded at a time, by `reduce_splits`
# Instructions of a warp that a multiprocessor starts in a clock. NVIDIA: one by each of its four
# schedulers. AMD: 64 lanes keep one of four units busy for four clocks, other work goes beside it;
# ASSUMED.
ISSUE = {"cuda": 4, "hip": 2}

# Instructions of a warp in the main loop, a step.
LOOP = {"descriptors": 90, "pointers": 40}
COPY = 12  # for 16 bytes that a thread copies: address, mask
TRANSFORM = 9  # for a value that a prologue changes
# For 4096 FLOPs, one HMMA, with the loads of its operands; sm_90 and sm_100 multiply tiles whole.
MATRIX = {"sm_80": 1.5, "sm_89": 1.5, "sm_120": 1.0, "gfx942": 0.5, "gfx950": 0.5}
# Behind the loop, for each result of a thread.
EPILOGUE = {"store": 4, "statistics": 12, "gradient": 24, "actgrad": 9}
# Registers of a thread: some, and more for each of its results. Descriptors' addresses take none.
REGISTERS = {
    "store": (26, 1.0), "statistics": (0, 2.0), "gradient": (71, 1.4), "actgrad": (26, 1.2),
}  # fmt: skip
READING = ("gradient", "actgrad")  # epilogues that read a tensor like the result
WITH_POINTERS, BUSY = (64, 2.0), 64  # and where operands go through them, or an epilogue reads
# Stages of operands in shared memory, of all: elsewhere the last is there while it is multiplied.
WHOLE_STAGES = ("sm_90", "sm_100", "gfx950")


class Work(NamedTuple):
    """A task as `copies` products [m, k] x [k, n], k being `taps` times `along`."""

    m: int  # small pixels of a group, or channels of the small side
    n: int  # channels
    taps: int
    along: int
    copies: int
    results: int  # values of the whole result
    bytes: int  # of the operands and the result, each once
    pairs: bool = False  # whether a tile by descriptors has two copies where it is wide enough

    def programs(self, tile: Tile) -> int:
        """Those that a tile makes."""
        two = self.pairs and tile.engine == "descriptors" and tile.columns >= 2 * self.n
        columns = cdiv(self.n, tile.columns) * cdiv(self.copies, 2 if two else 1)
        return cdiv(self.m, tile.rows) * columns * tile.split

    def steps(self, depth: int) -> int:
        """Along the whole sum."""
        return self.taps * cdiv(self.along, depth)


@functools.lru_cache(maxsize=4096)
def work_of(task: Task) -> Work:
    """Of one task; the products of an image's layers are those of gpu/conv_image.py."""
    g, op, image = task.geometry, task.op.removeprefix("image_"), task.op.startswith("image_")
    size, pixels = task.dtype.itemsize, g.N // task.groups * g.P * g.Q
    small, large, weight = g.N * g.P * g.Q * g.CS, g.N * g.H * g.W * g.CL, g.kernel**2 * g.CS * g.CL
    aux = 1 if task.prologue in ("none", "activate") else 2  # tensors that an operand is read from
    both = 2 if task.epilogue in READING else 1  # like the result: that, and what is read
    if op == "weight_gradient":  # the groups are one sum; its dtype is the parameter's
        n, copies = (g.window, 1) if image else (g.CL, g.kernel**2)
        moved = size * aux * (small + large) + 4 * weight
        pairs = not image and g.kernel % 2 == 0
        return Work(g.CS, n, 1, task.groups * pixels, copies, weight, moved, pairs)
    if op == "conv":
        taps, along = (1, g.window) if image else (g.kernel**2, g.CL)
        moved = size * (aux * large + weight + both * small)
        return Work(pixels, g.CS, taps, along, task.groups, small, moved)
    shape = g.shape(transposed=True)
    n, taps, phases = (64, 1, 1) if image else (g.CL, shape.SIDE**2, shape.PHASE**2)
    moved = size * (aux * small + weight + both * large)
    places = g.N // task.groups * shape.P * shape.Q
    return Work(places, n, taps, g.CS, phases * task.groups, large, moved)


def loaded_bytes(task: Task, tile: Tile) -> int:
    """Of both operands, for a step."""
    sides = [tile.rows, tile.columns]
    if task.prologue in ("normgrad", "actgrad", "both"):  # with aux
        sides += sides[: 2 if task.prologue == "both" else 1]
    return sum(sides) * tile.depth * task.dtype.itemsize


def shared_bytes(task: Task, tile: Tile, target: Target) -> int:
    """Estimate of the shared memory that a program takes: its operands in every stage, and those
    that a prologue changed."""
    stages = tile.stages if target.name in WHOLE_STAGES else max(1, tile.stages - 1)
    changed = 0 if task.prologue == "none" else tile.rows + tile.columns
    return stages * loaded_bytes(task, tile) + changed * tile.depth * task.dtype.itemsize


def registers(task: Task, tile: Tile, target: Target) -> float:
    """Estimate of a thread's."""
    if tile.engine == "descriptors":
        some, each = REGISTERS[task.epilogue if tile.split == 1 else "store"]
    else:
        some, each = WITH_POINTERS
        some += BUSY if is_busy(task) else 0
    return some + each * tile.rows * tile.columns / (tile.warps * target.warp_size)


def is_busy(task: Task) -> bool:
    """Whether operands, or a tile of another tensor, go through registers."""
    return task.prologue != "none" or task.epilogue in READING


def resident(task: Task, tile: Tile, target: Target) -> int:
    """Estimate of the programs that a multiprocessor holds at a time. By shared memory, of which
    NVIDIA's takes 1 KB for itself a program; and by registers: 65,536, on AMD's 512 for each lane
    of four units, which hold 8 warps each (CUDA C++ Programming Guide; CDNA3 ISA)."""
    shared, each = shared_bytes(task, tile, target), registers(task, tile, target)
    if target.backend == "hip":
        by_registers = 4 * min(8, int(512 // each)) // tile.warps
        return max(1, min(by_registers, target.shared_bytes // shared))
    by_registers = int(65_536 // (tile.warps * 32 * each))
    return max(1, min(by_registers, (target.shared_bytes + 1024) // (shared + 1024)))


def predicted_seconds(task: Task, tile: Tile, target: Target) -> float:
    """Of the task's launch, and of the one that adds the parts of a split sum.

    The longest of three governs a multiprocessor: products at their peak, bytes from and to the L2,
    instructions. If several programs are there, one's start and end hide behind another's loop; a
    program by itself adds up. Beside that runs memory, which sees each tensor once."""
    work, peaks, size = work_of(task), target.peaks, task.dtype.itemsize
    rows, columns, depth, split = tile.rows, tile.columns, tile.depth, tile.split
    # a multiprocessor's peaks, a second; memory's is the whole card's
    flops = (peaks.flops16 if size == 2 else peaks.flops32) / peaks.multiprocessors
    l2, starts = peaks.l2 / peaks.multiprocessors, ISSUE[target.backend] * peaks.clock
    memory = peaks.bytes / peaks.multiprocessors * target.multiprocessors
    latency, threads = LATENCY / peaks.clock, tile.warps * target.warp_size
    # a program: its loop
    steps, loaded = cdiv(work.steps(depth), split), loaded_bytes(task, tile)
    multiplied = 2 * rows * columns * depth
    told = LOOP[tile.engine] + MATRIX.get(target.name, 0) * multiplied / 4096 / tile.warps
    if tile.engine == "pointers":
        told += COPY * loaded / 16 / threads
    if task.prologue != "none":
        changed = rows + columns if task.prologue == "both" else rows
        told += TRANSFORM * changed * depth / threads
    products, loads = steps * multiplied / flops, steps * loaded / l2
    loop = steps * told * tile.warps / starts
    # ... and its end
    kind, stored = (task.epilogue, size) if split == 1 else ("store", 4)
    stores = rows * columns * stored * (2 if kind in READING else 1) / l2
    end = EPILOGUE[kind] * rows * columns / target.warp_size / starts
    arrive = (steps * latency + loads) / (tile.stages - 1)  # so many steps' loads are on their way
    alone = max(products, loads, loop, arrive) + steps * WAIT / peaks.clock + latency + stores + end
    shared = max(products, loads + stores, loop + end)
    # the device
    each = cdiv(work.programs(tile), target.multiprocessors)
    busy = max(each * shared, cdiv(each, resident(task, tile, target)) * alone)
    parts = PART * 4 * work.results * split if split > 1 else 0  # bytes
    moved = (work.bytes + parts) / memory
    seconds = max(busy, moved) + (1 - OVERLAP) * min(busy, moved)
    if split > 1:
        seconds += REPLAYED + (parts + 4 * work.results) / memory + cdiv(split, SUMMED) * latency
    return seconds
