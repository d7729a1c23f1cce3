"""Gives images the look of others and keeps their edges: the descent in pixels or in the latent
space. Not here: the statistics (gram.py, edges.py), files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdcgan.data import to_uint8
from fastdcgan.data.picture import Pixels
from fastdcgan.latent.draw import Generator
from fastdcgan.latent.projection import Advance, descend, frozen, nobody, project
from fastdcgan.stylisation.edges import edge_correlation
from fastdcgan.stylisation.gram import Features, gram_distance, style_of

LR = {"pixels": 0.02, "latent": 0.05}
"""Adam's first step, in values from -1 to 1 and in z."""

OUTSIDE = 10.0  # weight of what drives pixels back that leave [-1, 1]
LONG = 1.0  # weight of |z|^2 / nz beyond 1, where the generator has never been


@dataclass(frozen=True, eq=False)
class Restyled:
    """What `restyle` returns."""

    images: Pixels = field(repr=False)
    """(N, H, W, C)."""
    before: Tensor
    """(N,): the content's `gram_distance` to the style, the mean over layers."""
    after: Tensor
    """(N,): the result's."""
    edges: Tensor
    """(N,): `edge_correlation` of the result and the content."""


def restyle(
    content: Pixels,
    style: Pixels,
    networks: Sequence[Features],
    *,
    netG: Generator | None = None,
    device: torch.device,
    strength: float = 0.8,
    steps: int = 300,
    restarts: int = 4,
    pool: int = 256,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    advance: Advance = nobody,
) -> Restyled:
    """Changes each content image towards the mean Gram matrices of the style (Gatys et al. 2016).

    Minimised, by Adam, are strength x (the mean over layers of gram_distance / the content's own
    gram_distance) + (1 - strength) x (1 - edge_correlation with the content). Gatys et al. hold
    the content by deep features; here it is held by its edges, because at 64 pixels the
    discriminator's deep features are as much the old colours as they are the content.

    Args:
        content, style: (N, H, W, C) and (M, H, W, C), uint8, of one size.
        networks: whose features make the look; their Gram matrices count layer by layer.
        netG: None: the pixels are changed, beginning with the content in the style's colours, as
            far as `strength` says. A generator: its z, which begins at the random draws that fit
            best, see `project`; the result is one of its images.
        device: where to compute.
        strength: 0 keeps the content, 1 only minds the style.
        steps: of Adam.
        restarts, pool, seed: in the latent space, see `project`.
        autocast: dtype of the networks' products; None: float32.
        advance: is told 1 after each step; in the latent space of each batch, see `rounds`.
    """
    given, wanted = (_values(images, device) for images in (content, style))
    aim = style_of(wanted, networks)

    def distance(images: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            features = [f for network in networks for f in network(images)]
        return gram_distance(features, aim)

    with torch.no_grad():
        before = distance(given)

    def loss(images: Tensor, which: Tensor) -> Tensor:
        look = (distance(images) / before[which].clamp_min(1e-12)).mean(1)
        return strength * look + (1 - strength) * (1 - edge_correlation(images, given[which]))

    if netG is None:
        start = torch.lerp(given, recoloured(given, wanted), strength).clamp(-1, 1)
        rows = torch.arange(len(given), device=device)

        def pixel_loss(images: Tensor) -> Tensor:
            outside = (images.abs() - 1).relu().square().mean((1, 2, 3))
            return loss(images, rows) + OUTSIDE * outside

        ends, _ = descend(start, pixel_loss, steps=steps, lr=LR["pixels"], advance=advance)
        made = ends.clamp(-1, 1)
    else:
        net = frozen(netG)
        found = project(
            net, loss, len(given), prior=lambda images, z: LONG * (z.square().mean(1) - 1).relu(),
            restarts=restarts, pool=pool, steps=steps, lr=LR["latent"], seed=seed, advance=advance,
        )  # fmt: skip
        with torch.no_grad():
            made = net(found.z)
    images = to_uint8(made)
    with torch.no_grad():
        shown = _values(images, device)
        return Restyled(
            images,
            before.mean(1).cpu(),
            distance(shown).mean(1).cpu(),
            edge_correlation(shown, given).cpu(),
        )


def recoloured(images: Tensor, others: Tensor) -> Tensor:
    """Images with each channel's mean and standard deviation as `others` have them all together
    (Reinhard et al. 2001, in RGB). Both (N, C, H, W)."""
    mean, std = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    aim, spread = others.mean((0, 2, 3))[:, None, None], others.std((0, 2, 3))[:, None, None]
    return (images - mean) / std.clamp_min(1e-3) * spread + aim


def _values(images: Pixels, device: torch.device) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) in [-1, 1], channels_last."""
    return (torch.from_numpy(images).to(device).float() / 127.5 - 1).permute(0, 3, 1, 2)
