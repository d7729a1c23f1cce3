"""Dropout whose mask costs a CPU no more than reading what it hides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..choice import plain
from ..cpu.dropout import DTYPES, dropout
from ..functional import runs_cpu_kernels


class Dropout(nn.Dropout):
    """nn.Dropout that draws one number of PyTorch's generator a call on a CPU, as the seed of a
    mask by Philox4x32-10 on all threads, where nn.Dropout draws one an element on one thread: a
    third of the time of a small net's step.

    Arguments, state and repr are nn.Dropout's. The mask is another one than nn.Dropout's from the
    same seed of the generator, and the same for any number of threads. An element is dropped with
    probability p to 8e-6, and the others are divided by exactly the probability of keeping them.
    float32 and bfloat16 in eager training on a CPU with the C++ kernels; else it is nn.Dropout.
    Gradients of every order are those of the multiplication by the mask.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input` of any shape; in training with elements at random 0. Shape and dtype stay."""
        if not self._is_fast(input):
            return super().forward(input)
        found: Tensor = dropout(input, torch.empty((), dtype=torch.int64).random_(), self.p)
        return input.copy_(found) if self.inplace else found

    def _is_fast(self, x: Tensor) -> bool:
        return (
            self.training
            and not torch.compiler.is_compiling()
            and not plain.is_asked_for(x)
            and x.dtype in DTYPES
            and runs_cpu_kernels(x.device)
        )
