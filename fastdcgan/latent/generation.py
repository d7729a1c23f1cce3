"""What `generate` does with a trained generator: samples, walks and arithmetic, into files. The
parts are beside it (draw.py, interpolation.py, arithmetic.py, sheets.py) and in data/ (writers)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdcgan.data import writers
from fastdcgan.data.picture import Pixels, grid, save_image
from fastdcgan.data.video import SUFFIXES as VIDEO
from fastdcgan.data.video import save_video
from fastdcgan.errors import InputError
from fastdcgan.hardware import use_allowed_threads
from fastdcgan.latent.arithmetic import Group, combine, neighbourhood, parse_groups
from fastdcgan.latent.config import PICTURES, GenerateConfig
from fastdcgan.latent.draw import Sampler, fast_sampler, latents_numbered, load_generator
from fastdcgan.latent.interpolation import walk
from fastdcgan.latent.sheets import arithmetic_sheet, numbered_grid
from fastdcgan.progress import bar

LARGEST_SIDE = 16_383
"""Pixels on a side of a grid: what WebP holds, and more than most viewers open."""

Frames = Callable[[Pixels], None]


def generate(config: GenerateConfig, *, progress: bool = True) -> list[str]:
    """Draws what `config` says into its files; returns a line on each.

    Args:
        config: see its fields.
        progress: show a bar where stderr is a terminal.

    Raises:
        InputError: something cannot be: the message says what, why, and what to do.
    """
    config.validate()
    walked = None if config.interpolate is None else _numbers(config.interpolate)
    groups = None if config.arithmetic is None else parse_groups(config.arithmetic)
    _refuse_taken(config)
    use_allowed_threads()
    net = load_generator(config.source, ema=config.ema, device=config.device)
    n = config.n if walked is None else _legs(config, walked) * _steps(config) + (not config.loop)
    _refuse_huge(config, n, net.size)
    label = _label(config, net.classes)
    sampler = fast_sampler(net, amp=config.amp)
    try:
        if groups is not None:
            return _draw_sheet(sampler, config, groups, label)
        if walked is not None:
            keys = _latents(sampler, config, walked)
            way = walk(keys, _steps(config), curve=config.curve, loop=config.loop)
            images = sampler.pixels(way.split(config.batch_size), labels=_labels(label, len(way)))
        else:
            images = sampler.draw(
                n,
                labels=_labels(label, n),
                seed=config.seed,
                truncation=config.truncation,
                truncate=config.truncate,
                statistics=config.statistics,
                batch_size=config.batch_size,
            )
        with ExitStack() as files:
            takers = [files.enter_context(writer) for writer in _writers(config, n)]
            advance = files.enter_context(bar("images", n, shown=progress))
            for batch in images:
                for take in takers:
                    take(batch)
                advance(len(batch))
    except OSError as error:
        wrong = error.filename or config.out or config.each
        raise InputError(f"cannot write {wrong}: {error.strerror or error}") from None
    return [f"{n:,} images in {path}" for path in (config.each, config.out) if path is not None]


def _label(config: GenerateConfig, classes: tuple[str, ...] | None) -> int | None:
    """The class that is asked for; None: each in turn, or the net has none."""
    if config.label is None:
        if classes is not None and (config.interpolate or config.arithmetic):
            raise InputError(
                f"{config.source} draws by class: give --label, one of {', '.join(classes)}"
            )
        return None
    if classes is None:
        raise InputError(
            f"--label {config.label} was given, and {config.source} knows no classes: leave it "
            "out, or train with --classes"
        )
    if config.label in classes:
        return classes.index(config.label)
    if config.label.isdecimal() and int(config.label) < len(classes):
        return int(config.label)
    raise InputError(
        f"--label {config.label} was given; {config.source} has the classes {', '.join(classes)} "
        f"(or their numbers, 0 to {len(classes) - 1})"
    )


def _labels(label: int | None, n: int) -> Tensor | None:
    return None if label is None else torch.full((n,), label)


def _draw_sheet(
    sampler: Sampler, config: GenerateConfig, groups: Sequence[Group], label: int | None
) -> list[str]:
    assert config.out is not None
    parts = [_latents(sampler, config, group.numbers) for group in groups]
    means, result = combine(groups, parts)
    around = neighbourhood(result, config.seed)
    batches = [*parts, means, around]
    labels = _labels(label, sum(map(len, batches)))
    *drawn, centre, results = sampler.pixels(batches, labels=labels)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_image(config.out, arithmetic_sheet(groups, drawn, centre, results))
    return [f"arithmetic with {sum(map(len, parts))} samples in {config.out}"]


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if len(words) < 2 or not all(word.isdecimal() for word in words):
        raise InputError(
            f'--interpolate "{text}" was given; give the numbers of two samples or more, as '
            '"3,17,5" (--numbered shows them)'
        )
    return [int(word) for word in words]


def _latents(sampler: Sampler, config: GenerateConfig, numbers: Sequence[int]) -> Tensor:
    return latents_numbered(
        numbers,
        sampler.net.nz,
        seed=config.seed,
        truncation=config.truncation,
        truncate=config.truncate,
    )


def _is_picture(config: GenerateConfig) -> bool:
    return config.out is not None and config.out.suffix.lower() in PICTURES


def _steps(config: GenerateConfig) -> int:
    return config.frames or (8 if _is_picture(config) else 48)


def _legs(config: GenerateConfig, numbers: Sequence[int]) -> int:
    return len(numbers) - (not config.loop)


def _refuse_taken(config: GenerateConfig) -> None:
    out, each = config.out, config.each
    taken = [] if out is None else writers.shards(out)
    if each is not None and each.exists() and (each.is_file() or any(each.iterdir())):
        taken.append(each)
    if taken and not config.force:
        raise InputError(f"{taken[0]} exists already: choose another name, or --force")


def _refuse_huge(config: GenerateConfig, n: int, size: int) -> None:
    columns = ceil(sqrt(n)) if config.interpolate is None else _steps(config) + 1
    side = (max(columns, ceil(n / columns)) + 1) * (size + (20 if config.numbered else 2))
    if _is_picture(config) and side > LARGEST_SIDE:
        raise InputError(
            f"a picture of {n:,} images is more than {LARGEST_SIDE:,} pixels wide: give --each "
            "FOLDER, or --out with .npz, .zip or .tar at its end"
        )


def _writers(config: GenerateConfig, n: int) -> Iterator[AbstractContextManager[Frames]]:
    if config.each is not None:
        yield writers.single_files(config.each)
    if config.out is None:
        return
    config.out.parent.mkdir(parents=True, exist_ok=True)
    suffix = config.out.suffix.lower()
    if suffix == ".npz":
        yield writers.array(config.out, n)
    elif suffix in writers.ARCHIVES:
        yield writers.archives(config.out, config.shard)
    else:
        yield _together(config, config.out)


@contextmanager
def _together(config: GenerateConfig, out: Path) -> Iterator[Frames]:
    """What is one picture, still or moving, is written when all is there."""
    kept: list[Pixels] = []
    yield kept.append
    images = np.concatenate(kept)
    if out.suffix.lower() in VIDEO:
        save_video(out, images, config.fps, config.scale)
    elif config.interpolate is not None:
        steps = _steps(config)
        starts = range(0, len(images) - (not config.loop), steps)
        rows = [images[np.arange(start, start + steps + 1) % len(images)] for start in starts]
        save_image(out, grid(np.concatenate(rows), columns=steps + 1))
    elif config.numbered:
        save_image(out, numbered_grid(images))
    else:
        save_image(out, grid(images))
