"""Everything that the page asks of a run, as pixels and numbers, one call at a time. Not here: the
page itself (page.py), which does not know a net."""

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdcgan.data.decode import decode
from fastdcgan.data.picture import Pixels
from fastdcgan.data.selection import select
from fastdcgan.errors import InputError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.inpainting.filling import Filled, fill
from fastdcgan.inpainting.masks import Bools, Mask, contextual_weights
from fastdcgan.latent.directions import principal_directions
from fastdcgan.latent.draw import (
    Discriminator,
    fast_sampler,
    latents_numbered,
    load_discriminator,
    load_generator_at,
)
from fastdcgan.latent.interpolation import walk
from fastdcgan.latent.projection import Advance, nobody, precision, rounds

DIRECTIONS = 6
"""That the page has sliders for: each that follows changes less."""

LIMITS = {"seed": (0, 2**53 - 1), "number": (0, 9999), "n": (1, 256), "steps": (1, 60)}
"""The least and the most of what can be asked for; a browser's integers end at 2^53."""

PICTURES = 64
"""Of the source of images to fill."""


@dataclass(frozen=True)
class Sample:
    """One image of a generator, by the numbers that `generate` knows it by."""

    seed: int = 0
    number: int = 0


@dataclass(eq=False)
class Studio:
    """A run's nets, and what can be done with them. Threads may share one: the nets are used by one
    of them at a time.

    Raises:
        InputError: there is no such run, device or source of images.
    """

    source: Path
    """As `load_generator` takes it."""
    images: str | None = None
    """The source of images to fill, as `select` takes it; None: the data that the run names, else
    samples."""
    amp: bool = False
    """16-bit products where the device has them."""
    ema: bool = True
    """Prefer the averaged generator."""
    device: str = "auto"
    """As `pick_device` takes it."""
    cache: Path | None = None
    """Of packed images."""
    folder: Path | None = field(init=False)
    """The run's, where there is one: `source`, or the folder that `source` is in."""

    def __post_init__(self) -> None:
        use_allowed_threads()
        self._lock = threading.Lock()
        self._device = pick_device(self.device)
        self.folder = _run_folder(self.source)
        self._load()
        self._pictures: Pixels | None = None
        if self.images is not None:
            self._pictures = self._select(self.images)

    # ---- the run ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The run's, for people."""
        return (self.folder or self.source).resolve().name

    def facts(self) -> str:
        """One line on the generator that is shown."""
        net, side = self._sampler.net, self._sampler.net.size
        count = sum(parameter.numel() for parameter in net.parameters())
        colours = {1: "grey", 2: "grey with alpha", 3: "colour", 4: "colour with alpha"}
        step = [] if self.step is None else [f"step {self.step:,}"]
        sizes = [f"{side} × {side} pixels", colours[net.channels], f"{count / 1e6:.1f} M weights"]
        return " · ".join([*step, *sizes, str(self._device)])

    def refresh(self) -> None:
        """Takes the run's newest generator, where it is a newer one than that of the last call. One
        that cannot be read is left for the next time."""
        with self._lock:
            if _stamp(self.source) != self._stamp:
                try:
                    self._load()
                except InputError as error:
                    print(f"{error}; going on with step {self.step}", file=sys.stderr)

    def _load(self) -> None:
        self._stamp = _stamp(self.source)
        net, self.step = load_generator_at(self.source, ema=self.ema, device=str(self._device))
        if net.classes is not None:
            raise InputError(
                f"{self.source} draws by class (--classes), which the page has no choice for: give "
                "a run without classes, or use fastdcgan.generate --label"
            )
        self.directions = principal_directions(net, min(DIRECTIONS, net.nz))
        self._sampler = fast_sampler(net, amp=self.amp)
        self._netD: Discriminator | None
        try:
            self._netD = load_discriminator(self.folder or self.source, device=str(self._device))
        except InputError:
            self._netD = None  # filling does without its opinion

    # ---- samples ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Pixels on a side of an image."""
        return self._sampler.net.size

    def draw(self, seed: int, n: int, truncation: float) -> Pixels:
        """The first `n` images of a seed, z times `truncation`: (n, H, W, C)."""
        _check(seed=seed, n=n)
        with self._lock:
            drawn = self._sampler.draw(n, seed=seed, truncation=truncation, truncate="scale")
            return np.concatenate(list(drawn))

    def move(self, sample: Sample, amounts: Sequence[float]) -> Pixels:
        """The sample, and the one that lies `amounts` standard deviations along the directions:
        (2, H, W, C)."""
        with self._lock:
            z = self._latent(sample)
            along = (
                torch.tensor(amounts, dtype=torch.float32) @ self.directions.vectors[: len(amounts)]
            )
            return self._pixels(torch.cat([z, z + along]))

    def walk(self, start: Sample, end: Sample, steps: int) -> Pixels:
        """From one sample to another on the sphere: (steps + 1, H, W, C)."""
        _check(steps=steps)
        with self._lock:
            return self._pixels(walk(torch.cat([*map(self._latent, (start, end))]), steps))

    def _latent(self, sample: Sample) -> torch.Tensor:
        _check(seed=sample.seed, number=sample.number)
        return latents_numbered([sample.number], self._sampler.net.nz, seed=sample.seed)

    def _pixels(self, z: torch.Tensor) -> Pixels:
        (pixels,) = self._sampler.pixels([z])
        return pixels

    # ---- filling ---------------------------------------------------------------------------------

    def picture(self, number: int) -> Pixels:
        """An image to fill, (H, W, C): of the source of images, over and over; a sample of this
        number where the run names none, or none that is still there."""
        if self._pictures is None:
            try:
                self._pictures = self._select(_data(self.folder))
            except InputError as error:
                print(f"samples are shown to be filled: {error}", file=sys.stderr)
                self._pictures = self.draw(0, PICTURES, 1.0)
        one: Pixels = self._pictures[number % len(self._pictures)]
        return one

    def _select(self, spec: str) -> Pixels:
        net = self._sampler.net
        return select(
            spec, size=net.size, channels=net.channels, n=PICTURES, cache=self.cache
        ).images

    def prepare(self, background: Pixels, painted: Sequence[Pixels]) -> tuple[Pixels, Bools]:
        """A picture of any size and what is painted on it, as image and hole of the run's size.

        Args:
            background: (H, W, C). One whose pixels were each enlarged to a square comes back as it
                was; any other is cut and shrunk as for training.
            painted: layers (H, W, 4); what any of them covers at least half is hidden.

        Raises:
            InputError: nothing is painted, or everything.
        """
        side, channels = self.size, self._sampler.net.channels
        covered = np.zeros(background.shape[:2], np.uint8)
        for layer in painted:
            covered = np.maximum(covered, layer[..., 3])
        hole = decode(covered, side, 1)[..., 0] >= 128
        if not hole.any() or hole.all():
            raise InputError(
                "paint over the part that is to be filled"
                if not hole.any()
                else "everything is painted over: leave something to be seen"
            )
        factor = max(1, len(background) // side)
        small = background[::factor, ::factor]
        as_it_was = small.repeat(factor, 0).repeat(factor, 1)
        return decode(small if np.array_equal(as_it_was, background) else background, side,
                      channels), hole  # fmt: skip

    def fill(
        self, image: Pixels, hole: Bools, *, steps: int, seed: int, advance: Advance = nobody
    ) -> Filled:
        """Fills the hole of one image (H, W, C), see `filling.fill`; `advance` is told how many
        more of `self.rounds(steps)` are done."""
        _check(seed=seed)
        mask = Mask("painted", hole, contextual_weights(hole))
        with self._lock:
            say = partial(print, file=sys.stderr)
            return fill(
                self._sampler.net, self._netD, image[None], mask, steps=steps, seed=seed,
                autocast=precision(self._device, say) if self.amp else None, advance=advance,
            )  # fmt: skip

    @staticmethod
    def rounds(steps: int) -> int:
        """How often `fill` tells `advance`."""
        return rounds(1, restarts=8, steps=steps, batch=256)


def _check(**given: int) -> None:
    for name, value in given.items():
        least, most = LIMITS[name]
        if not least <= value <= most:
            raise InputError(f"{name} {value:,} was given; it must be from {least} to {most:,}")


def _run_folder(source: Path) -> Path | None:
    """Where the run's config.json is: a file of the run may be in its folder or one below."""
    around = (source, *source.resolve().parents[:2])
    return next((folder for folder in around if (folder / "config.json").is_file()), None)


def _data(folder: Path | None) -> str:
    """What the run was trained on."""
    if folder is None:
        raise InputError("no run, so no data of one")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config.get("data"), str):
        raise InputError(f"{folder / 'config.json'} names no data")
    return str(config["data"])


def _stamp(source: Path) -> set[tuple[Path, int]]:
    """Changes when a generator is written."""
    if not source.is_dir():
        return set()
    files = [*source.glob("*.safetensors"), *(source / "checkpoints").glob("step-*.pt")]
    return {(path, path.stat().st_mtime_ns) for path in files if path.exists()}
