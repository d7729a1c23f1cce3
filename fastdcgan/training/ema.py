"""An exponential moving average of the generator, from which samples are drawn."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdcgan.models.conditional import in_turn
from fastdcgan_kernels.adam import Average

LATENTS, BATCH = 512, 64
"""Latent vectors by which `settled` measures, and how many at a time."""


@torch.no_grad()
def settled(average: nn.Module) -> nn.Module:
    """A copy of an averaged generator, in eval mode, whose BatchNorm has the running statistics of
    its own features, over the same `LATENTS` latent vectors every time. The statistics that were
    averaged along are those of other weights, whose features vary more: by them images are too
    flat. Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization",
    section 3.2.

    Args:
        average: one of `fastdcgan.models`.
    """
    net: Any = copy.deepcopy(average).train()
    norms: list[Any] = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    device = next(net.parameters()).device
    z = torch.randn(LATENTS, net.nz, 1, 1, generator=torch.Generator().manual_seed(0))
    given = (z,) if net.classes is None else (z, in_turn(LATENTS, net.classes))
    batches = zip(*(each.split(BATCH) for each in given), strict=True)
    for count, batch in enumerate(batches if norms else (), start=1):
        for norm in norms:
            norm.momentum = 1 / count  # the mean of all batches until now
        net(*(each.to(device) for each in batch))
    for norm, (momentum, seen) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(seen)
    return cast(nn.Module, net.eval())


class EMA:
    """average <- d * average + (1 - d) * net, over parameters and floating buffers.

    d = min(decay, (1 + t) / (10 + t)) at update t: early on, the average forgets the initial
    weights instead of carrying them along.

    Args:
        net: the net to follow; its copy `average` has no gradients.
        decay: 0.999 remembers about the last thousand steps.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.average = copy.deepcopy(net).requires_grad_(False)
        averages, values = (n.state_dict(keep_vars=True).values() for n in (self.average, net))
        self.moving = Average(averages, values, decay)
        """Moved by the optimiser of `net`, after each of its updates."""

    @property
    def updates(self) -> Tensor:
        """How often the average was moved, (), float32."""
        return self.moving.updates
