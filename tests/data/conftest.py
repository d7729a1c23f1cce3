"""What the tests of the data room share: a cache of their own, and packed images without a file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.data import Packed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed images go during a test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTDCGAN_CACHE", str(folder))
    return folder


@pytest.fixture
def packed_of() -> Callable[..., Packed]:
    """packed_of(images, size=...): uint8 images (n, window, window, C) as `prepare` gives them."""

    def make(images: np.ndarray, *, size: int | None = None, epoch: int | None = None) -> Packed:
        n, window, _, channels = images.shape
        return Packed(
            path=Path("nowhere"),
            images=images,
            source="made",
            location="made",
            name="made",
            split="train",
            size=size or window,
            window=window,
            channels=channels,
            rule="none",
            n=n,
            epoch_images=epoch or n,
            hflip=False,
            fingerprint="",
            sha256="",
            skipped=0,
        )

    return make
