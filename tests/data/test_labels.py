"""Labels of every kind of source, and what the classes are called."""

import gzip
import shutil

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data import prepare
from fastdcgan.data.labels import class_names, labels
from fastdcgan.data.sources import FASHION_MNIST
from fastdcgan.errors import InputError


def packed_of(source, split="train"):
    return prepare(str(source), size=32, split=split, progress=False)


def test_labels_of_folders(tmp_path):
    """By the first folder, and without the pictures that could not be packed."""
    for name in ("cats/1.png", "cats/more/2.png", "dogs/1.png", "dogs/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "cats" / "more" / "2.png").write_text("no picture")
    found = labels(packed_of(tmp_path))
    assert found.numbers.tolist() == [0, 1, 1]
    assert found.names == class_names(str(tmp_path)) == ("cats", "dogs")
    for kind in ("zip", "tar"):
        base = tmp_path.parent / f"{tmp_path.name}-packed"
        archive = shutil.make_archive(str(base), kind, tmp_path)
        found = labels(packed_of(archive))
        assert (found.numbers.tolist(), found.names) == ([0, 1, 1], ("cats", "dogs"))
        assert class_names(archive) == ("cats", "dogs")


def test_labels_of_idx_files_and_npz(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    for prefix, classes in (("train", [7, 3, 7]), ("t10k", [1, 2, 1])):
        head = b"\0\0\x08\3" + np.array(images.shape, ">u4").tobytes()
        with gzip.open(tmp_path / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + images.tobytes())
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\1" + np.array([3], ">u4").tobytes() + bytes(classes)
        )
    assert labels(packed_of(tmp_path)).numbers.tolist() == [1, 0, 1]
    assert labels(packed_of(tmp_path, "test")).numbers.tolist() == [0, 1, 0]
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([5, 5, 9]))
    assert labels(packed_of(tmp_path / "set.npz")).numbers.tolist() == [0, 0, 1]
    assert class_names(str(tmp_path)) == ("3", "7"), "in the order of numbers"
    np.savez(tmp_path / "words.npz", images=images, labels=np.array(["sofa", "bed", "sofa"]))
    found = labels(packed_of(tmp_path / "words.npz"))
    assert (found.numbers.tolist(), found.names) == ([1, 0, 1], ("bed", "sofa"))


def test_no_labels_are_said(tmp_path):
    np.savez(tmp_path / "bare.npz", images=np.zeros((3, 4, 4), np.uint8))
    np.savez(tmp_path / "few.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(2))
    with pytest.raises(InputError, match="0 labels for 3 images"):
        labels(packed_of(tmp_path / "bare.npz"))
    with pytest.raises(InputError, match="2 labels for 3 images"):
        labels(packed_of(tmp_path / "few.npz"))
    with pytest.raises(InputError, match="has no labels"):
        labels(packed_of("blue-marble"))
    pytest.importorskip("torchvision")
    for spec in (str(tmp_path / "bare.npz"), "torchvision:MNIST"):
        with pytest.raises(InputError, match=f"{spec} has no labels: give"):
            class_names(spec)


def test_fashion_mnists_classes_have_names():
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    names = class_names("fashion-mnist")
    assert len(names) == 10
    assert (names[1], names[8]) == ("trouser", "bag")
    assert class_names("fashion-mnist", split="test") == names
