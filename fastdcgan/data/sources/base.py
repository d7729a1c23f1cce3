"""What a source of images is, and what all kinds of sources share. No kind of source is here."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fastdcgan.errors import InputError

if TYPE_CHECKING:
    from fastdcgan.data.decode import Picture

# A label for messages ("cats/1.jpg"), and a call that reads the picture. The calls may come from
# several threads at once, and a call may raise anything: that picture is then skipped.
Item: TypeAlias = tuple[str, Callable[[], "Picture"]]


@dataclass(frozen=True)
class Source:
    """Images that can be packed. Made by `open_source`; nothing of it has been decoded yet."""

    name: str
    """Short, fit for the name of a run's folder."""
    location: str
    """Absolute: tells this source from every other."""
    channels: int
    """What its images have of themselves: 1 for grey sets, 3 for pictures from files."""
    fingerprint: str
    """Another one than last time: the source has changed."""
    items: Callable[[int], Iterator[Item]] = field(repr=False)
    """items(window) gives the images in an order that never changes, as pictures to be decoded to
    window x window pixels. Raises InputError where the source itself is damaged."""
    count: int | None = None
    """How many items there will be; None: not known without reading them all."""
    epoch_images: int | None = None
    """Images in an epoch of training; None: as many as are packed."""
    hflip: bool = False
    """Whether a mirrored image is as good as the image."""
    margin: int = 0
    """Pixels that a packed window has more on a side than a training image, for random crops."""


def require_train(split: str, what: str) -> None:
    """Raises InputError if the split is another than "train", for a source that has no other."""
    if split != "train":
        raise InputError(
            f"{what} has no {split} split of its own: use split train, "
            f"or give the {split} images as a source of their own"
        )


def fingerprint(files: Iterable[Path], root: Path) -> str:
    """Hash of the files' paths relative to `root`, their sizes and their times of change."""
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
            line = f"{file.relative_to(root)}\t{facts.st_size}\t{facts.st_mtime_ns}\n"
        except OSError:  # a link to nowhere: an item that will be skipped, until it is mended
            line = f"{file.relative_to(root)}\tunreadable\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
