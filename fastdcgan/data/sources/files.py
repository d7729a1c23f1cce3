"""Sources that are many picture files: a folder, a zip, a tar. Not here: files that hold arrays."""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath

from fastdcgan.data.sources.base import Item, Source, fingerprint, require_train
from fastdcgan.errors import InputError

# fmt: off
PICTURES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on


def open_folder(root: Path, files: Sequence[Path], split: str) -> Source:
    """The pictures among the `files` of a folder, in their order."""
    require_train(split, f"the folder {root}")
    pictures = [file for file in files if is_picture(file)]
    if not pictures:
        raise no_pictures(root, len(files))
    return Source(
        name=stem(root),
        location=str(root),
        channels=3,
        fingerprint=fingerprint(pictures, root),
        items=lambda window: ((str(file.relative_to(root)), file.read_bytes) for file in pictures),
        count=len(pictures),
    )


def open_zip(path: Path, split: str) -> Source:
    """All pictures in a zip, in sorted order."""
    require_train(split, f"the archive {path}")
    # Not in a `with`: pictures are read when the last name has long been given. It closes itself
    # when the last of the calls is gone, and may be read from several threads.
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is a damaged zip ({error}): get it again") from None
    names = [
        info.filename
        for info in archive.infolist()
        if not info.is_dir() and not _hidden(PurePath(info.filename))
    ]
    pictures = sorted(name for name in names if is_picture(PurePath(name)))
    if not pictures:
        raise no_pictures(path, len(names))
    return Source(
        name=stem(path),
        location=str(path),
        channels=3,
        fingerprint=fingerprint([path], path.parent),
        items=lambda window: ((name, partial(archive.read, name)) for name in pictures),
        count=len(pictures),
    )


def open_tar(path: Path, split: str) -> Source:
    """All pictures in a tar, compressed or not, in the order in which they lie there."""
    require_train(split, f"the archive {path}")
    return Source(
        name=stem(path),
        location=str(path),
        channels=3,
        fingerprint=fingerprint([path], path.parent),
        items=lambda window: _tar_items(path),
    )


def _tar_items(path: Path) -> Iterator[Item]:
    """Reads the tar once from end to end: a compressed one cannot be read in any other way."""
    pictures = others = 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or _hidden(PurePath(member.name)):
                    continue
                if not is_picture(PurePath(member.name)):
                    others += 1
                    continue
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                data = file.read()
                pictures += 1
                yield member.name, partial(bytes, data)
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise InputError(
            f"{path} is damaged after {pictures} pictures ({error}): get it again"
        ) from None
    if not pictures:
        raise no_pictures(path, others)


def list_folder(root: Path) -> list[Path]:
    """All files under a folder, sorted, without hidden ones. A link to a file counts as the file.

    Raises:
        InputError: where a folder in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}")

    return sorted(
        file
        for folder, _, names in os.walk(root, onerror=refuse)
        for file in (Path(folder, name) for name in names)
        if not _hidden(file.relative_to(root))
    )


def is_picture(path: PurePath) -> bool:
    """Whether the file is to be decoded; going by its name, as opening every file takes hours."""
    return path.suffix.lower() in PICTURES


def stem(path: Path) -> str:
    """The file's name without its suffixes, in characters that any file system takes."""
    name = path.name
    for suffix in (".gz", ".bz2", ".xz", ".tgz", ".tbz2", ".txz", ".tar", ".zip", ".npy", ".npz"):
        name = name.removesuffix(suffix)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-") or "images"


def no_pictures(where: Path, others: int) -> InputError:
    """The error of a folder or archive without pictures."""
    seen = f"none of its {others:,} files is a picture" if others else "it is empty"
    return InputError(f"no images in {where}: {seen}; pictures end in .jpg, .png or the like")


def _hidden(path: PurePath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
