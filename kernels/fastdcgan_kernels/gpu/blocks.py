"""The blocks, forward and backward, as sequences of launches on real tensors: what happens inside
the operators of ops.py. Not here: autograd, autocast.

A block is convolution, [norm], activation. With a norm the convolution gives its raw
output y and the coefficients [5, groups, C] (mean, scale, shift, and two for the way back) of
z = scale * (y - mean) + shift; the activation of z is a pass of its own, or is left to the next
block, which applies it as it loads. Nothing else is kept for the backward pass. InstanceNorm is
BatchNorm with a group for each image.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import convolution
from ..aside import aside, mark, waits
from ..choice import choose
from ..choice.geometry import Geometry, Tile, gradient_dtype
from ..choice.spec import BlockSpec, Buffers, Inputs, Need, Saved
from ..choice.targets import target_of
from ..choice.types import Block, How, Target, Task
from ..reference import OF_INPUT
from . import batchnorm, conv_image, conv_pointers, conv_tma, conv_weight
from .tile import Epilogue, Operand, Result

CHANNELS_LAST = torch.channels_last


def conv_bn(inputs: Inputs, buffers: Buffers, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """(y, coef [5, groups, C] as `batchnorm.merged_statistics`); the buffers move in place."""
    source, weight = _source(inputs, spec), working_weight(inputs)
    geometry, groups = spec.geometry(inputs.x, inputs.weight), spec.groups
    channels = geometry.CL if spec.transposed else geometry.CS
    become = functools.partial(
        batchnorm.merged_statistics, inputs.x, groups, channels, eps=spec.eps
    )
    with batchnorm.without_gaps(_running(buffers, spec)) as running:
        merged = become(inputs.gamma, inputs.beta, running=running)
        own = become(None, None) if spec.sync else merged
        if _how(geometry, inputs.x, spec, True, groups) == "vendor":
            y = _vendor(_materialise(source, groups), weight, spec)
            if inputs.bias is not None:
                y += inputs.bias.to(y.dtype)[:, None, None]
            batchnorm.statistics(y, groups, own)
        else:
            epilogue = Epilogue("statistics", bias=inputs.bias, merged=own)
            y = convolve(
                source, weight, geometry, transposed=spec.transposed, epilogue=epilogue,
                groups=groups,
            ).value  # fmt: skip
        if spec.sync:
            batchnorm.merge_processes(own.stats, spec.sync, merged)
    return y, merged.coef


def _running(buffers: Buffers, spec: BlockSpec) -> batchnorm.Running | None:
    if buffers.running_mean is None or buffers.running_var is None:
        return None
    momentum = spec.momentum if buffers.momenta is None else buffers.momenta
    return batchnorm.Running(
        buffers.running_mean, buffers.running_var, momentum, buffers.batches, spec.correction
    )


def conv_bn_backward(
    gy: Tensor, gcoef: Tensor | None, saved: Saved, spec: BlockSpec, need: Need
) -> dict[str, Tensor]:
    """Gradients by the names of `Inputs`, from those of y and coef, of which that of coef is as
    `batchnorm.merged_sums` tells; None: that of y is all there is."""
    dy = _through_norm(gy, gcoef, saved, spec)
    return _convolution_backward(dy, saved, spec, need, spec.groups, norm=True)


def _through_norm(gy: Tensor, gcoef: Tensor | None, saved: Saved, spec: BlockSpec) -> Operand:
    """The gradient of the raw output, from that of y by itself and that of coef."""
    gy = _like(gy, saved.y)
    if gcoef is None:
        return Operand(gy)
    dcoef, _, _ = batchnorm.norm_gradient(gcoef.contiguous(), spec.sync)
    return Operand(gy, "normgrad", aux=saved.y, coef=dcoef)


def conv_act(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """act(convolution + bias)."""
    source, weight = _source(inputs, spec), working_weight(inputs)
    geometry, groups = spec.geometry(inputs.x, inputs.weight), _groups(inputs)
    act: dict[str, Any] = {"activation": spec.activation, "slope": spec.slope}
    if _how(geometry, inputs.x, spec, False, groups) == "vendor":
        y = _vendor(_materialise(source, groups), weight, spec)
        zero, one = torch.zeros_like(y[0, :, 0, 0], dtype=torch.float32), y.new_ones(1).float()
        shift = zero if inputs.bias is None else inputs.bias.float()
        coef = torch.stack([zero, zero + one, shift])[:, None]
        if inputs.bias is not None or spec.activation != "none":
            y = batchnorm.pointwise(Operand(y, "activate", coef=coef, **act), 1)
        return y
    epilogue = Epilogue(bias=inputs.bias, **act)
    return convolve(
        source, weight, geometry, transposed=spec.transposed, epilogue=epilogue, groups=groups
    ).value


def conv_act_backward(g: Tensor, saved: Saved, spec: BlockSpec, need: Need) -> dict[str, Tensor]:
    """Gradients by the names of `Inputs`."""
    dy = Operand(_like(g, saved.x))
    if spec.activation != "none":
        dy = Operand(dy.value, "actgrad", saved.out, activation=spec.activation, slope=spec.slope)
    return _convolution_backward(dy, saved, spec, need, _groups(saved), norm=False)


def activate(y: Tensor, coef: Tensor, spec: BlockSpec) -> Tensor:
    """act(scale * (y - mean) + shift)."""
    y = y.contiguous(memory_format=CHANNELS_LAST)
    operand = Operand(y, "activate", None, coef.contiguous(), spec.activation, spec.slope)
    return batchnorm.pointwise(operand, coef.shape[1])


def activate_backward(g: Tensor, y: Tensor, coef: Tensor, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """Gradients of y and coef."""
    y = y.contiguous(memory_format=CHANNELS_LAST)
    return batchnorm.activation_backward(
        _like(g, y), y, coef, spec.activation, spec.slope, coef.shape[1]
    )


# --- Convolutions: which family, and which tile ---------------------------------------------------


def convolve(
    source: Operand, weight: Tensor, geometry: Geometry, *, transposed: bool,
    epilogue: Epilogue = Epilogue(), groups: int = 1, tile: Tile | None = None,
) -> Result:  # fmt: skip
    """The convolution with its epilogue, by the family that fits. tile: by default chosen."""
    op = "conv_transposed" if transposed else "conv"
    tile = tile or _tile(op, geometry, source.value, source.prologue, epilogue.kind, groups)
    given: Any = {"transposed": transposed, "tile": tile, "precision": precision_of(source.value)}
    family: Any = conv_pointers
    if geometry.is_image(transposed):
        family = conv_image
    elif tile.engine == "gluon" and _gluon_takes(
        source, weight, geometry, epilogue=epilogue, groups=groups, **given
    ):
        family = gluon()
    elif conv_tma.takes(source, weight, geometry, **given):
        family = conv_tma
    result: Result = family.convolve(
        source, weight, geometry, epilogue=epilogue, groups=groups, **given
    )
    return result


def weight_gradient(
    x: Operand, dy: Operand, geometry: Geometry, *, transposed: bool = False, dtype: torch.dtype,
    groups: int = 1, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Gradient [CS, CL, K, K] of the weight from a layer's input and its output's gradient."""
    small, large = (x, dy) if transposed else (dy, x)
    prologues = "none" if small.prologue == large.prologue == "none" else "both"
    tile = tile or _tile("weight_gradient", geometry, x.value, prologues, "store", groups)
    family: Any = conv_image if geometry.is_image(False) else conv_weight
    gradient: Tensor = family.weight_gradient(
        small, large, geometry, tile=tile, dtype=dtype, groups=groups,
        precision=precision_of(x.value),
    )  # fmt: skip
    return gradient


@functools.cache
def gluon() -> Any:
    """The family conv_gluon. Gluon is experimental: None, and one warning, where it is not there or
    is no longer what that file is written in."""
    try:
        from . import conv_gluon
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"descriptors in place of the Gluon kernels, not importable: {why}", stacklevel=2
        )
        return None
    return conv_gluon


def _gluon_takes(source: Operand, weight: Tensor, geometry: Geometry, **more: Any) -> bool:
    epilogue: Epilogue = more["epilogue"]
    if epilogue.kind == "gradient" and epilogue.activation in OF_INPUT:
        return False
    return gluon() is not None and gluon().takes(source, weight, geometry, **more)


def precision_of(x: Tensor) -> str:
    """How tl.dot multiplies fp32: as PyTorch's convolutions are told to, where the target can."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    settings = (cudnn.conv.fp32_precision, cudnn.fp32_precision, backends.fp32_precision)
    chosen = next((setting for setting in settings if setting != "none"), "ieee")
    wanted = x.dtype == torch.float32 and chosen == "tf32"
    return "tf32" if wanted and _target(x.device).tf32 else "ieee"


def _target(device: torch.device) -> Target:
    target: Target | None = target_of(device)
    assert target is not None, f"no kernels for {device}"
    return target


def _tile(
    op: str, geometry: Geometry, x: Tensor, prologue: str, epilogue: str, groups: int
) -> Tile:
    op = f"image_{op}" if geometry.is_image(op == "conv_transposed") else op
    task = Task(op, geometry, x.dtype, prologue, epilogue, groups)
    tile: Tile = choose.tile_for(task, _target(x.device))
    if x.dtype == torch.float32 and precision_of(x) == "ieee":
        # No matrix instruction has full precision, and what comes by descriptors would spill.
        tile = replace(tile, engine="pointers")
    return tile


def _how(geometry: Geometry, x: Tensor, spec: BlockSpec, norm: bool, groups: int) -> How:
    block = Block(spec.transposed, geometry, x.dtype, norm, groups)
    return choose.choose(block, _target(x.device)).how


# --- Operands -------------------------------------------------------------------------------------


def _source(inputs: Inputs, spec: BlockSpec) -> Operand:
    """A block's input: a tensor as it is, or a producer's raw output with its coefficients."""
    x = inputs.x if inputs.x_activated is None else inputs.x_activated
    x = x.contiguous(memory_format=CHANNELS_LAST)
    if inputs.x_coef is None or inputs.x_activated is not None:
        return Operand(x)
    coef = inputs.x_coef.contiguous()
    return Operand(x, "activate", None, coef, spec.x_activation, spec.x_slope)


def working_weight(inputs: Inputs) -> Tensor:
    """The weight as the kernels take it: in the dtype of x, channels_last; itself if it is so."""
    if inputs.working is not None:
        return inputs.working
    return _as_working(inputs.weight, inputs.x.dtype)


def _as_working(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype, memory_format=CHANNELS_LAST).contiguous(memory_format=CHANNELS_LAST)


def _like(g: Tensor, y: Tensor | None) -> Tensor:
    """A gradient in the dtype of what it is the gradient of, channels_last."""
    assert y is not None
    return g.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)


def _groups(inputs: Inputs) -> int:
    return 1 if inputs.x_coef is None else inputs.x_coef.shape[1]


def _materialise(operand: Operand, groups: int) -> Tensor:
    if operand.prologue == "none":
        return operand.value
    return batchnorm.pointwise(operand, groups)


# --- The way back ---------------------------------------------------------------------------------


def _convolution_backward(
    dy: Operand, saved: Saved, spec: BlockSpec, need: Need, groups: int, norm: bool
) -> dict[str, Tensor]:
    source, weight = _source(saved, spec), saved.weight
    geometry, transposed = spec.geometry(saved.x, weight), spec.transposed
    how = _how(geometry, saved.x, spec, norm, groups)
    found: dict[str, Tensor] = {}
    if need.x or how == "vendor":  # our kernels read it for the gradient of x alone
        weight = working_weight(saved)
    if need.bias:
        found["bias"] = batchnorm.column_sum(dy, groups)
    # A weight's gradient reads each value of an image's layer once or nearly so: a prologue repeats
    # nothing. (A data gradient repeated it for 16 taps of an image: on an H200 70 us of that of G's
    # last layer, whose bytes take 10.)
    cheap = how != "vendor" and geometry.is_image(False) and not need.x
    if how != "prologue" and not cheap:
        dy = Operand(_materialise(dy, groups))
    dtype, act = gradient_dtype(saved.weight), (spec.x_activation, spec.x_slope)
    raw = saved.x.contiguous(memory_format=CHANNELS_LAST)
    coef = None if saved.x_coef is None else saved.x_coef.contiguous()
    if how == "vendor":
        values = _materialise(source, groups) if need.weight else source.value
        gx, gw = _vendor_gradients(dy.value, values, weight, spec, need)
        if gw is not None:
            found["weight"] = gw.to(dtype)
        if gx is None:
            return found
        found["x"] = gx.contiguous(memory_format=CHANNELS_LAST)
        if coef is not None:
            found["x"], found["x_coef"] = batchnorm.activation_backward(
                found["x"], raw, coef, *act, groups
            )
        elif spec.x_activation != "none":
            found["x"] = batchnorm.pointwise(Operand(found["x"], "actgrad", raw, None, *act))
        return found
    before = mark()
    if need.x:
        kind = "store" if spec.x_activation == "none" else "actgrad"
        epilogue = Epilogue(kind, None, raw, None, *act)
        if coef is not None:
            merged = batchnorm.merged_sums(coef)
            epilogue = Epilogue("gradient", None, raw, coef, *act, merged)
            found["x_coef"] = merged.out
        found["x"] = convolve(
            dy, weight, geometry, transposed=not transposed, epilogue=epilogue, groups=groups
        ).value
    if need.weight:  # beside that, where there is a second stream
        with nullcontext() if waits(saved.weight) else aside(source, dy, since=before):
            found["weight"] = weight_gradient(
                source, dy, geometry, transposed=transposed, dtype=dtype, groups=groups
            )
    return found


# --- The vendor's convolution ---------------------------------------------------------------------


def _vendor(x: Tensor, weight: Tensor, spec: BlockSpec) -> Tensor:
    off = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with off:
        y = convolution.convolve(x, weight, None, spec.stride, spec.padding, spec.transposed)
    return y.contiguous(memory_format=CHANNELS_LAST)


def _vendor_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, spec: BlockSpec, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    return convolution.gradients(
        dy, x, weight, spec.stride, spec.padding, spec.transposed, need.x, need.weight
    )
