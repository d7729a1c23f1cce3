"""The class of each image: from IDX files of labels, from a .npz, or from the folders that pictures
lie in. Not here: the images."""

import gzip
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np

from fastdcgan.data.cache import SKIPPED, Packed
from fastdcgan.data.sources import Source, open_source
from fastdcgan.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]

NPZ_KEYS = {"train": ("labels", "y_train", "y"), "test": ("y_test",)}

# Its files have numbers only.
FASHION_MNIST = ("T-shirt", "trouser", "pullover", "dress", "coat",
                 "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a source's images."""

    numbers: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    """(n,), in the order of the images: from 0, without gaps."""
    names: tuple[str, ...]
    """Of each number: the name of a folder, or what stands in a file of labels; in sorted order."""


def labels(packed: Packed, cache: Path | None = None) -> Labels:
    """The class of each packed image.

    Raises:
        InputError: the source has no labels that can be found, or not as many as images.
    """
    source = open_source(packed.source, split=packed.split, cache=cache)
    skipped = set()
    if packed.skipped:
        lines = (packed.path / SKIPPED).read_text(errors="surrogateescape").splitlines()
        skipped = {line.split("\t")[0] for line in lines}
    found = _values(source, packed.split, packed.window, skipped)
    if len(found) != packed.n:
        raise InputError(f"{packed.source} has {len(found):,} labels for {packed.n:,} images")
    return _numbered(found, packed.source, source)


def class_names(spec: str, *, split: str = "train", cache: Path | None = None) -> tuple[str, ...]:
    """The names of a source's classes, without decoding or packing an image; of a class whose
    images are all broken, too.

    Raises:
        InputError: the source cannot be used (see `open_source`), or has no labels.
    """
    source = open_source(spec, split=split, cache=cache)
    return _numbered(_values(source, split, 1, set()), spec, source).names


def _values(source: Source, split: str, window: int, skipped: set[str]) -> Array:
    """A label for each item, as the source has it."""
    place = Path(source.location)
    if place.suffix == ".npz":
        return _of_npz(place, split)
    if place.is_dir() and (files := _idx_files(place, split)):
        return np.concatenate([_read_idx(file) for file in files])
    if source.location.startswith("torchvision:"):
        return np.empty(0)  # its files are there only after a download
    return _of_folders(source, window, skipped)


def _numbered(values: Array, spec: str, source: Source) -> Labels:
    held, numbers = np.unique(values, return_inverse=True)
    if len(held) < 2:
        raise InputError(
            f"{spec} has no labels: give a set with IDX files of labels, a .npz with "
            "`labels`, or a folder of pictures with one subfolder for each class"
        )
    names = tuple(map(str, held.tolist()))
    if source.name == "fashion-mnist" and held.max() < len(FASHION_MNIST):
        names = tuple(FASHION_MNIST[value] for value in held)
    return Labels(numbers.astype(np.int64), names)


def _of_npz(path: Path, split: str) -> Array:
    with np.load(path, allow_pickle=False) as arrays:
        for key in NPZ_KEYS[split]:
            if key in arrays:
                held: Array = arrays[key]
                return held.ravel()
    return np.empty(0)


def _idx_files(folder: Path, split: str) -> list[Path]:
    """The folder's IDX files of one dimension, those named t10k or test being the test split's."""
    held = [p for p in sorted(folder.iterdir()) if p.is_file() and _start(p) == b"\0\0\x08\1"]
    testing = [
        p for p in held if re.search(r"(?<![a-z0-9])(t10k|test)(?![a-z0-9])", p.name.lower())
    ]
    return testing if split == "test" else [p for p in held if p not in testing]


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b":
        with gzip.open(path) as unzipped:
            start = unzipped.read(4)
    return start


def _read_idx(path: Path) -> Array:
    data = path.read_bytes()
    return np.frombuffer(
        gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data, np.uint8, -1, 8
    )


def _of_folders(source: Source, window: int, skipped: set[str]) -> Array:
    """The first folder on the way to each picture that is not skipped."""
    names = [label for label, _ in source.items(window) if label not in skipped]
    return np.array([PurePath(name).parts[0] if "/" in name else "" for name in names])
