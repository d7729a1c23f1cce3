"""An exponential moving average of the generator, from which samples are drawn."""

import copy

from torch import Tensor, nn

from fastdcgan_kernels.adam import Average


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
