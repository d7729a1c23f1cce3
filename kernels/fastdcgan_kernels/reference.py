"""The blocks in plain PyTorch: what a fused kernel must compute, on any device and dtype.
Not here: anything fast, and any state; the caller owns weights and running buffers.

Letters: N images, CI and CO input and output channels, H x W and P x Q input and output pixels,
KH x KW taps. Outputs are channels_last; inputs may have any strides. Gradients of every order are
those of the PyTorch functions called.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "leaky_relu", "tanh", "none"]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int,
    padding: int,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
) -> Tensor:
    """act(gamma * (y - mean) / sqrt(var + eps) + beta) with y = conv2d(x, weight) + bias.

    In training mean and var are those of y over N, P and Q (var biased), and the running buffers
    move in place as nn.BatchNorm2d's do: running += momentum * (new - running), with the unbiased
    variance. Otherwise mean and var are the running buffers.

    Args:
        x: input, (N, CI, H, W).
        weight: filters, (CO, CI, KH, KW).
        bias: (CO,), or None.
        gamma, beta: scale and shift, (CO,), or None for 1 and 0.
        running_mean, running_var: (CO,). None, in training only: no statistics are kept.
        stride, padding: of the convolution, in pixels, alike in both directions.
        training: normalise with the batch's statistics.
        momentum: share of the new value in the running buffers. For a module's momentum of None,
            the module passes 1 / num_batches_tracked.
        eps: added to the variance.
        activation: "relu", "leaky_relu", "tanh" or "none".
        slope: of "leaky_relu" below 0; the others do not read it. Default 0.

    Returns:
        (N, CO, P, Q), channels_last.

    Raises:
        ValueError: for another activation, or in training with one value a channel.
    """
    y = F.conv2d(x, weight, bias, stride, padding)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
    return _finish(y, activation, slope)


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int,
    padding: int,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
) -> Tensor:
    """As `conv_bn_act`, with y = conv_transpose2d(x, weight) + bias.

    Args:
        weight: filters, (CI, CO, KH, KW).
        Others: as in `conv_bn_act`.

    Returns:
        (N, CO, P, Q), channels_last, with P = (H - 1) * stride - 2 * padding + KH.

    Raises:
        ValueError: as in `conv_bn_act`.
    """
    y = F.conv_transpose2d(x, weight, bias, stride, padding)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
    return _finish(y, activation, slope)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    activation: Activation,
    slope: float = 0.0,
) -> Tensor:
    """act(conv2d(x, weight) + bias); arguments, result and errors as in `conv_bn_act`."""
    return _finish(F.conv2d(x, weight, bias, stride, padding), activation, slope)


def conv_transpose_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    activation: Activation,
    slope: float = 0.0,
) -> Tensor:
    """act(conv_transpose2d(x, weight) + bias); else as in `conv_transpose_bn_act`."""
    return _finish(F.conv_transpose2d(x, weight, bias, stride, padding), activation, slope)


def _finish(y: Tensor, activation: Activation, slope: float) -> Tensor:
    if activation == "relu":
        y = F.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, slope)
    elif activation == "tanh":
        y = torch.tanh(y)
    elif activation != "none":
        raise ValueError(
            f'activation={activation!r} was given; give "relu", "leaky_relu", "tanh" or "none"'
        )
    return y.contiguous(memory_format=torch.channels_last)
