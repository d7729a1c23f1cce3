"""Gram statistics: what a network's features say of an image's look, wherever in it they are. Not
here: making an image that has them (transfer.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdcgan.latent.projection import frozen
from fastdcgan.metrics.networks import load_network
from fastdcgan.metrics.probe import Discriminator

Features = Callable[[Tensor], list[Tensor]]
"""Images (N, C, H, W) in [-1, 1] -> features (N, K, h, w), float, layer by layer."""

LITE0_BLOCKS = (0, 2, 4, 7, 10)
"""The last block of each width of EfficientNet-Lite0 down to a 16th of the image's side."""


def discriminator_features(netD: Discriminator) -> Features:
    """The activations of each stage of a DCGAN discriminator, down to 8 x 8 places; ahead of them
    the image's own colours, each as a number from 0 to 1."""
    stages: list[nn.Sequential] = [nn.Sequential()]
    for layer in netD.main:
        stages[-1].append(layer)
        if isinstance(layer, nn.LeakyReLU):
            stages.append(nn.Sequential())
    fused = [frozen(stage) for stage in stages[:-1]]  # what is left over makes the logit

    def features(images: Tensor) -> list[Tensor]:
        found = [(images + 1) / 2]
        x = images
        for stage in fused:
            x = stage(x)
            if x.shape[2] >= 7:
                found.append(x)
        return found

    return features


def lite0_features(device: torch.device) -> Features:
    """Features of EfficientNet-Lite0 with ImageNet's weights, see LITE0_BLOCKS.

    Raises:
        InputError: the weights are not installed.
    """
    network: Any = load_network("lite0", device).module.requires_grad_(False)
    kept: list[Tensor] = []
    for index in LITE0_BLOCKS:
        network.blocks[index].register_forward_hook(lambda *call: kept.append(call[2]))

    def features(images: Tensor) -> list[Tensor]:
        kept.clear()
        pixels = (images + 1) * 127.5
        network(pixels[:, :3] if images.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1))
        return list(kept)

    return features


def gram(features: Tensor) -> Tensor:
    """G[n, i, j] = the mean over places of features[n, i] x features[n, j]: (N, K, H, W) ->
    (N, K, K), float32 or wider (Gatys et al. 2016, equation 3, divided by H W)."""
    flat = features.flatten(2)
    flat = flat.float() if flat.dtype.itemsize < 4 else flat
    return flat @ flat.mT / flat.shape[2]


def style_of(images: Tensor, networks: Sequence[Features]) -> list[Tensor]:
    """The mean Gram matrix of each layer of each network over a set of images, (K, K)."""
    with torch.no_grad():
        return [gram(f).mean(0) for network in networks for f in network(images)]


def gram_distance(features: Sequence[Tensor], style: Sequence[Tensor]) -> Tensor:
    """|G - S|^2 / |S|^2 (Frobenius norms) of each layer, (N, L): how far features are from a style.
    0 is the style itself, 1 what an image without any features has.

    Args:
        features: of N images, layer by layer, see `Features`.
        style: see `style_of`.
    """
    apart = [
        (gram(f) - s).square().sum((1, 2)) / s.square().sum()
        for f, s in zip(features, style, strict=True)
    ]
    return torch.stack(apart, dim=1)
