"""The operators of ops.py beside plain PyTorch: inside `Compared` each that runs is computed once
more on its own arguments, in float32 from the same 16-bit values; what is multiplied is rounded as
an operator rounds it. So what it gives differs by little more than the rounding of what it writes,
and no rounding adds up from layer to layer. Not here: experiments on random data (trials.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import convolution, reference
from .choice.spec import BlockSpec, Buffers, Inputs, Need, Saved
from .ops import GRADIENTS, NAMESPACE, SIGNATURES

ALLOWED = {torch.float32: 0.02, torch.float16: 0.01, torch.bfloat16: 0.03}
"""How far an operator's result may be from plain PyTorch's, by the dtype of its products; see
`Compared`. Measured by Triton's interpreter, `pytest -s tests/kernels/test_compared.py`, on all
operators of a step of small nets: the largest error of any that is right, and the smallest of any
product that is broken.

                  right    a missing tap    off by a pixel
    float32      4.8e-7             0.18              0.64
    float16      4.2e-4             0.18              0.64
    bfloat16     3.4e-3             0.18              0.64

Those nets make 16 pixels. Of nets for 32 pixels the worst were 2.4e-6 in float32, and 0.16 for a
missing tap. Of the standard nets (64 pixels, 64 feature maps) and 2 images in bfloat16: 2.2e-3,
0.20 and 0.66.
A GPU multiplies float32 in TF32, which rounds operands to ten bits on both sides; that was not
measured, so there is more room."""

Expected = dict[str, tuple[Tensor | None, Tensor | None]]
"""What an operator gave and what is right, both by name; None: not asked for."""


class Compared(TorchDispatchMode):
    """Compares each operator that runs inside, forward and backward, with its twin.

    The measure is |found - right| / |right| over all elements of a result, in the Euclidean norm.
    Elements that are too large for the result's dtype, or no numbers, are left out where they are
    right to be so; differences of its smallest spacing are none. Nothing is changed, and nothing is
    read back from the device before `errors`.

    Args:
        names: of weights, by `Tensor.data_ptr`; else a weight is named by its shape.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self._names = names or {}
        self._errors: list[tuple[str, Tensor]] = []
        self.unchecked = 0
        """Operators whose twin did not fit into the memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix(f"{NAMESPACE}::")
        twin = TWINS.get(name)
        if twin is None or func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        assert not kwargs
        before: Sequence[Any] = args
        if name == "conv_bn":  # moves its buffers
            before = [a.clone() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
        found = func(*args)
        try:
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                outs = found if isinstance(found, tuple) else (found,)
                where = f"{name} of {self._name(name, args)}"
                given = SIGNATURES[name].restore(before)
                if name == "conv_bn":  # what it moved is a result, too
                    _, moved, _ = SIGNATURES[name].restore(args)
                    outs = (*outs, moved.running_mean, moved.running_var)
                for what, (ours, right) in twin(*given, *outs).items():
                    if ours is not None and right is not None and ours.numel():
                        self._errors.append((f"{where}: {what}", relative_error(ours, right)))
        except torch.OutOfMemoryError:  # a large batch, and the step itself does fit
            self.unchecked += 1
        return found

    def errors(self) -> list[tuple[float, str]]:
        """The error of each result, and whose it is, the largest first; of no number it is inf."""
        if not self._errors:
            return []
        errors = torch.stack([error for _, error in self._errors]).nan_to_num(nan=torch.inf)
        names = [name for name, _ in self._errors]
        return sorted(zip(errors.tolist(), names, strict=True), reverse=True)

    def _name(self, name: str, args: Sequence[Any]) -> str:
        weight = SIGNATURES[name].named(args).get("weight")
        known = None if weight is None else self._names.get(weight.data_ptr())
        return known or str(tuple(args[0].shape))


def relative_error(found: Tensor, right: Tensor) -> Tensor:
    kind = torch.finfo(found.dtype)
    known = right.abs() < kind.max / 2
    off = ((found.float() - right).abs() - kind.tiny * kind.eps).clamp(min=0)
    off, size = (torch.where(known, t, 0).norm() for t in (off, right))
    return torch.where(off == 0, 0, off / size)


# --- the twins: (arguments, results) -> what was found and what is right, by names ----------------


def _conv_bn(
    inputs: Inputs, buffers: Buffers, spec: BlockSpec, y: Tensor, coef: Tensor, *moved: Tensor
) -> Expected:
    expected: Expected = {"y": (y, _convolution(inputs, replace(spec, activation="none")))}
    if spec.sync:  # across processes: compared by what comes of it
        return expected
    stats = reference.statistics(y, spec.groups)
    right = reference.coefficients(stats, inputs.gamma, inputs.beta, spec.eps)
    for plane, name in enumerate(("mean", "scale", "shift", "rstd", "count")):
        expected[name] = coef[plane], right[plane]
    momentum = spec.momentum if buffers.momenta is None else buffers.momenta
    reference.update_running(buffers, stats, momentum)
    pairs = zip(moved, (buffers.running_mean, buffers.running_var), strict=True)
    return expected | dict(zip(("running_mean", "running_var"), pairs, strict=True))


def _conv_bn_backward(
    gy: Tensor, gcoef: Tensor | None, saved: Saved, spec: BlockSpec, need: Need, *found: Tensor
) -> Expected:
    return _gradients(found, _through_norm(gy, gcoef, saved.y, spec), saved, spec, need)


def _conv_act(inputs: Inputs, spec: BlockSpec, out: Tensor) -> Expected:
    return {"result": (out, _convolution(inputs, spec))}


def _conv_act_backward(
    g: Tensor, saved: Saved, spec: BlockSpec, need: Need, *found: Tensor
) -> Expected:
    dy = g.float()
    if saved.out is not None:
        dy = reference.act_backward(dy, saved.out.float(), spec.activation, spec.slope)
    return _gradients(found, dy, saved, spec, need)


def _activate(y: Tensor, coef: Tensor, spec: BlockSpec, out: Tensor) -> Expected:
    return {"result": (out, reference.activate(y.float(), coef, spec.activation, spec.slope))}


def _activate_backward(
    g: Tensor, y: Tensor, coef: Tensor, spec: BlockSpec, *found: Tensor
) -> Expected:
    g = g.to(y.dtype).float()
    gy, gcoef = _activation_gradients(g, y, coef, spec.activation, spec.slope)
    return {"gradient of y": (found[0], gy), **_planes(found[1], gcoef)}


TWINS: dict[str, Callable[..., Expected]] = {
    twin.__name__.removeprefix("_"): twin
    for twin in (
        _conv_bn, _conv_bn_backward, _conv_act, _conv_act_backward, _activate,
        _activate_backward,
    )
}  # fmt: skip


def _gradients(
    found: Sequence[Tensor], dy: Tensor, saved: Saved, spec: BlockSpec, need: Need
) -> Expected:
    """Of a convolution whose result has the gradient dy."""
    ours = dict(zip(GRADIENTS, found, strict=True))
    source = _source(saved, spec).to(saved.x.dtype)
    gx, gw = _convolution_gradients(dy, source, saved.weight, spec)
    expected: Expected = {}
    if need.weight:
        expected["gradient of the weight"] = ours["weight"], gw
    if need.bias:
        expected["gradient of the bias"] = ours["bias"], dy.sum((0, 2, 3))
    if need.x and saved.x_coef is not None:
        gx, gcoef = _activation_gradients(
            gx, saved.x, saved.x_coef, spec.x_activation, spec.x_slope
        )
        expected |= _planes(ours["x_coef"], gcoef)
    elif need.x:
        gx = reference.act_backward(gx, saved.x.float(), spec.x_activation, spec.x_slope)
    if need.x:
        expected["gradient of x"] = ours["x"], gx
    return expected


def _source(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """What is multiplied for x: values of its dtype, in float32."""
    x = inputs.x.float()
    if inputs.x_coef is None:
        return x
    x = reference.activate(x, inputs.x_coef, spec.x_activation, spec.x_slope)
    return x.to(inputs.x.dtype).float()


def _convolution(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """act(convolution + bias) in float32, of the weight as it is multiplied."""
    weight = inputs.weight.to(inputs.x.dtype)
    return reference.conv_act_of(Inputs(_source(inputs, spec), weight, bias=inputs.bias), spec)


def _convolution_gradients(
    dy: Tensor, x: Any, weight: Any, spec: BlockSpec
) -> tuple[Tensor, Tensor]:
    """Of x and weight, all of them as they are multiplied: in the dtype of x."""
    dy, x, weight = (t.to(x.dtype).float() for t in (dy, x, weight))
    gx, gw = convolution.gradients(dy, x, weight, spec.stride, spec.padding, spec.transposed)
    assert gx is not None
    assert gw is not None
    return gx, gw


def _activation_gradients(
    g: Tensor, y: Tensor, coef: Any, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """Of y and of coef (gpu.partials.MergedSums: the planes 0, B, C, dgamma, dbeta), from that
    of act(z), z = scale * (y - mean) + shift."""
    mean, scale, shift, rstd, count = coef.unbind()
    away = y.float().unflatten(0, (coef.shape[1], -1)) - _wide(mean)
    kept = _wide(scale) * away + _wide(shift)
    if activation not in reference.OF_INPUT:
        kept = reference.act(kept, activation, slope)
    dz = reference.act_backward(g.view_as(away), kept, activation, slope)
    s1, s2 = dz.sum((1, 3, 4)), (dz * away).sum((1, 3, 4))
    b = -scale * rstd.square() * s2 / count
    c = -scale * s1 / count - b * mean
    sums = [total.sum(0).expand_as(s1) for total in (rstd * s2, s1)]
    planes = torch.stack([torch.zeros_like(b), b, c, *sums])
    return (_wide(scale) * dz).flatten(0, 1), planes


def _planes(found: Tensor, right: Tensor) -> Expected:
    """Those of a gradient of coef that are read (the last two in the first group alone)."""
    return {
        "slope of the norm's gradient": (found[1], right[1]),
        "constant of the norm's gradient": (found[2], right[2]),
        "gradient of gamma": (found[3, 0], right[3, 0]),
        "gradient of beta": (found[4, 0], right[4, 0]),
    }


def _through_norm(gy: Tensor, gcoef: Tensor | None, y: Any, spec: BlockSpec) -> Tensor:
    """gy + B * y + C."""
    if gcoef is None:
        return gy.to(y.dtype).float()
    from .gpu.batchnorm import norm_gradient  # imports Triton

    (_, b, c), _, _ = norm_gradient(gcoef, spec.sync)
    groups = gcoef.shape[1]
    dy, y = (t.float().unflatten(0, (groups, -1)) for t in (gy, y))
    through: Tensor = dy + _wide(b) * y + _wide(c)
    return through.flatten(0, 1)


def _wide(plane: Tensor) -> Tensor:
    """[groups, C] for [groups, N, C, P, Q]."""
    return plane[:, None, :, None, None]
