"""Sources that are data sets of torchvision, by name. Not here: any download of our own."""

import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from fastdcgan.data.decode import Picture
from fastdcgan.data.sources.base import Item, Source, require_train
from fastdcgan.errors import InputError

# Known here because a data set must be downloaded before it shows what it holds.
GREY = frozenset(
    ["EMNIST", "FashionMNIST", "FER2013", "KMNIST", "MNIST", "Omniglot", "QMNIST", "USPS"]
)


def open_torchvision(name: str, root: Path, split: str, *, classes: tuple[str, ...] = ()) -> Source:
    """The data set `torchvision.datasets.<name>`, downloaded into `root` when it is read; all its
    classes, or those that are named.

    Raises:
        InputError: where torchvision is missing, or has no such data set, or no such split of it.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise InputError(
            f"torchvision:{name} needs torchvision ({error}): pip install torchvision"
        ) from None
    if name not in datasets.__all__:
        folded = {known.casefold(): known for known in datasets.__all__}
        near = [folded[match] for match in get_close_matches(name.casefold(), folded)]
        hint = f"did you mean {' or '.join(near)}?" if near else "see the list of its datasets"
        raise InputError(f"torchvision has no data set named {name!r}: {hint}")
    kind = getattr(datasets, name)
    takes = inspect.signature(kind).parameters
    if "train" not in takes and "split" not in takes:
        require_train(split, f"torchvision:{name}")
    if classes and "classes" not in takes:
        raise InputError(
            f"torchvision:{name} cannot choose classes: leave out ?classes={','.join(classes)}"
        )
    offered = {"root": str(root), "download": True, "train": split == "train", "split": split}
    if classes:
        offered["classes"] = list(classes)
    return Source(
        name=name.lower(),
        location=f"torchvision:{name}:{root}" + ("?" + ",".join(classes) if classes else ""),
        channels=1 if name in GREY else 3,
        fingerprint=name,  # what a data set of this name holds does not change
        items=lambda window: _items(
            name, lambda: kind(**{key: offered[key] for key in offered if key in takes})
        ),
    )


def _items(name: str, construct: Callable[[], Any]) -> Iterator[Item]:
    try:
        dataset = construct()
        count = len(dataset)
    except Exception as error:  # a data set may raise anything where it is offline or damaged
        reason = " ".join(str(error).split())
        raise InputError(f"torchvision:{name} cannot be had: {reason}") from None
    lock = Lock()  # data sets promise nothing about threads
    for index in range(count):
        yield f"{name}[{index}]", partial(_picture, dataset, index, lock)


def _picture(dataset: Any, index: int, lock: Lock) -> Picture:
    with lock:
        sample = dataset[index]
    picture: Picture = sample[0] if isinstance(sample, tuple) else sample
    return picture
