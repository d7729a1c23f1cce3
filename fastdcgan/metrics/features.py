"""Images to features, a batch at a time: fakes as they are drawn, real images once for all, kept in
the cache. Not here: what the features are worth (scores.py)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastdcgan.data import Packed, atomic_write
from fastdcgan.data.picture import Pixels
from fastdcgan.data.sources import cache_folder
from fastdcgan.errors import InputError
from fastdcgan.metrics.networks import FeatureNetwork

BATCH = {
    "cpu": 8
}  # measured at 128 x 128 on two cores: 8 is fastest, 64 takes almost twice as long
BATCH_ELSEWHERE = 256

Advance = Callable[[int], object]
"""Is told how many more images are done."""


def nothing(done: int) -> None:
    """An `Advance` that tells nobody."""


def extract(
    images: Iterable[Pixels],
    network: FeatureNetwork,
    device: torch.device,
    advance: Advance = nothing,
) -> Tensor:
    """Features (N, D), float32 on the CPU, of images that come in chunks (n, H, W, C), uint8, each
    with C = 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA. No more than a chunk of them is in memory.

    Raises:
        InputError: the network gives something other than (n, D) numbers.
    """
    size = BATCH.get(device.type, BATCH_ELSEWHERE)
    found: list[Tensor] = []
    for chunk in images:
        for start in range(0, len(chunk), size):
            pixels = torch.from_numpy(np.ascontiguousarray(chunk[start : start + size]))
            batch = to_rgb(pixels.to(device).permute(0, 3, 1, 2))
            with torch.no_grad():
                features = network.module(batch)
            if not isinstance(features, Tensor) or features.shape[:-1] != (len(batch),):
                raise InputError(
                    f"the network {network.name} does not give features (N, D) for uint8 images "
                    f"(N, 3, H, W), but {_shape(features)} for N = {len(batch)}"
                )
            found.append(features.float().cpu())
            advance(len(batch))
    return torch.cat(found)


def to_rgb(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) of 1 to 4 channels -> (N, 3, H, W): grey three times, what is
    transparent on white."""
    channels = images.shape[1]
    if channels in (2, 4):
        alpha = images[:, -1:].float() / 255
        images = (images[:, :-1] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if channels in (1, 2) else images


def centre(packed: Packed, rows: Any) -> Pixels:
    """Those packed images as (n, size, size, C): of wider windows, their middle."""
    margin = (packed.window - packed.size) // 2
    middle = slice(margin, margin + packed.size)
    return packed.images[rows, middle, middle]


def chunks(packed: Packed, rows: np.ndarray[Any, Any], size: int = 256) -> Iterator[Pixels]:
    """Those packed images, in that order, up to `size` at a time."""
    for start in range(0, len(rows), size):
        yield centre(packed, rows[start : start + size])


def real_features(
    packed: Packed,
    count: int,
    network: FeatureNetwork,
    device: torch.device,
    *,
    cache: Path | None = None,
    advance: Advance = nothing,
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Features (count, D) of `count` different images of `packed`, drawn at random but always the
    same, and which rows of it they are. What the cache has is not computed again: it is found by
    the hash of the packed pixels, their size and the network's identity, so changed images or
    weights are never mistaken for the old ones.
    """
    if count > packed.n:
        raise InputError(f"{count:,} images of {packed.source} were asked for; it has {packed.n:,}")
    entry = entry_of(packed, network, cache)
    features, rows = _read(entry)
    if len(rows) < count:
        # The rows are stored with their features, so that no other numpy can shuffle them anew.
        others = np.setdiff1d(np.arange(packed.n), rows)
        more = np.random.default_rng(0).permutation(others)[: count - len(rows)]
        advance(len(rows))
        computed = extract(chunks(packed, more), network, device, advance)
        features = torch.cat([features, computed]) if len(rows) else computed
        rows = np.concatenate([rows, more])
        if entry is not None:
            held = {"features": features, "rows": torch.from_numpy(rows)}
            keep(entry, safetensors.torch.save(held))
    else:
        advance(count)
    return features[:count], rows[:count]


def entry_of(packed: Packed, network: FeatureNetwork, cache: Path | None) -> Path | None:
    if network.identity is None:
        return None
    facts = [packed.sha256, *packed.images.shape[1:], packed.size, network.identity]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    name = f"{packed.name}-{packed.size}-{network.name}-{digest}.safetensors"
    return cache_folder(cache) / "features" / name


def _read(entry: Path | None) -> tuple[Tensor, np.ndarray[Any, Any]]:
    if entry is not None and entry.is_file():
        try:
            held = safetensors.torch.load_file(entry)
            return held["features"], held["rows"].numpy()
        except (safetensors.SafetensorError, KeyError, OSError):
            pass  # damaged: made again
    return torch.empty(0), np.empty(0, np.int64)


def keep(path: Path, data: bytes) -> None:
    """Writes a file of the cache, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(data))
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {path.parent}: {error.strerror or error}; "
            "make room there, or set FASTDCGAN_CACHE to another folder"
        ) from None


def _shape(features: object) -> str:
    if isinstance(features, Tensor):
        return str(tuple(features.shape))
    return f"a {type(features).__name__}"
