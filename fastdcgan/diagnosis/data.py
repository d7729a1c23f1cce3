"""Whether the built-in data opens, and whether the cache can be written."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastdcgan.data import Packed, prepare
from fastdcgan.data.sources import cache_folder
from fastdcgan.diagnosis.layers import SIZE
from fastdcgan.diagnosis.machine import GIB
from fastdcgan.diagnosis.rows import Row, first_line


def open_data(folder: Path) -> Packed:
    """The built-in data, packed into `folder`."""
    return prepare("blue-marble", size=SIZE, cache=folder, progress=False)


def data_rows(packed: Packed) -> Iterable[Row]:
    """What came out, and where a run would put it."""
    yield Row(
        "built-in data",
        "ok",
        f"{packed.n:,} windows of {packed.name}, {packed.nbytes / 2**20:.0f} MiB; an epoch has "
        f"{packed.epoch_images:,} images",
    )


def cache_rows() -> Iterable[Row]:
    """A file in the cache's folder, or in the folder that it would be made in, written and removed
    again."""
    folder = cache_folder()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    advice = "set FASTDCGAN_CACHE, or give --cache, to a folder that you may write"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"written")
    except OSError as error:
        yield Row("cache folder", "failed", f"{folder}: {first_line(error)}", advice)
        return
    free = shutil.disk_usage(there).free
    full = free < GIB
    yield Row(
        "cache folder",
        "warning" if full else "ok",
        f"{folder}: writable, {free / GIB:.1f} GiB free",
        "packed images may not fit: " + advice if full else "",
        {"folder": str(folder), "free_bytes": free},
    )
