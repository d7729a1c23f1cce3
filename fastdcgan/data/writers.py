"""Many images into one place, a batch at a time, in memory that does not grow with their number:
single files, an array, archives. Each is a context in which a function takes the batches; a file
gets its name when all of it is written. Not here: grids (picture.py), moving pictures (video.py).
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastdcgan.data.picture import Pixels, atomic_file, save_image
from fastdcgan.errors import InputError

Add: TypeAlias = Callable[[Pixels], None]
"""Takes the next images, (N, H, W, C) uint8."""

ARCHIVES = (".zip", ".tar")
THREADS = 8  # that compress PNGs: zlib runs beside Python


@contextmanager
def single_files(folder: Path) -> Iterator[Add]:
    """folder/000000.png, 000001.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(THREADS) as pool:
        count = 0

        def add(images: Pixels) -> None:
            nonlocal count
            paths = [folder / f"{count + i:06d}.png" for i in range(len(images))]
            list(pool.map(save_image, paths, images))
            count += len(images)

        yield add


@contextmanager
def array(
    path: Path, n: int, others: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> Iterator[Add]:
    """An .npz with the array "images": uint8, n x H x W x C, and `others`. Exactly n images must be
    added."""
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, other in (others or {}).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, other, allow_pickle=False)
        count = 0

        def add(images: Pixels) -> None:
            nonlocal count
            if count == 0:
                shape = (n, *images.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(np.ascontiguousarray(images).data)
            count += len(images)

        with archive.open("images.npy", "w", force_zip64=True) as member:
            yield add
        assert count == n


def shards(path: Path) -> list[Path]:
    """The files that stand where `archives(path)` writes, the shards of another number included.

    Raises:
        InputError: a % in the name that is not %06d.
    """
    if "%" not in path.name:
        return [path] if path.exists() else []
    if path.name.count("%") > 1 or "%06d" not in path.name:
        raise InputError(f"cannot write {path}: shards are numbered by %06d, once in the name")
    first, last = path.name.split("%06d")
    found = path.parent.glob("*") if path.parent.is_dir() else ()
    return sorted(
        p
        for p in found
        if p.name.startswith(first)
        and p.name.endswith(last)
        and p.name[len(first) : len(p.name) - len(last)].isdigit()
    )


@contextmanager
def archives(
    path: Path, shard: int, texts: Callable[[int], Mapping[str, str]] = lambda index: {}
) -> Iterator[Add]:
    """PNGs named 000000.png and on, in a .zip or in a .tar as WebDataset reads it.

    The same images give the same bytes: no clock is in them.

    Args:
        path: one archive, or with %06d in its name one for every `shard` images. What Python keeps
            of a zip until it is closed, 0.34 kB an image, is all that grows, and in shards nothing.
        shard: images in each archive but the last.
        texts: what stands beside the image of that number, by suffix: {".cls": "3"}.

    Raises:
        InputError: as of `shards`.
    """
    split = "%" in path.name
    before = shards(path)
    written = []
    with ThreadPoolExecutor(THREADS) as pool, ExitStack() as current:
        count = 0
        put: Callable[[str, bytes], None]

        def add(images: Pixels) -> None:
            nonlocal count, put
            for content in pool.map(_png, images):
                if count == 0 or (split and count % shard == 0):
                    current.close()
                    name = (
                        path.name.replace("%06d", f"{count // shard:06d}") if split else path.name
                    )
                    written.append(path.with_name(name))
                    put = current.enter_context(_archive(written[-1]))
                put(f"{count:06d}.png", content)
                for suffix, text in texts(count).items():
                    put(f"{count:06d}{suffix}", text.encode())
                count += 1

        yield add
    for stale in set(before) - set(written):  # of a longer series
        stale.unlink()


def _archive(path: Path) -> AbstractContextManager[Callable[[str, bytes], None]]:
    return _zip(path) if path.suffix.lower() == ".zip" else _tar(path)


@contextmanager
def _zip(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        yield lambda name, content: archive.writestr(zipfile.ZipInfo(name), content)


@contextmanager
def _tar(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w|") as archive:

        def put(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all

        yield put


def _png(image: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()
