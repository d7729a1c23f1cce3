"""Blocks of convolution, BatchNorm and activation for any project, forward and backward, by fused
Triton kernels; imports nothing of fastdcgan.

Names are imported when they are first used, so that `python -m fastdcgan_kernels.inspect --help`
does not wait for torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .functional import (
        Deferred,
        conv_act,
        conv_bn_act,
        conv_transpose_act,
        conv_transpose_bn_act,
        materialise,
    )
    from .modules.block import ConvBlock
    from .modules.dropout import Dropout
    from .modules.fusion import Finding, findings, fuse, unfuse, unfused
    from .modules.keras import KerasBatchNorm2d
    from .modules.share import share
    from .tuner import tune

__all__ = [
    "Activated", "ConvBlock", "Deferred", "Dropout", "Finding", "KerasBatchNorm2d", "conv_act",
    "conv_bn_act", "conv_transpose_act", "conv_transpose_bn_act", "findings", "fuse", "materialise",
    "share", "tune", "unfuse", "unfused",
]  # fmt: skip

_ROOMS = {
    "ConvBlock": "modules.block",
    "Dropout": "modules.dropout",
    "KerasBatchNorm2d": "modules.keras",
    "tune": "tuner",
    "share": "modules.share",
    **dict.fromkeys(["Finding", "findings", "fuse", "unfuse", "unfused"], "modules.fusion"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_ROOMS.get(name, 'functional')}", __name__), name)
    globals()[name] = found
    return found
