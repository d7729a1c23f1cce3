"""What D is shown in place of an image: the same random changes for real and generated ones,
differentiable, so that G learns through them. All numbers are drawn on the device, by torch's own
generator, as dropout's are, so a CUDA graph draws new ones at every replay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdcgan.training.config import TrainConfig

SHIFT = 1 / 8
"""How far an image moves at most, as a share of its side: DiffAugment's."""
HOLE = 1 / 2
"""Side of the square that is cut out, as a share of the image's: DiffAugment's."""


def diffaugment(images: Tensor, policy: Sequence[str]) -> Tensor:
    """Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training".

    color: x + b, b ~ U[-1/2, 1/2); then away from the pixel's mean over channels by s ~ U[0, 2);
    then away from the image's mean by c ~ U[1/2, 3/2). translation: by whole pixels, up to 1/8 of
    the side each way; zeros come in. cutout: a square of half the side around a random pixel
    becomes zero. shift, which is not theirs: as translation, but the image's own mirror image comes
    in, as in Karras et al. 2020, "Training generative adversarial networks with limited data",
    appendix B: so D is never shown a border.

    Args:
        images: (B, C, H, W), any floating dtype; computed in float32 at least.
        policy: of `POLICIES`; applied in their order.

    Returns:
        Like `images`, channels_last. First and higher derivatives are PyTorch's.
    """
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    if "color" in policy:
        x = _color(x)
    if "translation" in policy:
        x = _moved(x, mirrored=False)
    if "shift" in policy:
        x = _moved(x, mirrored=True)
    if "cutout" in policy:
        x = _cutout(x)
    return x.to(images.dtype).contiguous(memory_format=torch.channels_last)


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number for each image, (B, 1, 1, 1)."""
    return torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) * (high - low) + low


def _color(x: Tensor) -> Tensor:
    x = x + _uniform(x, -0.5, 0.5)
    x = torch.lerp(x.mean(1, keepdim=True), x, _uniform(x, 0.0, 2.0))
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _uniform(x, 0.5, 1.5))


def _moved(x: Tensor, *, mirrored: bool) -> Tensor:
    """Each image moved by whole pixels. What comes in is the image mirrored at its outermost
    pixels, or zeros."""
    for dim in (2, 3):
        last = x.shape[dim] - 1
        most = round(x.shape[dim] * SHIFT)
        by = torch.randint(-most, most + 1, (len(x), 1), device=x.device)
        source = torch.arange(last + 1, device=x.device) - by  # (B, side)
        shape = (len(x), 1, -1, 1) if dim == 2 else (len(x), 1, 1, -1)
        within = last - (last - source.abs()).abs()  # where a mirror image has them
        x = x.gather(dim, within.view(shape).expand_as(x))
        if not mirrored:
            x = x * (within == source).view(shape)
    return x


def _cutout(x: Tensor) -> Tensor:
    hole = torch.ones((), dtype=torch.bool, device=x.device)
    for dim in (2, 3):
        side = x.shape[dim]
        width = round(side * HOLE)
        first = torch.randint(0, side, (len(x), 1), device=x.device) - width // 2
        at = torch.arange(side, device=x.device) - first
        inside = (at >= 0) & (at < width)
        hole = hole & inside.view((len(x), 1, side, 1) if dim == 2 else (len(x), 1, 1, side))
    return x * ~hole


def instance_noise(images: Tensor, sigma: float, clock: Tensor, steps: int) -> Tensor:
    """x + sigma * max(0, 1 - clock / steps) * N(0, 1).

    Sønderby et al. 2017, "Amortised MAP inference for image super-resolution"; Arjovsky & Bottou
    2017, "Towards principled methods for training GANs".

    Args:
        images: (B, C, H, W), any floating dtype.
        clock: steps made, of no dimension, on the device: a graph replays what the host gave it.
        steps: after which there is no noise.
    """
    now = (1 - clock / steps).clamp(min=0) * sigma
    return images + torch.randn_like(images) * now.to(images.dtype)


class Augmentation:
    """What D is shown of images in this run: DiffAugment, then instance noise. Nothing, by default.

    Args:
        config: its `diffaugment`, `instance_noise` and `instance_noise_steps`.
        clock: as in `instance_noise`; None where there is none.
    """

    def __init__(self, config: TrainConfig, clock: Tensor | None) -> None:
        self._policy = config.augmentations
        self._sigma, self._steps = config.instance_noise, config.instance_noise_steps
        self._clock = clock

    @property
    def changes(self) -> bool:
        """Whether D is shown anything but the images themselves."""
        return bool(self._policy) or self._clock is not None

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), like `images`; new random numbers at every call."""
        if self._policy:
            images = diffaugment(images, self._policy)
        if self._clock is not None:
            assert self._steps is not None
            images = instance_noise(images, self._sigma, self._clock, self._steps)
        return images
