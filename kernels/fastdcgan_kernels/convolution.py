"""The convolution kernels as functions of tensors: shapes in, launches out. Not here: autograd
(functional.py) and the choice of tiles (plan.py).

All tensors are channels_last; sides and weights are named as in geometry.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels.geometry import Geometry, Tile, box_of, cdiv, empty
from fastdcgan_kernels.jit.descriptors import gather_descriptors, weight_gradient_descriptors
from fastdcgan_kernels.jit.gather import gather_pointers
from fastdcgan_kernels.jit.logit import logit_gradients as _logit_gradients
from fastdcgan_kernels.jit.norm import reduce_splits
from fastdcgan_kernels.jit.wgrad import weight_gradient_pointers
from fastdcgan_kernels.launch import Launch


@dataclass(frozen=True)
class Operand:
    """A tensor and what happens to it as it is loaded (`jit.tile.transform`)."""

    value: Tensor
    prologue: str = "none"
    aux: Tensor | None = None
    coef: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0


@dataclass(frozen=True)
class Epilogue:
    """What happens to a result before it is stored (`jit.tile.store_tile`). `aux`: the raw y; or
    signs, uint8 [N, P, Q, C / 8], which "signs" writes and "signed" reads."""

    kind: str = "store"
    bias: Tensor | None = None
    aux: Tensor | None = None
    coef: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0


@dataclass(frozen=True)
class Result:
    """value: the stored tensor. partials [2, groups, tiles, C] and counts [groups, tiles], fp32,
    where the epilogue makes them (counts only for statistics)."""

    value: Tensor
    partials: Tensor | None = None
    counts: Tensor | None = None


def epilogue_buffers(
    kind: str, groups: int, tiles: int, channels: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Where the epilogue's partials and counts go."""
    if kind not in ("statistics", "gradient"):
        return None, None
    partials = like.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    counts = like.new_empty((groups, tiles), dtype=torch.float32) if kind == "statistics" else None
    return partials, counts


def epilogue_arguments(epilogue: Epilogue, out: Tensor, result: Result) -> dict[str, Any]:
    """The part of a kernel's arguments that `store_tile` reads. A pointer that is not read is
    given some tensor: the kernels take no None."""
    return {
        "bias": out if epilogue.bias is None else epilogue.bias,
        "out_aux": out if epilogue.aux is None else epilogue.aux,
        "out_coef": out if epilogue.coef is None else epilogue.coef,
        "partials": out if result.partials is None else result.partials,
        "counts": out if result.counts is None else result.counts,
        "slope": float(epilogue.slope),
        "HAS_BIAS": epilogue.bias is not None,
        "EPILOGUE": epilogue.kind,
        "ACTIVATION": epilogue.activation,
    }


def operand_arguments(name: str, operand: Operand) -> dict[str, Any]:
    """The part of a kernel's arguments that `load_operand` reads, for the operand called `name`."""
    value = operand.value
    return {
        name: value,
        f"{name}_aux": value if operand.aux is None else operand.aux,
        f"{name}_coef": value if operand.coef is None else operand.coef,
        f"{name}_slope": float(operand.slope),
    }


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor; (0, 0) for one that does not say."""
    import triton

    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def fits_descriptors(precision: str, *tensors: Tensor | None) -> bool:
    """Whether each starts at a multiple of 16 bytes, and so does each of its pixels: what a tensor
    descriptor asks for. And whether their products are then as exact as by pointers: before 3.7
    Triton rounds to TF32 only what goes through registers, and the hardware cuts off the rest."""
    if precision == "tf32" and triton_version() < (3, 7):
        return False
    return all(
        t is None or (t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0)
        for t in tensors
    )


def _side(t: Tensor, geometry: Geometry, large: bool, pixels: int, channels: int) -> Any:
    """Descriptor of a side, of which a box has these channels of `pixels` (jit/descriptors.py)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    n, c, h, w = t.shape
    images, rows, columns = box_of(pixels, geometry)
    if large and geometry.stride == 2:
        shape, strides = [n, h // 2, 2, w // 2, 2 * c], [h * w * c, 2 * w * c, w * c, 2 * c, 1]
        return TensorDescriptor(t, shape, strides, [images, rows, 1, columns, channels])
    shape, strides = [n, h, w, c], [h * w * c, w * c, c, 1]
    return TensorDescriptor(t, shape, strides, [images, rows, columns, channels])


def _described(
    name: str, operand: Operand, geometry: Geometry, large: bool, pixels: int, channels: int
) -> dict[str, Any]:
    """`operand_arguments` with descriptors of its tensors, and the box."""
    value = _side(operand.value, geometry, large, pixels, channels)
    aux = operand.aux
    return {
        **operand_arguments(name, operand),
        name: value,
        f"{name}_aux": value if aux is None else _side(aux, geometry, large, pixels, channels),
        **dict(zip(("BOX_N", "BOX_P", "BOX_Q"), box_of(pixels, geometry), strict=True)),
    }


def _weight_matrix(weight: Tensor, rows: int, columns: int) -> Any:
    """Descriptor of the weight as [CS, 16 * CL]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    wide = 16 * weight.shape[1]
    return TensorDescriptor(weight, [weight.shape[0], wide], [wide, 1], [rows, columns])


def gather(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    *,
    up: bool,
    tile: Tile,
    epilogue: Epilogue = Epilogue(),
    groups: int = 1,
    precision: str = "ieee",
) -> Result:
    """The convolution down or up with its epilogue; `weight` in the dtype of the source.

    Returns `Result`; its tiles are those of the rows, phases included.
    """
    g, x = geometry, source.value
    images = g.N // groups
    out = empty(g.N, g.CL, g.H, g.W, x) if up else empty(g.N, g.CS, g.P, g.Q, x)
    channels = out.shape[1]
    row_tiles = cdiv(images * g.P * g.Q, tile.rows)
    kernel, loads = gather_pointers, {**operand_arguments("x", source), "w": weight}
    whole_taps = up or g.CL % tile.depth == 0
    if tile.descriptors and whole_taps and fits_descriptors(precision, x, source.aux, weight):
        kernel, loads = (
            gather_descriptors,
            _described("x", source, g, not up, tile.rows, tile.depth),
        )
        box = (tile.depth, tile.columns) if up else (tile.columns, tile.depth)
        loads["w"] = _weight_matrix(weight, *box)
        row_tiles = cdiv(images, loads["BOX_N"]) * g.P * g.Q // (loads["BOX_P"] * loads["BOX_Q"])
    row_tiles *= g.phases if up else 1
    whole = tile.split == 1
    if whole:
        result = Result(out, *epilogue_buffers(epilogue.kind, groups, row_tiles, channels, out))
        now, store = epilogue, out
    else:
        result = Result(out)
        now, store = Epilogue(), x.new_empty((tile.split, out.numel()), dtype=torch.float32)
    Launch(
        kernel,
        (row_tiles * cdiv(channels, tile.columns), groups, tile.split),
        {
            **loads,
            "out": store,
            **epilogue_arguments(now, store, result),
            "groups": groups,
            "images": images,
            **g.constants,
            "UP": up,
            "PROLOGUE": source.prologue,
            "X_ACTIVATION": source.activation,
            "SPLIT": tile.split,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(x.device)
    return result if whole else reduce(store, out, epilogue, groups)


def reduce(parts: Tensor, out: Tensor, epilogue: Epilogue = Epilogue(), groups: int = 1) -> Result:
    """Sum fp32 parts [splits, out.numel()] in their order, then the epilogue, into `out`, whose
    memory is rows of `channels`; the rows of a group are together."""
    channels = out.shape[1]
    rows = out.numel() // channels // groups
    block_m, block_n = 32, min(64, max(16, 1 << (channels - 1).bit_length()))
    tiles = cdiv(rows, block_m)
    result = Result(out, *epilogue_buffers(epilogue.kind, groups, tiles, channels, out))
    Launch(
        reduce_splits,
        (tiles * cdiv(channels, block_n), groups),
        {
            "parts": parts,
            "out": out,
            **epilogue_arguments(epilogue, out, result),
            "groups": groups,
            "rows": rows,
            "C": channels,
            "SPLITS": parts.shape[0],
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    ).run(out.device)
    return result


def weight_gradient(
    small: Operand,
    large: Operand,
    geometry: Geometry,
    *,
    tile: Tile,
    dtype: torch.dtype,
    groups: int = 1,
    precision: str = "ieee",
) -> Tensor:
    """d weight [CS, CL, 4, 4] in `dtype`: per tap, small^T large over all pixels. `tile.rows` are
    of CS, `tile.columns` of CL, `tile.depth` pixels at a time; `tile.split` parts, summed in their
    order."""
    g = geometry
    parts = tile.split
    kernel = weight_gradient_pointers
    loads = operand_arguments("small", small) | operand_arguments("large", large)
    whole_boxes = groups == 1 or g.N // groups % box_of(tile.depth, g)[0] == 0
    tensors = (small.value, small.aux, large.value, large.aux)
    if tile.descriptors and whole_boxes and fits_descriptors(precision, *tensors):
        kernel = weight_gradient_descriptors
        loads = _described("small", small, g, False, tile.depth, tile.rows)
        loads |= _described("large", large, g, True, tile.depth, tile.columns)
    out = empty(g.CS, g.CL, 4, 4, small.value, dtype)
    store = out if parts == 1 else out.new_empty((parts, out.numel()), dtype=torch.float32)
    Launch(
        kernel,
        (16 * cdiv(g.CS, tile.rows) * cdiv(g.CL, tile.columns), parts),
        {
            **loads,
            "out": store,
            "groups": groups,
            "images": g.N // groups,
            **g.constants,
            "SMALL_PROLOGUE": small.prologue,
            "SMALL_ACTIVATION": small.activation,
            "LARGE_PROLOGUE": large.prologue,
            "LARGE_ACTIVATION": large.activation,
            "SPLIT": tile.split,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "PRECISION": precision,
        },
        tile.warps,
        tile.stages,
    ).run(out.device)
    return out if parts == 1 else reduce(store, out).value


def logit_gradients(
    g: Tensor, weight: Tensor, source: Operand, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Of a layer down to one number of each image, of which g [N, 1, 1, 1] is the gradient: that of
    the raw y [N, C, 4, 4] of the block before it, through its norm, too, and fp32 [18, C]: those of
    the 16 taps of the weight, of gamma and of beta. `source`: y with "activate" and all planes of
    its coef."""
    y, coef = source.value, source.coef
    assert coef is not None
    assert coef.shape[0] == 5
    channels = y.shape[1]
    out = torch.empty_like(y, memory_format=torch.channels_last)
    parts = coef.new_empty((groups, 18, channels))
    block = 16
    Launch(
        _logit_gradients,
        (cdiv(channels, block), groups),
        {
            "g": g,
            "w": weight,
            "y": y,
            "coef": coef,
            "out": out,
            "parts": parts,
            "groups": groups,
            "images": y.shape[0] // groups,
            "slope": float(source.slope),
            "C": channels,
            "ACTIVATION": source.activation,
            "BLOCK_M": 512,
            "BLOCK_N": block,
        },
        warps=8,
    ).run(out.device)
    if groups == 1:
        return out, parts[0]
    return out, reduce(parts, parts.new_empty((18, channels))).value
