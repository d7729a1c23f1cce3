"""One block on this device, run as training runs it: an experiment of the tuner's
(trials.py of the kernels) with its data, what is right, and how far from that a run may be. Needs
Triton."""

from typing import Any, cast, get_args

import torch
from torch import Tensor

from fastdcgan.diagnosis.layers import way_of
from fastdcgan_kernels import reference
from fastdcgan_kernels.choice.types import Block, How
from fastdcgan_kernels.tuner.trials import ACTIVATION, SLOPE, BlockTrial


class NetTrial(BlockTrial):
    """By Triton kernels in the plan's way, where they run; elsewhere as a fused net calls blocks:
    under autocast, and on activated inputs."""

    def __init__(self, block: Block, device: torch.device) -> None:
        super().__init__(block, device)
        self.how = way_of(block, device)

    def run(self) -> list[Tensor]:
        """The result, and the gradients of input, its coefficients, weight, gamma and shift."""
        if self.how in get_args(How):
            return self.prepare(cast("How", self.how))()
        return self.outcome(self._called)

    def _called(self, x: Tensor, coef: Tensor | None, *parameters: Any) -> Tensor:
        if coef is not None:
            x = reference.activate(x, coef, ACTIVATION, SLOPE)
        dtype = self.block.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return self.fused("materialised", x, None, *parameters)


def error(trial: NetTrial, raw: list[Tensor]) -> float:
    """The largest RMS error among results, each relative to the RMS of what is right."""
    return max(
        _rms(ours.double() - truth) / (_rms(truth) + 1e-30)
        for ours, truth in zip(trial.outputs(raw), trial.truth, strict=True)
    )


def _rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())
