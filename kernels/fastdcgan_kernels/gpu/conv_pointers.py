"""Convolutions as implicit GEMMs that gather: nothing is unfolded, the padding is never stored.
Loads are by pointers, which run on every target and take every number of channels.

A layer joins a small side [N, P, Q, CS] and a large side [N, H, W, CL], both NHWC in memory, by
K x K taps; its weight is [CS, K, K, CL] in memory, whichever PyTorch layer it comes from. Small
pixel (p, q) meets large pixel (p * STRIDE - PAD + kh, q * STRIDE - LEFT + kw) at tap (kh, kw).

convolution             large to small: Conv2d's output, ConvTranspose2d's input gradient.
transposed convolution  small to large: ConvTranspose2d's output, Conv2d's input gradient. With
                        STRIDE 2 the output falls into 4 phases (r, s), each a convolution by every
                        other tap: of a 4x4 kernel 2x2, of a 5x5 kernel 3x3, 3x2, 2x3 and 2x2. From
                        1x1 pixels to K x K it falls into K x K phases of one tap. A place is one
                        pixel of each phase.

Taps and phases are constants of the layer (Shape), so that each has a kernel of its own.

Not here: which tile; the layers with a three-channel side (conv_image.py); the weight's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Tile, cdiv
from .partials import finish, join, nothing, place_of, turns_of
from .tile import Epilogue, Operand, Result, gather_launch, gather_sum, is_there, of_group, pixels

# isort: split
from .tile import store_pixels


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool, tile: Tile,
    epilogue: Epilogue = Epilogue(), groups: int = 1, precision: str = "ieee",
) -> Result:  # fmt: skip
    """The convolution with its epilogue; `weight` [CS, CL, K, K] in the dtype of the source. The
    result's tiles are those of its rows, phase by phase."""
    shape = geometry.shape(transposed)
    rows = geometry.N // groups * shape.P * shape.Q
    launch, result = gather_launch(
        gather_pointers, {"x": source.loaded, "w": weight}, cdiv(rows, tile.rows), source,
        geometry, transposed, tile, epilogue, groups, precision,
    )  # fmt: skip
    launch.run(weight.device)
    return result()


@triton.jit(do_not_specialize=["images"])
def gather_pointers(
    x,  # Loaded: the side that is read, NHWC; [3, groups, CI] coefficients
    w,  # [CS, K, K, CL], dtype of x
    out,  # the side that is written, NHWC; with SPLIT > 1 fp32 [SPLIT, like that]
    end,  # Stored, like out
    groups, images,  # N / groups
    x_slope, slope, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    ONE: tl.constexpr,  # tile a program
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (programs * column tiles, groups, SPLIT). Rows are places of a group; each phase of
    them is a tile."""
    PHASES: tl.constexpr = S.PHASE * S.PHASE
    at = place_of(S.CO, BLOCK_N)
    split = tl.program_id(2)
    own = nothing(BLOCK_N)
    tiles = tl.cdiv(images * (S.P * S.Q), BLOCK_M) * PHASES
    for turn in range(turns_of(at.program, at.programs, tiles, ONE)):
        tile = at.program + turn * at.programs
        r, s = tile % PHASES // S.PHASE, tile % S.PHASE
        n, p, q, row_mask = pixels(tile // PHASES, at.group, images, S, BLOCK_M)
        if S.RAGGED:
            row_mask &= is_there(p, q, r, s, S)
        acc = gather_sum(
            of_group(x, at.group, S.CI), x_slope, groups * S.CI, w, n, p, q, row_mask, r, s,
            at.channel, at.channel_mask, split, S, PROLOGUE, X_ACTIVATION, SPLIT, BLOCK_M, BLOCK_N,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        found = store_pixels(
            acc, out, n, p, q, r, s, row_mask, at, end, slope, groups, images, split, S, SPLIT,
            HAS_BIAS, EPILOGUE, ACTIVATION,
        )  # fmt: skip
        own = join(own, found, EPILOGUE)
    finish(own, end, at, groups, S.CO, EPILOGUE)
