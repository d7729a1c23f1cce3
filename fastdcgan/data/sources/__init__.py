"""Where images come from: one line of the user's becomes a `Source`. Not here: decoding them
(decode.py), keeping them (cache.py)."""

import os
import tarfile
import zipfile
from pathlib import Path

from fastdcgan.data.sources.base import Item, Source
from fastdcgan.errors import InputError

__all__ = ["Item", "Source", "cache_folder", "open_source"]

# Where Debian's package of that name puts it.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def open_source(spec: str, *, split: str = "train", cache: Path | None = None) -> Source:
    """The images that `spec` names; decodes none of them.

    Args:
        spec: one of
            "blue-marble": the map of the Earth that comes with the package;
            "fashion-mnist" or "fashion-mnist:FOLDER": its IDX files, as Debian's package
            dataset-fashion-mnist installs them, or in a folder;
            "stacked-mnist": three digits an image, one in each colour (extra `digits`);
            "torchvision:NAME" or "torchvision:NAME:ROOT": a data set of torchvision; with
            "?classes=A,B" at the end only these classes, where the data set can choose (LSUN);
            a path: a folder of pictures or of IDX files, a zip or tar of pictures, an IDX file
            (gzipped or not), a .npy or a .npz with uint8 or float images.
        split: "train" or "test". Only the built-in sets, folders of IDX files, .npz files with
            `x_test` and the data sets of torchvision have a test split.
        cache: see `cache_folder`. torchvision downloads into its subfolder "torchvision/NAME".

    Raises:
        InputError: where it is not there, cannot be read, holds no images, or has no such split.
    """
    if split not in ("train", "test"):
        raise InputError(f"there is no split {split!r}: say train or test")
    kind, _, rest = spec.partition(":")
    try:
        if spec == "blue-marble":
            from fastdcgan.data.sources.blue_marble import open_blue_marble

            return open_blue_marble(split)
        if spec == "stacked-mnist":
            from fastdcgan.data.sources.stacked_mnist import open_stacked_mnist

            return open_stacked_mnist(split)
        if kind == "fashion-mnist":
            return _open_fashion_mnist(_absolute(rest) if rest else FASHION_MNIST, split)
        if kind == "torchvision":
            from fastdcgan.data.sources.torchvision import open_torchvision

            place, _, classes = rest.partition("?classes=")
            name, _, root = place.partition(":")
            default = cache_folder(cache) / "torchvision" / name
            return open_torchvision(
                name,
                _absolute(root) if root else default,
                split,
                classes=tuple(classes.split(",")) if classes else (),
            )
        return _open_path(_absolute(spec), split)
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename or spec}: permission denied") from None
    except OSError as error:
        raise InputError(f"cannot read {spec}: {error.strerror or error}") from None


def cache_folder(folder: Path | None = None) -> Path:
    """Where packed images and downloads are kept: `folder`, else $FASTDCGAN_CACHE, else
    $XDG_CACHE_HOME/fastdcgan, else ~/.cache/fastdcgan. It need not exist."""
    if folder is None:
        own, shared = os.environ.get("FASTDCGAN_CACHE"), os.environ.get("XDG_CACHE_HOME")
        folder = Path(own) if own else Path(shared or "~/.cache") / "fastdcgan"
    return _absolute(folder)


def _open_fashion_mnist(folder: Path, split: str) -> Source:
    from fastdcgan.data.sources import arrays, files

    listed = files.list_folder(folder) if folder.is_dir() else []
    source = arrays.open_idx_folder(folder, listed, split, "fashion-mnist")
    if source is None:
        raise InputError(
            f"fashion-mnist is not in {folder}: apt-get install dataset-fashion-mnist, "
            "or give the folder of its four files as fashion-mnist:FOLDER"
        )
    return source


def _open_path(path: Path, split: str) -> Source:
    from fastdcgan.data.sources import arrays, files

    if not path.exists():
        raise InputError(
            f"no images at {path}: there is no such file or folder "
            "(built in are blue-marble, fashion-mnist, stacked-mnist and torchvision:NAME)"
        )
    if path.is_dir():
        listed = files.list_folder(path)
        if not any(files.is_picture(file) for file in listed):
            source = arrays.open_idx_folder(path, listed, split, files.stem(path))
            if source is not None:
                return source
        return files.open_folder(path, listed, split)
    if files.is_picture(path):
        raise InputError(f"{path} is one picture: give the folder that holds all of them")
    if path.suffix.lower() == ".npz":
        return arrays.open_npz(path, split)
    if path.suffix.lower() == ".npy":
        return arrays.open_npy(path, split)
    if arrays.is_idx(path):
        return arrays.open_idx(path, split)
    if zipfile.is_zipfile(path):
        return files.open_zip(path, split)
    if tarfile.is_tarfile(path):
        return files.open_tar(path, split)
    raise InputError(
        f"{path} is not a set of images: give a folder, a zip or tar of pictures, "
        "an IDX file, a .npy or a .npz"
    )


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))
