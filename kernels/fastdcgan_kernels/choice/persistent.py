"""Tiles of the persistent kernel in Gluon (gpu/conv_gluon.py): which of them fit a layer, and what
the kernel is told of one. Shapes alone: imports no Triton. On an H200 the best of them took
0.84 to 1.06 of the default's time on a DCGAN's layers at batch 128, and twice it at 18 images
(benchmarks/results/gpu), so none is a default; the tuner tries them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .geometry import Geometry, Tile, box_of, cdiv
from .types import Target, Task

DTYPES = (torch.bfloat16, torch.float16)
EPILOGUES = ("store", "statistics", "gradient")
DEPTH = 64  # channels of the sum in a stage: 128 bytes, a row of the widest swizzle
ACCUMULATORS = 128  # numbers of the result that a thread may hold; with 255 registers more spill
BARRIERS = 1024  # bytes, more than they take


class Plan(NamedTuple):
    """A layer in one direction and a tile of it, as the kernel's constants. Everything that the
    kernel reads is a field: by them Triton tells one compilation from another."""

    P: int
    Q: int
    CS: int
    CL: int
    STRIDE: int
    PAD: int
    LEFT: int
    TRANSPOSED: bool
    CI: int  # channels of what is read
    CO: int  # and of what is written
    PHASE: int  # as in Shape
    SIDE: int
    BOX_N: int  # a tile's small pixels: images, rows, columns
    BOX_P: int
    BOX_Q: int
    BLOCK_M: int  # small pixels of a tile
    BLOCK_N: int  # its channels of the result
    BLOCK_K: int  # channels of the sum that a stage holds
    STAGES: int
    WARPS: int  # of a consumer
    CONSUMERS: int  # 1, or 2 that multiply in turn
    PIECES: int  # parts of a tile's pixels that go out one after the other
    BUFFERS: int  # through which they go, of a consumer
    RAGGED: bool  # the last box has images that are not there
    HAS_BIAS: bool
    EPILOGUE: str
    ACTIVATION: str

    @property
    def box(self) -> tuple[int, int, int]:
        """Of a tile's pixels."""
        return self.BOX_N, self.BOX_P, self.BOX_Q

    def boxes(self, images: int) -> int:
        """Of a group of so many images."""
        return cdiv(images, self.BOX_N) * (self.P // self.BOX_P) * (self.Q // self.BOX_Q)


def plan_of(
    geometry: Geometry, tile: Tile, target: Target, *, transposed: bool, groups: int = 1,
    epilogue: str = "store", activation: str = "none", has_bias: bool = False,
) -> Plan | None:  # fmt: skip
    """What the kernel is told; None where the tile does not fit the layer or the target. A tile has
    `rows` pixels and `columns` channels; 8 warps multiply together, 4 are two consumers in turn."""
    g, shape = geometry, geometry.shape(transposed)
    box, images = box_of(tile.rows, g), g.N // groups
    whole = shape.CI % DEPTH == 0 and shape.CO % tile.columns == 0
    sizes = tile.rows in (128, 256) and tile.columns in (64, 128)
    threads = 32 * tile.warps
    if not (
        target.name == "sm_90" and epilogue in EPILOGUES and g.is_standard and whole and sizes
        and tile.depth == DEPTH and tile.split == 1 and tile.warps in (4, 8) and tile.stages >= 3
        and tile.rows * tile.columns <= ACCUMULATORS * threads
        and (groups == 1 or images % box[0] == 0)  # else a box would reach into the next group
    ):  # fmt: skip
        return None
    consumers = 8 // tile.warps
    ring = 2 * tile.stages * DEPTH * (tile.rows + tile.columns)
    out = 2 * consumers * tile.rows * tile.columns
    # The gradient's aux comes in while a tile is multiplied: a buffer for each of its pieces, of
    # which fewer would spill. Else a piece waits for the one before, so they are as few as can be;
    # and one where other warps have the other half of a channel's pixels.
    ways = [(4, 4)] if epilogue == "gradient" else [(1, 1), (2, 1), (4, 1)]
    for pieces, buffers in ways:
        if pieces > 1 and tile.columns < 16 * tile.warps:
            continue
        if ring + out * buffers // pieces + BARRIERS <= target.shared_bytes:
            return Plan(
                g.P, g.Q, g.CS, g.CL, g.stride, g.pad, g.left, transposed, shape.CI, shape.CO,
                shape.PHASE, shape.SIDE, *box, tile.rows, tile.columns, DEPTH, tile.stages,
                tile.warps, consumers, pieces, buffers, images % box[0] != 0, has_bias, epilogue,
                activation,
            )  # fmt: skip
    return None


def tiles(task: Task, target: Target) -> list[Tile]:
    """Those to try for a task: the first two are one of each mode."""
    transposed = task.op == "conv_transposed"
    if task.op not in ("conv", "conv_transposed") or task.dtype not in DTYPES:
        return []
    if task.prologue != "none":
        return []
    every = [
        Tile(rows, columns, DEPTH, 1, warps, stages, "gluon")
        for rows, columns, warps, stages in (
            (256, 128, 8, 4), (128, 128, 4, 4), (256, 128, 8, 3), (128, 128, 4, 5),
            (256, 64, 8, 4), (256, 64, 4, 4),
        )
    ]  # fmt: skip
    found = [
        tile for tile in every
        if plan_of(
            task.geometry, tile, target, transposed=transposed, groups=task.groups,
            epilogue=task.epilogue,
        )
    ]  # fmt: skip
    widest = max((tile.columns for tile in found), default=0)
    return [tile for tile in found if tile.columns == widest]
