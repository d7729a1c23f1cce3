"""The class of each packed image: from IDX files of labels, from a .npz, or from the folders that
pictures lie in. Not here: the images."""

import gzip
import re
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np

from fastdcgan.data import Packed, open_source
from fastdcgan.data.cache import SKIPPED
from fastdcgan.data.sources import Source
from fastdcgan.errors import InputError

Labels: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

NPZ_KEYS = {"train": ("labels", "y_train", "y"), "test": ("y_test",)}


def labels(packed: Packed, cache: Path | None = None) -> Labels:
    """(packed.n,) numbers, one for each class.

    Raises:
        InputError: the source has no labels that can be found, or not as many as images.
    """
    source = open_source(packed.source, split=packed.split, cache=cache)
    place = Path(source.location)
    if place.suffix == ".npz":
        found = _of_npz(place, packed.split)
    elif place.is_dir() and (files := _idx_files(place, packed.split)):
        found = np.concatenate([_read_idx(file) for file in files])
    else:
        found = _of_folders(source, packed)
    if len(found) != packed.n:
        raise InputError(f"{packed.source} has {len(found):,} labels for {packed.n:,} images")
    _, numbers = np.unique(found, return_inverse=True)
    if len(found) == 0 or numbers.max() == 0:
        raise InputError(
            f"{packed.source} has no labels: give a set with IDX files of labels, a .npz with "
            "`labels`, or a folder of pictures with one subfolder for each class"
        )
    return numbers.astype(np.int64)


def _of_npz(path: Path, split: str) -> np.ndarray[Any, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        for key in NPZ_KEYS[split]:
            if key in arrays:
                held: np.ndarray[Any, Any] = arrays[key]
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


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    data = path.read_bytes()
    return np.frombuffer(
        gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data, np.uint8, -1, 8
    )


def _of_folders(source: Source, packed: Packed) -> np.ndarray[Any, Any]:
    """The first folder on the way to each picture that was packed."""
    skipped = set()
    if packed.skipped:
        lines = (packed.path / SKIPPED).read_text(errors="surrogateescape").splitlines()
        skipped = {line.split("\t")[0] for line in lines}
    names = [label for label, _ in source.items(packed.window) if label not in skipped]
    return np.array([PurePath(name).parts[0] if "/" in name else "" for name in names])
