"""Blocks of convolution, BatchNorm and activation for any project, forward and backward, by fused
Triton kernels; imports nothing of fastdcgan."""

from fastdcgan_kernels.functional import (
    Deferred,
    conv_act,
    conv_bn_act,
    conv_transpose_act,
    conv_transpose_bn_act,
    materialise,
)

__all__ = [
    "Deferred",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "materialise",
]
