"""Every fused block on the device against plain PyTorch in float64: results and all gradients, with
the tolerances of the tuner's trials. Not here: which block runs how (expectations.py)."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from fastdcgan.diagnosis.layers import batch_for, layers
from fastdcgan.diagnosis.machine import dtypes, short
from fastdcgan.diagnosis.rows import Row, guarded
from fastdcgan_kernels import plan, reference
from fastdcgan_kernels.functional import runs_kernels
from fastdcgan_kernels.trials import ACTIVATION, SLOPE, BlockTrial

TITLE = "Blocks, forward and all gradients, against float64: relative RMS errors"


class NetTrial(BlockTrial):
    """As a fused net calls its blocks where no Triton kernels run: under autocast, and with
    activated inputs."""

    def run(self) -> list[Tensor]:
        """The result, and the gradients of input, its coefficients, weight, gamma and shift."""
        return self._run(self._called, None)

    def _called(self, x: Tensor, coef: Tensor | None, *parameters: Tensor | None) -> Tensor:
        if coef is not None:
            x = reference.activate(x, coef, ACTIVATION, SLOPE)
        dtype = self.block.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out: Tensor = self._fused("materialised", x, None, *parameters)  # type: ignore[arg-type]
        return out


def check_blocks(device: torch.device) -> list[Row]:
    """A row for each of the ten layers, all native dtypes in it."""
    if device.type not in ("cpu", "cuda"):
        return [Row("blocks", "not possible here", f"{device.type} has no float64 to compare with")]
    batch = (
        batch_for(device) if device.type == "cuda" else 4
    )  # a CPU has no tiles that depend on it
    every = {dtype: layers(batch, dtype) for dtype in dtypes(device)}
    rows = []
    for name in every[torch.float32]:
        blocks = [found[name] for found in every.values()]
        rows += guarded(name, partial(_check, name, blocks, device))
    return rows


def _check(name: str, blocks: list[plan.Block], device: torch.device) -> Iterable[Row]:
    words, wrong, errors = [], [], {}
    for block in blocks:
        trial = NetTrial(block, device)
        how, run = _candidate(trial, device)
        raw = run()
        why, dtype = trial.wrong(raw), short(block.dtype)
        if why:
            wrong.append(f"{dtype}: {why}")
        errors[dtype] = _largest(trial, raw)
        words.append(f"{dtype} {errors[dtype]:.0e}")
    values = {"rms_errors": errors}
    if wrong:
        yield Row(
            name,
            "failed",
            "; ".join(wrong),
            "set FASTDCGAN_IMPL=reference (plain PyTorch) and report this with --json",
            values,
        )
        return
    yield Row(name, "ok", f"{how}: {', '.join(words)}", values=values)


def _candidate(trial: NetTrial, device: torch.device) -> tuple[str, Callable[[], list[Tensor]]]:
    """How this block runs here, in words, and the run."""
    target = plan.target_of(device)
    if target is None or not runs_kernels(device):
        return "plain PyTorch", trial.run
    how = plan.choose(trial.block, target).how
    return how, trial.prepare(how)


def _largest(trial: BlockTrial, raw: list[Tensor]) -> float:
    """The largest RMS error among results, each relative to the RMS of what is right."""

    def rms(values: Tensor) -> float:
        return float(values.detach().double().square().mean().sqrt())

    return max(
        rms(ours.double() - truth) / (rms(truth) + 1e-30)
        for ours, truth in zip(trial.outputs(raw), trial.truth, strict=True)
    )
