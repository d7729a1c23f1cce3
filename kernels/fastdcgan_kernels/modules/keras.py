"""BatchNorm as Keras has it, for nets that take over weights from there, or are measured beside it.
Not here: how it is run in a block (block.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KerasBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose running variance moves by the biased variance of the batch, sum of
    (x - mean)^2 / n, as Keras 3's `moving_variance` does (keras/src/layers/normalization/
    batch_normalization.py), where PyTorch takes n - 1. Blocks have it.

    State-dict keys, arguments and defaults are nn.BatchNorm2d's (Keras's eps is 1e-3, and its
    momentum of 0.99 is 0.01 here); momentum=None and track_running_stats=False are, too. Gradients
    of every order are F.batch_norm's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, H, W); shape and dtype stay.

        Raises:
            ValueError: in training, where there is one value a channel.
        """
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training or mean is None or var is None or count is None:
            return super().forward(input)
        self._check_input_dim(input)
        # With momentum 1 these receive the batch's own statistics from the pass that normalises;
        # zeros, because it takes 0 times what they held, and 0 times NaN is NaN.
        own, unbiased = torch.zeros_like(mean), torch.zeros_like(var)
        output = F.batch_norm(
            input, own, unbiased, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )
        n = input.numel() // self.num_features
        with torch.no_grad():
            count.add_(1)
            share = 1.0 / count.float() if self.momentum is None else self.momentum
            mean.lerp_(own, share)
            var.lerp_(unbiased * ((n - 1) / n), share)
        return output
