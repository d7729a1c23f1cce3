"""Way back through a layer that makes one number of an image: its gradients are outer products with
a column, no GEMMs. Not here: layers with more outputs (gather.py, wgrad.py)."""

import triton
import triton.language as tl

from fastdcgan_kernels.jit.tile import load_operand, store_gradient


@triton.jit(do_not_specialize=["images"])
def logit_gradients(
    g,  # gradient of the logits, [N]
    w,  # [4, 4, C]
    y,  # [N, 4, 4, C]: the layer's input is act(z), z = scale * (y - mean) + shift
    coef,  # [3, groups, C] fp32
    out,  # like y: scale * dz
    partials,  # [2, groups, 16, C] fp32: sum dz, sum dz * (y - mean), of each tap
    gw,  # like w; written where WEIGHT
    groups,
    images,  # N / groups
    slope,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (16 taps * column tiles,), each over all images."""
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tap = tl.program_id(0) // COLUMN_TILES
    channel = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < C
    place = tap * C + channel
    weight = tl.load(w + place, mask=channel_mask, other=0.0).to(tl.float32)

    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for group in range(groups):
        s1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
        s2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, images, BLOCK_M):
            image = first + tl.arange(0, BLOCK_M)
            n = (group * images + image).to(tl.int64)
            upstream = tl.load(g + n, mask=image < images, other=0.0).to(tl.float32)[:, None]
            offsets = (n * (16 * C))[:, None] + place[None, :]
            mask = (image < images)[:, None] & channel_mask[None, :]
            if WEIGHT:
                features = load_operand(
                    y,
                    y,
                    coef + group * C,
                    groups * C,
                    offsets,
                    mask,
                    channel[None, :],
                    channel_mask[None, :],
                    slope,
                    "activate",
                    ACTIVATION,
                )
                acc += tl.sum(upstream * features.to(tl.float32), axis=0)
            dz, dz_apart = store_gradient(
                upstream * weight[None, :],
                out,
                offsets,
                mask,
                channel,
                channel_mask,
                y,
                coef + group * C,
                groups * C,
                slope,
                ACTIVATION,
            )
            s1 += dz
            s2 += dz_apart
        own = group * (16 * C) + place
        tl.store(partials + own, s1, mask=channel_mask)
        tl.store(partials + groups * (16 * C) + own, s2, mask=channel_mask)
    if WEIGHT:
        tl.store(gw + place, acc.to(gw.dtype.element_ty), mask=channel_mask)
