"""What tests of whole runs share: the state that one leaves, and small features to judge it by. Not
here: any test."""

import torch
from torch import nn

from fastdcgan.training import checkpoints


def same(a, b):
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def final_state(out):
    state = checkpoints.Checkpoints(out / "checkpoints").newest()[1]
    # The watch knows which checkpoints there are, which no two of these runs agree about.
    return {k: v for k, v in state.items() if k not in ("config", "watch")}


class Tiny(nn.Module):
    """uint8 (N, 3, H, W) -> (N, 8)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=4)

    def forward(self, images):
        nothing = 0 * torch.rand(1)  # draws as dropout would
        return self.conv(images.float() / 255).relu().mean((2, 3)) + nothing
