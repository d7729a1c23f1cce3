"""An exponential moving average of the generator, from which samples are drawn."""

import copy

import torch
from torch import nn


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
        self.decay = decay
        self._net = net
        self._pairs = [
            (a, b.detach())
            for a, b in zip(
                self.average.state_dict(keep_vars=True).values(),
                net.state_dict(keep_vars=True).values(),
                strict=True,
            )
        ]

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Takes in the net as it is after step `t` (counted from 0)."""
        weight = 1 - min(self.decay, (1 + t) / (10 + t))
        floating = [(a, b) for a, b in self._pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], weight)
        for a, b in self._pairs:
            if not a.is_floating_point():
                a.copy_(b)
