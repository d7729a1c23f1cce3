"""Gradients of the operators of ops.py, by name: each is kept and handed back under the name that
its tensor has in `Inputs`. Not here: what the gradients are made by (gpu/blocks.py).

Where a graph of the gradient is asked for (create_graph=True), the gradient is that of the plain
twin in reference.py, so that higher orders are those of its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops as operators
from . import reference
from .choice import plain
from .choice.geometry import contiguous, is_channels_last
from .choice.spec import BlockSpec, Inputs, Need, Saved, Signature
from .ops import GRADIENTS, SIGNATURES, ops

SAVED, INPUTS = Signature("", (Saved, "")), Signature("", (Inputs, ""))


def keep(ctx: Any, inputs: Inputs, spec: BlockSpec, **results: Tensor | None) -> None:
    """For the way back; gradients of unused results stay None."""
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    tensors: dict[str, Any] = vars(inputs) | results
    if not inputs.weight.requires_grad:  # which alone is made of it
        tensors["x_activated"] = None
    ctx.save_for_backward(*SAVED.flatten(Saved(**tensors)))


def kept(ctx: Any) -> tuple[Saved, BlockSpec]:
    """What was kept. Once in a backward: a checkpoint gives its tensors no second time."""
    (saved,) = SAVED.restore(ctx.saved_tensors)
    return saved, ctx.spec


def handed_back(
    ctx: Any, name: str, grads: Mapping[str, Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, for each argument of this operator."""
    needs = SIGNATURES[name].named(ctx.needs_input_grad)
    return tuple(grads.get(of) if need else None for of, need in needs.items())


def formatted(saved: Saved, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The kernels' gradients, which are channels_last, in the format that PyTorch's would have: of
    x, channels_last where it or the weight is; of the weight, its own."""
    weight_is = is_channels_last(saved.weight)
    x, weight = grads.get("x"), grads.get("weight")
    if x is not None and not weight_is and not is_channels_last(saved.x):
        grads["x"] = contiguous(x)
    if weight is not None and not weight_is:
        grads["weight"] = contiguous(weight)
    return grads


def needs_reference() -> bool:
    """Whether a gradient is to be plain PyTorch's: with a graph of its own, or of many upstream
    gradients at once (`is_grads_batched`)."""
    return torch.is_grad_enabled() or plain.is_transformed()


def needs_of(ctx: Any, name: str) -> Need:
    """Which gradients of this operator's arguments are asked for."""
    needs = SIGNATURES[name].named(ctx.needs_input_grad)
    x, x_coef, weight, bias = (needs.get(of, False) for of in ("x", "x_coef", "weight", "bias"))
    return Need(x or x_coef, weight, bias)


def by_reference(
    ctx: Any, name: str, twin: Callable[[Inputs, BlockSpec], Any], saved: Saved,
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the plain twin, with a graph of their own."""
    inputs = Inputs(**{of: getattr(saved, of) for of in INPUTS.kinds})
    if inputs.x_coef is not None:
        inputs = replace(inputs, x_coef=_Coefficients.apply(inputs.x_coef))
    needs = SIGNATURES[name].named(ctx.needs_input_grad)
    wanted = {of: getattr(inputs, of) for of, need in needs.items() if need}
    found = gradients_of(lambda: twin(inputs, ctx.spec), list(wanted.values()), grads)
    return handed_back(ctx, name, formatted(saved, dict(zip(wanted, found, strict=True))))


def gradients_of(
    run: Callable[[], Any], wanted: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Gradients of `wanted` from those of what `run` returns, with a graph of their own."""
    with torch.enable_grad():
        outs = run()
        outs = outs if isinstance(outs, tuple) else (outs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=True)
            if grad is not None and out.requires_grad
        ]
        of, by = ([pair[side] for pair in pairs] for side in (0, 1))
        found: Sequence[Tensor | None] = torch.autograd.grad(
            of, wanted, by, create_graph=True, allow_unused=True
        )
    return found


class _Coefficients(torch.autograd.Function):
    """Coefficients of conv_bn, for plain PyTorch to take. Its gradient is that of mean, scale and
    shift; conv_bn's backward wants it as the kernels make it (gpu.partials.MergedSums), unless
    that is computed in plain PyTorch, too."""

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
    given, _, spec = SIGNATURES["conv_bn"].restore(inputs)
    keep(ctx, given, spec, y=output[0])


def _conv_bn_gradient(
    ctx: Any, gy: Tensor | None, gcoef: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, spec = kept(ctx)
    if gy is None:
        assert saved.y is not None
        gy = torch.zeros_like(saved.y)
    if needs_reference():
        return by_reference(ctx, "conv_bn", reference.conv_bn, saved, (gy, gcoef))
    need = needs_of(ctx, "conv_bn")
    given = SIGNATURES["conv_bn_backward"].flatten(gy, gcoef, saved, spec, need)
    grads = dict(zip(GRADIENTS, ops.conv_bn_backward(*given), strict=True))
    if gcoef is not None:  # summed with the coefficients' already (gpu.partials.MergedSums)
        for of, plane in (("gamma", 3), ("beta", 4)):
            parameter = getattr(saved, of)
            grads[of] = None if parameter is None else gcoef[plane, 0].to(parameter.dtype)
    return handed_back(ctx, "conv_bn", formatted(saved, grads))


def gradient_of(
    name: str, backward: str, names: Sequence[str], twin: Callable[[Inputs, BlockSpec], Any]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of an operator's first result, by another operator or by its twin."""

    def gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, _spec = kept(ctx)
        if needs_reference():
            return by_reference(ctx, name, twin, saved, (g,))
        given = SIGNATURES[backward].flatten(g, saved, ctx.spec, needs_of(ctx, name))
        grads = dict(zip(names, getattr(ops, backward)(*given), strict=True))
        return handed_back(ctx, name, formatted(saved, grads))

    return gradient


def save_conv_act(ctx: Any, name: str, inputs: Any, out: Tensor) -> None:
    """Without an activation, or if its taker undoes that, the output is not needed. Without one the
    taker may change it in place, too."""
    given, spec = SIGNATURES[name].restore(inputs)
    assert spec.activation not in reference.OF_INPUT, "functional.without_norm keeps its input"
    if spec.undone:
        spec = replace(spec, activation="none")
    keep(ctx, given, spec, out=None if spec.activation == "none" else out)


def _save_conv_act(ctx: Any, inputs: Any, output: Any) -> None:
    save_conv_act(ctx, "conv_act", inputs, output)


def _save_activate(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.spec = SIGNATURES["activate"].restore(inputs)
    ctx.save_for_backward(*tensors)


def _activate_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (y, coef), spec = ctx.saved_tensors, ctx.spec
    if needs_reference():
        plain = _Coefficients.apply(coef)
        needs = SIGNATURES["activate"].named(ctx.needs_input_grad)
        wanted = {of: t for of, t in (("y", y), ("coef", plain)) if needs[of]}
        found = gradients_of(
            lambda: reference.activate(y, plain, spec.activation, spec.slope),
            list(wanted.values()),
            (g,),
        )
        return handed_back(ctx, "activate", dict(zip(wanted, found, strict=True)))
    given = SIGNATURES["activate_backward"].flatten(g, y, coef, spec)
    found = ops.activate_backward(*given)
    return handed_back(ctx, "activate", dict(zip(("y", "coef"), found, strict=True)))


# register_autograd refuses an operator that changes arguments, whoever needs their gradients; these
# are buffers, which have none. test_ops.py and test_functional.py (compiling, training) hold it.
operators.conv_bn._setup_context_fn = _save_conv_bn
operators.conv_bn._backward_fn = _conv_bn_gradient
operators.conv_act.register_autograd(
    gradient_of("conv_act", "conv_act_backward", GRADIENTS, reference.conv_act_of),
    setup_context=_save_conv_act,
)
operators.activate.register_autograd(_activate_gradient, setup_context=_save_activate)
