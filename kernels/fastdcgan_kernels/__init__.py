"""Blocks of convolution, BatchNorm and activation for any project; imports nothing of fastdcgan.

Today these are plain PyTorch (reference.py): no faster than the modules they stand for. Fused
Triton kernels of the same signatures are to come, and are to be checked against them.
"""

from fastdcgan_kernels.reference import (
    conv_act,
    conv_bn_act,
    conv_transpose_act,
    conv_transpose_bn_act,
)

__all__ = ["conv_act", "conv_bn_act", "conv_transpose_act", "conv_transpose_bn_act"]
