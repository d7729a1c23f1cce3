"""Fakes beside real images: which images of each, through one network of features, to one report.

Not here: the formulas (scores.py), the networks (networks.py), the command line (evaluate.py).
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from fastdcgan.data import open_source, prepare, save_image
from fastdcgan.data.outputs import check_picture
from fastdcgan.data.picture import Pixels
from fastdcgan.data.sources import Source
from fastdcgan.errors import InputError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.latent.draw import draw, load_discriminator, load_generator
from fastdcgan.metrics.comparison import Comparison, compare, first_of
from fastdcgan.metrics.features import chunks
from fastdcgan.metrics.neighbours import SAMPLES, neighbour_sheet
from fastdcgan.metrics.networks import load_network
from fastdcgan.metrics.scores import NEAREST
from fastdcgan.progress import bar

if TYPE_CHECKING:
    from fastdcgan.metrics.modes import Modes
    from fastdcgan.metrics.probe import Probe

RUN_FILES = ("netG.safetensors", "netG_ema.safetensors", "checkpoints", "metrics.jsonl")
"""A folder with any of them is a run and no folder of pictures, though it has pictures in it."""

_TITLES = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "spectrum_db": "spectrum, dB",
    "peak": "peak of a grid",
}
_OF_PIXELS = ("spectrum_db", "peak")
"""By no network of features."""


@dataclass(frozen=True)
class Report:
    """What `evaluate` returns: numbers, and where they come from."""

    comparison: Comparison
    facts: dict[str, Any]
    """The two sets, in words and numbers."""
    probe: "Probe | None" = None
    modes: "Modes | None" = None

    def to_json(self) -> str:
        """One object: each score, its floor as NAME_floor, n, features, and `facts`."""
        found = {**self.comparison.numbers(), **self.facts}
        if self.probe is not None:
            found |= {f"probe_{name}": x for name, x in dataclasses.asdict(self.probe).items()}
        if self.modes is not None:
            held = self.modes
            found |= {"modes": held.modes, "modes_kl": held.kl, "modes_accuracy": held.accuracy}
        return json.dumps(found)

    def lines(self) -> Iterator[str]:
        """The same for people: a line on each set, then a table."""
        held = self.comparison
        yield f"real  {self.facts['real']}"
        yield f"fake  {self.facts['fake']}"
        yield ""
        yield f"{f'n = {held.n:,}':24}{'fake':>12}{'real':>12}"
        numbers = held.numbers()
        for name, title in _TITLES.items():
            by = "" if name in _OF_PIXELS else f"[{held.features}]"
            value, floor = numbers[name], numbers[f"{name}_floor"]
            yield f"{title + by:24}{_number(value):>12}{_number(floor):>12}"
        if self.probe is not None:
            yield ""
            yield from self.probe.lines()
        if self.modes is not None:
            yield ""
            yield from self.modes.lines()


def evaluate(
    real: str,
    fake: str,
    *,
    n: int = 10_000,
    features: str | Path | nn.Module = "lite0",
    image_size: int | None = None,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    statistics: Literal["running", "batch"] = "running",
    ema: bool = True,
    neighbours: Path | None = None,
    probe: str | None = None,
    modes: bool = False,
    device: str = "auto",
    cache: Path | None = None,
    progress: bool = True,
) -> Report:
    """Scores what `fake` names beside what `real` names.

    Args:
        real: a source of images, see `open_source`; decoded to the size and channels of the fakes.
        fake: a run, a generator's file, or another source of images.
        n: images of each set; fewer where the real set does not have twice as many, or the fakes
            are fewer.
        features: see `load_network`.
        image_size: pixels on a side, where the fakes are files; None: what the first of them has.
        split: of the real images.
        seed, statistics, ema: how fakes are drawn, see `draw` and `load_generator`.
        neighbours: a picture to write: samples beside their nearest real images.
        probe: a labelled source: how well the features of the run's discriminator separate its
            classes, see `probe.probe`.
        modes: count the modes of stacked-mnist in the fakes, see `modes.count_modes`.
        device: where features are computed, see `pick_device`.
        cache: see `prepare`.
        progress: show a bar where stderr is a terminal, and say on stderr what is done.

    Raises:
        InputError: something of this is not there, cannot be read, or does not fit.
    """
    if n <= NEAREST:
        raise InputError(f"--n {n} was given; scores need at least {NEAREST + 1} images")
    use_allowed_threads()
    place = pick_device(device)
    fakes = _open_fakes(fake, image_size, seed, statistics, ema, place, cache, progress)
    if modes:
        from fastdcgan.metrics.modes import count_modes, require

        require(fakes.size, fakes.channels)
    network = load_network(features, place)
    packed = prepare(
        real, size=fakes.size, channels=fakes.channels, split=split, cache=cache, progress=progress
    )
    asked, n = n, min(n, packed.n // 2, fakes.count or n)
    if n <= NEAREST:
        raise InputError(
            f"{packed.n:,} real images and {fakes.count or 'any number of'} fakes are too few: "
            f"give at least {2 * (NEAREST + 1)} and {NEAREST + 1}"
        )
    own = open_source(real, split=split, cache=cache).channels
    if progress and own != packed.channels:
        _say(
            f"{real} has images of {own} channels: compared as {packed.channels}, like the fakes "
            f"(1 grey, 2 grey and alpha, 3 RGB, 4 RGBA)"
        )
    if progress and n < asked:
        _say(
            f"n is {n:,}, not {asked:,}: there are {packed.n:,} real images, and the floor takes "
            "as many again as the score" + (f"; {fakes.count:,} fakes" if fakes.count else "")
        )
    if neighbours is not None:
        check_picture(neighbours, force=True)
    probed = None
    if probe is not None:
        from fastdcgan.metrics.probe import probe as run_probe

        netD = load_discriminator(Path(fake), device=str(place))
        probed = run_probe(netD, probe, n=asked, seed=seed, cache=cache)
    sample: list[Pixels] = []
    with bar(f"features by {network.name}", 3 * n, shown=progress) as advance:
        found = compare(
            packed,
            first_of(fakes.images(n), SAMPLES, sample),
            n,
            network,
            place,
            cache=cache,
            advance=advance,
        )
    if neighbours is not None:
        sheet = neighbour_sheet(
            np.concatenate(sample)[:SAMPLES], found.fake[:SAMPLES], *found.real, packed
        )
        try:
            save_image(neighbours, sheet)
        except OSError as error:
            raise InputError(f"cannot write {neighbours}: {error.strerror or error}") from None
    side = f"{fakes.size}x{fakes.size}x{fakes.channels}"
    facts = {
        "real": f"{packed.source} ({split}): {n:,} + {n:,} of {packed.n:,} images, {side}",
        "fake": f"{fakes.described}: {n:,} images, {side}",
        "image_size": fakes.size,
        "channels": fakes.channels,
        "seed": seed,
        "real_sha256": packed.sha256,
    }
    counted = count_modes(fakes.images(n)) if modes else None
    return Report(found, facts, probed, counted)


# ---- fakes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fakes:
    images: Callable[[int], Iterable[Pixels]]
    size: int
    channels: int
    count: int | None
    described: str


def _open_fakes(
    spec: str,
    image_size: int | None,
    seed: int,
    statistics: Literal["running", "batch"],
    ema: bool,
    device: torch.device,
    cache: Path | None,
    progress: bool,
) -> _Fakes:
    path = Path(spec)
    is_run = any((path / part).exists() for part in RUN_FILES)
    if is_run or path.suffix in (".safetensors", ".pt", ".pth"):
        net = load_generator(path, ema=ema, device=str(device))
        if image_size not in (None, net.size):
            raise InputError(
                f"--image-size {image_size} was given; {spec} makes images of {net.size} pixels"
            )
        return _Fakes(
            lambda n: draw(net, n, seed=seed, statistics=statistics),
            net.size,
            net.channels,
            None,
            f"{spec} (seed {seed})",
        )
    try:
        source = open_source(spec, cache=cache)
    except InputError as error:
        raise InputError(f"--fake {spec} is neither a run nor images: {error}") from None
    packed = prepare(spec, size=image_size or _side(source), cache=cache, progress=progress)

    def some(n: int) -> Iterable[Pixels]:
        # Not drawn as the real images are: of one source they would be the very same ones.
        rows = np.random.default_rng([seed, 1]).permutation(packed.n)[:n]
        return chunks(packed, rows)

    return _Fakes(some, packed.size, packed.channels, packed.n, spec)


def _side(source: Source) -> int:
    """Pixels on the shorter side of the source's first picture that can be decoded."""
    from PIL import Image

    if source.margin:
        return 64  # it has no size of its own
    for _, read in source.items(1):
        try:
            picture = read()
            if isinstance(picture, bytes):
                import io

                picture = Image.open(io.BytesIO(picture))
            if isinstance(picture, Image.Image):
                return int(min(picture.size))
            return int(min(picture.shape[:2]))
        except Exception:  # a damaged file; preparing the source will name it
            continue
    raise InputError(f"none of the images of {source.location} can be decoded")


# ---- what is kept, and what is shown -------------------------------------------------------------


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
