"""fastdcgan as it is used, as workloads: the whole step with its feed, sampling, the discriminator,
single blocks, the feed."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.peers import autocast
from benchmarks.timing import Unavailable, Workload
from fastdcgan import models
from fastdcgan.data import Order, Packed, make_feed, prepare
from fastdcgan.errors import RunError
from fastdcgan.hardware import amp_dtype, pick_device
from fastdcgan.training import plan
from fastdcgan.training.config import TrainConfig, preset
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.state import TrainState
from fastdcgan.training.whole_step import WholeStep
from fastdcgan_kernels import fuse

DEVICE = pick_device("auto")
"""What all benchmarks run on."""
REPEAT = 10 if DEVICE.type == "cuda" else 1
"""Calls of whole nets in a round: on a GPU the host then runs ahead of it, as in training."""
STEPS = 1000
"""In an epoch of the benchmarks, so that no batch is ragged."""


def native_amp(device: torch.device) -> torch.dtype:
    """The dtype of --amp; `Unavailable` where the device does not compute it natively."""
    dtype = amp_dtype(device)
    if dtype is None:
        raise Unavailable(f"this {device.type} has no native bf16 arithmetic, so no AMP")
    return dtype


def state_of(config: TrainConfig, device: torch.device) -> tuple[TrainState, plan.Engine]:
    """A fresh run's state, and how its steps run here."""
    if config.amp:
        native_amp(device)
    engine = plan.choose_engine(config, Ranks(), device)
    return TrainState(config, device, scaling=engine.autocast == torch.float16), engine


def step(device: torch.device, batch: int, **options: Any) -> Workload:
    """The whole step of the DCGAN: feed with crop and flip, noise, both updates, average.

    Args:
        **options: of `TrainConfig`.
    """
    config = TrainConfig(channels=3, batch_size=batch, **options)
    return _step(config, device, prepare("blue-marble", size=64, progress=False))


def tf28_step(device: torch.device, batch: int, **options: Any) -> Workload:
    """The whole step of the TensorFlow tutorial's recipe."""
    config = preset("tf28", channels=1, batch_size=batch, **options)
    return _step(config, device, _noise(1024, config.image_size))


def _step(config: TrainConfig, device: torch.device, packed: Packed) -> Workload:
    state, engine = state_of(config, device)
    order = Order(packed.n, STEPS * config.batch_size, config.batch_size, config.seed)
    feed = make_feed(
        packed,
        order=order,
        device=device,
        hflip=packed.hflip,
        dtype=engine.autocast or torch.float32,
    )
    return Workload(WholeStep(state, feed, engine=engine, say=_refuse), config.batch_size)


def _refuse(line: str) -> None:
    """What training would say and go on without (a graph, a compiler) is no benchmark of it."""
    raise RunError(line)


def sampling(device: torch.device, batch: int, statistics: Any, **options: Any) -> Workload:
    """Images from the averaged generator, as `generate` and training's sample sheets draw them."""
    state, engine = state_of(TrainConfig(channels=3, **options), device)
    z = torch.randn(batch, state.config.nz, 1, 1, device=device)

    def draw() -> None:
        with autocast(device, engine.autocast):
            models.sample(state.sampler, z, statistics=statistics)

    return Workload(draw, batch)


def discriminator(device: torch.device, batch: int, *, backward: bool, **options: Any) -> Workload:
    """D on one batch of images, with its loss and, if asked for, the gradients of its weights."""
    state, engine = state_of(TrainConfig(channels=3, **options), device)
    images = torch.rand(batch, 64, 64, 3, device=device).mul_(2).sub_(1).permute(0, 3, 1, 2)

    def run() -> None:
        state.netD.zero_grad(set_to_none=True)
        with autocast(device, engine.autocast):
            loss = F.softplus(-state.netD(images).float()).mean()  # the loss on "real"
        if backward:
            loss.backward()

    return Workload(run, batch)


def critic_step(device: torch.device, batch: int) -> Workload:
    """One update of SNGAN's critic, fused."""
    return peers.critic_step(device, batch, form=torch.channels_last, change=fuse)


def feed(packed: Packed, device: torch.device, batch: int) -> Workload:
    """An epoch of batches on the device. None of them is ragged."""
    order = Order(packed.n, packed.n // batch * batch, batch, seed=0)
    batches = make_feed(packed, order=order, device=device, hflip=packed.hflip)
    epoch = itertools.count()

    def run() -> None:
        first = next(epoch) * order.steps_per_epoch
        for step in range(first, first + order.steps_per_epoch):
            batches.batch(step)

    return Workload(run, order.epoch_images)


def _noise(n: int, size: int) -> Packed:
    """Packed grey noise, from a cache of its own that is gone when nothing maps it any more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (n, size, size), np.uint8))
        return prepare(str(path), size=size, cache=Path(folder) / "cache", progress=False)
