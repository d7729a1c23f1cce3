"""What a training step has besides its nets, as functions of tensors, each of them one launch: the
loss with its gradient, the cropping of images. They have no gradients of their own, and are for
devices that have kernels (`functional.runs_kernels`). Not here: the update of weights (adam.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels import reference
from fastdcgan_kernels.functional import runs_kernels
from fastdcgan_kernels.geometry import cdiv, empty
from fastdcgan_kernels.launch import Launch

BLOCK = 1024


def _kernel(name: str) -> Any:
    """One of jit/step.py's. Triton is imported when the first is wanted: some devices lack it."""
    from fastdcgan_kernels.jit import step

    return getattr(step, name)


def bce(
    logits: Tensor, targets: Tensor, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of sigmoid(logits), a mean over each of the groups, with its gradient.

    Args:
        logits: (groups * B,), any floating dtype: equal batches, one after the other.
        targets: (groups,), float32: what each batch is to be, 1 for "real".
        share: of this process in the global batch; everything returned is multiplied by it.
        scale: (), float32: the gradient is multiplied by it, too (fp16's loss scale). Default: 1.

    Returns:
        (1 + groups,) float32: the sum of the groups' losses, and the mean probability of each; and
        the gradient of that sum, in the shape and dtype of `logits`. By the twin in reference.py
        where there are no kernels, or for float64.
    """
    if logits.dtype == torch.float64 or not runs_kernels(logits.device):
        return reference.bce(logits, targets, share=share, scale=scale)
    groups = targets.shape[0]
    logits = logits.detach().contiguous()
    row = logits.new_empty(1 + groups, dtype=torch.float32)
    gradient = torch.empty_like(logits)
    Launch(
        _kernel("bce_rows"),
        (1,),
        {
            "logits": logits, "targets": targets, "scale": row if scale is None else scale,
            "row": row, "gradient": gradient, "count": logits.numel() // groups, "groups": groups,
            "share": float(share), "SCALED": scale is not None, "BLOCK": BLOCK,
        },
    ).run(logits.device)  # fmt: skip
    return row, gradient


def crop(
    images: Tensor,
    rows: Tensor,
    size: int,
    dtype: torch.dtype,
    *,
    corner: Sequence[Tensor] | None = None,
    flipped: Tensor | None = None,
) -> Tensor:
    """Squares of uint8 images as value / 127.5 - 1, in float32 and rounded once.

    Args:
        images: (n, H, W, C), contiguous.
        rows: (b,) int64: which images.
        size: side of the square in pixels.
        dtype: of the result, floating, at most 32 bits.
        corner: top and left pixel of each square, (b,) int64 each. Default: 0.
        flipped: (b,) int64, 1 where the square is turned from left to right. Default: nowhere.

    Returns:
        (b, C, size, size), channels_last.
    """
    b, (_, height, width, channels) = rows.shape[0], images.shape
    out = empty(b, channels, size, size, images, dtype)
    top, left = (rows, rows) if corner is None else (each.contiguous() for each in corner)
    Launch(
        _kernel("crop"),
        (cdiv(size * size * channels, BLOCK), b),
        {
            "images": images, "rows": rows, "top": top, "left": left,
            "flipped": rows if flipped is None else flipped.contiguous(), "out": out,
            "HEIGHT": height, "WIDTH": width, "C": channels, "SIZE": size,
            "MOVED": corner is not None, "FLIPPED": flipped is not None, "BLOCK": BLOCK,
        },
    ).run(images.device)  # fmt: skip
    return out
