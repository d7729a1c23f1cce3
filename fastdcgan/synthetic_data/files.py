"""A synthetic set as files that classifiers' loaders read, beside its manifest.json: a folder that
is there when all of it is. Not here: which images they are (drawing.py)."""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdcgan.data import atomic_write, writers
from fastdcgan.data.picture import Pixels
from fastdcgan.errors import InputError

MANIFEST = "manifest.json"
CHUNK = 256  # images in memory at a time
SHUFFLE = 0x7AB
"""Seed of the order in shards; it has nothing to do with what is drawn."""

Kind = Literal["folder", "npz", "webdataset"]


def refuse_taken(out: Path, *, force: bool) -> None:
    """InputError where `out` is there already, or, with `force`, is something else than a set of
    ours; or where nothing can be written there."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not force:
        raise InputError(f"{out} exists already: choose another name, or --force")
    if out.exists() and not _is_set(out):
        raise InputError(f"{out} is no set of this command (by its {MANIFEST}): not replaced")


def _is_set(out: Path) -> bool:
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"per_class", "counts", "source"} <= found.keys()


def write_set(
    out: Path,
    kind: Kind,
    images: Sequence[Pixels],
    classes: Sequence[str],
    manifest: dict[str, Any],
    *,
    shard: int,
    advance: Callable[[int], object],
) -> None:
    """Writes the set beside `out` and gives it that name; a set of ours that is there goes.

    Args:
        kind: folder: CLASS/000000.png and on. npz: images.npz with images, labels, classes.
            webdataset: 000000.tar and on, NNNNNN.png and NNNNNN.cls (the class's number) in it, in
            an order that mixes the classes.
        images: of each class (n, H, W, C); maps of files will do.
        classes: their names.
        shard: images in one .tar.
        advance: is told how many more are written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.iterdir():  # of a process that was killed
        if stale.name.startswith(f".{out.name}.") and stale.name.endswith(".set.tmp"):
            shutil.rmtree(stale)
    beside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.set.tmp")
    try:
        (beside / "new").mkdir(parents=True)
        for writer, batches in _parts(beside / "new", kind, images, classes, shard):
            with writer as add:
                for batch in batches:
                    add(batch)
                    advance(len(batch))
        text = json.dumps(manifest, indent=2) + "\n"
        atomic_write(beside / "new" / MANIFEST, lambda file: file.write(text.encode()))
        if out.exists():
            out.rename(beside / "old")
        (beside / "new").rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _parts(
    folder: Path, kind: Kind, images: Sequence[Pixels], classes: Sequence[str], shard: int
) -> Iterator[tuple[AbstractContextManager[writers.Add], Iterator[Pixels]]]:
    """What writes, and what it is to write."""
    counts = [len(some) for some in images]
    labels = np.repeat(np.arange(len(classes)), counts)
    if kind == "folder":
        for name, some in zip(classes, images, strict=True):
            yield writers.single_files(folder / name), _in_chunks(some)
    elif kind == "npz":
        others = {"labels": labels, "classes": np.array(classes)}
        yield (
            writers.array(folder / "images.npz", len(labels), others),
            (chunk for some in images for chunk in _in_chunks(some)),
        )
    else:
        order = np.random.default_rng(SHUFFLE).permutation(len(labels))
        within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield (
            writers.archives(
                folder / "%06d.tar", shard, lambda index: {".cls": f"{labels[order[index]]}"}
            ),
            (
                np.stack([images[labels[i]][within[i]] for i in order[start : start + CHUNK]])
                for start in range(0, len(order), CHUNK)
            ),
        )


def _in_chunks(images: Pixels) -> Iterator[Pixels]:
    for start in range(0, len(images), CHUNK):
        yield images[start : start + CHUNK]
