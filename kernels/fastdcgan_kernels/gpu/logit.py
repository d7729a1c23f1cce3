"""Way back through a layer that makes one number of an image, and through the norm before it: outer
products with a column, no GEMMs. Not here: layers with more outputs (conv_*.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choice.geometry import cdiv
from .launch import Launch
from .tile import Operand, activate, activation_derivative, coefficients, reduce

COLUMNS = 16


def backward(g: Tensor, weight: Tensor, source: Operand, groups: int = 1) -> tuple[Tensor, Tensor]:
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
    Launch(
        logit_gradients, (cdiv(channels, COLUMNS), groups), {
            "g": g, "w": weight, "x": source.loaded, "out": out, "parts": parts, "groups": groups,
            "images": y.shape[0] // groups, "slope": float(source.slope), "C": channels,
            "ACTIVATION": source.activation, "BLOCK_M": 512, "BLOCK_N": COLUMNS,
        }, warps=8).run(out.device)  # fmt: skip
    if groups == 1:
        return out, parts[0]
    return out, reduce(parts, parts.new_empty((18, channels))).value


@triton.jit
def load_rows(
    g, w, x, group, groups, images, first, channel, channel_mask, slope, C: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows (image, tap) from `first` on of a group: where they are, their mask, the logit's
    gradient [BLOCK_M, 1], y - mean, act(z) and dz, 0 outside."""
    row = first + tl.arange(0, BLOCK_M)
    mask = (row < images * 16)[:, None] & channel_mask[None, :]
    n = (group * images + row // 16).to(tl.int64)
    offsets = (n * (16 * C) + row % 16 * C)[:, None] + channel[None, :]
    upstream = tl.load(g + n, mask=row < images * 16, other=0.0).to(tl.float32)[:, None]
    places = (row % 16 * C)[:, None] + channel[None, :]
    weight = tl.load(w + places, mask=mask, other=0.0).to(tl.float32)
    mean, scale, shift = coefficients(x.coef + group * C, groups * C, channel, channel_mask)
    apart = tl.load(x.value + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    o = activate(scale[None, :] * apart + shift[None, :], slope, ACTIVATION)
    dz = tl.where(mask, upstream * weight * activation_derivative(o, slope, ACTIVATION), 0.0)
    return offsets, mask, upstream, apart, o, dz


@triton.jit(do_not_specialize=["images"])
def logit_gradients(
    g,  # gradient of the logits, [N]
    w,  # [4, 4, C]
    x,  # Loaded: y [N, 4, 4, C], the layer's input is act(z), z = scale * (y - mean) + shift;
    # [5, groups, C] fp32: mean, scale, shift, 1 / sqrt(var + eps), count
    out,  # like y: its gradient, also through mean and variance
    parts,  # [groups, 18, C] fp32: gradients of w (its 16 taps), gamma and beta
    groups, images,  # N / groups
    slope, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (column tiles, groups). A program has all values of its channels, so it goes over them
    twice: for the sums, and with them. BLOCK_M is a multiple of 16."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    group = tl.program_id(1)

    s1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    gw = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    for first in range(0, images * 16, BLOCK_M):
        _, mask, upstream, apart, o, dz = load_rows(
            g, w, x, group, groups, images, first, channel, channel_mask, slope, C, ACTIVATION,
            BLOCK_M,
        )  # fmt: skip
        s1 += tl.sum(dz, axis=0)
        s2 += tl.sum(dz * apart, axis=0)
        features = tl.where(mask, upstream * o.to(x.value.dtype.element_ty).to(tl.float32), 0.0)
        gw += tl.sum(features.reshape(BLOCK_M // 16, 16, BLOCK_N), axis=0)

    row = group * C + channel
    scale = tl.load(x.coef + groups * C + row, mask=channel_mask, other=0.0)
    rstd = tl.load(x.coef + 3 * groups * C + row, mask=channel_mask, other=0.0)
    count = tl.load(x.coef + 4 * groups * C + row, mask=channel_mask, other=1.0)
    taps = tl.arange(0, 16)
    own = parts + group * (18 * C) + channel
    tl.store(own[None, :] + (taps * C)[:, None], gw, mask=(taps < 16)[:, None] & channel_mask)
    tl.store(own + 16 * C, rstd * s2, mask=channel_mask)
    tl.store(own + 17 * C, s1, mask=channel_mask)

    by_value = -scale * rstd * rstd * s2 / count
    by_mean = -scale * s1 / count
    for first in range(0, images * 16, BLOCK_M):
        offsets, mask, _, apart, _, dz = load_rows(
            g, w, x, group, groups, images, first, channel, channel_mask, slope, C, ACTIVATION,
            BLOCK_M,
        )  # fmt: skip
        dy = scale[None, :] * dz + (by_value[None, :] * apart + by_mean[None, :])
        tl.store(out + offsets, dy.to(out.dtype.element_ty), mask=mask)
