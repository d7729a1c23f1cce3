"""Images of one class, drawn until there are enough that pass the screen; kept in files, so that a
stop loses nothing that is done. Not here: the screen's rules (screening.py)."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from fastdcgan.data import atomic_write
from fastdcgan.data.picture import Pixels
from fastdcgan.latent.draw import CHUNK, latents
from fastdcgan.synthetic_data.screening import BAD, COPY, KEPT, Screen

BATCH = 64
"""Images drawn and judged at a time; after the last that is needed no more are looked at."""
ENDLESS = 2**62


@dataclass(frozen=True, eq=False)
class Drawn:
    """What has been drawn of a class: the first images of a seed that passed."""

    images: Pixels = field(repr=False)
    """(kept, H, W, C)."""
    drawn: int
    """Images of the seed that were looked at, from its first on."""
    copies: int
    """Of these, copies of real images."""
    bad: int
    """Of these, rejected."""


def draw_passing(
    sample: Callable[[Tensor], Pixels],
    screen: Screen,
    begun: Drawn,
    *,
    n: int,
    most: int,
    nz: int,
    seed: int,
    advance: Callable[[int], object],
) -> Drawn:
    """Goes on where `begun` ended, to `n` images that pass, or to `most` that were looked at.

    Args:
        sample: latent vectors (B, nz, 1, 1) to images (B, H, W, C) uint8.
        screen: says which of them pass.
        seed: of the latent vectors, see `latent.draw.latents`.
        advance: is told how many more have passed.
    """
    kept, drawn, copies, bad = [begun.images], begun.drawn, begun.copies, begun.bad
    left = n - len(begun.images)
    for z in _latents_from(drawn, nz, seed):
        if left <= 0 or drawn >= most:
            break
        images = sample(z[: most - drawn])
        verdicts = screen.judge(images)
        passed = np.flatnonzero(verdicts == KEPT)[:left]
        if len(passed) == left:  # those after the last that is needed do not count
            verdicts = verdicts[: passed[-1] + 1]
        kept.append(images[passed])
        left -= len(passed)
        drawn += len(verdicts)
        copies += int((verdicts == COPY).sum())
        bad += int((verdicts == BAD).sum())
        advance(len(passed))
    return Drawn(np.concatenate(kept), drawn, copies, bad)


def _latents_from(start: int, nz: int, seed: int) -> Iterator[Tensor]:
    for index, chunk in enumerate(latents(ENDLESS, nz, seed=seed)):
        yield from (z for z in chunk[max(start - index * CHUNK, 0) :].split(BATCH) if len(z))


# ---- files ---------------------------------------------------------------------------------------


def begun_in(folder: Path, name: str, key: str, shape: tuple[int, ...]) -> Drawn:
    """What was drawn of a class under the same `key` before; nothing, where nothing was.

    Args:
        key: another one whenever other images would have been drawn.
        shape: of an image.
    """
    try:
        facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if facts["key"] == key:
            images: Pixels = np.load(folder / f"{name}.npy", mmap_mode="r")
            return Drawn(images, facts["drawn"], facts["copies"], facts["bad"])
    except (OSError, ValueError, KeyError):
        pass  # none, or damaged: drawn again
    return Drawn(np.empty((0, *shape), np.uint8), 0, 0, 0)


def keep(folder: Path, name: str, key: str, held: Drawn) -> None:
    """Writes what was drawn, for `begun_in`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"key": key, "drawn": held.drawn, "copies": held.copies, "bad": held.bad}
    (folder / f"{name}.json").unlink(missing_ok=True)  # it stands for images that are whole
    atomic_write(folder / f"{name}.npy", lambda file: np.save(file, held.images))
    atomic_write(folder / f"{name}.json", lambda file: file.write(json.dumps(facts).encode()))


def forget(folder: Path, names: Iterable[str]) -> None:
    """Removes what `keep` wrote, and the folder if nothing else is in it."""
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
        (folder / f"{name}.npy").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
