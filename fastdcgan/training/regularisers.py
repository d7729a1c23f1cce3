"""Penalties on the gradient of D at its images, added to D's loss: R1, R2, and that of WGAN-GP.

Exactly, they need second derivatives, which neither the fused blocks nor compiled nets have. So
each is a pass of its own through plain layers, in the dtype of the weights (float32 also where the
other passes run in 16 bits), whose backward adds to the gradients that D has. By differences R1 and
R2 need first derivatives only, which fused blocks have.

A penalty is on each image's own gradient, and BatchNorm in D mixes the images of a batch: what is
penalised is then the gradient of the sum of the batch's logits, which is not the papers' quantity.
`--norm-d none` leaves BatchNorm out; it is the default of wgan-gp. Where it is in, the pass
normalises by its own batch and leaves running statistics as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdcgan.training.config import TrainConfig
from fastdcgan_kernels.choice.targets import implementation

STEP = 0.0003
"""Standard deviation of the noise by which an image is moved for a difference, of pixels in
[-1, 1]. Beside D's curvature it must be small, because noise on all pixels is a long way: of a D
trained without a penalty the mean is 1.04 of the exact value at this length, 1.25 at 0.001 and 11
at 0.01 (`python -m benchmarks.penalty_forms`). Rounding of float32 logits is far below; that of
TF32, in which GPUs multiply float32 unless told not to, is not (`without_tf32`)."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 is multiplied in float32 on GPUs, forward and backward, by PyTorch and by
    fused blocks."""
    settings: Any = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [one.fp32_precision for one in settings]
    try:
        for one in settings:
            one.fp32_precision = "ieee"
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.fp32_precision = value


def zero_centred(gradients: Tensor, gamma: float) -> Tensor:
    """gamma / 2 * E[|grad D(x)|^2]; `gradients`: (B, C, H, W), at real images x for R1, at
    generated ones for R2.

    Mescheder, Geiger & Nowozin 2018, "Which training methods for GANs do actually converge?",
    equation 9.
    """
    penalty: Tensor = gradients.square().flatten(1).sum(1).mean() * (gamma / 2)
    return penalty


def difference(
    netD: nn.Module, images: Tensor, gamma: float, *labels: Tensor, step: float = STEP
) -> Tensor:
    """gamma / 2 * E[((D(x + s n) - D(x)) / s)^2], n ~ N(0, 1) for each pixel, s = `step`: for a
    small s the mean over n is that of `zero_centred`, with the spread of a square of one normal
    number for each image.

    Lin et al. 2025, "Diffusion adversarial post-training for one-step video generation", section
    3.3, which leaves the division by s^2 to gamma.

    Args:
        netD: its logit of an image depends on no other image of the batch.
        images: (B, C, H, W), any floating dtype; D's passes are in that of its weights.
    """
    x = images.detach().to(next(netD.parameters()).dtype)
    moved = x + step * torch.randn_like(x)
    logits = netD(torch.cat([x, moved]), *(each.repeat(2) for each in labels))
    before, after = logits.chunk(2)
    penalty: Tensor = ((after - before) / step).square().mean() * (gamma / 2)
    return penalty


def slope_penalty(gradients: Tensor, weight: float) -> Tensor:
    """weight * E[(|grad D(x)| - 1)^2] at images between real and generated ones.

    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", equation 3.
    """
    penalty: Tensor = (gradients.flatten(1).norm(dim=1) - 1).square().mean() * weight
    return penalty


def between(real: Tensor, fake: Tensor) -> Tensor:
    """e * real + (1 - e) * fake, with e ~ U[0, 1] for each pair of images."""
    e = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, device=real.device)
    return fake + e * (real - fake)


def image_gradients(netD: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """d (sum of D's logits) / d images, itself differentiable. Buffers of D (running statistics,
    vectors of spectral norm) stay as they are. `labels`: as in step.py."""
    images = images.detach().to(next(netD.parameters()).dtype).requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in netD.named_buffers()}
    with implementation("reference"):
        logits = functional_call(netD, buffers, (images, *labels))
        (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients


class Penalty:
    """The penalties that a run has chosen: R1, R2 or both; or WGAN-GP's.

    With `penalty_every` K they are taken at every K-th step only and multiplied by K (Karras et al.
    2020, "Analyzing and improving the image quality of StyleGAN", lazy regularisation). Those steps
    launch other work than the others; as CUDA graphs the two are captured one by one.

    Args:
        config: its `r1`, `r2`, `penalty_form`, `gradient_penalty`, `penalty_every` and `loss`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._gammas = config.r1, config.r2
        self._slope = config.slope_penalty
        self._every = config.penalty_every
        self._exact = config.penalty_form == "exact"

    @property
    def chosen(self) -> bool:
        """Whether there is one."""
        return any(self._gammas) or self._slope > 0

    def due(self, step: int) -> bool:
        """Whether step number `step`, from 0, has it."""
        return self.chosen and step % self._every == 0

    def __call__(self, netD: nn.Module, real: Tensor, fake: Tensor, *labels: Tensor) -> Tensor:
        """The penalty, of no dimension, for the images that D was shown, (B, C, H, W) each, of
        these classes."""
        if self._slope:
            dtype = next(netD.parameters()).dtype
            images = between(real.detach().to(dtype), fake.detach().to(dtype))
            return slope_penalty(image_gradients(netD, images, *labels), self._slope * self._every)
        each = [
            zero_centred(image_gradients(netD, images, *labels), gamma * self._every)
            if self._exact
            else difference(netD, images, gamma * self._every, *labels)
            for gamma, images in zip(self._gammas, (real, fake), strict=True)
            if gamma
        ]
        return torch.stack(each).sum()
