"""Which blocks run by the kernels of the CPU. Not here: their operators (ops.py), and the
convolutions (convolution.py)."""

from __future__ import annotations

import torch

from ..choice.geometry import Geometry
from . import ops as _  # noqa: F401  (registers the operators)
from .build import library
from .convolution import CHUNK, beats_bfloat16, has_image_up, has_winograd, is_end

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "none")  # that the operators have


def takes(geometry: Geometry, transposed: bool, norm: bool, narrow: bool = False) -> bool:
    """Whether a block of this layer gains by running here: a rule by shapes, so that a run gives
    the same bits again. With a norm, channels come 16 at a time. `narrow`: PyTorch would run it in
    bfloat16."""
    channels = geometry.CL if transposed else geometry.CS
    if norm and channels % CHUNK:
        return False
    if narrow:
        return beats_bfloat16(geometry) or has_image_up(geometry)
    gains = has_winograd(geometry) or has_image_up(geometry) or is_end(geometry)
    return norm or gains


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether there is a library."""
    return library() is not None
