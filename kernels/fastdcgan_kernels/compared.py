"""The operators of ops.py beside plain PyTorch: inside `Compared` each that runs is computed once
more on its own arguments, in float32 from the same 16-bit values; what is multiplied is rounded as
an operator rounds it. So what it gives differs by little more than the rounding of what it writes,
and no rounding adds up from layer to layer. Not here: experiments on random data (trials.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan_kernels import reference

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
        twin = _TWINS.get(func._schema.name)
        if twin is None:
            return func(*args, **(kwargs or {}))
        assert not kwargs
        before = [a.clone() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
        found = func(*args)
        try:
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                outs = found if isinstance(found, tuple) else (found,)
                where = f"{func._schema.name.removeprefix('fastdcgan::')} of {self._name(args)}"
                for name, (ours, right) in twin(before, args, *outs).items():
                    if ours is not None and right is not None and ours.numel():
                        self._errors.append((f"{where}: {name}", _error(ours, right)))
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

    def _name(self, args: Sequence[Any]) -> str:
        weights = [a for a in args if isinstance(a, Tensor) and a.shape[2:] == (4, 4)]
        known = [self._names[w.data_ptr()] for w in weights if w.data_ptr() in self._names]
        return known[-1] if known else " ".join(str(tuple(a.shape)) for a in args[:1])


def _error(found: Tensor, right: Tensor) -> Tensor:
    kind = torch.finfo(found.dtype)
    known = right.abs() < kind.max / 2
    off = ((found.float() - right).abs() - kind.tiny * kind.eps).clamp(min=0)
    off, size = (torch.where(known, t, 0).norm() for t in (off, right))
    return torch.where(off == 0, 0, off / size)


# --- the twins: (arguments before, arguments after, results) -> what was found and what is right --


def _conv_bn(before: Sequence[Any], after: Sequence[Any], y: Tensor, coef: Tensor) -> Expected:
    x, x_coef, weight, bias, gamma, beta, up, stride, groups, eps, x_act, x_slope, sync = before[
        :13
    ]
    running: dict[str, Any] = dict(zip(_RUNNING, before[14:19], strict=False))
    source = _source(x, x_coef, x_act, x_slope)
    given = (None, weight.to(x.dtype), bias, up, stride, "none", 0.0, "none", 0.0)
    expected: Expected = {"y": (y, reference.conv_and_act(source, *given))}
    if sync:  # across processes: compared by what comes of it
        return expected
    stats = reference.statistics(y, groups)
    right = reference.coefficients(stats, gamma, beta, eps)
    for plane, name in enumerate(("mean", "scale", "shift", "rstd", "count")):
        expected[name] = coef[plane], right[plane]
    mean, var, _, momentum, momenta = (running.get(name) for name in _RUNNING)
    if mean is not None and var is not None:
        share = (momentum or 0.0) if momenta is None else momenta
        reference.update_running(mean, var, stats, share)
        expected |= {"running_mean": (after[14], mean), "running_var": (after[15], var)}
    return expected


_RUNNING = ("mean", "var", "batches", "momentum", "momenta")


def _conv_bn_backward(before: Sequence[Any], after: Sequence[Any], *found: Tensor) -> Expected:
    gy, gcoef, x, x_coef, weight, _, bias, y, up, stride, _, x_act, x_slope, sync, need = before
    dy = _through_norm(gy, gcoef, y, sync)
    return _gradients(found, dy, x, x_coef, weight, bias, up, stride, x_act, x_slope, need)


def _conv_bn_of_image_backward(
    before: Sequence[Any], after: Sequence[Any], *found: Tensor
) -> Expected:
    gy, gcoef, picture, first, _, _, x, weight, _, y, _, x_act, x_slope, sync, need = before
    dy = _through_norm(gy, gcoef, y, sync)
    gx, gw = _convolution_gradients(dy, x, weight, False, 2)
    g = gx * _derivative(x.float(), x_act, x_slope)
    gpicture, gfirst = _convolution_gradients(g, picture, first, False, 2)
    names = ("gradient of the image", "gradient of its weight", "gradient of the weight")
    right = (r if n else None for r, n in zip((gpicture, gfirst, gw), need, strict=True))
    return dict(zip(names, zip(found, right, strict=True), strict=True))


def _conv_act(before: Sequence[Any], after: Sequence[Any], out: Tensor, signs: Tensor) -> Expected:
    x, x_coef, weight, bias, up, stride, x_act, x_slope, act, slope = before[:10]
    source = _source(x, x_coef, x_act, x_slope)
    given = (None, weight.to(x.dtype), bias, up, stride, "none", 0.0, act, slope)
    right = reference.conv_and_act(source, *given)
    expected: Expected = {"result": (out, right)}
    if signs.numel():
        bits = signs[..., None].bitwise_right_shift(torch.arange(8, device=signs.device)) & 1
        expected["signs"] = bits.flatten(-2).permute(0, 3, 1, 2).float(), (out > 0).float()
    return expected


def _conv_act_backward(before: Sequence[Any], after: Sequence[Any], *found: Tensor) -> Expected:
    g, out, x, x_coef, weight, _, bias, up, stride, x_act, x_slope, act, slope, need = before
    dy = g.float() * _derivative(out.float(), act, slope)
    return _gradients(found, dy, x, x_coef, weight, bias, up, stride, x_act, x_slope, need)


def _logit_backward(
    before: Sequence[Any], after: Sequence[Any], gy: Tensor, sums: Tensor
) -> Expected:
    g, y, coef, weight, _, activation, slope = before
    source = _source(y, coef, activation, slope).to(y.dtype)
    gx, gw = _convolution_gradients(g, source, weight, False, 1)
    gx, gcoef = _activation_gradients(gx, y, coef, activation, slope)
    return {
        "gradient of y": (gy, _through_norm(gx, gcoef, y, "")),
        "gradient of the weight": (sums[:16], gw.permute(0, 2, 3, 1).reshape(16, -1)),
        "gradient of gamma": (sums[16], gcoef[3, 0]),
        "gradient of beta": (sums[17], gcoef[4, 0]),
    }


def _activate(before: Sequence[Any], after: Sequence[Any], out: Tensor) -> Expected:
    y, *given = before
    return {"result": (out, reference.activate(y.float(), *given))}


def _activate_backward(before: Sequence[Any], after: Sequence[Any], *found: Tensor) -> Expected:
    g, y, coef, activation, slope = before
    gy, gcoef = _activation_gradients(g.to(y.dtype).float(), y, coef, activation, slope)
    return {"gradient of y": (found[0], gy), **_planes(found[1], gcoef)}


_TWINS: dict[str, Callable[..., Expected]] = {
    f"fastdcgan::{twin.__name__.removeprefix('_')}": twin
    for twin in (
        _conv_bn, _conv_bn_backward, _conv_bn_of_image_backward, _conv_act, _conv_act_backward,
        _logit_backward, _activate, _activate_backward,
    )
}  # fmt: skip


def _gradients(
    found: Sequence[Tensor], dy: Tensor, x: Tensor, x_coef: Tensor | None, weight: Tensor,
    bias: Tensor | None, up: bool, stride: int, x_act: str, x_slope: float, need: Sequence[bool],
) -> Expected:  # fmt: skip
    """Of a convolution whose result has the gradient dy."""
    source = _source(x, x_coef, x_act, x_slope).to(x.dtype)
    gx, gw = _convolution_gradients(dy, source, weight, up, stride)
    expected: Expected = {}
    if need[1]:
        expected["gradient of the weight"] = found[2], gw
    if need[2] and bias is not None:
        expected["gradient of the bias"] = found[3], dy.sum((0, 2, 3))
    if need[0] and x_coef is not None:
        gx, gcoef = _activation_gradients(gx, x, x_coef, x_act, x_slope)
        expected |= _planes(found[1], gcoef)
    if need[0]:
        expected["gradient of x"] = found[0], gx
    return expected


def _source(x: Tensor, x_coef: Tensor | None, activation: str, slope: float) -> Tensor:
    """What is multiplied for x: values of its dtype, in float32."""
    if x_coef is None:
        return x.float()
    return reference.activate(x.float(), x_coef, activation, slope).to(x.dtype).float()


def _convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, up: bool, stride: int
) -> tuple[Tensor, Tensor]:
    """Of x and weight, all of them as they are multiplied: in the dtype of x."""
    operands = (t.to(x.dtype).float() for t in (dy, x, weight))
    pad = 1 if stride == 2 else 0
    gx, gw, _ = torch.ops.aten.convolution_backward(
        *operands, None, [stride] * 2, [pad] * 2, [1, 1], up, [0, 0], 1, [True, True, False]
    )
    return gx, gw


def _activation_gradients(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """Of y and of coef (jit.norm.sum_partials: the planes 0, B, C, dgamma and dbeta), from that of
    act(z), z = scale * (y - mean) + shift."""
    mean, scale, shift, rstd, count = coef.unbind()
    away = y.float().unflatten(0, (coef.shape[1], -1)) - _wide(mean)
    out = reference.act(_wide(scale) * away + _wide(shift), activation, slope)
    dz = g.view_as(away) * _derivative(out, activation, slope)
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


def _through_norm(gy: Tensor, gcoef: Tensor | None, y: Tensor, sync: str) -> Tensor:
    """gy + B * y + C."""
    if gcoef is None:
        return gy.to(y.dtype).float()
    from fastdcgan_kernels.normalisation import norm_gradient  # imports Triton

    (_, b, c), _, _ = norm_gradient(gcoef, sync)
    groups = gcoef.shape[1]
    dy, y = (t.float().unflatten(0, (groups, -1)) for t in (gy, y))
    through: Tensor = dy + _wide(b) * y + _wide(c)
    return through.flatten(0, 1)


def _derivative(out: Tensor, activation: str, slope: float) -> Tensor | float:
    """act' where act(z) = out."""
    if activation == "tanh":
        return 1 - out.square()
    if activation == "none":
        return 1.0
    return torch.where(out > 0, 1.0, slope if activation == "leaky_relu" else 0.0)


def _wide(plane: Tensor) -> Tensor:
    """[groups, C] for [groups, N, C, P, Q]."""
    return plane[:, None, :, None, None]
