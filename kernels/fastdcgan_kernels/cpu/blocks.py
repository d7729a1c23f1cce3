"""The blocks on a CPU in float32, as functional.py calls them, and which of them run here. Not
here: their operators (ops.py), and the convolutions (convolution.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..choice.geometry import Geometry
from ..choice.spec import BlockSpec, Buffers, Inputs
from ..ops import SIGNATURES, ops
from . import ops as _  # noqa: F401  (registers the operators)
from .build import library
from .convolution import CHUNK, has_image_up, has_winograd


def takes(geometry: Geometry, transposed: bool, norm: bool) -> bool:
    """Whether a block of this layer gains by running here: a rule by shapes, so that a run gives
    the same bits again. With a norm, channels come 16 at a time."""
    channels = geometry.CL if transposed else geometry.CS
    if norm and channels % CHUNK:
        return False
    gains = has_winograd(geometry) or has_image_up(geometry) or geometry.stride == 1
    return norm or gains


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether there is a library."""
    return library() is not None


def conv_bn_act(
    inputs: Inputs, buffers: Buffers, spec: BlockSpec, training: bool, momentum: float | Tensor
) -> Tensor:
    """`functional.conv_bn_act`, or its transposed twin."""
    if not training and buffers.running_mean is not None and buffers.running_var is not None:
        return conv_act(reference.fold(inputs, buffers, spec), spec)
    if inputs.x.shape[0] % spec.groups:
        batch = inputs.x.shape[0]
        raise ValueError(f"stat_groups={spec.groups} does not divide a batch of {batch}")
    out: Tensor
    out, y, stats = ops.cpu_conv_norm(*SIGNATURES["cpu_conv_norm"].flatten(inputs, spec))
    reference.check_values_per_channel(y.shape, spec.groups)
    reference.update_running(buffers, stats, momentum)
    return out


def conv_act(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """act(convolution + bias)."""
    out: Tensor = ops.cpu_conv_act(*SIGNATURES["cpu_conv_act"].flatten(inputs, spec))
    return out
