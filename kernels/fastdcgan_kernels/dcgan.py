"""The layers of the standard DCGAN, and the two nets made of them: what the tools measure, compile
and examine. Light: imports torch only when a net or a shape is asked for.

Reference: Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (2015), in the widths of PyTorch's DCGAN example.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from .choice.geometry import Geometry, Sides

SIZES = (32, 64, 128)  # pixels along a side of the images
NZ, WIDTH = 100, 64  # latent channels; ngf and ndf, the feature maps beside the image


class Layer(NamedTuple):
    """A convolution with what stands around it."""

    name: str  # G1, G2, ... and D1, D2, ...
    transposed: bool
    stride: int
    ci: int
    co: int
    side: int  # of the input, in pixels
    norm: bool  # a BatchNorm follows
    before: str  # activation of a BatchNorm before it, which its kernels may apply as they load
    after: str  # activation behind it and its norm
    kernel: int = 4
    padding: Sides | None = None  # as `sides_of` it; None: a DCGAN's

    @property
    def pad(self) -> int:
        """A DCGAN's: 1 with stride 2, 0 with stride 1."""
        return self.stride - 1

    @property
    def sides(self) -> Sides:
        """(top, left, bottom, right) of its padding."""
        return self.padding or (self.pad, self.pad, self.pad, self.pad)

    def geometry(self, batch: int) -> Geometry:
        """Its shapes on a batch."""
        import torch

        from .choice.geometry import geometry_of

        cs, cl = (self.ci, self.co) if self.transposed else (self.co, self.ci)
        x = torch.empty(batch, self.ci, self.side, self.side, device="meta")
        weight = torch.empty(cs, cl, self.kernel, self.kernel, device="meta")
        return geometry_of(x, weight, self.transposed, self.stride, self.sides)


def layers(size: int = 64, channels: int = 3) -> list[Layer]:
    """The generator's layers, then the discriminator's, for images of this size."""
    widths = [WIDTH * 2**step for step in range(size.bit_length() - 4, -1, -1)]
    last, found = len(widths), []
    for i, (ci, co) in enumerate(pairwise([NZ, *widths, channels])):
        stride, side = (2, 2 << i) if i else (1, 1)
        before, after = "relu" if i else "none", "relu" if i < last else "tanh"
        found.append(Layer(f"G{i + 1}", True, stride, ci, co, side, i < last, before, after))
    for i, (ci, co) in enumerate(pairwise([channels, *reversed(widths), 1])):
        stride, norm = 2 if i < last else 1, 0 < i < last
        before, after = "leaky_relu" if i > 1 else "none", "leaky_relu" if i < last else "none"
        found.append(Layer(f"D{i + 1}", False, stride, ci, co, size >> i, norm, before, after))
    return found


def nets(size: int = 64, channels: int = 3) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator for images of this size, untrained."""
    from torch import nn

    found: dict[str, list[nn.Module]] = {"G": [], "D": []}
    for layer in layers(size, channels):
        conv = nn.ConvTranspose2d if layer.transposed else nn.Conv2d
        net = found[layer.name[0]]
        net.append(conv(layer.ci, layer.co, 4, layer.stride, layer.pad, bias=False))
        if layer.norm:
            net.append(nn.BatchNorm2d(layer.co))
        if layer.after != "none":
            activations = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "tanh": nn.Tanh()}
            net.append(activations[layer.after])
    return nn.Sequential(*found["G"]), nn.Sequential(*found["D"])
