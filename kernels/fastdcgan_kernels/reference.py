"""The blocks in plain PyTorch: what a fused kernel must compute, on any device and dtype.
Not here: anything fast, and any state; the caller owns weights and running buffers.

First the blocks as users call them, then the pieces that the operators of ops.py are made of.

Letters: N images, CI and CO input and output channels, H x W and P x Q input and output pixels,
KH x KW taps. Outputs are channels_last; inputs may have any strides. Gradients of every order are
those of the PyTorch functions called.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
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
    momentum: float | Tensor,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
    sync: str = "",
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
        momentum: share of the new value in the running buffers, a float or a 0-dim tensor. For a
            module's momentum of None, the module passes 1 / num_batches_tracked.
        eps: added to the variance.
        activation: "relu", "leaky_relu", "tanh" or "none".
        slope: of "leaky_relu" below 0; the others do not read it. Default 0.
        sync: name of the process group whose batches are normalised as one (SyncBatchNorm);
            "": none. Default "".

    Returns:
        (N, CO, P, Q), channels_last.

    Raises:
        ValueError: for another activation, or in training with one value a channel.
    """
    y = F.conv2d(x, weight, bias, stride, padding)
    return _normalise(
        y, gamma, beta, running_mean, running_var, training, momentum, eps, activation, slope, sync
    )


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
    momentum: float | Tensor,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
    sync: str = "",
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
    return _normalise(
        y, gamma, beta, running_mean, running_var, training, momentum, eps, activation, slope, sync
    )


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


def _normalise(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float | Tensor, eps: float,
    activation: Activation, slope: float, sync: str,
) -> Tensor:  # fmt: skip
    check_activation(activation)
    batch = training or running_mean is None or running_var is None
    if not batch or not (sync or isinstance(momentum, Tensor)):
        y = F.batch_norm(y, running_mean, running_var, gamma, beta, batch, float(momentum), eps)
        return _finish(y, activation, slope)
    if not sync:
        check_values_per_channel(y.shape)
    stats = statistics(y, sync=sync)
    if training and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, stats, momentum)
    coef = coefficients(stats, gamma, beta, eps)
    return activate(y, coef, activation, slope).contiguous(memory_format=torch.channels_last)


def _finish(y: Tensor, activation: Activation, slope: float) -> Tensor:
    check_activation(activation)
    y = act(y, activation, slope)
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


def check_activation(activation: str) -> None:
    """Refuse a name that is none of `Activation`."""
    if activation not in ("relu", "leaky_relu", "tanh", "none"):
        raise ValueError(
            f'activation={activation!r} was given; give "relu", "leaky_relu", "tanh" or "none"'
        )


def check_values_per_channel(shape: torch.Size, groups: int = 1) -> None:
    """Refuse batch statistics of a single value, in nn.BatchNorm2d's words; `shape`: that of the
    norm's input."""
    if shape[0] * shape[2] * shape[3] == groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )


def act(z: Tensor, activation: str, slope: float) -> Tensor:
    """relu, leaky_relu(slope), tanh, or z itself."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    return torch.tanh(z) if activation == "tanh" else z


def statistics(y: Tensor, groups: int = 1, sync: str = "") -> Tensor:
    """[3, groups, C]: mean, biased variance and count of each channel of y [N, C, P, Q], in float32
    (float64 for a float64 y), differentiable; the batch is `groups` equal batches in a row, and
    with `sync` the processes' batches, of any sizes, are one."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    wide = wide.unflatten(0, (groups, -1))
    count = torch.full_like(wide[:, 0, :, 0, 0], wide.shape[1] * y.shape[2] * y.shape[3])
    if not sync:
        var, mean = torch.var_mean(wide, (1, 3, 4), correction=0)
        return torch.stack([mean, var, count])
    from torch.distributed.nn.functional import all_reduce

    group = process_group(sync)
    total, count = all_reduce(torch.stack([wide.sum((1, 3, 4)), count]), group=group)
    mean = total / count
    apart = wide - mean[:, None, :, None, None]
    var = all_reduce(apart.square().sum((1, 3, 4)), group=group) / count
    return torch.stack([mean, var, count])


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this name: an operator's arguments are plain data."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: dist.ProcessGroup = resolve(name)
    return group


def coefficients(stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """[5, groups, C] (mean, scale, shift, rstd, count) with scale = gamma * rstd, shift = beta and
    rstd = 1 / sqrt(var + eps); the last two are for the kernels' way back, and have no gradient."""
    mean, var, count = stats
    rstd = scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype).expand_as(mean)
    return torch.stack([mean, scale, shift, rstd.detach(), count.detach()])


def activate(y: Tensor, coef: Tensor, activation: str, slope: float) -> Tensor:
    """act(scale * (y - mean) + shift), in the dtype of y."""
    mean, scale, shift = coef[:3, :, None, :, None, None]
    z = scale * (y.unflatten(0, (coef.shape[1], -1)) - mean) + shift
    return act(z, activation, slope).flatten(0, 1).to(y.dtype)


def update_running(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float | Tensor
) -> None:
    """Move the buffers by each group's statistics in turn, the variance unbiased, in place.
    momentum: of every group, or [groups]."""
    with torch.no_grad():
        for group, (mean, var, count) in enumerate(stats.detach().unbind(1)):
            share = momentum_of(momentum, group)
            running_mean.mul_(1 - share).add_(mean * share)
            running_var.mul_(1 - share).add_(var * (count / (count - 1)) * share)


def momentum_of(momentum: float | Tensor, group: int) -> float | Tensor:
    """One group's momentum, where each may have its own."""
    each = isinstance(momentum, Tensor) and momentum.dim() == 1
    return momentum[group] if each else momentum  # type: ignore[index]


def fold(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor, running_var: Tensor, eps: float, *, transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight, bias) of the convolution that does what the convolution and an evaluating BatchNorm
    do, in float32 at least; differentiable."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (running_var.to(wide) + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -running_mean.to(wide) if bias is None else bias.to(wide) - running_mean
    shift = shift * scale
    if beta is not None:
        shift = shift + beta
    return weight * (scale[:, None, None] if transposed else scale[:, None, None, None]), shift


def conv_bn(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, up: bool, stride: int, groups: int, eps: float, x_activation: str,
    x_slope: float, sync: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Twin of the operator fastdcgan::conv_bn, the running buffers apart: (y, coef)."""
    y = conv_and_act(x, x_coef, weight, bias, up, stride, x_activation, x_slope, "none", 0.0)
    stats = statistics(y, groups, sync)
    return y, coefficients(stats, gamma, beta, eps)


def conv_bn_of_image(
    picture: Tensor, picture_weight: Tensor, weight: Tensor, bias: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, groups: int, eps: float, x_activation: str,
    x_slope: float, sync: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Twin of the operator fastdcgan::conv_bn where it is told of the layer before it: that, then
    `conv_bn`, both down."""
    x = conv_and_act(
        picture, None, picture_weight, None, False, 2, "none", 0.0, x_activation, x_slope
    )
    return conv_bn(x, None, weight, bias, gamma, beta, False, 2, groups, eps, "none", 0.0, sync)


def conv_and_act(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, up: bool, stride: int,
    x_activation: str, x_slope: float, activation: str, slope: float,
) -> Tensor:  # fmt: skip
    """Twin of the operator fastdcgan::conv_act; parameters in the dtype of x."""
    if x_coef is not None:
        x = activate(x, x_coef, x_activation, x_slope)
    convolve = F.conv_transpose2d if up else F.conv2d
    bias = None if bias is None else bias.to(x.dtype)
    y = convolve(x, weight.to(x.dtype), bias, stride, 1 if stride == 2 else 0)
    return act(y, activation, slope)


def bce(
    logits: Tensor, targets: Tensor, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `step.bce`; in float64 for float64 logits."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.unflatten(0, (targets.shape[0], -1))
    wanted = targets.to(wide.dtype)[:, None].expand_as(wide)
    losses = F.binary_cross_entropy_with_logits(wide, wanted, reduction="none").mean(1)
    probabilities = wide.sigmoid()
    row = torch.cat([losses.sum()[None], probabilities.mean(1)]) * share
    gradient = (probabilities - wanted) * (share / wide.shape[1])
    if scale is not None:
        gradient = gradient * scale
    return row, gradient.to(logits.dtype).view_as(logits)
