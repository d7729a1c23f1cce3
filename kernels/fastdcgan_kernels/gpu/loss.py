"""Binary cross-entropy on logits with its gradient, in one launch. Not here: its twin in plain
PyTorch, and which of them runs (functional.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

BLOCK = 1024


def bce(
    logits: Tensor, targets: Tensor, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `functional.bce`, whose kernel this launches: logits in 32 or 16 bits."""
    groups = targets.shape[0]
    logits = logits.detach().contiguous()
    row = logits.new_empty(1 + groups, dtype=torch.float32)
    gradient = torch.empty_like(logits)
    Launch(
        bce_rows,
        (1,),
        {
            "logits": logits, "targets": targets, "scale": row if scale is None else scale,
            "row": row, "gradient": gradient, "count": logits.numel() // groups, "groups": groups,
            "share": float(share), "SCALED": scale is not None, "BLOCK": BLOCK,
        },
    ).run(logits.device)  # fmt: skip
    return row, gradient


@triton.jit(do_not_specialize=["count"])
def bce_rows(
    logits,  # [groups, count]
    targets,  # [groups] fp32
    scale,  # [] fp32; read where SCALED
    row,  # [1 + groups] fp32: the groups' mean losses added, and each one's mean sigmoid
    gradient,  # like logits: of the losses' sum, times share and scale
    count, groups,
    share,  # row and gradient are multiplied by it
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Binary cross-entropy on logits, BLOCK of them at a time and always in the same order. Grid:
    (1,)."""
    factor = share / count
    back = factor
    if SCALED:
        back = factor * tl.load(scale)
    total = 0.0
    for group in range(groups):
        target = tl.load(targets + group)
        loss = tl.zeros((BLOCK,), dtype=tl.float32)
        probability = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mask = at < count
            z = tl.load(logits + group * count + at, mask=mask, other=0.0).to(tl.float32)
            e = tl.exp(-tl.abs(z))
            # log(1 + e) to e's own last digits (Kahan): what 1 + e rounds away is divided out.
            u = 1.0 + e
            log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
            p = tl.where(z >= 0, 1.0, e) / u
            loss += tl.where(mask, tl.maximum(z, 0.0) - z * target + log1p, 0.0)
            probability += tl.where(mask, p, 0.0)
            g = (p - target) * back
            to = gradient + group * count + at
            tl.store(to, g.to(gradient.dtype.element_ty), mask=mask)
        total += tl.sum(loss, axis=0)
        tl.store(row + 1 + group, tl.sum(probability, axis=0) * factor)
    tl.store(row, total * factor)
