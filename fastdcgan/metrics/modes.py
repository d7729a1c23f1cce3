"""How many of StackedMNIST's 1,000 modes a generator finds, by a classifier of digits that is
trained here, in half a minute. Not here: the images (data/sources/stacked_mnist.py)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcgan.data.picture import Pixels
from fastdcgan.data.sources.stacked_mnist import digits
from fastdcgan.errors import InputError

MODES = 1000
SEED = 0
EPOCHS, BATCH, RATE = 15, 50, 1e-3
SHIFT, TURN, SCALE = 0.07, 0.2, 0.1
"""How far a digit is moved (share of its side), turned (radians) and scaled in training."""


@dataclass(frozen=True)
class Modes:
    """What `count_modes` returns."""

    modes: int
    """Of 1,000, those that at least one image shows."""
    kl: float
    """KL(p || uniform) in nats, p the share of images of each mode; 0 is best. That of as many
    images of the data is about 1,000 / (2 n)."""
    accuracy: float
    """Share of the test split's digits that the classifier takes for what they are."""
    images: int

    def lines(self) -> Iterator[str]:
        yield f"modes {self.modes:,} of {MODES:,}, KL {self.kl:.3f}, of {self.images:,} images"
        yield f"  by a classifier that is right on {self.accuracy:.2%} of the test split's digits"


class Digits(nn.Sequential):
    """Grey images (B, 1, S, S) in [0, 1], S a multiple of 4, to logits (B, 10)."""

    def __init__(self, side: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 10),
        )  # fmt: skip


def train_classifier(side: int) -> tuple[Digits, float]:
    """A classifier of digits of that side, trained on the train split's 4,000; and its accuracy on
    the test split's 1,000. The same every time; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        images, classes = _resized("train", side)
        net = Digits(side)
        steps = EPOCHS * len(images) // BATCH
        optimiser = torch.optim.AdamW(net.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3 * RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images)).split(BATCH):
                loss = F.cross_entropy(net(_moved(images[rows])), classes[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    net.eval()
    images, classes = _resized("test", side)
    with torch.no_grad():
        right = net(images).argmax(1) == classes
    return net, float(right.double().mean())


def require(side: int, channels: int) -> None:
    """Asks, before anything long, for what `count_modes` needs.

    Raises:
        InputError: they are no colour images of a side that 4 divides, or mlxtend is not
            installed.
    """
    if channels != 3 or side % 4:
        raise InputError(
            f"images of {side}x{side}x{channels} were given; the modes of stacked-mnist are "
            "counted in RGB images with a side that 4 divides"
        )
    digits("train")


def count_modes(images: Iterable[Pixels]) -> Modes:
    """Counts the modes of images of three digits.

    Args:
        images: chunks (n, S, S, 3), uint8; S a multiple of 4.

    Raises:
        InputError: as `require`.
    """
    counts = np.zeros(MODES, np.int64)
    net, accuracy = None, math.nan
    for chunk in images:
        side = chunk.shape[1]
        if net is None:
            require(side, chunk.shape[3])
            net, accuracy = train_classifier(side)
        counts += np.bincount(classify(net, chunk), minlength=MODES)
    shares = counts / max(counts.sum(), 1)
    found = shares[shares > 0]
    kl = float((found * np.log(found * MODES)).sum())
    return Modes(int((counts > 0).sum()), kl, accuracy, int(counts.sum()))


def classify(net: nn.Module, chunk: Pixels) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(n,): the number that an image's three digits make, red first."""
    x = torch.from_numpy(np.ascontiguousarray(chunk)).permute(3, 0, 1, 2)[:, :, None].float() / 255
    with torch.no_grad():
        red, green, blue = (net(channel).argmax(1) for channel in x)
    modes: np.ndarray[tuple[int], np.dtype[np.int64]] = (100 * red + 10 * green + blue).numpy()
    return modes


def _resized(split: str, side: int) -> tuple[Tensor, Tensor]:
    images, classes = digits(split)
    x = torch.from_numpy(images)[:, None].float() / 255
    if side != x.shape[-1]:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return x, torch.from_numpy(classes)


def _moved(x: Tensor) -> Tensor:
    """Each digit turned, scaled and shifted a little, at random."""
    turn, scale = (torch.rand(2, len(x)) * 2 - 1) * torch.tensor([[TURN], [SCALE]])
    shift = (torch.rand(len(x), 2) * 2 - 1) * 2 * SHIFT
    rows = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    theta = torch.cat([rows * (1 + scale)[:, None, None], shift[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
