"""Images in, batches out: sources, the packed cache, the feeds of a training run, picture files.

Importing this package loads nothing heavy; a name below loads its file when it is first used. Not
here: what is done with a batch, and how good a picture is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdcgan.data.cache import Packed as Packed
    from fastdcgan.data.cache import SourceFacts as SourceFacts
    from fastdcgan.data.cache import inspect_source as inspect_source
    from fastdcgan.data.cache import prepare as prepare
    from fastdcgan.data.feeds import Feed as Feed
    from fastdcgan.data.feeds import Order as Order
    from fastdcgan.data.feeds import make_feed as make_feed
    from fastdcgan.data.picture import atomic_write as atomic_write
    from fastdcgan.data.picture import grid as grid
    from fastdcgan.data.picture import save_image as save_image
    from fastdcgan.data.picture import to_uint8 as to_uint8
    from fastdcgan.data.sources import Source as Source
    from fastdcgan.data.sources import open_source as open_source

_HOME = {
    "Packed": "cache",
    "SourceFacts": "cache",
    "inspect_source": "cache",
    "prepare": "cache",
    "Feed": "feeds",
    "Order": "feeds",
    "make_feed": "feeds",
    "atomic_write": "picture",
    "grid": "picture",
    "save_image": "picture",
    "to_uint8": "picture",
    "Source": "sources",
    "open_source": "sources",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"fastdcgan.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastdcgan.data' has no attribute {name!r}")
