"""The blocks as torch.library operators: opaque to torch.compile, with shapes for fake and meta
tensors and with gradients. Not here: what they compute (blocks.py), and what users call
(functional.py).

An operator returns a tensor for everything; a gradient that was not asked for has no elements. Its
arguments have no defaults: before a call, PyTorch drops trailing arguments that equal theirs, and
PyTorch 2.11 then looks for the mutated ones among those left (IndexError).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdcgan_kernels import reference
from fastdcgan_kernels.geometry import empty_output, geometry_of, gradient_dtype

ops: Any = torch.ops.fastdcgan
CHANNELS_LAST = torch.channels_last


@torch.library.custom_op(
    "fastdcgan::conv_bn", mutates_args=("running_mean", "running_var", "batches")
)
def conv_bn(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, up: bool, stride: int, groups: int, eps: float, x_activation: str,
    x_slope: float, sync: str, working: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, momenta: Tensor | None,
    picture: Tensor | None, picture_weight: Tensor | None, picture_working: Tensor | None,
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, coef) as `blocks.conv_bn`. Moves the running buffers and their count, where given, by
    `momentum` or by `momenta`. `working`: the weight as the kernels take it.

    x may be given as a constant, with what it was made of: x = act(conv2d(picture, picture_weight))
    and its `signs`. Then the gradients are those of picture and picture_weight."""
    from fastdcgan_kernels import blocks, normalisation

    running = None
    if running_mean is not None and running_var is not None:
        share = momentum if momenta is None else momenta
        running = normalisation.Running(running_mean, running_var, share, batches)
    return blocks.conv_bn(
        x, x_coef, weight, bias, gamma, beta, up, stride, groups, eps, x_activation, x_slope, sync,
        working, running,
    )  # fmt: skip


@conv_bn.register_fake
def _(x, x_coef, weight, bias, gamma, beta, up, stride, groups, eps, x_activation, x_slope, sync,
      working, running_mean, running_var, batches, momentum, momenta, picture, picture_weight,
      picture_working, signs):  # fmt: skip
    y = empty_output(x, weight, up, stride)
    return y, x.new_empty((5, groups, y.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fastdcgan::conv_bn_backward", mutates_args=())
def conv_bn_backward(
    gy: Tensor, gcoef: Tensor | None, x: Tensor, x_coef: Tensor | None, weight: Tensor,
    working: Tensor | None, bias: Tensor | None, y: Tensor, up: bool, stride: int, groups: int,
    x_activation: str, x_slope: float, sync: str, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, x_coef, weight, bias; `need`: of x or x_coef, weight, bias."""
    from fastdcgan_kernels import blocks

    grads = blocks.conv_bn_backward(
        gy, gcoef, x, x_coef, weight, working, y, up, stride, groups, x_activation, x_slope, sync,
        *need,
    )  # fmt: skip
    return _gradients(grads, x, bias)


@conv_bn_backward.register_fake
def _(gy, gcoef, x, x_coef, weight, working, bias, y, up, stride, groups, x_activation, x_slope,
      sync, need):  # fmt: skip
    return fake_gradients(x, x_coef, weight, bias, need)


@torch.library.custom_op("fastdcgan::conv_bn_of_image_backward", mutates_args=())
def conv_bn_of_image_backward(
    gy: Tensor, gcoef: Tensor, picture: Tensor, picture_weight: Tensor,
    picture_working: Tensor | None, signs: Tensor, x: Tensor, weight: Tensor,
    working: Tensor | None, y: Tensor, groups: int, x_activation: str, x_slope: float, sync: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of picture, picture_weight and weight, each where `need`ed."""
    from fastdcgan_kernels import blocks

    grads = blocks.conv_bn_of_image_backward(
        gy, gcoef, picture, picture_weight, picture_working, signs, x, weight, working, y, groups,
        x_activation, x_slope, sync, *need,
    )  # fmt: skip
    gpicture, gpicture_weight, gw = (present(grad, x) for grad in grads)
    return gpicture, gpicture_weight, gw


@conv_bn_of_image_backward.register_fake
def _(gy, gcoef, picture, picture_weight, picture_working, signs, x, weight, working, y, groups,
      x_activation, x_slope, sync, need):  # fmt: skip
    likes = zip(need, (picture, picture_weight, weight), strict=True)
    return tuple(
        torch.empty_like(like, dtype=gradient_dtype(like), memory_format=CHANNELS_LAST)
        if wanted
        else present(None, x)
        for wanted, like in likes
    )


@torch.library.custom_op("fastdcgan::conv_act", mutates_args=())
def conv_act(
    x: Tensor, x_coef: Tensor | None, weight: Tensor, bias: Tensor | None, up: bool, stride: int,
    x_activation: str, x_slope: float, activation: str, slope: float, working: Tensor | None,
    signed: bool, x_gamma: Tensor | None, x_beta: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `blocks.conv_act`, and the signs (N, P, Q, CO / 8), of no size unless `signed`. `working`:
    the weight as the kernels take it. With x_gamma and x_beta, which x_coef was made of, the
    gradient of x is that through its norm, too, and those of x_gamma and x_beta come from here:
    `blocks.logit_backward`."""
    from fastdcgan_kernels import blocks

    signs = _empty_signs(x, weight, up, stride, signed)
    out = blocks.conv_act(
        x, x_coef, weight, bias, up, stride, x_activation, x_slope, activation, slope, working,
        signs if signed else None,
    )  # fmt: skip
    return out, signs


def _empty_signs(x: Tensor, weight: Tensor, up: bool, stride: int, signed: bool) -> Tensor:
    g = geometry_of(x, weight, up, stride)
    shape = (g.N, g.P, g.Q, g.CS // 8) if signed else (0,)
    return x.new_empty(shape, dtype=torch.uint8)


@conv_act.register_fake
def _(x, x_coef, weight, bias, up, stride, x_activation, x_slope, activation, slope, working,
      signed, x_gamma, x_beta):  # fmt: skip
    return empty_output(x, weight, up, stride), _empty_signs(x, weight, up, stride, signed)


@torch.library.custom_op("fastdcgan::conv_act_backward", mutates_args=())
def conv_act_backward(
    g: Tensor, out: Tensor, x: Tensor, x_coef: Tensor | None, weight: Tensor,
    working: Tensor | None, bias: Tensor | None, up: bool, stride: int, x_activation: str,
    x_slope: float, activation: str, slope: float, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, x_coef, weight, bias; `need`: of x or x_coef, weight, bias."""
    from fastdcgan_kernels import blocks

    grads = blocks.conv_act_backward(
        g, out, x, x_coef, weight, working, up, stride, x_activation, x_slope, activation, slope,
        *need,
    )  # fmt: skip
    return _gradients(grads, x, bias)


@conv_act_backward.register_fake
def _(g, out, x, x_coef, weight, working, bias, up, stride, x_activation, x_slope, activation,
      slope, need):  # fmt: skip
    return fake_gradients(x, x_coef, weight, bias, need)


@torch.library.custom_op("fastdcgan::logit_backward", mutates_args=())
def logit_backward(
    g: Tensor, x: Tensor, x_coef: Tensor, weight: Tensor, working: Tensor | None,
    x_activation: str, x_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `blocks.logit_backward`."""
    from fastdcgan_kernels import blocks

    return blocks.logit_backward(g, x, x_coef, weight, working, x_activation, x_slope)


@logit_backward.register_fake
def _(g, x, x_coef, weight, working, x_activation, x_slope):
    sums = x_coef.new_empty((18, x.shape[1]))
    return torch.empty_like(x, memory_format=CHANNELS_LAST), sums


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


def _gradients(grads, x, bias) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gx, gx_coef, gw, gbias = (present(grad, x) for grad in grads)
    return gx, gx_coef, gw, gbias.to(bias.dtype) if gbias.numel() and bias is not None else gbias


def fake_gradients(x, x_coef, weight, bias, need) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def one(wanted: bool, like: Tensor) -> Tensor:
        if not wanted:
            return present(None, x)
        form = CHANNELS_LAST if like.dim() == 4 else None
        return torch.empty_like(like, dtype=gradient_dtype(like), memory_format=form)

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

    `inputs` are the operator's, coefficients second if any; `needs`: which want a gradient."""
    inputs = list(inputs)
    if isinstance(inputs[1], Tensor) and inputs[1].dim() == 3 and inputs[1].shape[0] == 5:
        inputs[1] = _Coefficients.apply(inputs[1])
    wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=True)
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


class _Coefficients(torch.autograd.Function):
    """Coefficients of conv_bn, for plain PyTorch to take. Its gradient is that of mean, scale and
    shift; conv_bn's backward wants it as the kernels make it (jit.norm.sum_partials), unless that
    is computed in plain PyTorch, too."""

    @staticmethod
    def forward(ctx: Any, coef: Tensor) -> Tensor:
        ctx.save_for_backward(coef)
        return coef.view_as(coef)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return grad
        mean, scale, _, rstd, count = ctx.saved_tensors[0].unbind()
        gmean, gscale, gshift = grad[:3].unbind()
        b = -scale * rstd.square() * gscale / count
        sums = torch.zeros(2, *gscale.shape, dtype=grad.dtype, device=grad.device)
        sums[0, 0], sums[1, 0] = (rstd * gscale).sum(0), gshift.sum(0)
        return torch.stack([torch.zeros_like(b), b, gmean / count - b * mean, *sums])


def _save_conv_bn(ctx: Any, inputs: Any, output: Any) -> None:
    x, x_coef, weight, bias, gamma, beta, *ctx.options = inputs[:13]
    y, coef = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, x_coef, weight, inputs[13], bias, gamma, beta, y, coef, *inputs[19:])


def _conv_bn_gradient(
    ctx: Any, gy: Tensor | None, gcoef: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, x_coef, weight, working, bias, gamma, beta, y, coef, picture, *rest = ctx.saved_tensors
    if gy is None:
        gy = torch.zeros_like(y)
    up, stride, groups, _, x_activation, x_slope, sync = ctx.options
    needs = ctx.needs_input_grad
    if picture is not None:
        gcoef = torch.zeros_like(coef) if gcoef is None else gcoef
        return _conv_bn_of_image_gradient(ctx, gy, gcoef, picture, *rest)
    if torch.is_grad_enabled():
        inputs = (x, x_coef, weight, bias, gamma, beta, *ctx.options)
        found = by_reference(reference.conv_bn, inputs, needs[: len(inputs)], (gy, gcoef))
        return only(needs, *found)
    gx, gx_coef, gw, gbias = ops.conv_bn_backward(
        gy, gcoef, x, x_coef, weight, working, bias, y, up, stride, groups, x_activation, x_slope,
        sync, [needs[0] or needs[1], needs[2], needs[3]],
    )  # fmt: skip
    return only(needs, gx, gx_coef, gw, gbias, *_norm_parameters(gcoef, gamma, beta))


def _norm_parameters(
    gcoef: Tensor | None, gamma: Any, beta: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Their gradients, summed with the coefficients' already (jit.norm.sum_partials)."""
    return (
        None if gamma is None or gcoef is None else gcoef[3, 0].to(gamma.dtype),
        None if beta is None or gcoef is None else gcoef[4, 0].to(beta.dtype),
    )


def _conv_bn_of_image_gradient(
    ctx: Any, gy: Tensor, gcoef: Tensor, picture: Tensor, picture_weight: Tensor,
    picture_working: Tensor | None, signs: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, _, weight, working, bias, gamma, beta, y = ctx.saved_tensors[:8]
    _, _, groups, eps, x_activation, x_slope, sync = ctx.options
    needs = ctx.needs_input_grad
    need = [needs[19], needs[20], needs[2]]
    if torch.is_grad_enabled():
        inputs = (picture, picture_weight, weight, bias, gamma, beta, groups, eps, x_activation,
                  x_slope, sync)  # fmt: skip
        asked = [*need, *needs[3:6], *[False] * 5]
        found = by_reference(reference.conv_bn_of_image, inputs, asked, (gy, gcoef))
        gpicture, gpicture_weight, *others = found[:6]
    else:
        gpicture, gpicture_weight, gw = ops.conv_bn_of_image_backward(
            gy, gcoef, picture, picture_weight, picture_working, signs, x, weight, working, y,
            groups, x_activation, x_slope, sync, need,
        )  # fmt: skip
        others = [gw, None, *_norm_parameters(gcoef, gamma, beta)]
    return only(needs, None, None, *others, *[None] * 13, gpicture, gpicture_weight)


def _save_conv_act(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # signs have none
    x, x_coef, weight, bias, *ctx.options = inputs[:10]
    # Without an activation the output is not needed, and may be changed in place by its taker.
    linear = ctx.options[-2] == "none"
    saved = x, x_coef, weight, inputs[10], bias, None if linear else output[0]
    ctx.save_for_backward(*saved, *inputs[12:])


def _conv_act_gradient(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, x_coef, weight, working, bias, out, x_gamma, x_beta = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        inputs = (x, x_coef, weight, bias, *ctx.options)
        found = by_reference(reference.conv_and_act, inputs, needs[: len(inputs)], (g,))
        return only(needs, *found)
    if x_gamma is not None and x_beta is not None and needs[0]:
        gx, sums = ops.logit_backward(g, x, x_coef, weight, working, *ctx.options[2:4])
        gw = None
        if needs[2]:
            gw = sums[:16].view(1, 4, 4, -1).permute(0, 3, 1, 2).to(gradient_dtype(weight))
        norm = sums[16].to(x_gamma.dtype), sums[17].to(x_beta.dtype)
        return only(needs, gx, None, gw, *[None] * 9, *norm)
    need = [needs[0] or needs[1], needs[2], needs[3]]
    out = g.to(x.dtype) if out is None else out
    grads = ops.conv_act_backward(g, out, x, x_coef, weight, working, bias, *ctx.options, need)
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


def only(needs: Sequence[bool], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None for the rest and for what is no tensor."""
    asked = [grad if need else None for need, grad in zip(needs, grads, strict=False)]
    return *asked, *[None] * (len(needs) - len(grads))


# register_autograd refuses an operator that changes arguments, whoever needs their gradients; these
# are buffers, which have none. test_ops.py and test_functional.py (compiling, training) hold it.
conv_bn._setup_context_fn, conv_bn._backward_fn = _save_conv_bn, _conv_bn_gradient
conv_act.register_autograd(_conv_act_gradient, setup_context=_save_conv_act)
activate.register_autograd(_activate_gradient, setup_context=_save_activate)
