"""What each class is drawn from: a generator trained on its images alone, or one that knows all
classes by their names; trained here, or found in runs that are there. Not here: what is drawn
(drawing.py)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.data import Packed, atomic_write
from fastdcgan.data.picture import Pixels
from fastdcgan.errors import InputError, RunError
from fastdcgan.latent.draw import load_generator
from fastdcgan.metrics.features import centre
from fastdcgan.training.config import TrainConfig

WEIGHTS = ("netG", "netG_ema", "netD")
LENGTH = ("steps", "epochs", "max_minutes")
"""Fields that a resumed run may change, and by which it is done or not."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """The real images: what the generators learn, and what the synthetic ones are compared with."""

    packed: Packed
    labels: np.ndarray[Any, np.dtype[np.int64]]
    """(packed.n,) numbers of classes."""
    names: tuple[str, ...]
    """Of the classes, as the source has them."""
    classes: tuple[str, ...]
    """The same, fit for a folder's name."""

    def rows(self, label: int) -> np.ndarray[Any, Any]:
        """Which of the packed images are of that class."""
        return np.flatnonzero(self.labels == label)

    def images(self, label: int) -> Pixels:
        """(n, size, size, C), of that class."""
        return np.ascontiguousarray(centre(self.packed, self.rows(label)))


@dataclass(frozen=True)
class Origin:
    """Where the images of a class are drawn from."""

    run: Path
    label: int | None
    """The class's number among the generator's own; None: it draws nothing else."""


def names_for_folders(names: Sequence[str]) -> tuple[str, ...]:
    """The classes' names without what no folder's name can hold.

    Raises:
        InputError: two of them become the same.
    """
    safe = tuple(
        "".join(c if c.isalnum() or c in " ._-+" else "-" for c in name).strip(" .") or "class"
        for name in names
    )
    if len(set(safe)) < len(safe):
        raise InputError(
            f"the classes {', '.join(names)} cannot have a folder each: rename those that differ "
            "in signs only"
        )
    return safe


def require_enough(real: LabelledImages, least: int, why: str) -> None:
    """InputError where a class has fewer than `least` images."""
    counts = np.bincount(real.labels, minlength=len(real.classes))
    few = [f"{name} ({n})" for name, n in zip(real.classes, counts, strict=True) if n < least]
    if few:
        raise InputError(f"too few images of {', '.join(few)}: {why}")


# ---- trained -------------------------------------------------------------------------------------


def train_each(
    real: LabelledImages, config: TrainConfig, runs: Path, say: Callable[[str], None]
) -> list[Origin]:
    """Trains a generator for each class in runs/generators/NAME, on runs/data/NAME.npy; with
    `config.classes` one for all, in runs/generators/all. Goes on with what is there, and keeps what
    is done.

    Returns:
        What each class is drawn from.

    Raises:
        InputError: what is there was trained on other images, or otherwise.
        RunError: a run was stopped, or could not go on.
    """
    _same_images(real, runs)
    if config.classes:
        out = runs / "generators" / "all"
        _train(dataclasses.replace(config, out=out, resume="auto"), "all classes", say)
        return find([out], real)
    origins = []
    for label, name in enumerate(real.classes):
        data, out = (runs / "data" / f"{name}.npy").absolute(), runs / "generators" / name
        if not data.is_file():  # another file would be another source, packed anew
            data.parent.mkdir(exist_ok=True)
            atomic_write(data, partial(np.save, arr=real.images(label)))
        own = dataclasses.replace(
            config, data=str(data), channels=real.packed.channels, out=out, resume="auto",
            cache=runs / "cache",
        )  # fmt: skip
        _train(own, f"class {name}, {label + 1} of {len(real.classes)}", say)
        origins.append(Origin(out, None))
    return origins


def _same_images(real: LabelledImages, runs: Path) -> None:
    """Writes down what the generators in `runs` are trained on, or refuses other images."""
    path = runs / "images.json"
    labels = hashlib.sha256(real.labels.tobytes()).hexdigest()
    now = {"sha256": real.packed.sha256, "labels": labels, "classes": list(real.names)}
    if not path.is_file():
        atomic_write(path, lambda file: file.write(json.dumps(now, indent=2).encode()))
    elif json.loads(path.read_text(encoding="utf-8")) != now:
        raise InputError(
            f"the generators in {runs} were trained on other images than {real.packed.source} has "
            f"now at {real.packed.size} pixels: give another --runs, or remove {runs}"
        )


def _train(config: TrainConfig, title: str, say: Callable[[str], None]) -> None:
    from fastdcgan.training import train

    assert config.out is not None
    if _is_done(config, config.out):
        say(f"{title}: {config.out} is trained")
        return
    for name in WEIGHTS:  # of a shorter run, which a stop would leave beside newer checkpoints
        (config.out / f"{name}.safetensors").unlink(missing_ok=True)
    say(f"{title}: training")
    if train(config).interrupted:
        raise RunError(f"stopped while training {title}; the same command goes on")


def _is_done(config: TrainConfig, out: Path) -> bool:
    """Whether the run there has come to its end, as it is configured now."""
    if not (out / f"{WEIGHTS[-1]}.safetensors").is_file():
        return False
    before = TrainConfig.from_json((out / "config.json").read_text(encoding="utf-8"))
    now = dataclasses.replace(config, channels=before.channels)  # None: the data's, the same yet
    if config.instance_noise_steps is None:  # a run writes down what that came to
        now = dataclasses.replace(now, instance_noise_steps=before.instance_noise_steps)
    return not before.differences(now) and all(
        getattr(before, name) == getattr(now, name) for name in LENGTH
    )


# ---- found ---------------------------------------------------------------------------------------


def find(runs: Sequence[Path], real: LabelledImages) -> list[Origin]:
    """What each class is drawn from among these: the one run of a class-conditional generator, or a
    run for each class, matched by the names of their folders where these are the classes', else in
    the order of the classes.

    Raises:
        InputError: there are more or fewer of them than classes, or a class is unknown to it.
    """
    known = [load_generator(run).classes for run in runs]
    if len(runs) == 1 and known[0] is not None:
        missing = [name for name in real.names if name not in known[0]]
        if missing:
            raise InputError(f"{runs[0]} does not know of {', '.join(missing)}: give another run")
        return [Origin(runs[0], known[0].index(name)) for name in real.names]
    for run, classes in zip(runs, known, strict=True):
        if classes is not None:
            raise InputError(f"{run} draws {len(classes)} classes: give it alone as --from")
    if len(runs) != len(real.classes):
        raise InputError(
            f"--from was given {len(runs)} run{'s' * (len(runs) > 1)}, and there are "
            f"{len(real.classes)} classes ({', '.join(real.classes)}): give one run for each, or "
            "one that was trained with --classes"
        )
    named = {run.name: run for run in runs}
    if set(named) == set(real.classes):
        runs = [named[name] for name in real.classes]
    return [Origin(run, None) for run in runs]


def shape_of(runs: Sequence[Path]) -> tuple[int, int]:
    """(pixels on a side, channels) of what the runs draw.

    Raises:
        InputError: one is not there, or is no run; or they differ.
    """
    nets = [load_generator(run) for run in runs]
    for run, net in zip(runs, nets, strict=True):
        if (net.size, net.channels) != (nets[0].size, nets[0].channels):
            raise InputError(
                f"{run} draws images of {net.size} pixels and {net.channels} channels, {runs[0]} "
                f"of {nets[0].size} and {nets[0].channels}: give runs that draw alike"
            )
    return nets[0].size, nets[0].channels
