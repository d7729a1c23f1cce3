"""Fills what a mask hides of images: the latent vectors whose images fit what is seen, and these
images blended in. Not here: files, and how good the result is (scores.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.data import to_uint8
from fastdcgan.data.picture import Pixels
from fastdcgan.inpainting.blending import Images, blend, trust
from fastdcgan.inpainting.masks import Mask
from fastdcgan.latent.draw import Generator
from fastdcgan.latent.projection import Advance, Wrap, frozen, nobody, project
from fastdcgan.metrics.probe import Discriminator

PRIOR = 0.003
"""Weight of the discriminator's opinion: lambda of Yeh et al. 2017."""


@dataclass(frozen=True, eq=False)
class Filled:
    """What `fill` returns."""

    images: Pixels = field(repr=False)
    """(N, H, W, C): the given images, filled."""
    generated: Pixels = field(repr=False)
    """(N, H, W, C): the generator's images that were blended in."""
    losses: Tensor
    """(N, R), float32: all restarts', the best first."""
    strengths: Images
    """(N,): how much of the made gradients is in the fill, 0 to 1."""


def fill(
    netG: Generator,
    netD: Discriminator | None,
    images: Pixels,
    mask: Mask,
    *,
    prior: float = PRIOR,
    restarts: int = 8,
    pool: int = 2048,
    steps: int = 150,
    lr: float = 0.05,
    batch: int = 256,
    combine: Literal["best", "mean"] = "best",
    blending: Literal["poisson", "none"] = "poisson",
    strength: float | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    wrap: Wrap = lambda loss: loss,
    advance: Advance = nobody,
) -> Filled:
    """Fills the hole of each image (Yeh et al. 2017).

    z minimises `contextual_loss` + `prior` x log(1 - D(G(z))), by `project`; the fill is G(z), with
    the gradients of G(z) blended in. Where the mask looks at everything, it is G(z) itself.

    Args:
        netG, netD: of one run; without netD the prior is left out.
        images: (N, H, W, C) uint8, of the nets' size and channels. What is in the hole is not read.
        mask: see `make_mask`.
        prior: weight of the discriminator's term; 0 leaves it out.
        restarts, pool, steps, lr, batch, seed, wrap, advance: see `project`.
        combine: fill with the best restart's image, or with the mean of all restarts': less sharp,
            nearer on average.
        blending: "none" pastes the image in.
        strength: of the made gradients, 0 to 1; None: for each image as far as its gradients agree
            with what is seen, see `blending.trust`.
        autocast: dtype of the nets' products; None: that of the weights.
    """
    first = next(netG.parameters())
    device, dtype = first.device, first.dtype
    netG = frozen(netG)
    critic = frozen(netD) if netD is not None and prior else None
    values = images.astype(np.float64)
    values[:, mask.hole & (not mask.sees_all)] = 0  # nothing may depend on what is hidden
    scaled = torch.from_numpy(values / 127.5 - 1).permute(0, 3, 1, 2)
    seen = shrink(scaled, mask.factor).to(device, dtype)
    weights = torch.from_numpy(mask.weights).to(device, dtype)

    def measure(made: Tensor, which: Tensor) -> Tensor:
        return contextual_loss(shrink(made, mask.factor), seen[which], weights)

    def opinion(made: Tensor, z: Tensor) -> Tensor:
        assert critic is not None
        return prior * prior_loss(critic(made))

    def in_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        wrapped = wrap(loss)

        def call(z: Tensor, which: Tensor) -> Tensor:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                return wrapped(z, which)

        return call

    found = project(
        netG, measure, len(images), prior=opinion if critic is not None else None,
        restarts=restarts, pool=pool, steps=steps, lr=lr, batch=batch, seed=seed,
        wrap=in_precision, advance=advance,
    )  # fmt: skip
    chosen = found.restarts[:, : 1 if combine == "best" else None]
    with torch.no_grad():
        parts = [netG(z).float() for z in chosen.flatten(0, 1).split(batch)]
    made = torch.cat(parts).unflatten(0, chosen.shape[:2]).mean(1)
    generated = to_uint8(made)
    hole = mask.hole[None, :, :, None]
    if mask.sees_all:
        return Filled(generated, generated, found.losses, np.ones(len(images)))
    if blending == "none":
        pasted = np.where(hole, generated, images)
        return Filled(pasted, generated, found.losses, np.ones(len(images)))
    precise = (made.double().cpu().permute(0, 2, 3, 1).numpy() + 1) * 127.5
    strengths = (
        trust(precise, values, mask.hole) if strength is None else np.full(len(images), strength)
    )
    blended = blend(precise, values, mask.hole, strengths).round().clip(0, 255).astype(np.uint8)
    return Filled(np.where(hole, blended, images), generated, found.losses, strengths)


def contextual_loss(made: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
    """Sum over pixels of weight x mean over channels of |made - seen|, (N,), float32 or wider: Yeh
    et al. 2017, equation 4, in units of pixels.

    Args:
        made, seen: (N, C, H, W).
        weights: (H, W), of sum 1.
    """
    apart = (made - seen).abs().mean(1)
    return (apart.to(weights.dtype) * weights).sum((1, 2))


def prior_loss(logits: Tensor) -> Tensor:
    """log(1 - D(x)) of the discriminator's logits: the lower, the more real x looks to it (Yeh et
    al. 2017, equation 5)."""
    return -F.softplus(logits.float() if logits.dtype.itemsize < 4 else logits)


def shrink(images: Tensor, factor: int) -> Tensor:
    """The means over squares of factor x factor pixels."""
    return images if factor == 1 else F.avg_pool2d(images, factor)
