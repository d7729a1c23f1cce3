"""The blocks in plain PyTorch: what a fused kernel must compute, on any device and dtype.
Not here: anything fast, and any state; the caller owns weights and running buffers.

First the blocks as users call them, then the twins of the operators (ops.py) and their pieces.

Letters: N images, CI and CO input and output channels, H x W and P x Q input and output pixels,
KH x KW taps. Outputs are channels_last; inputs may have any strides. Gradients of every order are
those of the PyTorch functions called.
"""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .choice import plain
from .choice.geometry import Padding, sides_of
from .choice.spec import BlockSpec, Buffers, Inputs

Activation = Literal["relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu", "gelu", "none"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
OF_INPUT = ("silu", "gelu")
"""Activations whose derivative reads the input z. That of the others reads the output act(z)."""


def conv_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, *, stride: int, padding: Padding,
    training: bool, momentum: float | Tensor, eps: float, activation: Activation,
    slope: float = 0.0, sync: str = "",
) -> Tensor:  # fmt: skip
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
        stride: of the convolution, along both axes.
        padding: zeros around x, in pixels: one number, (rows, columns), or (top, left, bottom,
            right).
        training: normalise with the batch's statistics.
        momentum: share of the new value in the running buffers, a float or a 0-dim tensor. For a
            module's momentum of None, the module passes 1 / num_batches_tracked.
        eps: added to the variance.
        activation: "relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu", "gelu" (the exact one,
            with erf) or "none".
        slope: of "leaky_relu" below 0, and the alpha of "elu", above 0; the others do not read it.
            Default 0.
        sync: name of the process group whose batches are normalised as one (SyncBatchNorm);
            "": none. Default "".

    Returns:
        (N, CO, P, Q), channels_last.

    Raises:
        ValueError: for another activation, for "elu" with a slope that is not above 0, or in
            training with one value a channel.
    """
    spec = BlockSpec(False, stride, sides_of(padding), activation, slope, eps, sync=sync)
    inputs = Inputs(x, weight, bias=bias, gamma=gamma, beta=beta)
    return block(inputs, Buffers(running_mean, running_var), spec, training, momentum)


def conv_transpose_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, *, stride: int, padding: Padding, output_padding: Padding = 0,
    training: bool, momentum: float | Tensor, eps: float, activation: Activation,
    slope: float = 0.0, sync: str = "",
) -> Tensor:  # fmt: skip
    """As `conv_bn_act`, with y = conv_transpose2d(x, weight) + bias.

    Args:
        weight: filters, (CI, CO, KH, KW).
        padding: pixels that are cut off, as in `conv_bn_act`; of four numbers the last two may be
            negative: then there are so many more.
        output_padding: of these pixels, how many stay below and on the right: one number, or (rows,
            columns). Default 0.
        Others: as in `conv_bn_act`.

    Returns:
        (N, CO, P, Q), channels_last, with P = (H - 1) * stride - 2 * padding + KH + output_padding.

    Raises:
        ValueError: as in `conv_bn_act`.
    """
    spec = BlockSpec(True, stride, sides_of(padding, output_padding), activation, slope, eps, sync=sync)
    inputs = Inputs(x, weight, bias=bias, gamma=gamma, beta=beta)
    return block(inputs, Buffers(running_mean, running_var), spec, training, momentum)


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, padding: Padding,
    activation: Activation, slope: float = 0.0,
) -> Tensor:  # fmt: skip
    """act(conv2d(x, weight) + bias); arguments, result and errors as in `conv_bn_act`."""
    spec = BlockSpec(False, stride, sides_of(padding), activation, slope)
    return block_without_norm(Inputs(x, weight, bias=bias), spec)


def conv_transpose_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, padding: Padding, output_padding: Padding = 0,
    activation: Activation, slope: float = 0.0,
) -> Tensor:  # fmt: skip
    """act(conv_transpose2d(x, weight) + bias); else as in `conv_transpose_bn_act`."""
    spec = BlockSpec(True, stride, sides_of(padding, output_padding), activation, slope)
    return block_without_norm(Inputs(x, weight, bias=bias), spec)


def block(
    inputs: Inputs, buffers: Buffers, spec: BlockSpec, training: bool, momentum: float | Tensor
) -> Tensor:
    """`conv_bn_act` or its transposed twin, of one group."""
    check_activation(spec.activation, spec.slope)
    mean, var = buffers.running_mean, buffers.running_var
    y = _convolve(inputs.x, inputs.weight, inputs.bias, spec)
    batch = training or mean is None or var is None
    if not batch or not (spec.sync or isinstance(momentum, Tensor)):
        y = F.batch_norm(y, mean, var, inputs.gamma, inputs.beta, batch, float(momentum), spec.eps)
        return _channels_last(act(y, spec.activation, spec.slope))
    if not spec.sync:
        check_values_per_channel(y.shape)
    stats = statistics(y, sync=spec.sync)
    if training:
        update_running(buffers, stats, momentum)
    coef = coefficients(stats, inputs.gamma, inputs.beta, spec.eps)
    return _channels_last(activate(y, coef, spec.activation, spec.slope))


def block_without_norm(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """`conv_act` or its transposed twin."""
    check_activation(spec.activation, spec.slope)
    y = _convolve(inputs.x, inputs.weight, inputs.bias, spec)
    return _channels_last(act(y, spec.activation, spec.slope))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: BlockSpec) -> Tensor:
    return convolution.convolve(x, weight, bias, spec.stride, spec.padding, spec.transposed)


def _channels_last(y: Tensor) -> Tensor:
    """As promised, but inside torch.func, whose batches have no such format."""
    if y.dim() != 4 or plain.is_transformed():
        return y
    return y.contiguous(memory_format=torch.channels_last)


def check_activation(activation: str, slope: float) -> None:
    """Refuse a name that is none of `Activation`, and an "elu" without its alpha."""
    if activation not in ACTIVATIONS:
        *names, last = (f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f"activation={activation!r} was given; give {', '.join(names)} or {last}")
    if activation == "elu" and not slope > 0:
        raise ValueError(f'slope={slope} was given for "elu"; give its alpha, which is above 0')


def check_values_per_channel(shape: torch.Size, groups: int = 1) -> None:
    """Refuse batch statistics of a single value, in nn.BatchNorm2d's words; `shape`: that of the
    norm's input."""
    if shape[0] * shape[2] * shape[3] == groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )


def act(z: Tensor, activation: str, slope: float) -> Tensor:
    """act(z), by PyTorch's functions."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    if activation == "elu":
        return F.elu(z, slope)
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z) if activation == "gelu" else z


def act_backward(g: Tensor, o: Tensor, activation: str, slope: float) -> Tensor:
    """The gradient of z from that of o = act(z); of an activation in `OF_INPUT` o is z itself."""
    aten = torch.ops.aten
    found: Tensor = g
    if activation == "relu":
        found = aten.threshold_backward(g, o, 0)
    elif activation == "leaky_relu":
        found = aten.leaky_relu_backward(g, o, slope, True)
    elif activation == "tanh":
        found = aten.tanh_backward(g, o)
    elif activation == "sigmoid":
        found = aten.sigmoid_backward(g, o)
    elif activation == "elu":
        found = aten.elu_backward(g, slope, 1.0, 1.0, True, o)
    elif activation == "silu":
        found = aten.silu_backward(g, o)
    elif activation == "gelu":
        found = aten.gelu_backward(g, o, approximate="none")
    return found


def undone(o: Tensor, activation: str, slope: float) -> Tensor:
    """o = act(z) itself, for a producer that takes the gradient of z for that of o."""
    found: Tensor = _Undone.apply(o, activation, slope)
    return found


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, activation: str, slope: float) -> Tensor:
        ctx.save_for_backward(o)
        ctx.act = activation, slope
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (o,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            o = undone(o, *ctx.act)
        return act_backward(g, o, *ctx.act), None, None


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


def update_running(buffers: Buffers, stats: Tensor, momentum: float | Tensor) -> None:
    """Move the running statistics, where there are some, by each group's in turn, the variance
    unbiased, in place. momentum: of every group, or [groups]."""
    if buffers.running_mean is None or buffers.running_var is None:
        return
    with torch.no_grad():
        for group, (mean, var, count) in enumerate(stats.detach().unbind(1)):
            share = momentum_of(momentum, group)
            buffers.running_mean.mul_(1 - share).add_(mean * share)
            buffers.running_var.mul_(1 - share).add_(var * (count / (count - 1)) * share)


def momentum_of(momentum: float | Tensor, group: int) -> float | Tensor:
    """One group's momentum, where each may have its own."""
    each = isinstance(momentum, Tensor) and momentum.dim() == 1
    return momentum[group] if each else momentum  # type: ignore[index]


def fold(inputs: Inputs, buffers: Buffers, spec: BlockSpec) -> Inputs:
    """Inputs of the convolution that does what the convolution and an evaluating BatchNorm do, its
    weight and bias in float32 at least; differentiable."""
    weight, bias = inputs.weight, inputs.bias
    assert buffers.running_mean is not None
    assert buffers.running_var is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (buffers.running_var.to(wide) + spec.eps).rsqrt()
    if inputs.gamma is not None:
        scale = scale * inputs.gamma
    mean = buffers.running_mean
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean
    shift = shift * scale
    if inputs.beta is not None:
        shift = shift + inputs.beta
    scale = scale[:, None, None] if spec.transposed else scale[:, None, None, None]
    return Inputs(inputs.x, weight * scale, inputs.x_coef, bias=shift)


def conv_bn(inputs: Inputs, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """Twin of the operator conv_bn, without its running buffers: (y, coef)."""
    y = conv_act_of(inputs, replace(spec, activation="none"))
    return y, coefficients(
        statistics(y, spec.groups, spec.sync), inputs.gamma, inputs.beta, spec.eps
    )


def conv_act_of(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """Twin of the operator conv_act; parameters in the dtype of x."""
    x, bias = inputs.x, inputs.bias
    if inputs.x_coef is not None:
        x = activate(x, inputs.x_coef, spec.x_activation, spec.x_slope)
    elif spec.x_activation != "none":
        x = undone(x, spec.x_activation, spec.x_slope)
    bias = None if bias is None else bias.to(x.dtype)
    return act(_convolve(x, inputs.weight.to(x.dtype), bias, spec), spec.activation, spec.slope)


def bce(
    logits: Tensor, targets: Tensor, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `functional.bce`; in float64 for float64 logits."""
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
