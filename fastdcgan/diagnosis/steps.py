"""Whole training steps on the device: as a CUDA graph, without waiting for the device, and a few in
earnest. Not here: how long they take (timings.py)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.data import Order, Packed, make_feed
from fastdcgan.diagnosis.layers import SIZE, batch_for
from fastdcgan.diagnosis.rows import Row, Verdict
from fastdcgan.hardware import amp_dtype
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import choose_engine
from fastdcgan.training.state import TrainState
from fastdcgan.training.whole_step import WholeStep

STEPS = 8


def start(
    packed: Packed, device: torch.device, *, say: Callable[[str], None], **options: Any
) -> WholeStep:
    """The first step of a run on this data, and so all that follow; options of TrainConfig."""
    config = TrainConfig(image_size=SIZE, channels=packed.channels, **options)
    config.validate()
    engine = choose_engine(config, Ranks(), device)
    state = TrainState(config, device, scaling=engine.autocast == torch.float16)
    whole = packed.epoch_images // config.batch_size * config.batch_size  # no ragged batches
    feed = make_feed(
        packed,
        order=Order(packed.n, whole, config.batch_size, config.seed),
        device=device,
        hflip=packed.hflip,
        dtype=engine.autocast or torch.float32,
    )
    return WholeStep(state, feed, engine=engine, say=say)


def graph_rows(packed: Packed, device: torch.device) -> Iterable[Row]:
    """Has a whole step compared with plain PyTorch, captured, and compared with an eager one (all
    by whole_step.py), and replays it. On other devices a step is run where nothing can wait."""
    if device.type == "cuda":
        yield from _captured(packed, device)
    else:
        yield Row(
            "CUDA graph",
            "not possible here",
            f"graphs are for CUDA devices, and this is {device}; instead:",
        )
    yield from _without_values(packed)
    if device.type == "cpu":
        yield from _without_waiting(packed, device)


def _captured(packed: Packed, device: torch.device) -> Iterable[Row]:
    said: list[str] = []
    amp = amp_dtype(device) is not None
    whole = start(packed, device, say=said.append, amp=amp, batch_size=batch_for(device))
    rows = torch.stack([whole().clone() for _ in range(STEPS)])
    if said or not whole.graphed:
        yield Row(
            "CUDA graph",
            "failed",
            "; ".join(said) or "the step was not captured",
            "training goes on without, and is slower; report this with --json",
        )
        return
    finite = bool(rows.isfinite().all())
    yield Row(
        "CUDA graph",
        "ok" if finite else "failed",
        "a whole step agrees with plain PyTorch, was captured, agrees with the step run eagerly, "
        f"and was replayed {STEPS} times" + ("" if finite else "; the losses are not finite"),
    )


def _without_values(packed: Packed) -> Iterable[Row]:
    meta = torch.device("meta")
    whole = start(packed, meta, say=lambda line: None)
    shape = tuple(whole().shape)
    yield Row("step on meta", "ok", f"a whole step without any values gives readings {shape}")


def _without_waiting(packed: Packed, device: torch.device) -> Iterable[Row]:
    whole = start(packed, device, say=lambda line: None, **_sizes(device))
    whole()  # tables and states are made in the first step
    with NoSync() as seen:
        whole()
    yield Row(
        "host syncs",
        "ok",
        f"none among the {seen.count} operations of a step",
        values={"operations": seen.count},
    )


def _sizes(device: torch.device) -> dict[str, int]:
    """Of nets and batches: small where arithmetic is dear, and where it is not, those that kernels
    were compiled for."""
    if device.type == "cuda":
        return {"batch_size": batch_for(device)}
    return {"ngf": 16, "ndf": 16, "batch_size": 8}


class NoSync(TorchDispatchMode):
    """Raises where an operation would make the host wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or name.startswith("_unique"):
            raise RuntimeError(f"a step waits for the device: {func} reads a value back")
        self.count += 1
        return func(*args, **(kwargs or {}))


def training_rows(packed: Packed, device: torch.device) -> Iterable[Row]:
    """Some steps of small nets on the built-in data, as fast as this machine is told to go."""
    said: list[str] = []
    amp = amp_dtype(device) is not None
    whole = start(packed, device, say=said.append, amp=amp, **_sizes(device))
    rows = torch.stack([whole().clone() for _ in range(STEPS)]).tolist()
    finite = all(math.isfinite(value) for row in rows for value in row)
    (first_d, first_g), (last_d, last_g) = rows[0][:2], rows[-1][:2]
    detail = (
        f"{STEPS} steps{' with --amp' if amp else ''}: D's loss from {first_d:.2f} "
        f"to {last_d:.2f}, G's from {first_g:.2f} to {last_g:.2f}"
    )
    if finite and whole.state.is_finite():
        verdict: Verdict = "warning" if said else "ok"
        detail = "; ".join([detail, *said])
        yield Row("training", verdict, detail, values={"loss_d": last_d, "loss_g": last_g})
    else:
        yield Row("training", "failed", f"not finite: {detail}", "report this with --json")
