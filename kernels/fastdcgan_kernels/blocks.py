"""The blocks, forward and backward, as sequences of launches on real tensors: what happens inside
the ops of functional.py. Not here: autograd, autocast, the running buffers.

A block is convolution, [BatchNorm], activation. With BatchNorm the convolution gives its raw
output y and the coefficients [5, groups, C] (mean, scale, shift, and two for the way back) of
z = scale * (y - mean) + shift; the activation of z is a pass of its own, or is left to the next
block, which applies it as it loads. Nothing else is kept for the backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdcgan_kernels import image, normalisation, plan
from fastdcgan_kernels.convolution import Epilogue, Operand, Result, logit_gradients
from fastdcgan_kernels.convolution import gather as _gather
from fastdcgan_kernels.convolution import weight_gradient as _weight_gradient
from fastdcgan_kernels.geometry import Geometry, geometry_of, gradient_dtype
from fastdcgan_kernels.normalisation import Running

CHANNELS_LAST = torch.channels_last


def _is_image(geometry: Geometry) -> bool:
    return geometry.stride == 2 and geometry.CL <= 4


def _precision(x: Tensor) -> str:
    """How tl.dot multiplies fp32: as PyTorch's convolutions are told to, where the target can."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    settings = (cudnn.conv.fp32_precision, cudnn.fp32_precision, backends.fp32_precision)
    chosen = next((setting for setting in settings if setting != "none"), "ieee")
    wanted = x.dtype == torch.float32 and chosen == "tf32"
    return "tf32" if wanted and _target(x.device).tf32 else "ieee"


def _target(device: torch.device) -> plan.Target:
    target: plan.Target | None = plan.target_of(device)
    assert target is not None, f"no kernels for {device}"
    return target


def _task(op: str, geometry: Geometry, x: Tensor, prologue: str, epilogue: str, groups: int):  # type: ignore[no-untyped-def]
    op = f"image_{op}" if _is_image(geometry) else op
    task = plan.Task(op, geometry, x.dtype, prologue, epilogue, groups)
    return plan.tile_for(task, _target(x.device))


def _how(geometry: Geometry, dtype: torch.dtype, device: torch.device, up: bool, norm: bool,
         groups: int) -> str:  # fmt: skip
    block = plan.Block("up" if up else "down", geometry, dtype, norm, groups)
    return plan.choose(block, _target(device)).how


def _materialise(operand: Operand, groups: int) -> Tensor:
    if operand.prologue == "none":
        return operand.value
    return normalisation.pointwise(operand, groups)


def _convolve(
    source: Operand,
    weight: Tensor,
    geometry: Geometry,
    up: bool,
    epilogue: Epilogue,
    groups: int,
) -> Result:
    """Our GEMM, the image kernels where the large side is an image."""
    x = source.value
    run = (image.image_up if up else image.image_down) if _is_image(geometry) else None
    kind = "store" if epilogue.kind in ("signs", "signed") else epilogue.kind
    tile = _task("up" if up else "down", geometry, x, source.prologue, kind, groups)
    options = {"tile": tile, "epilogue": epilogue, "groups": groups}
    if run is not None:
        return run(source, weight, geometry, precision=_precision(x), **options)
    return _gather(source, weight, geometry, up=up, precision=_precision(x), **options)


def _weight_gradient_of(
    x: Operand, dy: Operand, geometry: Geometry, up: bool, dtype: torch.dtype, groups: int
) -> Tensor:
    small, large = (x, dy) if up else (dy, x)
    prologues = "none" if small.prologue == large.prologue == "none" else "both"
    tile = _task("weight_gradient", geometry, x.value, prologues, "store", groups)
    run = image.image_weight_gradient if _is_image(geometry) else _weight_gradient
    return run(
        small, large, geometry, tile=tile, dtype=dtype, groups=groups,
        precision=_precision(x.value),
    )  # fmt: skip


def _image_gradients(
    dy: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue, dtype: torch.dtype,
    groups: int,
) -> tuple[Result, Tensor]:  # fmt: skip
    """Both gradients of a layer up to an image in one launch."""
    x, target = dy.value, _target(dy.value.device)
    tile = _task("down", geometry, x, dy.prologue, "gradient", groups)
    return image.image_gradients(
        dy, weight, geometry, epilogue=epilogue, dtype=dtype, groups=groups,
        tile=plan.tile_of_both(tile, target), parts=plan.parts(target, groups),
        precision=_precision(x),
    )  # fmt: skip


def _vendor(x: Tensor, weight: Tensor, geometry: Geometry, up: bool) -> Tensor:
    op = F.conv_transpose2d if up else F.conv2d
    off = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with off:
        y = op(x, weight, None, geometry.stride, geometry.pad)
    return y.contiguous(memory_format=CHANNELS_LAST)


def _vendor_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, up: bool, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    stride, pad = [geometry.stride] * 2, [geometry.pad] * 2
    gx, gw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, pad, [1, 1], up, [0, 0], 1, [*need, False]
    )
    return gx, gw


def _source(x: Tensor, coef: Tensor | None, activation: str, slope: float) -> Operand:
    """A block's input: a tensor as it is, or a producer's raw output with its coefficients."""
    x = x.contiguous(memory_format=CHANNELS_LAST)
    if coef is None:
        return Operand(x)
    return Operand(x, "activate", coef=coef.contiguous(), activation=activation, slope=slope)


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the kernels take it: in this dtype, channels_last; itself where it is so."""
    return weight.to(dtype, memory_format=CHANNELS_LAST).contiguous(memory_format=CHANNELS_LAST)


def _groups(coef: Tensor | None, groups: int) -> int:
    return groups if coef is None else coef.shape[1]


def conv_bn(
    x: Tensor,
    x_coef: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    up: bool,
    stride: int,
    groups: int,
    eps: float,
    x_activation: str,
    x_slope: float,
    sync: str,
    working: Tensor | None = None,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, coef [5, groups, C] as `normalisation.finalize_statistics`); `running` moves in place.
    `working`, here and below, is the weight's `working_copy`; None: it is made."""
    source = _source(x, x_coef, x_activation, x_slope)
    w = working_copy(weight, x.dtype) if working is None else working
    geometry = geometry_of(x, weight, up, stride)
    how = _how(geometry, x.dtype, x.device, up, True, groups)
    if how == "vendor":
        y = _vendor(_materialise(source, groups), w, geometry, up)
        if bias is not None:
            y += bias.to(y.dtype)[:, None, None]
        result = normalisation.statistics(y, groups)
    else:
        result = _convolve(source, w, geometry, up, Epilogue("statistics", bias=bias), groups)
    coef, _ = normalisation.finalize_statistics(result, gamma, beta, eps, sync, running)
    return result.value, coef


def conv_bn_backward(
    gy: Tensor,
    gcoef: Tensor | None,
    x: Tensor,
    x_coef: Tensor | None,
    weight: Tensor,
    working: Tensor | None,
    y: Tensor,
    up: bool,
    stride: int,
    groups: int,
    x_activation: str,
    x_slope: float,
    sync: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, x_coef, weight and bias, from those of y and coef, of which that of coef is
    as `normalisation.finalize_gradient` makes it; None: that of y is all there is."""
    gy = gy.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)
    dy = Operand(gy)
    if gcoef is not None:
        dcoef, _, _ = normalisation.norm_gradient(gcoef.contiguous(), sync)
        dy = Operand(gy, "normgrad", aux=y, coef=dcoef)
    return _convolution_backward(
        dy, x, x_coef, weight, working, up, stride, groups, x_activation, x_slope,
        need_x, need_weight, need_bias, norm=True,
    )  # fmt: skip


def conv_bn_of_image_backward(
    gy: Tensor,
    gcoef: Tensor,
    picture: Tensor,
    picture_weight: Tensor,
    picture_working: Tensor | None,
    signs: Tensor,
    x: Tensor,
    weight: Tensor,
    working: Tensor | None,
    y: Tensor,
    groups: int,
    x_activation: str,
    x_slope: float,
    sync: str,
    need_picture: bool,
    need_picture_weight: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of picture, its weight and weight, through a `conv_bn` down and the layer before
    it, x = act(conv2d(picture, picture_weight)), of which there are `signs`."""
    dcoef, _, _ = normalisation.norm_gradient(gcoef.contiguous(), sync)
    gy = gy.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)
    dy = Operand(gy, "normgrad", aux=y, coef=dcoef)
    geometry = geometry_of(x, weight, False, 2)
    first = geometry_of(picture, picture_weight, False, 2)
    w = working_copy(weight, x.dtype) if working is None else working
    picture = picture.contiguous(memory_format=CHANNELS_LAST)
    gpicture = gpicture_weight = gw = None
    if need_picture:
        epilogue = Epilogue("signed", aux=signs, activation=x_activation, slope=x_slope)
        g = Operand(_convolve(dy, w, geometry, True, epilogue, groups).value)
        first_w = picture_working
        if first_w is None:
            first_w = working_copy(picture_weight, x.dtype)
        gpicture = _convolve(g, first_w, first, True, Epilogue(), 1).value
        if need_picture_weight:
            dtype = gradient_dtype(picture_weight)
            gpicture_weight = _weight_gradient_of(Operand(picture), g, first, False, dtype, 1)
    elif need_picture_weight:  # nobody else wants the gradient between the layers
        gpicture_weight = image.image_weight_gradient_through(
            dy, w, geometry, signs, x_activation, x_slope, picture,
            tile=_task("up", geometry, gy, dy.prologue, "store", groups),
            parts=plan.parts(_target(x.device), groups), dtype=gradient_dtype(picture_weight),
            groups=groups, precision=_precision(x),
        )  # fmt: skip
    if need_weight:
        gw = _weight_gradient_of(Operand(x), dy, geometry, False, gradient_dtype(weight), groups)
    return gpicture, gpicture_weight, gw


def conv_act(
    x: Tensor,
    x_coef: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    up: bool,
    stride: int,
    x_activation: str,
    x_slope: float,
    activation: str,
    slope: float,
    working: Tensor | None = None,
    signs: Tensor | None = None,
) -> Tensor:
    """act(convolution + bias), and its signs, of a layer down from an image, into `signs`."""
    source = _source(x, x_coef, x_activation, x_slope)
    w = working_copy(weight, x.dtype) if working is None else working
    geometry, groups = geometry_of(x, weight, up, stride), _groups(x_coef, 1)
    if _how(geometry, x.dtype, x.device, up, False, groups) == "vendor":
        y = _vendor(_materialise(source, groups), w, geometry, up)
        zero, one = torch.zeros_like(y[0, :, 0, 0], dtype=torch.float32), y.new_ones(1).float()
        shift = zero if bias is None else bias.float()
        coef = torch.stack([zero, zero + one, shift])[:, None]
        if bias is None and activation == "none":
            return y
        return normalisation.pointwise(
            Operand(y, "activate", coef=coef, activation=activation, slope=slope), 1
        )
    kind = "store" if signs is None else "signs"
    epilogue = Epilogue(kind, bias=bias, aux=signs, activation=activation, slope=slope)
    return _convolve(source, w, geometry, up, epilogue, groups).value


def conv_act_backward(
    g: Tensor,
    out: Tensor,
    x: Tensor,
    x_coef: Tensor | None,
    weight: Tensor,
    working: Tensor | None,
    up: bool,
    stride: int,
    x_activation: str,
    x_slope: float,
    activation: str,
    slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, x_coef, weight and bias."""
    g = g.to(out.dtype).contiguous(memory_format=CHANNELS_LAST)
    dy = Operand(g)
    if activation != "none":
        dy = Operand(g, "actgrad", aux=out, activation=activation, slope=slope)
    return _convolution_backward(
        dy, x, x_coef, weight, working, up, stride, _groups(x_coef, 1), x_activation, x_slope,
        need_x, need_weight, need_bias, norm=False,
    )  # fmt: skip


def logit_backward(
    g: Tensor, x: Tensor, x_coef: Tensor, weight: Tensor, working: Tensor | None,
    x_activation: str, x_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`logit_gradients` of a `conv_act` to one number without an activation."""
    g = g.to(x.dtype).contiguous()
    w = working_copy(weight, x.dtype) if working is None else working
    source = _source(x, x_coef, x_activation, x_slope)
    return logit_gradients(g, w, source, x_coef.shape[1])


def _convolution_backward(
    dy: Operand,
    x: Tensor,
    x_coef: Tensor | None,
    weight: Tensor,
    working: Tensor | None,
    up: bool,
    stride: int,
    groups: int,
    x_activation: str,
    x_slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    norm: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    source = _source(x, x_coef, x_activation, x_slope)
    geometry = geometry_of(x, weight, up, stride)
    how = _how(geometry, x.dtype, x.device, up, norm, groups)
    w = weight  # our kernels read it for the gradient of x alone
    if need_x or how == "vendor":
        w = working_copy(weight, x.dtype) if working is None else working
    gx = gx_coef = gw = gbias = None
    if need_bias:
        gbias = normalisation.column_sum(dy, groups)
    # On an image's few channels, and where all taps of a value are one tile, a prologue repeats
    # next to nothing.
    cheap = how == "materialised" and _is_image(geometry) and (up or not need_x)
    if how != "prologue" and not cheap:
        dy = Operand(_materialise(dy, groups))
    if how == "vendor":
        values = _materialise(source, groups) if need_weight else source.value
        gx, gw = _vendor_gradients(dy.value, values, w, geometry, up, (need_x, need_weight))
        if gw is not None:
            gw = gw.to(gradient_dtype(weight))
        if gx is not None and source.coef is not None:
            gx = gx.contiguous(memory_format=CHANNELS_LAST)
            gx, partials = normalisation.activation_gradient(
                gx, source.value, source.coef, x_activation, x_slope, groups
            )
            gx_coef = normalisation.finalize_gradient(partials, source.coef)
        return gx, gx_coef, gw, gbias
    if need_x and x_coef is None:
        gx = _convolve(dy, w, geometry, not up, Epilogue(), groups).value
    elif need_x:
        epilogue = Epilogue(
            "gradient", aux=source.value, coef=source.coef, activation=x_activation, slope=x_slope
        )
        if need_weight and up and _is_image(geometry):
            result, gw = _image_gradients(dy, w, geometry, epilogue, gradient_dtype(weight), groups)
        else:
            result = _convolve(dy, w, geometry, not up, epilogue, groups)
        assert result.partials is not None
        assert source.coef is not None
        gx, gx_coef = result.value, normalisation.finalize_gradient(result.partials, source.coef)
    if need_weight and gw is None:
        gw = _weight_gradient_of(source, dy, geometry, up, gradient_dtype(weight), groups)
    return gx, gx_coef, gw, gbias


def activate(y: Tensor, coef: Tensor, activation: str, slope: float) -> Tensor:
    """act(scale * (y - mean) + shift)."""
    operand = _source(y, coef, activation, slope)
    return normalisation.pointwise(operand, coef.shape[1])


def activate_backward(
    g: Tensor, y: Tensor, coef: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """Gradients of y and coef."""
    g, y = (t.contiguous(memory_format=CHANNELS_LAST) for t in (g.to(y.dtype), y))
    gy, partials = normalisation.activation_gradient(g, y, coef, activation, slope, coef.shape[1])
    return gy, normalisation.finalize_gradient(partials, coef)
