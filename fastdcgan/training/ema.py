"""An exponential moving average of the generator, from which samples are drawn."""

import copy

import torch
from torch import nn

from fastdcgan_kernels.functional import runs_kernels
from fastdcgan_kernels.step import Average


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
        states = (n.state_dict(keep_vars=True).values() for n in (self.average, net))
        pairs = [(a.detach(), b.detach()) for a, b in zip(*states, strict=True)]
        self._followed = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._average: Average | None = None
        # On the device, because a CUDA graph repeats whatever the host gives it.
        self.updates = torch.zeros((), device=pairs[0][0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the net as it is now."""
        if runs_kernels(self.updates.device):
            if self._average is None:
                self._average = Average(*zip(*self._followed, strict=True))
            self._average.update(self.updates, 1 - self.decay)
        else:
            self._lerp()
        if self._copied:
            counts, newer = (list(side) for side in zip(*self._copied, strict=True))
            torch._foreach_copy_(counts, newer)
        self.updates.add_(1)

    def _lerp(self) -> None:
        # 1 - d, in a form that float32 does not cancel.
        weight = (9 / (10 + self.updates)).clamp(min=1 - self.decay)
        if weight.device.type == "cpu":  # one pass over memory, where launches cost nothing
            for average, value in self._followed:
                average.lerp_(value, weight.to(average.dtype))
        else:
            averages, values = (list(side) for side in zip(*self._followed, strict=True))
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, weight.to(steps[0].dtype))
            torch._foreach_add_(averages, steps)
