"""Sources that are arrays in a file: IDX (the format of MNIST), .npy and .npz. Not here: files that
are pictures."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.lib import format as npy

from fastdcgan.data.sources.base import Item, Source, fingerprint, require_train
from fastdcgan.data.sources.files import stem
from fastdcgan.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]

NPZ_KEYS = ("images", "x_train", "x", "arr_0")
_TEST_FILE = re.compile(r"(?<![a-z0-9])(t10k|test)(?![a-z0-9])", re.IGNORECASE)
_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


def is_idx(path: Path) -> bool:
    """Whether the file, gzipped or not, begins as an IDX file of bytes does."""
    try:
        with _open_idx(path) as file:
            start = file.read(4)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False
    return start[:3] == b"\0\0\x08" and start[3:] in (b"\1", b"\2", b"\3", b"\4")


def open_idx(path: Path, split: str) -> Source:
    """One IDX file of images."""
    require_train(split, f"the file {path}")
    return _idx_source([path], path, stem(path))


def open_idx_folder(root: Path, files: Sequence[Path], split: str, name: str) -> Source | None:
    """The IDX files of images among the `files` of a folder, those named t10k or test being its
    test split; None if there are none."""
    files = [file for file in files if is_idx(file) and len(_idx_shape(file)) >= 3]
    if not files:
        return None
    for_testing = [file for file in files if _TEST_FILE.search(file.name)]
    if not for_testing:
        require_train(split, f"the folder {root}")
    chosen = for_testing if split == "test" else [f for f in files if f not in for_testing]
    if not chosen:
        raise InputError(f"{root} has IDX files of test images only: give one of the files itself")
    return _idx_source(chosen, root, name)


def open_npy(path: Path, split: str) -> Source:
    """The images in a .npy file, mapped and never read as a whole."""
    require_train(split, f"the file {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read as an array of numbers: {error}") from None
    return _array_source(path, array.shape, array.dtype, lambda: array)


def open_npz(path: Path, split: str) -> Source:
    """The images in a .npz file: `images`, `x_train`, `x`, `arr_0`, or the only array of three or
    more dimensions; for testing `x_test`."""
    try:
        headers = _npz_headers(path)
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read as arrays of numbers: {error}") from None
    if split == "test" and "x_test" not in headers:
        require_train(split, f"the file {path}")
    keys = [key for key in NPZ_KEYS if key in headers] if split == "train" else ["x_test"]
    keys = keys[:1] or [key for key, (shape, _) in headers.items() if len(shape) >= 3]
    if len(keys) != 1:
        held = ", ".join(f"{key} {shape}" for key, (shape, _) in headers.items()) or "nothing"
        raise InputError(f"{path}: which array is the images? Name it `images`. It holds: {held}")
    return _array_source(path, *headers[keys[0]], lambda: _load_npz(path, keys[0]))


# ---- IDX -----------------------------------------------------------------------------------------


def _idx_source(files: Sequence[Path], location: Path, name: str) -> Source:
    shapes = [_idx_shape(file) for file in files]
    layouts = [_layout(shape, file) for shape, file in zip(shapes, files, strict=True)]
    return Source(
        name=name,
        location=str(location),
        channels=layouts[0][1],
        fingerprint=fingerprint(files, files[0].parent),
        items=lambda window: (item for file in files for item in _idx_items(file)),
        count=sum(shape[0] for shape in shapes),
    )


def _idx_items(path: Path) -> Iterator[Item]:
    """Reads the file once from end to end: a gzipped one cannot be read in any other way."""
    done = 0
    try:
        shape = _idx_shape(path)
        channels_first, _ = _layout(shape, path)
        with _open_idx(path) as file:
            file.read(4 + 4 * len(shape))
            for done in range(shape[0]):
                image = np.frombuffer(file.read(prod(shape[1:])), np.uint8).reshape(shape[1:])
                yield f"{path.name}[{done}]", partial(_to_hwc, image, channels_first)
    except _DAMAGED:
        raise InputError(f"{path} is damaged after {done:,} images: get it again") from None


def _idx_shape(path: Path) -> tuple[int, ...]:
    with _open_idx(path) as file:
        dimensions = file.read(4)[3]
        return tuple(np.frombuffer(file.read(4 * dimensions), ">u4").tolist())


def _open_idx(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if gzipped else path.open("rb")


# ---- .npy and .npz -------------------------------------------------------------------------------


def _array_source(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], load: Callable[[], Array]
) -> Source:
    if dtype != np.uint8 and dtype.kind != "f":
        raise InputError(
            f"{path} holds {dtype} values: give uint8, or floats in [0, 1] or in [-1, 1]"
        )
    channels_first, channels = _layout(shape, path)
    return Source(
        name=stem(path),
        location=str(path),
        channels=channels,
        fingerprint=fingerprint([path], path.parent),
        items=lambda window: _array_items(load(), path, channels_first),
        count=shape[0],
    )


def _array_items(array: Array, path: Path, channels_first: bool) -> Iterator[Item]:
    low = _lowest(array, path) if array.dtype.kind == "f" else 0
    for index in range(len(array)):
        yield f"{path.name}[{index}]", partial(_array_image, array, index, low, channels_first)


def _array_image(array: Array, index: int, low: int, channels_first: bool) -> Array:
    image = _to_hwc(array[index], channels_first)
    if image.dtype.kind == "f":
        image = ((image.astype(np.float64) - low) * (255 / (1 - low))).round().astype(np.uint8)
    return image


def _lowest(array: Array, path: Path) -> int:
    """0 for floats in [0, 1], -1 for floats in [-1, 1]; read in parts, as the array may be a map of
    a file larger than the memory."""
    parts = [array[start : start + 1024] for start in range(0, len(array), 1024)]
    least = min(float(part.min()) for part in parts)
    most = max(float(part.max()) for part in parts)
    if not (least >= -1 and most <= 1):  # so that a NaN fails too
        raise InputError(
            f"{path} holds floats from {least:g} to {most:g}: "
            "scale them to [0, 1] or [-1, 1], or give uint8"
        )
    return 0 if least >= 0 else -1


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, without reading the arrays."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
                shape, _, dtype = read(file)
                headers[name.removesuffix(".npy")] = (shape, dtype)
    return headers


def _load_npz(path: Path, key: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: Array = arrays[key]
            return array
    except _DAMAGED as error:
        raise InputError(f"{path} is damaged ({error}): get it again") from None


def _layout(shape: tuple[int, ...], path: Path) -> tuple[bool, int]:
    """Whether the channels come before height and width, and how many they are."""
    if 0 not in shape:
        if len(shape) == 3:
            return False, 1
        if len(shape) == 4 and shape[3] <= 4:
            return False, shape[3]
        if len(shape) == 4 and shape[1] <= 4:
            return True, shape[1]
    raise InputError(
        f"{path} holds an array of shape {shape}: "
        "images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to 4 channels"
    )


def _to_hwc(image: Array, channels_first: bool) -> Array:
    return np.ascontiguousarray(np.moveaxis(image, 0, -1) if channels_first else image)
