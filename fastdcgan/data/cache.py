"""Decoded images kept on disk as one memory-mapped array: packed once, then opened at once.

Not here: how one picture is decoded (decode.py), how batches are drawn from the array (feeds.py).
"""

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from fastdcgan.data.sources import Item, Source, cache_folder, open_source
from fastdcgan.errors import InputError

Broken: TypeAlias = tuple[str, str]  # an item's label, and why it could not be decoded

FORMAT = 1  # of an entry: change it when a file of the entry, or what a source gives, changes
IMAGES, MANIFEST, SKIPPED = "images.u8", "manifest.json", "skipped.txt"
CHUNK = 16  # items a task of the pool: amortises its cost where images are as small as MNIST's


@dataclass(frozen=True, eq=False)
class Packed:
    """Images of one source, decoded to one size: an entry of the cache."""

    path: Path
    """The entry's folder."""
    images: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    """(n, window, window, channels), mapped copy-on-write: the file never changes."""
    source: str
    """As the user named it."""
    location: str
    """Absolute: which source that was."""
    name: str
    """Short, fit for the name of a run's folder."""
    split: str
    """"train" or "test"."""
    size: int
    """Pixels on a side of a training image."""
    window: int
    """Pixels on a side of a packed image: `size`, and more where crops are drawn from it."""
    channels: int
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGBA."""
    rule: str
    """How pictures were made square."""
    n: int
    """Packed images."""
    epoch_images: int
    """Images in an epoch of training; more than n where an epoch draws several crops of each."""
    hflip: bool
    """Whether a mirrored image is as good as the image."""
    fingerprint: str
    """Of the source when it was packed."""
    sha256: str
    """Of the packed bytes."""
    skipped: int
    """Items that could not be decoded; skipped.txt in `path` lists them with the reasons."""

    @property
    def nbytes(self) -> int:
        """Bytes of all packed images."""
        return self.images.nbytes


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source before anything is decoded."""

    name: str
    """Short, fit for the name of a run's folder."""
    count: int | None
    """Items, broken ones included; None where only reading them all would tell."""
    channels: int
    """What its images have of themselves."""
    epoch_images: int | None
    """Images in an epoch of training, if none is broken; None if unknown."""
    hflip: bool
    """Whether a mirrored image is as good as the image."""


def inspect_source(spec: str, *, split: str = "train", cache: Path | None = None) -> SourceFacts:
    """What `prepare` would pack, without packing, downloading or writing anything.

    Args and Raises: as `open_source`.
    """
    source = open_source(spec, split=split, cache=cache)
    epoch_images = source.count if source.epoch_images is None else source.epoch_images
    return SourceFacts(source.name, source.count, source.channels, epoch_images, source.hflip)


def prepare(
    spec: str,
    *,
    size: int,
    channels: int | None = None,
    split: str = "train",
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Packed:
    """The source's images, from the cache if it has them, else decoded and put there.

    Several processes may ask for the same at once: one packs, the others wait and open it. A
    process that is killed leaves nothing that looks finished.

    Args:
        spec: where the images come from, see `open_source`.
        size: pixels on a side of a training image.
        channels: 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; None: what the source has.
        split: "train" or "test".
        cache: the cache's folder; None: $FASTDCGAN_CACHE, else $XDG_CACHE_HOME/fastdcgan, else
            ~/.cache/fastdcgan.
        workers: threads that decode; None: one a CPU of this process, at most 32.
        progress: show a bar where stderr is a terminal, and say on stderr what was packed.

    Raises:
        InputError: where the source cannot be used (see `open_source`), none of its items can be
            decoded, or the cache cannot be written.
    """
    if size < 1:
        raise InputError(f"images of {size} pixels: give a size of at least 1")
    if channels not in (None, 1, 2, 3, 4):
        raise InputError(f"images of {channels} channels: give 1, 2, 3 or 4")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers: give at least 1, or none to use every CPU")
    from fastdcgan.data.decode import RULE  # loads Pillow, which packed images do not need

    source = open_source(spec, split=split, cache=cache)
    facts: dict[str, Any] = {
        "source": spec,
        "location": source.location,
        "name": source.name,
        "split": split,
        "size": size,
        "window": size + source.margin,
        "channels": source.channels if channels is None else channels,
        "rule": RULE,
        "hflip": source.hflip,
        "fingerprint": source.fingerprint,
    }
    key = [facts[part] for part in ("location", "split", "size", "channels", "rule")]
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
    folder = cache_folder(cache)
    entry = folder / f"{source.name}-{size}-{digest[:12]}"
    packed = _open(entry)
    if packed is not None and packed.fingerprint == source.fingerprint:
        return packed
    with _lock(entry):
        packed = _open(entry)  # another process may have packed it while this one waited
        if packed is not None and packed.fingerprint != source.fingerprint:
            _say(f"{spec} has changed since it was packed: packing it again")
            packed = None
        return packed or _pack(source, entry, facts, workers or _cpus(), progress)


def _open(entry: Path) -> Packed | None:
    """The entry, or None where there is none or it is not whole."""
    try:
        facts = json.loads((entry / MANIFEST).read_text())
        shape = (facts["n"], facts["window"], facts["window"], facts["channels"])
        if (entry / IMAGES).stat().st_size != prod(shape):
            return None
        images = np.memmap(entry / IMAGES, np.uint8, "c", shape=shape)
        names = [fact.name for fact in fields(Packed) if fact.name not in ("path", "images")]
        return Packed(entry, images, **{name: facts[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _pack(
    source: Source, entry: Path, facts: dict[str, Any], workers: int, progress: bool
) -> Packed:
    """Decodes the source into a folder beside the entry, which becomes the entry when it is whole
    and on the disk."""
    partial = entry.with_name(f"{entry.name}.partial")
    with _writing(entry.parent):
        if partial.exists():  # the remains of a process that was killed
            shutil.rmtree(partial)
        partial.mkdir()
    try:
        with _writing(entry.parent), (partial / IMAGES).open("wb") as file:
            n, sha256, broken = _decode_all(source, file, facts, workers, progress)
        if n == 0:
            raise _nothing_decoded(facts["source"], broken)
        facts |= {
            "format": FORMAT,
            "n": n,
            "epoch_images": n if source.epoch_images is None else source.epoch_images,
            "sha256": sha256,
            "skipped": len(broken),
        }
        with _writing(entry.parent):
            if broken:
                lines = "".join(f"{label}\t{reason}\n" for label, reason in broken)
                (partial / SKIPPED).write_text(lines, errors="surrogateescape")
            (partial / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")
            for path in (*partial.iterdir(), partial):
                _sync(path)
            if entry.exists():
                shutil.rmtree(entry)
            partial.rename(entry)
            _sync(entry.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    packed = _open(entry)
    assert packed is not None
    if progress:
        shape = "x".join(map(str, packed.images.shape[1:]))
        skipped = f", {len(broken):,} skipped (see {entry / SKIPPED})" if broken else ""
        _say(f"packed {n:,} images of {packed.name} as {shape}{skipped} in {entry}")
    return packed


def _decode_all(
    source: Source, file: BinaryIO, facts: dict[str, Any], workers: int, progress: bool
) -> tuple[int, str, list[Broken]]:
    """Writes every image to the file; returns their number, their hash, and what was broken."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    n, digest, broken = 0, hashlib.sha256(), list[Broken]()
    shown = progress and sys.stderr.isatty()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = bar.add_task(f"packing {source.name}", total=source.count)
        items = source.items(facts["window"])
        for images, failures in _decoded(pool, items, facts["window"], facts["channels"], workers):
            for image in images:
                file.write(image.data)
                digest.update(image.data)
            n += len(images)
            broken += failures
            bar.advance(task, len(images) + len(failures))
    return n, digest.hexdigest(), broken


def _decoded(
    pool: ThreadPoolExecutor, items: Iterator[Item], window: int, channels: int, workers: int
) -> Iterator[tuple[list[np.ndarray[Any, Any]], list[Broken]]]:
    """The items decoded by the pool, in their order, a chunk at a time, with no more than a few
    chunks waiting: the whole set need not fit in memory."""
    pending = deque[Future[tuple[list[np.ndarray[Any, Any]], list[Broken]]]]()
    while chunk := list(islice(items, CHUNK)):
        pending.append(pool.submit(_decode_chunk, chunk, window, channels))
        if len(pending) > 2 * workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _decode_chunk(
    items: Sequence[Item], window: int, channels: int
) -> tuple[list[np.ndarray[Any, Any]], list[Broken]]:
    from fastdcgan.data.decode import decode

    images, broken = [], []
    for label, read in items:
        try:
            images.append(np.ascontiguousarray(decode(read(), window, channels)))
        except Exception as error:  # the decoder of a damaged file may raise anything
            broken.append((label, _reason(error)))
    return images, broken


def _reason(error: Exception) -> str:
    """Why an item could not be decoded, in one line."""
    if type(error).__name__ == "UnidentifiedImageError":  # its own text is an object's address
        return "not a picture of any known kind"
    return " ".join(str(error).split()) or type(error).__name__


def _nothing_decoded(spec: str, broken: Sequence[Broken]) -> InputError:
    if not broken:
        return InputError(f"no images in {spec}: it is empty")
    first = "; ".join(f"{label}: {reason}" for label, reason in broken[:3])
    return InputError(f"none of the {len(broken):,} images of {spec} can be decoded: {first}")


@contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Holds the entry's lock; says so if another process has it for now."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{entry}.lock")
    with _writing(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"waiting for another process that packs {entry}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns an error of writing into the cache into one clear line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {folder}: {error.strerror or error}; "
            "make room there, or set FASTDCGAN_CACHE to another folder"
        ) from None


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a crash leaves it whole or absent."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cpus() -> int:
    """CPUs that this process may use; more than 32 threads decode no faster than 32."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, usable or 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
