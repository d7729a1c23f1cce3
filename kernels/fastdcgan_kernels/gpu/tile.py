"""What the kernel families share. First, on the host: operands, epilogues and results as named
tensors, how they become a kernel's arguments, and launches that two families make. Then, in Triton:
activations, what is done to an operand as it is loaded (prologues) and to a result before it is
stored (epilogues), where a pixel is, the products of a convolution by pointers, and the sum of a
sum's parts.

Coefficients of a normalisation are one fp32 tensor [3, groups, C]: mean, scale, shift, meaning
z = scale * (y - mean) + shift. That form, and not scale * y + (shift - mean * scale), is used
everywhere: it does not cancel where |mean| is far above the standard deviation, and every kernel
that forms z forms the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import Geometry, Tile, cdiv, empty
from .launch import Launch
from .partials import KINDS, MergedStatistics, MergedSums, Partial, rows_of, tickets

# isort: split
from .partials import finish, join, moments, nothing, place_of


class Loaded(NamedTuple):
    """An operand, as a kernel takes it. A tensor that is not read is some other: no None there."""

    value: Any  # elements in storage dtype
    aux: Any  # like value; read by the prologues normgrad and actgrad
    coef: Any  # [3, groups, C] fp32; read by activate and normgrad


class Stored(NamedTuple):
    """What an epilogue reads and writes besides the result, as a kernel takes it."""

    bias: Any  # [C]; read where HAS_BIAS
    aux: Any  # like the result: raw y, for gradient; act(z), for actgrad
    coef: Any  # [3, groups, C] fp32, of aux; for gradient
    partials: Any  # [2, groups, rows, C] fp32; for statistics and gradient
    counts: Any  # [column tiles, groups, rows] fp32; for statistics
    merged: Any  # MergedStatistics or MergedSums; (): partials are left as they are


@dataclass(frozen=True)
class Operand:
    """A tensor and what happens to it as it is loaded (`transform`)."""

    value: Tensor
    prologue: str = "none"
    aux: Tensor | None = None
    coef: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0

    @property
    def loaded(self) -> Loaded:
        """As a kernel's argument."""
        value, aux, coef = self.value, self.aux, self.coef
        return Loaded(value, value if aux is None else aux, value if coef is None else coef)


@dataclass(frozen=True)
class Epilogue:
    """What happens to a result before it is stored (`store_tile`). `aux`: raw y, for "gradient";
    act(z), for "actgrad". `merged`: what the partials of statistics or gradient become, in the same
    launch; None: they are left as they are."""

    kind: str = "store"
    bias: Tensor | None = None
    aux: Tensor | None = None
    coef: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0
    merged: MergedStatistics | MergedSums | None = None

    def programs(self, tiles: int, groups: int, device: torch.device) -> int:
        """Programs among which a group's tiles of the same channels are dealt."""
        return rows_of(tiles, groups, device) if self.kind in KINDS else tiles

    def result(self, out: Tensor, groups: int, programs: int, column_tiles: int) -> Result:
        """`out` with room for what the epilogue makes, by so many programs of each group and each
        column tile."""
        partials = counts = None
        if self.kind in KINDS:
            planes = 1 if self.kind == "column" else 2
            shape = planes, groups, programs, out.shape[1]
            partials = out.new_empty(shape, dtype=torch.float32)
        if self.kind == "statistics":
            counts = out.new_empty((column_tiles, groups, programs), dtype=torch.float32)
        return Result(out, partials, counts)

    def arguments(self, result: Result, column_tiles: int) -> dict[str, Any]:
        """The part of a kernel's arguments that `store_tile` and `finish` read."""
        tensors = (self.bias, self.aux, self.coef, result.partials, result.counts)
        bias, aux, coef, partials, counts = (result.value if t is None else t for t in tensors)
        merged: Any = ()
        if self.merged is not None:
            merged = self.merged._replace(tickets=tickets(result.value.device, column_tiles))
        return {
            "end": Stored(bias, aux, coef, partials, counts, merged), "slope": float(self.slope),
            "HAS_BIAS": self.bias is not None, "EPILOGUE": self.kind, "ACTIVATION": self.activation,
        }  # fmt: skip


@dataclass(frozen=True)
class Result:
    """value: the stored tensor. partials [2, groups, rows, C] and counts [column tiles, groups,
    rows], fp32, where the epilogue makes them (counts only for statistics)."""

    value: Tensor
    partials: Tensor | None = None
    counts: Tensor | None = None


def parts_like(out: Tensor, parts: int) -> Tensor:
    """Where `parts` of a sum like `out` go, fp32; `out` itself if it is one."""
    return out if parts == 1 else out.new_empty((parts, out.numel()), dtype=torch.float32)


def reduce(parts: Tensor, out: Tensor, epilogue: Epilogue = Epilogue(), groups: int = 1) -> Result:
    """Sum fp32 parts [splits, out.numel()] in a fixed order, then the epilogue, into `out`, whose
    memory is rows of channels; the rows of a group are together."""
    splits, elements, columns, block_m = parts.shape[0], out.numel() // groups, out.shape[1], 32
    flat = epilogue.kind == "store" and epilogue.bias is None
    if flat:  # channels do not matter: full rows, however few there are
        columns = max(columns, min(64, elements & -elements))
    block_n = min(64, max(16, triton.next_power_of_2(columns)))
    # 4096 values at a time. Many parts of a small sum are the parallel work that there is.
    block_s = min(triton.next_power_of_2(splits), 64 if flat else 4096 // (block_m * block_n))
    if flat:
        block_m = min(block_m, 4096 // (block_s * block_n))
    rows = elements // columns
    column_tiles = cdiv(columns, block_n)
    programs = epilogue.programs(cdiv(rows, block_m), groups, out.device)
    result = epilogue.result(out, groups, programs, column_tiles)
    Launch(
        reduce_splits, (programs * column_tiles, groups), {
            "parts": parts, "out": out, **epilogue.arguments(result, column_tiles),
            "groups": groups, "rows": rows, "C": columns, "SPLITS": splits, "BLOCK_S": block_s,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        }, warps=8 if flat else 4).run(out.device)  # fmt: skip
    return result


def gather_launch(
    kernel: Any, loads: dict[str, Any], row_tiles: int, source: Operand, geometry: Geometry,
    transposed: bool, tile: Tile, epilogue: Epilogue, groups: int, precision: str,
) -> tuple[Launch, Callable[[], Result]]:  # fmt: skip
    """A convolution by `kernel` (gather_pointers or gather_descriptors) with these loads, of so
    many tiles of a group's places; and what gives its result once it has run."""
    g, shape = geometry, geometry.shape(transposed)
    out = empty(g.N, shape.CO, shape.HO, shape.WO, source.value)
    store, whole = parts_like(out, tile.split), tile.split == 1
    now = epilogue if whole else Epilogue()
    column_tiles = cdiv(shape.CO, tile.columns)
    tiles = row_tiles * shape.PHASE**2
    programs = now.programs(tiles, groups, out.device)
    result = now.result(store, groups, programs, column_tiles)
    launch = Launch(
        kernel, (programs * column_tiles, groups, tile.split), {
            **loads, "out": store, **now.arguments(result, column_tiles), "groups": groups,
            "images": g.N // groups, "x_slope": float(source.slope), "S": shape,
            "PROLOGUE": source.prologue,
            "X_ACTIVATION": source.activation, "SPLIT": tile.split, "ONE": programs == tiles,
            "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
            "PRECISION": precision,
        }, tile.warps, tile.stages)  # fmt: skip
    return launch, lambda: result if whole else reduce(store, out, epilogue, groups)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """act(z) in fp32; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "tanh":
        # By exp of a negative number, which cannot overflow; odd, so the sign is put back.
        e = tl.exp(-2.0 * tl.abs(z))
        t = (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0, -t, t)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    elif ACTIVATION == "elu":
        z = tl.where(z > 0, z, slope * expm1(-tl.abs(z)))
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "gelu":
        z = z * normal_cdf(z)
    return z


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), by exp of a negative number, which cannot overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def expm1(z):
    """exp(z) - 1 for z <= 0. Near 0, where the difference loses digits, by Taylor's series: from
    -0.25 on the terms after z^6 are below 5e-8 of the sum."""
    near = tl.maximum(z, -0.25, propagate_nan=tl.PropagateNan.ALL)
    series = 1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))
    series = near * (1.0 + near * (1 / 2 + near * series))
    return tl.where(z < -0.25, tl.exp(z) - 1.0, series)


@triton.jit
def normal_cdf(z):
    """(1 + erf(z / sqrt(2))) / 2."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def derivative_at(z, slope, ACTIVATION: tl.constexpr):
    """act'(z) from z."""
    if ACTIVATION == "silu":
        s = sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        d = normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        d = activation_derivative(activate(z, slope, ACTIVATION), slope, ACTIVATION)
    return d


@triton.jit
def activation_derivative(o, slope, ACTIVATION: tl.constexpr):
    """act'(z) from the output o = act(z), of activations that allow it (reference.OF_INPUT does not
    name them). At 0 it is PyTorch's: 0 for relu, slope for leaky_relu and elu, for which the sign
    of o is that of z, so slope must not be negative."""
    tl.static_assert(ACTIVATION != "silu" and ACTIVATION != "gelu", "see derivative_at")
    if ACTIVATION == "relu":
        d = tl.where(o > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(o > 0, 1.0, slope)
    elif ACTIVATION == "tanh":
        d = 1.0 - o * o
    elif ACTIVATION == "sigmoid":
        d = o * (1.0 - o)
    elif ACTIVATION == "elu":
        d = tl.where(o > 0, 1.0, o + slope)
    else:
        d = o * 0.0 + 1.0
    return d


@triton.jit
def coefficients(coef, plane, channels, mask):
    """mean, scale and shift of these channels; coef points at the group's row of the first plane,
    plane = groups * C elements from one plane to the next."""
    mean = tl.load(coef + channels, mask=mask, other=0.0)
    scale = tl.load(coef + plane + channels, mask=mask, other=0.0)
    shift = tl.load(coef + 2 * plane + channels, mask=mask, other=0.0)
    return mean, scale, shift


@triton.jit
def transform(
    value, aux, mean, scale, shift, slope, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One loaded tile, in fp32, as its consumer wants it:

    activate   act(scale * (value - mean) + shift)   a producer's raw output, normalised here
    normgrad   value + scale * (aux - mean) + shift  gradient through batch statistics; aux = y
    actgrad    value * act'(aux)                     gradient of an activation; aux: its output
    """
    value = value.to(tl.float32)
    if PROLOGUE == "activate":
        value = activate(scale * (value - mean) + shift, slope, ACTIVATION)
    elif PROLOGUE == "normgrad":
        value = value + (scale * (aux.to(tl.float32) - mean) + shift)
    elif PROLOGUE == "actgrad":
        value = value * activation_derivative(aux.to(tl.float32), slope, ACTIVATION)
    return value


@triton.jit
def of_group(x, group, C: tl.constexpr):
    """An operand (Loaded) whose coefficients start at this group's row."""
    return Loaded(x.value, x.aux, x.coef + group * C)


@triton.jit
def pixels(block, group, images, S: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a group's places: (image, int64, among those of all groups, row, column, mask),
    each [BLOCK]."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    mask = row < images * (S.P * S.Q)
    q = row % S.Q
    p = (row // S.Q) % S.P
    return (group * images + row // (S.P * S.Q)).to(tl.int64), p, q, mask


@triton.jit
def load_operand(
    x,  # Loaded, `of_group`
    slope,
    plane,  # groups * C: from one plane of the coefficients to the next
    offsets,  # [A, B] int64, the same for value and aux
    mask,  # [A, B]
    channels,  # [1, B] or [A, 1]: channel of each element
    channel_mask,  # like channels
    PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile [A, B] through its prologue, in storage dtype; 0 outside the mask, also after it:
    padding is 0 and act(shift) is not."""
    tile = tl.load(x.value + offsets, mask=mask, other=0.0)
    second = tile
    if PROLOGUE != "none" and PROLOGUE != "activate":
        second = tl.load(x.aux + offsets, mask=mask, other=0.0)
    return apply(x, slope, plane, tile, second, mask, channels, channel_mask, PROLOGUE, ACTIVATION)


@triton.jit
def apply(
    x, slope, plane, tile, second, mask, channels, channel_mask, PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What `load_operand` does with a tile [A, B] and, for normgrad and actgrad, one of aux."""
    if PROLOGUE != "none":
        mean, scale, shift = 0.0, 0.0, 0.0
        if PROLOGUE != "actgrad":
            mean, scale, shift = coefficients(x.coef, plane, channels, channel_mask)
        changed = transform(tile, second, mean, scale, shift, slope, PROLOGUE, ACTIVATION)
        tile = tl.where(mask, changed, 0.0).to(tile.dtype)
    return tile


@triton.jit
def store_gradient(
    result, out, offsets, mask, channels, channel_mask, y, coef, plane, slope,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr = 0,
):  # fmt: skip
    """With result d act(z), z = scale * (y - mean) + shift, and dz = result * act'(z): stores
    scale * dz; returns sum dz and sum dz * (y - mean) of each channel."""
    mean, scale, shift = coefficients(coef, plane, channels, channel_mask)
    mean, shift = tl.expand_dims(mean, ROWS), tl.expand_dims(shift, ROWS)
    scale = tl.expand_dims(scale, ROWS)
    apart = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mean
    derivative = derivative_at(scale * apart + shift, slope, ACTIVATION)
    dz = tl.where(mask, result * derivative, 0.0)
    tl.store(out + offsets, (scale * dz).to(out.dtype.element_ty), mask=mask)
    return tl.sum(dz, axis=ROWS), tl.sum(dz * apart, axis=ROWS)


@triton.jit
def store_tile(
    result,  # fp32 [BM, BN]; or [BN, BM], where ROWS is 1
    out,  # pointer
    offsets,  # int64 like result, the same for out and aux
    row_mask,  # [BM]
    at,  # Place: `channel` [BN] is the output channel of each column
    end, slope,  # Stored; `aux` like out
    groups, C: tl.constexpr,  # channels of out
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr = 0,  # the axis that the rows are along
):  # fmt: skip
    """One tile of a result to memory:

    store       act(result + bias)
    actgrad     result is d act(z), and end.aux is act(z): dz = result * act'(z)
    statistics  y = result + bias; of each channel mean and M2 of y as rounded for storage
    gradient    result is d act(z), z = scale * (end.aux - mean) + shift: dz = result * act'(z);
                scale * dz; of each channel sum dz and sum dz * (end.aux - mean)

    Returns the Partial of this tile, of no use with other epilogues.
    """
    channels, channel_mask = at.channel, at.channel_mask
    coef = end.coef + at.group * C
    plane = groups * C
    there = tl.expand_dims(row_mask, 1 - ROWS)
    mask = there & tl.expand_dims(channel_mask, ROWS)
    if HAS_BIAS:
        bias = tl.load(end.bias + channels, mask=channel_mask, other=0.0).to(tl.float32)
        result += tl.expand_dims(bias, ROWS)
    count = tl.sum(row_mask.to(tl.float32), axis=0)
    first, second = count, count
    if EPILOGUE == "store":
        stored = activate(result, slope, ACTIVATION).to(out.dtype.element_ty)
        tl.store(out + offsets, stored, mask=mask)
    elif EPILOGUE == "actgrad":
        o = tl.load(end.aux + offsets, mask=mask, other=0.0).to(tl.float32)
        result *= activation_derivative(o, slope, ACTIVATION)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    elif EPILOGUE == "statistics":
        stored = result.to(out.dtype.element_ty)
        tl.store(out + offsets, stored, mask=mask)
        first, second = moments(stored.to(tl.float32), there, count, ROWS)
    elif EPILOGUE == "gradient":
        first, second = store_gradient(
            result, out, offsets, mask, channels, channel_mask, end.aux, coef, plane, slope,
            ACTIVATION, ROWS,
        )  # fmt: skip
    return Partial(count, first, second)


@triton.jit
def store_pixels(
    acc,  # as `store_tile`: rows are small pixels, or the pixels of one phase of the large side
    out,
    n, p, q, r, s,  # [BM]: image, row and column of the place; phase
    row_mask,
    at,  # Place
    end, slope, groups, images, split, S: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr = 0,
):  # fmt: skip
    """`store_tile` of a tile of a convolution; with SPLIT > 1 to this part's copy of `out`."""
    if S.TRANSPOSED:
        out_row = (n * S.HO + (S.PHASE * p + r)) * S.WO + (S.PHASE * q + s)
    else:
        out_row = (n * S.HO + p) * S.WO + q
    offsets = tl.expand_dims(out_row * S.CO, 1 - ROWS) + tl.expand_dims(at.channel, ROWS)
    if SPLIT > 1:
        offsets += split * (groups * images).to(tl.int64) * (S.HO * S.WO * S.CO)
    return store_tile(
        acc, out, offsets, row_mask, at, end, slope, groups, S.CO, HAS_BIAS, EPILOGUE, ACTIVATION,
        ROWS,
    )  # fmt: skip


@triton.jit
def is_there(p, q, r, s, S: tl.constexpr):
    """Of each place whether its pixel of phase (r, s) is one of the large side's."""
    return (S.PHASE * p + r < S.HO) & (S.PHASE * q + s < S.WO)


@triton.jit
def taps_of(r, S: tl.constexpr, PAD: tl.constexpr):
    """Along one axis, of the pixels of phase r of a transposed convolution, PAD of which are cut
    off: how many taps they have, and where the first that they read lies from their place. The
    next lies one place further, and so on; `row_of` gives the kernel's rows."""
    taps, top = S.SIDE, 0
    if S.PHASE == S.STRIDE and S.STRIDE == 1:
        top = PAD - S.K + 1
    elif S.PHASE == S.STRIDE:
        # h = 2 * place + r meets the rows kh = h + PAD - 2 * p, of which the least is 0 or 1.
        least, at = r, PAD // 2
        if PAD % 2 == 1:
            least, at = 1 - r, PAD // 2 + r
        if S.UNEVEN:
            taps = S.SIDE - least
        top = at - taps + 1
    return taps, top


@triton.jit
def row_of(tap, taps, r, S: tl.constexpr, PAD: tl.constexpr):
    """The kernel's row of a tap, of `taps` (`taps_of`). In this order of terms, constants first,
    both Tritons keep the DCGAN's kernels in registers."""
    row = S.STRIDE * (taps - 1) - S.STRIDE * tap
    if S.PHASE != S.STRIDE:  # from one pixel
        row = r
    elif S.STRIDE == 2 and PAD % 2 == 1:
        row = S.STRIDE * (taps - 1) + 1 - S.STRIDE * tap - r
    elif S.STRIDE == 2:
        row += r
    return row


@triton.jit
def gather_sum(
    x, x_slope,  # Loaded, `of_group`
    plane,  # groups * channels of x
    w,
    n, p, q, row_mask,  # [BLOCK_M]: as of `pixels`
    r, s,  # phase
    channel, channel_mask,  # [BLOCK_N]: of out
    split, S: tl.constexpr, PROLOGUE: tl.constexpr, X_ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] fp32: a tile of the convolution, or of one part of SPLIT of its sum.
    Loads by pointers, which the compiler turns into asynchronous copies."""
    CHUNKS: tl.constexpr = (S.CI + BLOCK_K - 1) // BLOCK_K

    down, across = S.SIDE, S.SIDE
    if S.TRANSPOSED:
        taps, from_p = taps_of(r, S, S.PAD)
        side, from_q = taps_of(s, S, S.LEFT)
        top, left = p + from_p, q + from_q
        if S.UNEVEN:
            down, across = taps, side
    else:
        top, left = p * S.STRIDE - S.PAD, q * S.STRIDE - S.LEFT
    corner = ((n * S.HI + top) * S.WI + left) * S.CI
    steps = down * across * CHUNKS
    share = (steps + SPLIT - 1) // SPLIT

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(split * share, min(split * share + share, steps)):
        tap = step // CHUNKS
        c = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_mask = c < S.CI
        th, tw = tap // across, tap % across
        if S.TRANSPOSED:
            kh, kw = row_of(th, down, r, S, S.PAD), row_of(tw, across, s, S, S.LEFT)
        else:
            kh, kw = th, tw
        h, v = top + th, left + tw
        inside = row_mask & (h >= 0) & (h < S.HI) & (v >= 0) & (v < S.WI)
        a = load_operand(
            x, x_slope, plane, (corner + (th * S.WI + tw) * S.CI)[:, None] + c[None, :],
            inside[:, None] & c_mask[None, :], c[None, :], c_mask[None, :], PROLOGUE, X_ACTIVATION,
        )  # fmt: skip
        if S.TRANSPOSED:
            w_offsets = (c * (S.K * S.K * S.CO) + (kh * S.K + kw) * S.CO)[:, None]
            w_offsets += channel[None, :]
        else:
            w_offsets = (kh * S.K + kw) * S.CI + c[:, None]
            w_offsets += (channel * (S.K * S.K * S.CI))[None, :]
        b = tl.load(w + w_offsets, mask=c_mask[:, None] & channel_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_at(at, tile, rows, C: tl.constexpr, BLOCK_M: tl.constexpr):
    """A row tile of this Place's group: its mask [BLOCK_M], the offsets of its values in [groups,
    rows, C], [BLOCK_M, BLOCK_N] int64, and their mask."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    offsets = ((at.group.to(tl.int64) * rows + row) * C)[:, None] + at.channel[None, :]
    return row_mask, offsets, row_mask[:, None] & at.channel_mask[None, :]


@triton.jit(do_not_specialize=["rows"])
def reduce_splits(
    parts,  # [SPLITS, groups, rows, C] fp32
    out,  # [groups, rows, C]
    end, groups, rows, slope, C: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Parts of a sum, BLOCK_S at a time and always in the same order, then the epilogue. By rows
    (`Place`)."""
    at = place_of(C, BLOCK_N)
    plane = (groups * rows).to(tl.int64) * C
    own = nothing(BLOCK_N)
    for tile in range(at.program, tl.cdiv(rows, BLOCK_M), at.programs):
        row_mask, offsets, mask = rows_at(at, tile, rows, C, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, SPLITS, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)[:, None, None]
            acc += tl.sum(
                tl.load(
                    parts + split * plane + offsets[None, :, :],
                    mask=(split < SPLITS) & mask[None, :, :], other=0.0,
                ), axis=0,
            )  # fmt: skip
        found = store_tile(
            acc, out, offsets, row_mask, at, end, slope, groups, C, HAS_BIAS, EPILOGUE, ACTIVATION
        )
        own = join(own, found, EPILOGUE)
    finish(own, end, at, groups, C, EPILOGUE)
