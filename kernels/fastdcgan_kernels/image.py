"""The kernels for layers with an image of 1 to 4 channels as functions of tensors; they take and
give what `convolution.gather` and `convolution.weight_gradient` do. Stride 2 only.

`parts` are programs that share the tiles and keep each a sum of the weight's gradient, which are
then summed in their order."""

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


def image_gradients(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    *,
    tile: Tile,
    epilogue: Epilogue,
    parts: int,
    dtype: torch.dtype,
    groups: int = 1,
    precision: str = "ieee",
) -> tuple[Result, Tensor]:
    """With `source` the gradient of an image that was made of act(z): what `image_down` gives for
    the epilogue "gradient", whose tiles here are the parts, and d weight [CS, CL, 4, 4]. Of `tile`
    the depth and the split are not read."""
    g = geometry
    assert epilogue.kind == "gradient"
    out = empty(g.N, g.CS, g.P, g.Q, source.value)
    result = Result(out, *epilogue_buffers("gradient", groups, parts, g.CS, out))
    store = _parts(g.CS, g.CL, parts, groups, out)
    arguments = epilogue_arguments(epilogue, out, result)
    Launch(
        image.image_gradients,
        (cdiv(g.CS, tile.columns), groups, parts),
        {
            **operand_arguments("x", source),
            "w": weight,
            "out": out,
            **{name: arguments[name] for name in ("out_aux", "out_coef", "partials", "slope")},
            "gw": store,
            "groups": groups,
            "images": g.N // groups,
            **_constants(g),
            "PROLOGUE": source.prologue,
            "X_ACTIVATION": source.activation,
            "ACTIVATION": epilogue.activation,
            "PARTS": parts,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(out.device)
    return result, reduce(store, empty(g.CS, g.CL, 4, 4, out, dtype)).value


def image_weight_gradient_through(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    signs: Tensor,
    activation: str,
    slope: float,
    image_: Tensor,
    *,
    tile: Tile,
    parts: int,
    dtype: torch.dtype,
    groups: int = 1,
    precision: str = "ieee",
) -> Tensor:
    """d weight [CL, CI, 4, 4] of the layer down from an image [N, CI, 2H, 2W] to the large side of
    this geometry, of which act(z) there are `signs` (`jit.tile.store_signs`); `source` and `weight`
    are those of the gradient from the small side to it. `tile.split` is not read."""
    g, channels = geometry, image_.shape[1]
    assert tuple(image_.shape[2:]) == (2 * g.H, 2 * g.W)
    store = _parts(g.CL, channels, parts, groups, image_)
    Launch(
        image.image_weight_gradient_through,
        (cdiv(g.CL, tile.columns), groups, parts),
        {
            **operand_arguments("x", source),
            "w": weight,
            "signs": signs,
            "image": image_,
            "gw": store,
            "groups": groups,
            "images": g.N // groups,
            "slope": float(slope),
            "P": g.P,
            "Q": g.Q,
            "CS": g.CS,
            "CL": g.CL,
            "CI": channels,
            "PROLOGUE": source.prologue,
            "X_ACTIVATION": source.activation,
            "ACTIVATION": activation,
            "PARTS": parts,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(image_.device)
    return reduce(store, empty(g.CL, channels, 4, 4, image_, dtype)).value


def _parts(small: int, large: int, parts: int, groups: int, like: Tensor) -> Tensor:
    """Where the parts of a weight's gradient go."""
    return like.new_empty((groups * parts, small * 16 * large), dtype=torch.float32)
