"""From images back to the latent space: the z whose image comes nearest to what is wanted, by Adam
through a frozen generator. What is wanted is a function of the caller's; what is done with the z is
not here."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype
from fastdcgan.latent.draw import Generator, latents
from fastdcgan_kernels import fuse

Net = TypeVar("Net", bound=nn.Module)

Objective = Callable[[Tensor], Tensor]
"""Points (N, ...) -> losses (N,), each of its own row alone."""

Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""Gives back the same function, done in another way."""

Advance = Callable[[int], object]
"""Is told how many more steps are done."""

LR = 0.05
"""Adam's first step in z, whose values are about 1; it falls to 0 as half a cosine."""

POOL = 2048
"""Draws among which the best starting points are looked for: they cost a forward pass each, shared
by all images, where a restart costs a forward and a backward pass a step."""


def nobody(done: int) -> None:
    """An `Advance` that tells nobody."""


def frozen(net: Net) -> Net:
    """A copy of the net to look through: eval statistics, weights without gradients, channels_last,
    fused blocks where they run. Its parameters' dtype and device stay.

    Raises:
        InputError: it takes labels, too.
    """
    if getattr(net, "classes", None) is not None:
        raise InputError(
            "this run draws by class (--classes), and the class of an image is not looked for: "
            "give a run without classes"
        )
    copied = copy.deepcopy(net).eval().requires_grad_(False)
    return fuse(copied.to(memory_format=torch.channels_last))


def descend(
    start: Tensor, objective: Objective, *, steps: int, lr: float = LR, advance: Advance = nobody
) -> tuple[Tensor, Tensor]:
    """Adam on every row of `start` at once, each as if it were alone; nothing waits for the device.

    Args:
        start: (N, ...), floating; is not changed.
        objective: one loss a row, see `Objective`. Their sum is differentiated.
        steps: of Adam, at least 0. The rate falls from `lr` to 0 as half a cosine.
        lr: the first step's size, in the units of `start`.
        advance: is told 1 after each step.

    Returns:
        For each row the best point on its way, as `start`, and its loss, (N,) in the dtype of the
        losses. A row whose losses are never finite keeps its start, with an infinite loss.
    """
    point = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    best, least = start.detach().clone(), None
    for step in range(steps + 1):
        losses = objective(point)
        with torch.no_grad():
            least = torch.full_like(losses, torch.inf) if least is None else least
            better = losses < least
            least = torch.where(better, losses, least)
            best = torch.where(better.view(-1, *[1] * (point.dim() - 1)), point, best)
        if step < steps:
            (point.grad,) = torch.autograd.grad(losses.sum(), point)
            adam.step()
            falling.step()
            advance(1)
    assert least is not None
    return best.detach(), least.detach()


def best_draws(
    netG: Generator,
    compare: Callable[[Tensor], Tensor],
    count: int,
    *,
    pool: int = POOL,
    seed: int = 0,
) -> Tensor:
    """The `count` of `pool` random z that fit each of B targets best: (B, count, nz).

    Args:
        netG: frozen.
        compare: images (P, C, H, W) -> losses (B, P).
        count: at most `pool`.
        pool: z ~ N(0, 1) that are tried, the first of `draw.latents`.
        seed: of the draws.
    """
    first = next(netG.parameters())
    kept, losses = [], []
    with torch.no_grad():
        for z in latents(pool, netG.nz, seed=seed):
            z = z.flatten(1).to(first.device, first.dtype)
            kept.append(z)
            losses.append(compare(netG(z)))
    order = torch.cat(losses, dim=1).topk(count, largest=False).indices
    return torch.cat(kept)[order]


@dataclass(frozen=True, eq=False)
class Projection:
    """What `project` returns."""

    restarts: Tensor
    """(B, R, nz), in the generator's dtype: of each of B targets all ends, the best first."""
    losses: Tensor
    """(B, R): theirs."""

    @property
    def z(self) -> Tensor:
        """(B, nz): the best of each target."""
        return self.restarts[:, 0]


def project(
    netG: Generator,
    measure: Callable[[Tensor, Tensor], Tensor],
    targets: int,
    *,
    prior: Callable[[Tensor, Tensor], Tensor] | None = None,
    restarts: int = 8,
    pool: int = POOL,
    steps: int = 200,
    lr: float = LR,
    batch: int = 256,
    seed: int = 0,
    wrap: Wrap = lambda loss: loss,
    advance: Advance = nobody,
) -> Projection:
    """Finds for each target the z whose image measures least, from several starts at once (Yeh et
    al. 2017, section 3): the best of many random draws, then Adam.

    Args:
        netG: `frozen`.
        measure: (images (N, C, H, W), which (N,) int64: the target of each) -> losses (N,).
        targets: how many there are.
        prior: (images, z) -> losses (N,) that are added, no matter which target.
        restarts: starting points of each target; the best end is kept.
        pool: random draws among which these are chosen; at least `restarts`.
        steps, lr: see `descend`.
        batch: latent vectors that go through the nets together.
        seed: of the draws: the same seed gives the same z, whatever the other targets are.
        wrap: is given the loss, a function of (z, which), before it is used: where to compile it.
        advance: is told 1 after each step of each batch; see `rounds`.

    Raises:
        InputError: a number is out of its range.
    """
    given = {"restarts": restarts, "pool": pool, "steps": steps, "batch": batch}
    lowest = {"restarts": 1, "pool": restarts, "steps": 0, "batch": 1}
    for name, value in given.items():
        if value < lowest[name]:
            raise InputError(f"--{name} {value} was given; it must be at least {lowest[name]}")
    if not lr > 0:
        raise InputError(f"--lr {lr} was given; it must be above 0")
    device = next(netG.parameters()).device

    def compare(images: Tensor) -> Tensor:
        rows = torch.arange(targets, device=device)
        return torch.stack([measure(images, row.expand(len(images))) for row in rows])

    def loss(z: Tensor, which: Tensor) -> Tensor:
        images = netG(z)
        own = measure(images, which)
        return own if prior is None else own + prior(images, z)

    wrapped = wrap(loss)
    starts = best_draws(netG, compare, restarts, pool=pool, seed=seed).flatten(0, 1)
    which = torch.arange(targets, device=device).repeat_interleave(restarts)
    ends, losses = [], []
    for rows in torch.arange(len(starts), device=device).split(batch):
        objective = partial(_of_rows, wrapped, which[rows])
        end, least = descend(starts[rows], objective, steps=steps, lr=lr, advance=advance)
        ends.append(end)
        losses.append(least)
    found, order = torch.cat(losses).view(targets, restarts).sort(dim=1)
    z = torch.cat(ends).view(targets, restarts, -1)
    z = z.gather(1, order[..., None].expand_as(z))
    return Projection(z, found)


def _of_rows(loss: Callable[..., Tensor], which: Tensor, z: Tensor) -> Tensor:
    return loss(z, which)


def precision(device: torch.device, say: Callable[[str], None]) -> torch.dtype | None:
    """bfloat16 for autocast where the device has it, else None and a line to `say`: float16's
    range is too small for losses that nobody scales."""
    if amp_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    say(f"--amp: this {device.type} has no native bf16 arithmetic; going on in float32")
    return None


def rounds(targets: int, *, restarts: int, steps: int, batch: int) -> int:
    """How often `project` tells `advance`."""
    return -(-targets * restarts // max(1, batch)) * steps


def nearest_images(
    netG: models.Generator | models.TF28Generator, images: Tensor, **options: object
) -> Projection:
    """`project` onto whole images (B, C, H, W) in [-1, 1], by the mean squared difference."""
    targets = images.to(next(netG.parameters()).device)
    return project(
        frozen(netG),
        lambda made, which: (made - targets[which]).square().mean((1, 2, 3)),
        len(images),
        **options,  # type: ignore[arg-type]
    )
