"""Dropout on a CPU as an operator: the mask is made from a seed, forward and backward, and is never
held. Not here: when it is used (modules/dropout.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution import call

LEVELS = 1 << 16  # an element's random bits are 16
DTYPES = (torch.float32, torch.bfloat16)


def kept_of(p: float) -> int:
    """Of `LEVELS` values of an element's bits how many keep it."""
    return round((1 - p) * LEVELS)


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with each element times 0 or LEVELS / kept_of(p), whose mean is 1 to the last bit of p;
    float32 or bfloat16; seed: one int64. Strides are those of torch.empty_like."""
    out = torch.empty_like(x)
    if x.stride() != out.stride():
        x = out.copy_(x)
    kept = kept_of(p)
    scale = LEVELS / kept if kept else 0.0
    call("dropout", x, seed, out, x.numel(), kept, scale, x.dtype == torch.bfloat16)
    return out


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    # Elements are told by where they are in memory, so g lies there as the output does.
    if g.stride() != ctx.strides:
        g = torch.empty_strided(g.shape, ctx.strides, dtype=g.dtype).copy_(g)
    return dropout(g, *ctx.saved_tensors, ctx.p), None, None


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.strides = output.stride()
    ctx.save_for_backward(seed)


dropout = torch.library.custom_op(
    "fastdcgan::cpu_dropout",
    _dropout,
    mutates_args=(),
    schema="(Tensor x, Tensor seed, float p) -> Tensor",
)
dropout.register_fake(lambda x, seed, p: torch.empty_like(x))
dropout.register_autograd(_backward, setup_context=_setup)
