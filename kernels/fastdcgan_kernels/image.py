"""The kernels for layers with an image of 1 to 4 channels as functions of tensors; they take and
give what `convolution.gather` and `convolution.weight_gradient` do. Stride 2 only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdcgan_kernels.convolution import (
    Epilogue,
    Operand,
    Result,
    epilogue_arguments,
    epilogue_buffers,
    operand_arguments,
    reduce,
)
from fastdcgan_kernels.geometry import Geometry, Tile, cdiv, empty
from fastdcgan_kernels.jit import image
from fastdcgan_kernels.launch import Launch

COLUMNS = 16  # of image_up: four phases of up to 4 channels
WINDOW = 64  # columns of a 4x4 window: 4 rows of up to 16 values


def _constants(g: Geometry) -> dict[str, int]:
    """The sides, of which the large one is twice the small one."""
    assert (g.H, g.W, g.stride, g.pad) == (2 * g.P, 2 * g.Q, 2, 1)
    assert g.CL <= 4
    return {"P": g.P, "Q": g.Q, "CS": g.CS, "CL": g.CL}


def image_down(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    *,
    tile: Tile,
    epilogue: Epilogue = Epilogue(),
    groups: int = 1,
    precision: str = "ieee",
) -> Result:
    """Image to features: a sum of 64, of which `tile.depth` at a time. `tile.split` is not read."""
    g = geometry
    out = empty(g.N, g.CS, g.P, g.Q, source.value)
    row_tiles = cdiv(g.N // groups * g.P * g.Q, tile.rows)
    return _convolve(
        image.image_down, row_tiles * cdiv(g.CS, tile.columns), row_tiles, source, weight, g, out,
        replace(tile, depth=min(tile.depth, WINDOW)), epilogue, groups, precision,
    )  # fmt: skip


def image_up(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    *,
    tile: Tile,
    epilogue: Epilogue = Epilogue(),
    groups: int = 1,
    precision: str = "ieee",
) -> Result:
    """Features to image. `tile.columns` and `tile.split` are not read."""
    g = geometry
    out = empty(g.N, g.CL, g.H, g.W, source.value)
    row_tiles = cdiv(g.N // groups * g.P * g.Q, tile.rows)
    return _convolve(
        image.image_up, row_tiles, 4 * row_tiles, source, weight, g, out,
        replace(tile, columns=COLUMNS), epilogue, groups, precision,
    )  # fmt: skip


def _convolve(
    kernel: object, programs: int, tiles: int, source: Operand, weight: Tensor, g: Geometry,
    out: Tensor, tile: Tile, epilogue: Epilogue, groups: int, precision: str,
) -> Result:  # fmt: skip
    buffers = epilogue_buffers(epilogue.kind, groups, tiles, out.shape[1], out)
    result = Result(out, *buffers)
    Launch(
        kernel,
        (programs, groups),
        {
            **operand_arguments("x", source),
            "w": weight,
            "out": out,
            **epilogue_arguments(epilogue, out, result),
            "groups": groups,
            "images": g.N // groups,
            **_constants(g),
            "PROLOGUE": source.prologue,
            "X_ACTIVATION": source.activation,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(out.device)
    return result


def image_weight_gradient(
    small: Operand,
    large: Operand,
    geometry: Geometry,
    *,
    tile: Tile,
    dtype: torch.dtype,
    groups: int = 1,
    precision: str = "ieee",
) -> Tensor:
    """d weight [CS, CL, 4, 4]. `tile.rows` are of CS, `tile.depth` pixels at a time; all columns
    are one tile."""
    g = geometry
    parts = tile.split
    out = empty(g.CS, g.CL, 4, 4, small.value, dtype)
    store = out if parts == 1 else out.new_empty((parts, out.numel()), dtype=torch.float32)
    Launch(
        image.image_weight_gradient,
        (cdiv(g.CS, tile.rows), parts),
        {
            **operand_arguments("small", small),
            **operand_arguments("large", large),
            "out": store,
            "groups": groups,
            "images": g.N // groups,
            **_constants(g),
            "SMALL_PROLOGUE": small.prologue,
            "SMALL_ACTIVATION": small.activation,
            "LARGE_PROLOGUE": large.prologue,
            "LARGE_ACTIVATION": large.activation,
            "SPLIT": tile.split,
            "BLOCK_M": tile.rows,
            "BLOCK_K": tile.depth,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(out.device)
    return out if parts == 1 else reduce(store, out).value
