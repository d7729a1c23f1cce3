"""The blocks as torch.library operators: opaque to torch.compile, with shapes for fake and meta
tensors and with gradients. Not here: what they compute (blocks.py), and what users call
(functional.py).

An operator returns a tensor for everything; a gradient that was not asked for has no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels import reference
from fastdcgan_kernels.geometry import empty_output

ops: Any = torch.ops.fastdcgan
CHANNELS_LAST = torch.channels_last


@torch.library.custom_op("fastdcgan::conv_bn", mutates_args=())
def conv_bn(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, up: bool, stride: int, groups: int, eps: float, x_activation: str,
    x_slope: float, sync: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, coef, stats) as `blocks.conv_bn`."""
    from fastdcgan_kernels import blocks

    return blocks.conv_bn(
        x, x_coef, weight, bias, gamma, beta, up, stride, groups, eps, x_activation, x_slope, sync
    )


@conv_bn.register_fake
def _(x, x_coef, weight, bias, gamma, beta, up, stride, groups, eps, x_activation, x_slope, sync):
    y = empty_output(x, weight, up, stride)
    rows = [x.new_empty((3, groups, y.shape[1]), dtype=torch.float32) for _ in range(2)]
    return y, *rows


@torch.library.custom_op("fastdcgan::conv_bn_backward", mutates_args=())
def conv_bn_backward(
    gy: Tensor, gcoef: Tensor, x: Tensor, x_coef: Tensor | None, weight: Tensor,
    bias: Tensor | None, gamma: Tensor | None, y: Tensor, stats: Tensor, up: bool, stride: int,
    groups: int, eps: float, x_activation: str, x_slope: float, sync: str, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, x_coef, weight, bias, gamma, beta; `need`: of x or x_coef, weight, bias."""
    from fastdcgan_kernels import blocks

    grads = blocks.conv_bn_backward(
        gy, gcoef, x, x_coef, weight, gamma, y, stats, up, stride, groups, eps, x_activation,
        x_slope, sync, *need,
    )  # fmt: skip
    gx, gx_coef, gw, gbias, ggamma, gbeta = (present(grad, x) for grad in grads)
    if gbias.numel() and bias is not None:
        gbias = gbias.to(bias.dtype)
    if gamma is not None:
        ggamma = ggamma.to(gamma.dtype)
    return gx, gx_coef, gw, gbias, ggamma, gbeta


@conv_bn_backward.register_fake
def _(gy, gcoef, x, x_coef, weight, bias, gamma, y, stats, up, stride, groups, eps, x_activation,
      x_slope, sync, need):  # fmt: skip
    channels = (y.shape[1],)
    ggamma = x.new_empty(channels, dtype=torch.float32 if gamma is None else gamma.dtype)
    gbeta = x.new_empty(channels, dtype=torch.float32)
    return *fake_gradients(x, x_coef, weight, bias, need), ggamma, gbeta


@torch.library.custom_op("fastdcgan::conv_act", mutates_args=())
def conv_act(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, up: bool, stride: int,
    x_activation: str, x_slope: float, activation: str, slope: float,
) -> Tensor:  # fmt: skip
    """As `blocks.conv_act`."""
    from fastdcgan_kernels import blocks

    return blocks.conv_act(
        x, x_coef, weight, bias, up, stride, x_activation, x_slope, activation, slope
    )


@conv_act.register_fake
def _(x, x_coef, weight, bias, up, stride, x_activation, x_slope, activation, slope):
    return empty_output(x, weight, up, stride)


@torch.library.custom_op("fastdcgan::conv_act_backward", mutates_args=())
def conv_act_backward(
    g: Tensor, out: Tensor, x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None,
    up: bool, stride: int, x_activation: str, x_slope: float, activation: str, slope: float,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, x_coef, weight, bias; `need`: of x or x_coef, weight, bias."""
    from fastdcgan_kernels import blocks

    grads = blocks.conv_act_backward(
        g, out, x, x_coef, weight, up, stride, x_activation, x_slope, activation, slope, *need
    )
    gx, gx_coef, gw, gbias = (present(grad, x) for grad in grads)
    if gbias.numel() and bias is not None:
        gbias = gbias.to(bias.dtype)
    return gx, gx_coef, gw, gbias


@conv_act_backward.register_fake
def _(g, out, x, x_coef, weight, bias, up, stride, x_activation, x_slope, activation, slope, need):
    return fake_gradients(x, x_coef, weight, bias, need)


@torch.library.custom_op("fastdcgan::activate", mutates_args=())
def activate(y: Tensor, coef: Tensor, activation: str, slope: float) -> Tensor:
    """As `blocks.activate`."""
    from fastdcgan_kernels import blocks

    return blocks.activate(y, coef, activation, slope)


@activate.register_fake
def _(y, coef, activation, slope):
    return torch.empty_like(y, memory_format=CHANNELS_LAST)


@torch.library.custom_op("fastdcgan::activate_backward", mutates_args=())
def activate_backward(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """Gradients of y and coef."""
    from fastdcgan_kernels import blocks

    return blocks.activate_backward(g, y, coef, activation, slope)


@activate_backward.register_fake
def _(g, y, coef, activation, slope):
    return torch.empty_like(y, memory_format=CHANNELS_LAST), torch.empty_like(coef)


def present(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device) if grad is None else grad


def fake_gradients(x, x_coef, weight, bias, need) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def one(wanted: bool, like: Tensor) -> Tensor:
        if not wanted:
            return present(None, x)
        return torch.empty_like(like, memory_format=CHANNELS_LAST if like.dim() == 4 else None)

    with_coef = need[0] and x_coef is not None
    return (
        one(need[0], x),
        one(with_coef, x_coef),
        one(need[1], weight),
        one(need[2] and bias is not None, bias),
    )


def by_reference(
    function: Callable[..., Any], inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of the plain-PyTorch twin, with a graph of their own: what create_graph=True gets.

    `inputs` are the operator's; `needs` says which of them want a gradient."""
    wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=False)  # stats have none
            if grad is not None and out.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needs]


def _save_conv_bn(ctx: Any, inputs: Any, output: Any) -> None:
    x, x_coef, weight, bias, gamma, beta, *ctx.options = inputs
    y, _, stats = output
    ctx.save_for_backward(x, x_coef, weight, bias, gamma, beta, y, stats)
    ctx.mark_non_differentiable(stats)


def _conv_bn_gradient(ctx: Any, gy: Tensor, gcoef: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, x_coef, weight, bias, gamma, beta, y, stats = ctx.saved_tensors
    up, stride, groups, eps, x_activation, x_slope, sync = ctx.options
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (x, x_coef, weight, bias, gamma, beta, *ctx.options)
        return tuple(by_reference(reference.conv_bn, inputs, needs, (gy, gcoef)))
    gx, gx_coef, gw, gbias, ggamma, gbeta = ops.conv_bn_backward(
        gy, gcoef, x, x_coef, weight, bias, gamma, y, stats, up, stride, groups, eps,
        x_activation, x_slope, sync, [needs[0] or needs[1], needs[2], needs[3]],
    )  # fmt: skip
    if beta is not None:
        gbeta = gbeta.to(beta.dtype)
    return only(needs, gx, gx_coef, gw, gbias, ggamma, gbeta)


def _save_conv_act(ctx: Any, inputs: Any, output: Any) -> None:
    x, x_coef, weight, bias, *ctx.options = inputs
    # Without an activation the output is not needed, and may be changed in place by its taker.
    linear = ctx.options[-2] == "none"
    ctx.save_for_backward(x, x_coef, weight, bias, None if linear else output)


def _conv_act_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, x_coef, weight, bias, out = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (x, x_coef, weight, bias, *ctx.options)
        return tuple(by_reference(reference.conv_and_act, inputs, needs, (g,)))
    need = [needs[0] or needs[1], needs[2], needs[3]]
    out = g.to(x.dtype) if out is None else out
    grads = ops.conv_act_backward(g, out, x, x_coef, weight, bias, *ctx.options, need)
    return only(needs, *grads)


def _save_activate(ctx: Any, inputs: Any, output: Any) -> None:
    y, coef, *ctx.options = inputs
    ctx.save_for_backward(y, coef)


def _activate_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    y, coef = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (y, coef, *ctx.options)
        return tuple(by_reference(reference.activate, inputs, needs, (g,)))
    return only(needs, *ops.activate_backward(g, y, coef, *ctx.options))


def only(needs: Sequence[bool], *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None for the rest and for what is no tensor."""
    asked = [grad if need else None for need, grad in zip(needs, grads, strict=False)]
    return *asked, *[None] * (len(needs) - len(grads))


conv_bn.register_autograd(_conv_bn_gradient, setup_context=_save_conv_bn)
conv_act.register_autograd(_conv_act_gradient, setup_context=_save_conv_act)
activate.register_autograd(_activate_gradient, setup_context=_save_activate)
