"""Every fused block on the device against plain PyTorch in float64: results and all gradients, with
the tolerances of the tuner's trials. Not here: which block runs how (expectations.py)."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from fastdcgan.diagnosis.layers import batch_for, layers
from fastdcgan.diagnosis.machine import dtypes, short
from fastdcgan.diagnosis.rows import Row, guarded
from fastdcgan_kernels.choice.types import Block

TITLE = "Blocks, forward and all gradients, against float64: relative RMS errors"
CPU_BATCH = 4  # float64 takes its time


def check_blocks(device: torch.device) -> list[Row]:
    """A row for each of the ten layers, all native dtypes in it."""
    if device.type not in ("cpu", "cuda"):
        return [Row("blocks", "not possible here", f"{device.type} has no float64 to compare with")]
    try:
        from fastdcgan.diagnosis import trial  # noqa: F401
    except ImportError as error:
        return [Row("blocks", "not possible here", f"needs Triton: {error}", "pip install triton")]
    batch = batch_for(device) if device.type == "cuda" else CPU_BATCH
    every = {dtype: layers(batch, dtype) for dtype in dtypes(device)}
    rows = []
    for name in every[torch.float32]:
        blocks = [found[name] for found in every.values()]
        rows += guarded(name, partial(_check, name, blocks, device))
    return rows


def _check(name: str, asked: Sequence[Block], device: torch.device) -> Iterable[Row]:
    from fastdcgan.diagnosis.trial import NetTrial, error

    ways, wrong, errors = [], [], {}
    for one in asked:
        trial = NetTrial(one, device)
        raw, dtype = trial.run(), short(one.dtype)
        why, errors[dtype] = trial.wrong(raw), error(trial, raw)
        ways.append(trial.how)
        if why:
            wrong.append(f"{dtype}: {why}")
    values = {"ways": ways, "rms_errors": errors}
    alike = len(set(ways)) == 1
    how = f"{ways[0]}: " if alike else ""
    if wrong:
        advice = "set FASTDCGAN_IMPL=reference (plain PyTorch) and report this with --json"
        yield Row(name, "failed", how + "; ".join(wrong), advice, values)
        return
    found = ", ".join(
        f"{dtype} {error:.0e}" + ("" if alike else f" ({way})")
        for (dtype, error), way in zip(errors.items(), ways, strict=True)
    )
    yield Row(name, "ok", how + found, values=values)
