"""The blocks on a CPU as torch.library operators, with shapes for fake tensors and with gradients.
Not here: the convolutions (convolution.py), the running buffers and the choice (functional.py).

An operator returns a tensor for everything; a gradient that was not asked for has no elements.
Where a graph of the gradient is asked for, it is plain PyTorch's (autograd.by_reference).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import gradient_of, keep, save_conv_act
from ..choice.spec import BlockSpec, Buffers, Inputs, Need, Saved, Signature
from ..ops import CHANNELS_LAST, NEED, SIGNATURES, gradients, operator, output
from .convolution import call, convolve, given, weight_gradient

CONVOLUTION = ("x", "weight", "bias")
BLOCK = (*CONVOLUTION, "gamma", "beta")
LAYER = "transposed stride padding activation slope"
NORM = f"{LAYER} groups eps"


def conv_norm(inputs: Inputs, buffers: Buffers, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(out, y, stats): out = act(norm(y)) with y = convolution + bias, and stats [3, groups, C]
    (mean, biased variance, count) of y, by which the buffers move; the number of channels is a
    multiple of 16. All is float32 but x and out, which may be bfloat16."""
    y = _convolve(inputs, spec, 1.0, torch.float32)
    n, channels, h, w = y.shape
    rows = n * h * w // spec.groups
    out = torch.empty_like(y, dtype=inputs.x.dtype, memory_format=CHANNELS_LAST)
    stats = y.new_empty((3, spec.groups, channels))
    stats[2] = rows
    call(
        "norm", y, _flat(inputs.gamma), _flat(inputs.beta), stats[0], stats[1], *given(out),
        spec.groups, rows, channels, spec.eps, _slope(spec),
    )  # fmt: skip
    momenta = buffers.momenta
    share = spec.momentum if momenta is None else momenta
    reference.update_running(buffers, stats, share, spec.correction)
    if buffers.batches is not None:
        buffers.batches.add_(spec.groups)
    return (out.tanh_() if spec.activation == "tanh" else out), y, stats


def _fake_conv_norm(
    inputs: Inputs, buffers: Buffers, spec: BlockSpec
) -> tuple[Tensor, Tensor, Tensor]:
    out = output(inputs, spec)
    y = torch.empty_like(out, dtype=torch.float32)
    return out, y, y.new_empty((3, spec.groups, out.shape[1]))


def conv_norm_backward(g: Tensor, saved: Saved, spec: BlockSpec, need: Need) -> dict[str, Tensor]:
    """Gradients of x, weight, bias, gamma, beta; the last two always, where there are these."""
    g, y, stats = _last(g), saved.y, saved.stats
    assert y is not None
    assert stats is not None
    if saved.out is not None:  # tanh's
        g = torch.ops.aten.tanh_backward(g, saved.out)
    channels, rows = y.shape[1], y.numel() // y.shape[1] // spec.groups
    dy = torch.empty_like(y, memory_format=CHANNELS_LAST)
    dgamma, dbeta = y.new_empty(channels), y.new_empty(channels)
    call(
        "norm_gradient", *given(g), y, _flat(saved.gamma), _flat(saved.beta), stats[0], stats[1],
        dy, dgamma, dbeta, spec.groups, rows, channels, spec.eps, _slope(spec),
    )  # fmt: skip
    found = _convolution_gradients(dy, saved, spec, need)
    for name, made in (("gamma", dgamma), ("beta", dbeta)):
        parameter: Tensor | None = getattr(saved, name)
        if parameter is not None:
            found[name] = made.to(parameter.dtype)
    return found


def conv_act(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """act(convolution + bias) in the dtype of x, float32 or bfloat16."""
    out = _convolve(inputs, spec, _slope(spec), inputs.x.dtype)
    return out.tanh_() if spec.activation == "tanh" else out


def conv_act_backward(g: Tensor, saved: Saved, spec: BlockSpec, need: Need) -> dict[str, Tensor]:
    """Gradients of x, weight, bias."""
    dy = _last(g)
    if spec.activation == "tanh":
        dy = torch.ops.aten.tanh_backward(dy, saved.out)
    elif spec.activation != "none":
        dy = torch.ops.aten.leaky_relu_backward(dy, saved.out, _slope(spec), True)
    return _convolution_gradients(dy, saved, spec, need)


def _convolve(inputs: Inputs, spec: BlockSpec, slope: float, dtype: torch.dtype) -> Tensor:
    x, weight, bias = _last(inputs.x), _wide(inputs.weight), _flat(inputs.bias)
    return convolve(x, weight, spec.geometry(x, weight), spec.transposed, bias, slope, dtype)


def _convolution_gradients(
    dy: Tensor, saved: Saved, spec: BlockSpec, need: Need
) -> dict[str, Tensor]:
    geometry, found = spec.geometry(saved.x, saved.weight), {}
    if need.x:
        weight, dtype = _wide(saved.weight), saved.x.dtype
        found["x"] = convolve(dy, weight, geometry, not spec.transposed, dtype=dtype)
    if need.weight:
        x = _last(saved.x)
        small, large = (x, dy) if spec.transposed else (dy, x)
        found["weight"] = weight_gradient(small, large, geometry)
    if need.bias:
        found["bias"] = dy.sum((0, 2, 3)).float()  # with dtype=, all of dy would be cast first
    return found


def _last(tensor: Tensor) -> Tensor:
    """channels_last."""
    return tensor.contiguous(memory_format=CHANNELS_LAST)


def _wide(tensor: Tensor) -> Tensor:
    """And float32."""
    return _last(tensor.float())


def _flat(tensor: Tensor | None) -> Tensor | None:
    """A vector in float32, its elements in a row."""
    return None if tensor is None else tensor.float().contiguous()


def _slope(spec: BlockSpec) -> float:
    """Below zero; that of no activation is 1, tanh is applied elsewhere."""
    return {"relu": 0.0, "leaky_relu": spec.slope}.get(spec.activation, 1.0)


def _conv_norm_twin(inputs: Inputs, spec: BlockSpec) -> Tensor:
    y, coef = reference.conv_bn(inputs, spec)
    return reference.activate(y, coef, spec.activation, spec.slope)


def _save_conv_norm(ctx: Any, inputs: Any, output: Any) -> None:
    given, _, spec = SIGNATURES["cpu_conv_norm"].restore(inputs)
    out, y, stats = output
    keep(ctx, given, spec, out=out if spec.activation == "tanh" else None, y=y, stats=stats)
    ctx.mark_non_differentiable(y, stats)


def _save_conv_act(ctx: Any, inputs: Any, output: Any) -> None:
    save_conv_act(ctx, "cpu_conv_act", inputs, output)


# fmt: off
_norm = operator(
    "cpu_conv_norm",
    Signature(
        "", (Inputs, "x weight bias gamma beta"), (Buffers, ""),
        (BlockSpec, f"{NORM} momentum correction"),
    ),
    conv_norm, _fake_conv_norm, returns=3, changed=("running_mean", "running_var", "batches"),
)
gradients(
    "cpu_conv_norm_backward",
    Signature("g", (Saved, "x weight bias gamma beta out y! stats!"), (BlockSpec, NORM), NEED),
    conv_norm_backward, BLOCK,
)
_act = operator(
    "cpu_conv_act", Signature("", (Inputs, "x weight bias"), (BlockSpec, LAYER)), conv_act, output,
    returns=1,
)
gradients(
    "cpu_conv_act_backward",
    Signature("g", (Saved, "x weight bias out"), (BlockSpec, LAYER), NEED),
    conv_act_backward, CONVOLUTION,
)
# As for conv_bn: register_autograd refuses an operator that changes arguments (autograd.py).
_norm._setup_context_fn = _save_conv_norm
_norm._backward_fn = gradient_of("cpu_conv_norm", "cpu_conv_norm_backward", BLOCK, _conv_norm_twin)
_act.register_autograd(
    gradient_of("cpu_conv_act", "cpu_conv_act_backward", CONVOLUTION, reference.conv_act_of),
    setup_context=_save_conv_act,
)
