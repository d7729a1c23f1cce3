"""`n` fakes beside `n` real images, and these beside `n` others: all scores and their floors. Not
here: where fakes come from (evaluation.py), the formulas (scores.py, spectrum.py)."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdcgan.data import Packed
from fastdcgan.data.picture import Pixels
from fastdcgan.errors import InputError
from fastdcgan.metrics.features import (
    Advance,
    chunks,
    entry_of,
    extract,
    keep,
    nothing,
    real_features,
)
from fastdcgan.metrics.networks import FeatureNetwork
from fastdcgan.metrics.scores import NEAREST, Scores, score
from fastdcgan.metrics.spectrum import IMAGES, Texture, power_spectrum, texture

FLOOR_RULE = 1
"""Stands in the cache's key of a floor: change it whenever scores.py would give another one."""


@dataclass(frozen=True)
class Comparison:
    """`n` fakes beside `n` real images."""

    scores: Scores
    floor: Scores
    """What `n` other real images score in the fakes' place: no generator can expect better."""
    texture: Texture
    """By the first `spectrum.IMAGES` of each set."""
    texture_floor: Texture
    n: int
    features: str
    """The network's name."""
    real: tuple[Tensor, np.ndarray[Any, Any]] = dataclasses.field(repr=False)
    """Features (2n, D) of the real images, first those of the scores, then those of the floor; and
    which rows of the packed images they are."""
    fake: Tensor = dataclasses.field(repr=False)
    """Features (n, D) of the fakes."""

    def numbers(self) -> dict[str, Any]:
        """Each score, its floor as NAME_floor, n, features (the network's name) and nearest."""
        found = {**dataclasses.asdict(self.scores), **dataclasses.asdict(self.texture)}
        floor = {**dataclasses.asdict(self.floor), **dataclasses.asdict(self.texture_floor)}
        floors = {f"{name}_floor": x for name, x in floor.items()}
        held = {"n": self.n, "features": self.features, "nearest": NEAREST}
        return {**found, **floors, **held}


def compare(
    packed: Packed,
    fakes: Iterable[Pixels],
    n: int,
    network: FeatureNetwork,
    device: torch.device,
    *,
    cache: Path | None = None,
    advance: Advance = nothing,
) -> Comparison:
    """Scores `n` fakes beside `n` of the packed images, and other `n` of these beside the same.

    Args:
        packed: real images, at least 2n.
        fakes: n images in chunks (m, H, W, C) uint8, as `draw` gives them; H and W as in `packed`.
        n: at least 6.
        network: from `load_network`, on `device`.
        cache: as in `prepare`: features and floor of the real images are kept there.
        advance: is told how many of the 3n images are done.

    Raises:
        InputError: there are too few images, or the `metrics` extra is not installed.
    """
    if 2 * n > packed.n or n <= NEAREST:
        raise InputError(
            f"{packed.source} has {packed.n:,} images: too few for n = {n:,}, which takes two "
            f"halves of {max(n, NEAREST + 1):,}; give more images, or a smaller --n"
            if n > NEAREST
            else f"n = {n} is too few: scores need at least {NEAREST + 1} images of each set"
        )
    real, rows = real_features(packed, 2 * n, network, device, cache=cache, advance=advance)
    shown: list[Pixels] = []
    fake = extract(first_of(fakes, IMAGES, shown), network, device, advance)
    place = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
    classifier = network.classifier
    if classifier is not None and device != place:
        classifier = deepcopy(classifier).to(place)
    first, second = real[:n].to(place), real[n:].to(place)
    floor = _floor(packed, network, n, cache, lambda: score(first, second, classifier))
    scores = score(first, fake.to(place), classifier)
    spectra = [power_spectrum(chunks(packed, each)) for each in (rows[:n], rows[n:])]
    textures = texture(spectra[0], power_spectrum(shown)), texture(*spectra)
    return Comparison(scores, floor, *textures, n, network.name, (real, rows), fake)


def first_of(images: Iterable[Pixels], count: int, into: list[Pixels]) -> Iterator[Pixels]:
    """The same chunks; the first `count` images of them are kept in `into`."""
    missing = count
    for chunk in images:
        if missing > 0:
            into.append(chunk[:missing])
            missing -= len(chunk)
        yield chunk


def _floor(
    packed: Packed,
    network: FeatureNetwork,
    n: int,
    cache: Path | None,
    compute: Callable[[], Scores],
) -> Scores:
    """The floor, from the cache if it is there."""
    entry = entry_of(packed, network, cache)
    if entry is None:
        return compute()
    path = entry.with_suffix(f".floor{FLOOR_RULE}-{n}.json")
    try:
        return Scores(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        floor = compute()
        keep(path, json.dumps(dataclasses.asdict(floor)).encode())
        return floor
