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
from fastdcgan_kernels.fuse import Finding, findings, fuse, unfuse
from fastdcgan_kernels.modules import ConvBlock

__all__ = [
    "ConvBlock",
    "Deferred",
    "Finding",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "findings",
    "fuse",
    "materialise",
    "unfuse",
]
