"""BatchNorm made a part of the weights before it, for a net that only ever evaluates. Not here:
fusing for training (fastdcgan_kernels), and any file format."""

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


def fold(net: nn.Module) -> nn.Module:
    """A copy of `net` in eval mode that draws the same numbers without BatchNorm.

    W' = W * gamma / sqrt(var + eps) for each output channel, b' = beta + (b - mean) * gamma /
    sqrt(var + eps), in float64, then in the net's own dtype. Folded is each BatchNorm that follows
    a convolution, a transposed one or a dense layer in an nn.Sequential, directly or behind a crop
    (an nn.ZeroPad2d that only takes away, as in the 28x28 nets). An nn.Identity takes its place,
    so the other modules keep their numbers. Weights that torch computes from other tensors
    (spectral_norm) become plain ones.
    """
    folded = copy.deepcopy(net).eval()
    for module in list(folded.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
    for part in folded.modules():
        if not isinstance(part, nn.Sequential):
            continue
        before: int | None = None  # the layer that the next norm would be folded into
        for index, module in enumerate(part):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                before = index
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and before is not None:
                part[before] = _joined(part[before], module)
                part[index] = nn.Identity()
                before = None
            elif not (isinstance(module, nn.ZeroPad2d) and max(module.padding) <= 0):
                before = None
    return folded


def _make_plain(module: Any) -> None:
    """Each parametrised tensor becomes a parameter of its present value. `parametrize` has its own
    way to do that, which would break the net that `module` is a copy of: they share a class."""
    values = {name: getattr(module, name).detach() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))


def _joined(layer: Any, norm: Any) -> nn.Module:
    dtype = layer.weight.dtype
    layer, norm = layer.double(), norm.double()
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm).to(dtype)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    joined: nn.Module = fuse_conv_bn_eval(layer, norm, transpose=transposed).to(dtype)
    return joined
