"""The whole training step that the phases prove, time and profile: that of
`python -m fastdcgan.train --amp`, on random pixels. On a card its first call makes a CUDA graph."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.phase import Setting
from fastdcgan.data import Order, Packed, make_feed
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import choose_engine
from fastdcgan.training.state import TrainState
from fastdcgan.training.whole_step import WholeStep

MARGIN = 32
"""Pixels around an image that a crop may move over, on each side: the built-in data's."""
STEPS = 1000
"""In an epoch, so that no batch is ragged."""


def whole_step(
    setting: Setting, batch: int, *, say: Callable[[str], None], prove: bool | None = None,
    **options: Any,
) -> WholeStep:  # fmt: skip
    """A fresh run's step.

    Args:
        setting: where, and how large.
        batch: images.
        say: is called with a line where the step goes on without its kernels or its graph.
        prove: as WholeStep's.
        **options: of TrainConfig.
    """
    import torch

    size = setting.size
    config = TrainConfig(
        channels=3,
        batch_size=batch,
        image_size=size.image,
        ngf=size.width,
        ndf=size.width,
        nz=size.nz,
        amp=size.amp,
        impl="triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto",
        **options,
    )
    engine = choose_engine(config, Ranks(), setting.device)
    state = TrainState(config, setting.device, scaling=engine.autocast == torch.float16)
    packed = _pixels(2 * batch, size.image)
    feed = make_feed(
        packed,
        order=Order(packed.n, STEPS * batch, batch, config.seed),
        device=setting.device,
        hflip=packed.hflip,
        dtype=engine.autocast or torch.float32,
        resident=True,
    )
    return WholeStep(state, feed, engine=engine, say=say, prove=prove)


def _pixels(n: int, size: int) -> Packed:
    """Random images (n, window, window, 3), as the built-in data would be packed."""
    window = size + 2 * MARGIN
    images = np.random.default_rng(0).integers(0, 256, (n, window, window, 3), np.uint8)
    return Packed(
        path=Path(), images=images, source="", location="", name="", split="train", size=size,
        window=window, channels=3, rule="", n=n, epoch_images=n, hflip=True, fingerprint="",
        sha256="", skipped=0,
    )  # fmt: skip
