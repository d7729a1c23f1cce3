"""What one whole training step costs, counted from what it really launches, and the time that this
predicts on a GPU: `python -m benchmarks.cost_model`. Nothing here is measured, and no GPU is used.

The steps are ours in each of the implementations that a plan can choose, and the PyTorch example's
loop in float32 and under AMP. How launches and operations are counted is in counting.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.counting import Work

COMMAND = "python -m benchmarks.cost_model"
DTYPES = ("bf16", "fp16", "fp32")
MEGA, GIGA = 1e6, 1e9

# Seconds that a launch adds. ASSUMED, not measured: a kernel in a replayed CUDA graph starts about
# a microsecond after the one before it; eager PyTorch takes about five on the host to dispatch an
# operation, while the device works on earlier ones.
REPLAYED, DISPATCHED = 1e-6, 5e-6


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU. flops: of dense matrix products with float32 sums; bytes: of its memory."""

    name: str
    target: str
    multiprocessors: int
    flops16: float
    flops32: float
    bytes: float
    source: str


DEVICES = {
    "h100": Device(
        "H100 SXM", "sm_90", 132, 798e12, 67e12, 3.0e12,
        "16 bit and memory: measured on one; fp32: NVIDIA H100 data sheet",
    ),
    "h200": Device("H200", "sm_90", 132, 989e12, 67e12, 4.8e12, "NVIDIA H200 data sheet"),
    "b200": Device("B200", "sm_100", 148, 2250e12, 75e12, 7.7e12, "NVIDIA HGX B200 data sheet"),
    "a100": Device("A100 SXM 80 GB", "sm_80", 108, 312e12, 19.5e12, 2.039e12,
                   "NVIDIA A100 data sheet"),
    "l4": Device("L4", "sm_89", 58, 121e12, 30.3e12, 0.3e12, "NVIDIA L4 data sheet"),
    "rtx4090": Device("RTX 4090", "sm_89", 128, 165.2e12, 82.6e12, 1.008e12,
                      "NVIDIA Ada architecture whitepaper"),
    "mi300x": Device("MI300X", "gfx942", 304, 1307.4e12, 163.4e12, 5.3e12,
                     "AMD Instinct MI300X data sheet"),
}  # fmt: skip

OURS = {
    "default": "ours, the plan's own choices",
    "prologue": "ours, prologue",
    "materialised": "ours, materialised",
    "vendor": "ours, vendor convolutions",
    "reference": "ours, reference",
}
EAGER = {"eager-amp": "PyTorch example, eager, AMP", "eager": "PyTorch example, eager, fp32"}


@dataclass(frozen=True)
class Cost:
    """One step, added up. `replayed`: as one CUDA graph; else launched one by one."""

    name: str
    work: list[Work]
    batch: int
    replayed: bool

    @property
    def launches(self) -> int:
        """Kernel launches of a step."""
        return sum(w.launches for w in self.work)

    @property
    def bytes(self) -> int:
        """Bytes read and written in a step."""
        return sum(w.bytes for w in self.work)

    @property
    def flops(self) -> int:
        """FLOPs of a step as the kernels make them, padding included."""
        return sum(w.flops for w in self.work)

    @property
    def useful(self) -> int:
        """FLOPs of a step's convolutions themselves."""
        return sum(w.useful for w in self.work)

    def roofline(self, device: Device, dtype: str) -> float:
        """Seconds: for each launch the longer of its products and its bytes at the peaks, added."""
        peak = device.flops32 if dtype == "fp32" else device.flops16
        return sum(max(w.flops / peak, w.bytes / device.bytes) for w in self.work)

    def predicted(self, device: Device, dtype: str) -> float:
        """Seconds: the roofline and, replayed, REPLAYED for each launch; eagerly, what the host
        takes for all of them where that is longer."""
        device_time = self.roofline(device, dtype)
        if self.replayed:
            return device_time + self.launches * REPLAYED
        return max(device_time, self.launches * DISPATCHED)


# --- The steps ------------------------------------------------------------------------------------


def torch_dtype(dtype: str) -> torch.dtype:
    """bf16, fp16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]


def our_step(how: str, device: Device, batch: int, size: int, dtype: str) -> list[Work]:
    """A whole step of ours: data, noise, both updates, average; with the plan's own choices where
    `how` is "default"."""
    from contextlib import ExitStack

    import torch

    from benchmarks.counting import counting
    from fastdcgan.training import TrainConfig
    from fastdcgan.training.plan import Engine
    from fastdcgan.training.readings import Readings
    from fastdcgan.training.state import TrainState
    from fastdcgan.training.whole_step import WholeStep

    meta, compute = torch.device("meta"), torch_dtype(dtype)
    config = TrainConfig(channels=3, batch_size=batch, image_size=size, impl="triton")
    state = TrainState(config, meta)
    for optimiser in (state.optD, state.optG):
        for group in optimiser.param_groups:  # as on a GPU; the meta device does not let it be asked
            group.update(fused=True, foreach=False)
        _adam_state(optimiser, steps="meta")
    # Nor has it an autocast: what that does to the input of a fused net is done by hand.
    state.netG.register_forward_pre_hook(lambda net, z: z[0].to(compute))
    autocast = None if dtype == "fp32" else compute
    step = WholeStep(
        state,
        _feed(batch, size, meta, compute),
        engine=Engine(meta, autocast, compile=False, impl="triton", cuda_graph="off", notes=()),
        readings=Readings(8, meta),
    )
    with ExitStack() as stack:
        stack.enter_context(_on(device, how))
        step()  # what is made once is there
        work = stack.enter_context(counting())
        step()
    return work


@contextmanager
def _on(device: Device, how: str) -> Iterator[None]:
    """Inside, tensors on the meta device are taken to be on this one, and blocks run like that."""
    from contextlib import nullcontext
    from dataclasses import replace

    from fastdcgan_kernels import plan

    target = replace(plan.TARGETS[device.target], multiprocessors=device.multiprocessors)
    choice: Any = nullcontext() if how == "default" else plan.override(how)  # type: ignore[arg-type]
    with plan.assume(target), choice:
        yield


def _adam_state(optimiser: torch.optim.Adam, *, steps: str) -> None:
    """That of a step that is not the first; `steps`: where Adam counts, which is the host unless it
    is fused."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    for group in optimiser.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            with unset_fake_temporarily():
                optimiser.state[p] = {"step": torch.ones((), device=steps), **moments}


def _feed(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Images as the built-in data's: random crops of larger windows, flipped."""
    import numpy as np

    from fastdcgan.data import Order, Packed, make_feed
    from fastdcgan.data.sources.blue_marble import MARGIN

    n, window = 8 * batch, size + 2 * MARGIN
    packed = Packed(
        path=Path(), images=np.empty((n, window, window, 3), np.uint8), source="", location="",
        name="", split="train", size=size, window=window, channels=3, rule="", n=n, epoch_images=n,
        hflip=True, fingerprint="", sha256="", skipped=0,
    )  # fmt: skip
    order = Order(n, n, batch, 0)
    return make_feed(packed, order=order, device=device, hflip=True, dtype=dtype, resident=True)


def eager_step(amp: bool, batch: int, size: int) -> list[Work]:
    """The PyTorch example's loop as a GPU's user runs it: eager, NCHW, Adam by lists of tensors
    (PyTorch's default on a GPU); under AMP in bf16, with the loss on logits, which autocast asks
    for.

    It runs on fake tensors on the CPU, whose autocast has these operations in the same lists.
    """
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.counting import counting
    from fastdcgan.models import Discriminator, Generator

    with FakeTensorMode(allow_non_fake_inputs=True):
        netG, netD = Generator(size), Discriminator(size)
        adam: Callable[..., Any] = torch.optim.Adam
        optD, optG = (
            adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=True) for net in (netD, netG)
        )
        _adam_state(optD, steps="cpu")
        _adam_state(optG, steps="cpu")
        loader = torch.empty(batch, 3, size, size)
        criterion = nn.BCEWithLogitsLoss() if amp else nn.BCELoss()

        def autocast() -> Any:
            return torch.autocast("cpu", torch.bfloat16, enabled=amp)

        def loss_and_output(images: torch.Tensor, label: torch.Tensor) -> Any:
            with autocast():
                out = netD(images)
                if not amp:
                    out = out.sigmoid()
            return criterion(out.float(), label), out

        def step() -> None:
            netD.zero_grad()
            images = loader.clone()  # to the device
            label = torch.full((batch,), 1.0)
            loss_real, output = loss_and_output(images, label)
            loss_real.backward()
            output.mean().item()
            noise = torch.randn(batch, 100, 1, 1)
            with autocast():
                fake = netG(noise)
            label.fill_(0.0)
            loss_fake, output = loss_and_output(fake.detach(), label)
            loss_fake.backward()
            output.mean().item()
            (loss_real + loss_fake).item()
            optD.step()
            netG.zero_grad()
            label.fill_(1.0)
            loss, output = loss_and_output(fake, label)
            loss.backward()
            output.mean().item()
            optG.step()
            loss.item()

        with counting() as work:
            step()
    return work


def cost(name: str, *, device: Device, batch: int, size: int, dtype: str) -> Cost:
    """The cost of one of `OURS` or `EAGER`."""
    if name in OURS:
        return Cost(OURS[name], our_step(name, device, batch, size, dtype), batch, True)
    return Cost(EAGER[name], eager_step(name == "eager-amp", batch, size), batch, False)
