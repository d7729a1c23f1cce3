"""Way back through a layer that makes one number of an image, and through the norm before it: outer
products with a column, no GEMMs. Not here: layers with more outputs (gather.py, wgrad.py)."""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import activate, activation_derivative, coefficients


@triton.jit
def load_rows(
    g,
    w,
    y,
    coef,
    group,
    groups,
    images,
    first,
    channel,
    channel_mask,
    slope,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows (image, tap) from `first` on of a group: where they are, their mask, the logit's
    gradient [BLOCK_M, 1], y - mean, act(z) and dz, 0 outside."""
    row = first + tl.arange(0, BLOCK_M)
    mask = (row < images * 16)[:, None] & channel_mask[None, :]
    n = (group * images + row // 16).to(tl.int64)
    offsets = (n * (16 * C) + row % 16 * C)[:, None] + channel[None, :]
    upstream = tl.load(g + n, mask=row < images * 16, other=0.0).to(tl.float32)[:, None]
    places = (row % 16 * C)[:, None] + channel[None, :]
    weight = tl.load(w + places, mask=mask, other=0.0).to(tl.float32)
    mean, scale, shift = coefficients(coef + group * C, groups * C, channel, channel_mask)
    apart = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    o = activate(scale[None, :] * apart + shift[None, :], slope, ACTIVATION)
    dz = tl.where(mask, upstream * weight * activation_derivative(o, slope, ACTIVATION), 0.0)
    return offsets, mask, upstream, apart, o, dz


@triton.jit(do_not_specialize=["images"])
def logit_gradients(
    g,  # gradient of the logits, [N]
    w,  # [4, 4, C]
    y,  # [N, 4, 4, C]: the layer's input is act(z), z = scale * (y - mean) + shift
    coef,  # [5, groups, C] fp32: mean, scale, shift, 1 / sqrt(var + eps), count
    out,  # like y: its gradient, also through mean and variance
    parts,  # [groups, 18, C] fp32: gradients of w (its 16 taps), gamma and beta
    groups,
    images,  # N / groups
    slope,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
            g, w, y, coef, group, groups, images, first, channel, channel_mask, slope, C,
            ACTIVATION, BLOCK_M,
        )  # fmt: skip
        s1 += tl.sum(dz, axis=0)
        s2 += tl.sum(dz * apart, axis=0)
        features = tl.where(mask, upstream * o.to(y.dtype.element_ty).to(tl.float32), 0.0)
        gw += tl.sum(features.reshape(BLOCK_M // 16, 16, BLOCK_N), axis=0)

    row = group * C + channel
    scale = tl.load(coef + groups * C + row, mask=channel_mask, other=0.0)
    rstd = tl.load(coef + 3 * groups * C + row, mask=channel_mask, other=0.0)
    count = tl.load(coef + 4 * groups * C + row, mask=channel_mask, other=1.0)
    taps = tl.arange(0, 16)
    own = parts + group * (18 * C) + channel
    tl.store(own[None, :] + (taps * C)[:, None], gw, mask=(taps < 16)[:, None] & channel_mask)
    tl.store(own + 16 * C, rstd * s2, mask=channel_mask)
    tl.store(own + 17 * C, s1, mask=channel_mask)

    by_value = -scale * rstd * rstd * s2 / count
    by_mean = -scale * s1 / count
    for first in range(0, images * 16, BLOCK_M):
        offsets, mask, _, apart, _, dz = load_rows(
            g, w, y, coef, group, groups, images, first, channel, channel_mask, slope, C,
            ACTIVATION, BLOCK_M,
        )  # fmt: skip
        dy = scale[None, :] * dz + (by_value[None, :] * apart + by_mean[None, :])
        tl.store(out + offsets, dy.to(out.dtype.element_ty), mask=mask)
