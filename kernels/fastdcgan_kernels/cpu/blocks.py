"""The blocks on a CPU in float32, as functional.py calls them, and which of them run here. Not
here: their operators (ops.py), and the convolutions (convolution.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan_kernels import reference
from fastdcgan_kernels.cpu import ops as _  # noqa: F401  (registers the operators)
from fastdcgan_kernels.cpu.build import library
from fastdcgan_kernels.cpu.convolution import CHUNK, has_image_up, has_winograd
from fastdcgan_kernels.geometry import Geometry
from fastdcgan_kernels.ops import ops


def takes(geometry: Geometry, up: bool, norm: bool) -> bool:
    """Whether a block of this layer gains by running here: a rule by shapes, so that a run gives
    the same bits again. With a norm, channels come 16 at a time."""
    channels = geometry.CL if up else geometry.CS
    if norm and channels % CHUNK:
        return False
    gains = has_winograd(geometry) or has_image_up(geometry) or geometry.stride == 1
    return norm or gains


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether there is a library."""
    return library() is not None


def conv_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, up: bool, stride: int, training: bool,
    momentum: float | Tensor, eps: float, activation: str, slope: float, groups: int,
) -> Tensor:  # fmt: skip
    """`functional.conv_bn_act`, or its transposed twin."""
    if not training and running_mean is not None and running_var is not None:
        weight, bias = reference.fold(
            weight, bias, gamma, beta, running_mean, running_var, eps, transposed=up
        )
        return conv_act(x, weight, bias, up, stride, activation, slope)
    if x.shape[0] % groups:
        raise ValueError(f"stat_groups={groups} does not divide a batch of {x.shape[0]}")
    out, y, stats = ops.cpu_conv_norm(
        x, weight, bias, gamma, beta, up, stride, groups, eps, activation, slope
    )
    reference.check_values_per_channel(y.shape, groups)
    if running_mean is not None and running_var is not None:
        reference.update_running(running_mean, running_var, stats, momentum)
    result: Tensor = out
    return result


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: bool, stride: int, activation: str,
    slope: float,
) -> Tensor:  # fmt: skip
    """act(convolution + bias)."""
    out: Tensor = ops.cpu_conv_act(x, weight, bias, up, stride, activation, slope)
    return out
