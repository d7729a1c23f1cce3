"""The convolution kernels as functions of tensors: shapes in, launches out. Not here: autograd
(functional.py) and the choice of tiles (plan.py).

A layer's geometry is that of gather.py: a small side [N, CS, P, Q] and a large side [N, CL, H, W]
joined by the 16 taps of a weight [CS, CL, 4, 4]: Conv2d goes down, ConvTranspose2d goes up. All
tensors are channels_last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels.jit.gather import gather_pointers
from fastdcgan_kernels.jit.norm import reduce_splits
from fastdcgan_kernels.jit.wgrad import weight_gradient_pointers
from fastdcgan_kernels.launch import Launch


@dataclass(frozen=True)
class Geometry:
    """Sides and steps of one layer on one batch."""

    N: int
    P: int
    Q: int
    CS: int
    H: int
    W: int
    CL: int
    stride: int
    pad: int

    @property
    def phases(self) -> int:
        """Programs that share a row tile when going up."""
        return self.stride**2 if self.stride > 1 else 16

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels' constants."""
        return {
            "P": self.P, "Q": self.Q, "CS": self.CS, "H": self.H, "W": self.W, "CL": self.CL,
            "STRIDE": self.stride, "PAD": self.pad,
        }  # fmt: skip


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
    """What happens to a result before it is stored (`jit.tile.store_tile`)."""

    kind: str = "store"
    bias: Tensor | None = None
    aux: Tensor | None = None
    coef: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0


@dataclass(frozen=True)
class Tile:
    """rows x columns of the result a program makes, `depth` of the sum it takes at a time, parts
    the sum is split into, and what the compiler is told. `box`: (images, rows, columns) of pixels
    in a tile of `rows`, for the descriptor kernels; None: pointers."""

    rows: int
    columns: int
    depth: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    box: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Result:
    """value: the stored tensor. partials [2, groups, tiles, C] and counts [groups, tiles], fp32,
    where the epilogue makes them (counts only for statistics)."""

    value: Tensor
    partials: Tensor | None = None
    counts: Tensor | None = None


def empty(n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last [n, c, h, w] on the device of `like`."""
    return torch.empty(
        (n, c, h, w),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def epilogue_buffers(
    kind: str, groups: int, tiles: int, channels: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Where the epilogue's partials and counts go."""
    if kind == "store":
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
    if up:
        out = empty(g.N, g.CL, g.H, g.W, x)
    else:
        out = empty(g.N, g.CS, g.P, g.Q, x)
    channels = out.shape[1]
    row_tiles = cdiv(images * g.P * g.Q, tile.rows) * (g.phases if up else 1)
    whole = tile.split == 1
    if whole:
        result = Result(out, *epilogue_buffers(epilogue.kind, groups, row_tiles, channels, out))
        now, store = epilogue, out
    else:
        result = Result(out)
        now, store = Epilogue(), x.new_empty((tile.split, out.numel()), dtype=torch.float32)
    Launch(
        gather_pointers,
        (row_tiles * cdiv(channels, tile.columns), groups, tile.split),
        {
            **operand_arguments("x", source),
            "w": weight,
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


def reduce(
    parts: Tensor, out: Tensor, epilogue: Epilogue = Epilogue(), groups: int = 1
) -> Result:
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
    of CS, `tile.columns` of CL, `tile.depth` pixels at a time; groups * tile.split parts, summed
    in their order."""
    g = geometry
    parts = groups * tile.split
    out = empty(g.CS, g.CL, 4, 4, small.value, dtype)
    store = out if parts == 1 else out.new_empty((parts, out.numel()), dtype=torch.float32)
    Launch(
        weight_gradient_pointers,
        (16 * cdiv(g.CS, tile.rows) * cdiv(g.CL, tile.columns), parts),
        {
            **operand_arguments("small", small),
            **operand_arguments("large", large),
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
