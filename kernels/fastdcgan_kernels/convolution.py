"""PyTorch's own convolutions, with padding that may differ from side to side, and their gradients.
Not here: any kernel of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: Sequence[int],
    transposed: bool,
) -> Tensor:  # fmt: skip
    """conv2d of x with this padding, or conv_transpose2d cut by it, and the bias; `sides`: as
    `sides_of` a padding."""
    pad, more = _native(sides, stride, transposed)
    top, left, bottom, right = sides
    if pad is None:
        if not transposed:
            return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride)
        y = F.pad(F.conv_transpose2d(x, weight, None, stride), (-left, -right, -top, -bottom))
        return y if bias is None else y + bias[:, None, None].to(y.dtype)
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, pad, more)
    return F.conv2d(x, weight, bias, stride, pad)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, sides: Sequence[int], transposed: bool,
    need_x: bool = True, need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Those of x and of the weight from that of `convolve`'s result."""
    pad, more = _native(sides, stride, transposed)
    top, left, bottom, right = sides
    if pad is None and transposed:
        dy = F.pad(dy, (left, right, top, bottom))
    elif pad is None:
        x = F.pad(x, (left, right, top, bottom))
    gx, gw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride] * 2, pad or (0, 0), [1, 1], transposed, more, 1,
        [need_x, need_weight, False],
    )  # fmt: skip
    if pad is None and not transposed and gx is not None:
        gx = F.pad(gx, (-left, -right, -top, -bottom))
    return gx, gw


def _native(
    sides: Sequence[int], stride: int, transposed: bool
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """padding and output_padding that PyTorch has for these sides; None: it has none."""
    top, left, bottom, right = sides
    more = (top - bottom, left - right)
    fits = all(0 <= n < stride for n in more) if transposed else more == (0, 0)
    return ((top, left), more) if fits and min(top, left) >= 0 else (None, (0, 0))
