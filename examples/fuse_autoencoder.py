"""Somebody else's model, made faster in one line: `fuse(model)`.

    python examples/fuse_autoencoder.py

The autoencoder below is plain PyTorch and knows nothing of fastdcgan. It trains a few steps as it
is, then, from the same weights on the same images, fused. The losses agree; how much faster the
steps are is measured here and now.
"""

import copy
import sys
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcgan.data import prepare
from fastdcgan_kernels import fuse


class Autoencoder(nn.Module):
    """64x64 pictures through a code of `code` numbers and back."""

    def __init__(self, width: int = 64, code: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        down: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        up: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            down += [
                nn.Conv2d(narrow, wide, 4, 2, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(0.2),
            ]
            up = [
                nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
                *up,
            ]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(widths[-1] * 64, code))
        self.decoder = nn.Sequential(
            nn.Linear(code, widths[-1] * 64),
            nn.Unflatten(1, (widths[-1], 8, 8)),
            *up,
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def train(model: nn.Module, batches: list[Tensor]) -> tuple[list[float], float]:
    """One step a batch. Returns the losses, and the seconds of a step: the median, so that the
    first one, in which kernels are compiled, does not count."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    losses, seconds = [], []
    for images in batches:
        start = time.perf_counter()
        optimiser.zero_grad()
        loss = F.mse_loss(model(images), images)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())  # and so waits for the device
        seconds.append(time.perf_counter() - start)
    return losses, sorted(seconds)[len(seconds) // 2]


def main(steps: int = 12, batch: int = 32, width: int = 32) -> tuple[list[float], list[float]]:
    """Trains both and says how they compare; returns their losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = prepare("blue-marble", size=64)
    offset = (packed.window - 64) // 2
    chosen = np.random.default_rng(0).integers(packed.n, size=steps * batch)
    cropped = packed.images[chosen, offset : offset + 64, offset : offset + 64]
    pixels = torch.from_numpy(cropped).permute(0, 3, 1, 2).to(device).float()
    batches = list((pixels / 127.5 - 1).split(batch))

    torch.manual_seed(0)
    plain = Autoencoder(width).to(device, memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain), verbose=True)  # the one line

    plain_losses, plain_seconds = train(plain, batches)
    fused_losses, fused_seconds = train(fused, batches)
    print(f"loss, plain: {plain_losses[0]:.5f} -> {plain_losses[-1]:.5f}")
    print(f"loss, fused: {fused_losses[0]:.5f} -> {fused_losses[-1]:.5f}")
    print(
        f"step, plain: {1000 * plain_seconds:.1f} ms; fused: {1000 * fused_seconds:.1f} ms; "
        f"{plain_seconds / fused_seconds:.2f} times as fast on this {device}"
    )
    return plain_losses, fused_losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
