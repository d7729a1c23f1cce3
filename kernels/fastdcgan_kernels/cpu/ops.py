"""The blocks on a CPU as torch.library operators, with shapes for fake tensors and with gradients.
Not here: the convolutions (convolution.py), the running buffers and the choice (functional.py).

An operator returns a tensor for everything; a gradient that was not asked for has no elements.
Where a graph of the gradient is asked for, the gradient is plain PyTorch's (ops.by_reference).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels import reference
from fastdcgan_kernels.cpu.convolution import call, convolve, weight_gradient
from fastdcgan_kernels.geometry import empty_output, geometry_of
from fastdcgan_kernels.ops import by_reference, fake_gradients, only, ops, present

CHANNELS_LAST = torch.channels_last


@torch.library.custom_op("fastdcgan::cpu_conv_norm", mutates_args=())
def conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    up: bool, stride: int, groups: int, eps: float, activation: str, slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, y, stats): out = act(norm(y)) with y = convolution + bias, and stats [3, groups, C]
    (mean, biased variance, count) of y; float32, the number of channels a multiple of 16."""
    geometry = geometry_of(x, weight, up, stride)
    y = convolve(_wide(x), _wide(weight), geometry, up, _flat(bias))
    n, channels, h, w = y.shape
    rows = n * h * w // groups
    out = torch.empty_like(y, memory_format=CHANNELS_LAST)
    stats = y.new_empty((3, groups, channels))
    stats[2] = rows
    call(
        "norm", y, _flat(gamma), _flat(beta), stats[0], stats[1], out, groups, rows, channels, eps,
        _slope(activation, slope),
    )  # fmt: skip
    return (out.tanh_() if activation == "tanh" else out), y, stats


@conv_norm.register_fake
def _(x, weight, bias, gamma, beta, up, stride, groups, eps, activation, slope):
    out = empty_output(x, weight, up, stride)
    return out, torch.empty_like(out), x.new_empty((3, groups, out.shape[1]))


@torch.library.custom_op("fastdcgan::cpu_conv_norm_backward", mutates_args=())
def conv_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, out: Tensor | None, y: Tensor, stats: Tensor, up: bool, stride: int,
    groups: int, eps: float, activation: str, slope: float, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, gamma, beta; `need`: of the first three. `out` for tanh."""
    g = _wide(g)
    if out is not None:
        g = torch.ops.aten.tanh_backward(g, out)
    channels, rows = y.shape[1], y.numel() // y.shape[1] // groups
    dy = torch.empty_like(y, memory_format=CHANNELS_LAST)
    dgamma, dbeta = y.new_empty(channels), y.new_empty(channels)
    call(
        "norm_gradient", g, y, _flat(gamma), _flat(beta), stats[0], stats[1], dy, dgamma, dbeta,
        groups, rows, channels, eps, _slope(activation, slope),
    )  # fmt: skip
    return *_convolution_gradients(dy, x, weight, bias, up, stride, need), dgamma, dbeta


@conv_norm_backward.register_fake
def _(g, x, weight, bias, gamma, beta, out, y, stats, up, stride, groups, eps, activation, slope,
      need):  # fmt: skip
    gx, _, gw, gbias = fake_gradients(x, None, weight, bias, need)
    return gx, gw, gbias, x.new_empty(y.shape[1]), x.new_empty(y.shape[1])


@torch.library.custom_op("fastdcgan::cpu_conv_act", mutates_args=())
def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: bool, stride: int, activation: str,
    slope: float,
) -> Tensor:  # fmt: skip
    """act(convolution + bias), float32."""
    geometry = geometry_of(x, weight, up, stride)
    slope = _slope(activation, slope)
    out = convolve(_wide(x), _wide(weight), geometry, up, _flat(bias), slope)
    return out.tanh_() if activation == "tanh" else out


@conv_act.register_fake
def _(x, weight, bias, up, stride, activation, slope):
    return empty_output(x, weight, up, stride)


@torch.library.custom_op("fastdcgan::cpu_conv_act_backward", mutates_args=())
def conv_act_backward(
    g: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, up: bool,
    stride: int, activation: str, slope: float, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias; `out` where there is an activation."""
    dy = _wide(g)
    if activation == "tanh":
        dy = torch.ops.aten.tanh_backward(dy, out)
    elif activation != "none":
        dy = torch.ops.aten.leaky_relu_backward(dy, out, _slope(activation, slope), True)
    return _convolution_gradients(dy, x, weight, bias, up, stride, need)


@conv_act_backward.register_fake
def _(g, out, x, weight, bias, up, stride, activation, slope, need):
    gx, _, gw, gbias = fake_gradients(x, None, weight, bias, need)
    return gx, gw, gbias


def _convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, up: bool, stride: int,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = geometry_of(x, weight, up, stride)
    gx = gw = gbias = None
    if need[0]:
        gx = convolve(dy, _wide(weight), geometry, not up)
    if need[1]:
        small, large = (_wide(x), dy) if up else (dy, _wide(x))
        gw = weight_gradient(small, large, geometry)
    if need[2] and bias is not None:
        gbias = dy.sum((0, 2, 3))
    return present(gx, x), present(gw, x), present(gbias, x)


def _wide(tensor: Tensor) -> Tensor:
    """channels_last."""
    return tensor.contiguous(memory_format=CHANNELS_LAST)


def _flat(tensor: Tensor | None) -> Tensor | None:
    """A vector in float32, its elements in a row."""
    return None if tensor is None else tensor.float().contiguous()


def _slope(activation: str, slope: float) -> float:
    """Below zero; that of no activation is 1, tanh is applied elsewhere."""
    return {"relu": 0.0, "leaky_relu": slope}.get(activation, 1.0)


def _conv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    up: bool, stride: int, groups: int, eps: float, activation: str, slope: float,
) -> Tensor:  # fmt: skip
    y, coef = reference.conv_bn(
        x, None, weight, bias, gamma, beta, up, stride, groups, eps, "none", 0.0, ""
    )
    return reference.activate(y, coef, activation, slope)


def _save_conv_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, gamma, beta, *ctx.options = inputs
    out, y, stats = output
    saved = out if ctx.options[-2] == "tanh" else None
    ctx.save_for_backward(x, weight, bias, gamma, beta, saved, y, stats)
    ctx.mark_non_differentiable(y, stats)


def _conv_norm_gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, beta, out, y, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (x, weight, bias, gamma, beta, *ctx.options)
        return tuple(by_reference(_conv_norm_reference, inputs, needs, (g,)))
    grads = ops.cpu_conv_norm_backward(
        g, x, weight, bias, gamma, beta, out, y, stats, *ctx.options, list(needs[:3])
    )
    return only(needs, *grads)


def _conv_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: bool, stride: int, activation: str,
    slope: float,
) -> Tensor:  # fmt: skip
    return reference.conv_and_act(x, None, weight, bias, up, stride, "none", 0.0, activation, slope)


def _save_conv_act(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, *ctx.options = inputs
    # Without an activation the output is not needed, and may be changed in place by its taker.
    linear = ctx.options[-2] == "none"
    ctx.save_for_backward(x, weight, bias, None if linear else output)


def _conv_act_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, out = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (x, weight, bias, *ctx.options)
        return tuple(by_reference(_conv_act_reference, inputs, needs, (g,)))
    grads = ops.cpu_conv_act_backward(g, out, x, weight, bias, *ctx.options, list(needs[:3]))
    return only(needs, *grads)


conv_norm.register_autograd(_conv_norm_gradient, setup_context=_save_conv_norm)
conv_act.register_autograd(_conv_act_gradient, setup_context=_save_conv_act)
