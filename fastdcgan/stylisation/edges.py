"""Where an image has edges, and how far two images have them in the same places."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def edge_map(images: Tensor) -> Tensor:
    """The magnitude of Sobel's gradient of the brightness: (N, C, H, W) -> (N, H - 2, W - 2). With
    an epsilon under the root, so that it has a gradient everywhere."""
    if images.shape[1] >= 3:
        weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)
        grey = (images[:, :3] * weights[:, None, None]).sum(1, keepdim=True)
    else:
        grey = images[:, :1]
    across = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])) / 8
    kernels = torch.stack([across, across.T])[:, None].to(grey)
    gradients: Tensor = F.conv2d(grey, kernels)
    return (gradients.square().sum(1) + 1e-8).sqrt()


def edge_correlation(images: Tensor, others: Tensor) -> Tensor:
    """Pearson's correlation of the two `edge_map`s, (N,): 1 where edges lie in the same places with
    proportional strength, about 0 where they have nothing to do with each other."""
    a, b = (edge_map(x).flatten(1) for x in (images, others))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    scale = a.norm(dim=1) * b.norm(dim=1)
    found: Tensor = (a * b).sum(1) / scale.clamp_min(float(np.finfo(np.float32).tiny))
    return found
