"""open_source(): every way to name images, and one clear line for every way to name none."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data import inspect_source, open_source, prepare
from fastdcgan.data.sources import FASHION_MNIST, blue_marble
from fastdcgan.data.sources.base import Source
from fastdcgan.errors import InputError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def idx(path: Path, array: np.ndarray) -> Path:
    """An IDX file as its definition has it: magic, big-endian sizes, bytes."""
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def labels(source: Source) -> list[str]:
    return [label for label, _ in source.items(8)]


def refusal(spec: str | Path, **options: Any) -> str:
    """The one line with which the source is refused, at once or when it is read."""
    with pytest.raises(InputError) as caught:
        prepare(str(spec), size=8, progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- blue-marble ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earth() -> np.ndarray:
    file = Path(blue_marble.__file__).parents[1] / "assets" / "blue_marble.jpg"
    return np.asarray(Image.open(file).convert("RGB"))


def test_the_map_has_1125_tiles_with_detail(earth: np.ndarray) -> None:
    tiles = [
        (y, x)
        for y in range(216, 2700, 64)
        for x in range(0, 5400 - 63, 64)
        if y >= 0.08 * 2700
        and y + 64 <= 0.86 * 2700
        and np.mean([earth[y : y + 64, x : x + 64, c].std() for c in range(3)]) > 12
    ]
    assert len(tiles) == 1125
    for split in ("train", "test"):
        corners = list(blue_marble.windows(earth, split, 64))
        assert len(corners) == len(set(corners)) == blue_marble.TILES[split]
        assert set(corners) <= set(tiles)
        assert inspect_source("blue-marble", split=split).count == len(corners)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_train_and_test_windows_share_no_pixel(earth: np.ndarray, size: int) -> None:
    window = size + 64
    covered = {split: np.zeros(earth.shape[:2], bool) for split in ("train", "test")}
    for split, mask in covered.items():
        corners = list(blue_marble.windows(earth, split, window))
        assert len(corners) == blue_marble.TILES[split]
        for y, x in corners:
            assert 0 <= y <= 2700 - window
            assert 0 <= x <= 5400 - window
            mask[y : y + window, x : x + window] = True
    assert not (covered["train"] & covered["test"]).any()
    assert covered["test"].sum() > 0.05 * covered["train"].sum()


def test_most_windows_have_their_tile_in_the_middle(earth: np.ndarray) -> None:
    tiles = set(blue_marble.windows(earth, "train", 64))
    middles = {(y + 32, x + 32) for y, x in blue_marble.windows(earth, "train", 128)}
    assert len(tiles & middles) > 0.85 * len(tiles)


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_splits_have_sea_forest_desert_and_snow(earth: np.ndarray, split: str) -> None:
    means = np.array(
        [
            earth[y : y + 64, x : x + 64].mean(axis=(0, 1))
            for y, x in blue_marble.windows(earth, split, 64)
        ]
    )
    red, green, blue = means.T
    kinds = {
        "sea": (blue > 1.5 * red) & (blue > 40),
        "forest": (green > 1.2 * blue) & (green > red) & (green < 90),
        "desert": (red > 1.3 * blue) & (red > 150),
        "snow": means.min(axis=1) > 180,
    }
    assert {kind: int(found.sum()) for kind, found in kinds.items() if found.sum() < 2} == {}


def test_blue_marble_is_packed_in_windows_and_an_epoch_is_the_whole_map() -> None:
    train = prepare("blue-marble", size=32, progress=False)
    assert train.images.shape == (998, 96, 96, 3)
    assert (train.epoch_images, train.hflip, train.channels) == (1125, True, 3)
    test = prepare("blue-marble", size=32, split="test", progress=False)
    assert (test.n, test.epoch_images) == (127, 127)
    assert train.path != test.path


def test_blue_marble_refuses_sizes_that_its_test_bands_cannot_hold() -> None:
    with pytest.raises(InputError, match="at most 256"):
        prepare("blue-marble", size=257, progress=False)


# ---- fashion-mnist and IDX -----------------------------------------------------------------------


def raw_idx(path: Path, size: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(
        -1, size, size, 1
    )


@pytest.mark.skipif(
    not FASHION_MNIST.is_dir() and "CI" not in os.environ,
    reason="needs the Debian package dataset-fashion-mnist",
)
def test_fashion_mnist_as_debian_installs_it() -> None:
    test = prepare("fashion-mnist", size=28, split="test", progress=False)
    assert (test.name, test.channels, test.hflip) == ("fashion-mnist", 1, False)
    np.testing.assert_array_equal(
        test.images, raw_idx(FASHION_MNIST / "t10k-images-idx3-ubyte.gz", 28)
    )
    train = inspect_source("fashion-mnist")
    assert (train.count, train.epoch_images) == (60_000, 60_000)


def test_fashion_mnist_in_a_folder_and_its_splits(tmp_path: Path) -> None:
    train, test = noise(5, 8, 8), noise(3, 8, 8, seed=1)
    idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", noise(5))
    idx(tmp_path / "t10k-images-idx3-ubyte", test)
    for spec, name in ((f"fashion-mnist:{tmp_path}", "fashion-mnist"), (tmp_path, tmp_path.name)):
        packed = prepare(str(spec), size=8, progress=False)
        assert (packed.name, packed.channels) == (name, 1)
        np.testing.assert_array_equal(packed.images[..., 0], train)
        packed = prepare(str(spec), size=8, split="test", progress=False)
        np.testing.assert_array_equal(packed.images[..., 0], test)


def test_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    assert "apt-get install dataset-fashion-mnist" in refusal(f"fashion-mnist:{tmp_path}")
    assert "apt-get install dataset-fashion-mnist" in refusal(f"fashion-mnist:{tmp_path}/none")


@pytest.mark.parametrize("name", ["digits-idx3-ubyte", "digits.gz"])
def test_one_idx_file(tmp_path: Path, name: str) -> None:
    images = noise(40, 8, 8)
    packed = prepare(str(idx(tmp_path / name, images)), size=8, channels=3, progress=False)
    np.testing.assert_array_equal(packed.images, np.repeat(images[..., None], 3, axis=3))


def test_idx_files_that_hold_no_images(tmp_path: Path) -> None:
    assert "(7,)" in refusal(idx(tmp_path / "labels-idx1-ubyte", noise(7)))
    file = idx(tmp_path / "cut-idx3-ubyte", noise(40, 8, 8))
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged after 39 images" in refusal(file)
    file = idx(tmp_path / "cut.gz", noise(40, 8, 8))
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refusal(file)


# ---- folders and archives ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "My photos"
    for index, name in enumerate(["b/2.PNG", "b/10.png", "a.jpg", "c.webp"]):
        picture(root / name, noise(9, 12, 3, seed=index))
    picture(root / ".hidden.png", noise(9, 9))
    picture(root / ".cache" / "d.png", noise(9, 9))
    picture(root / "__MACOSX" / "e.png", noise(9, 9))
    (root / "notes.txt").write_text("no picture")
    return root


SORTED = ["a.jpg", "b/10.png", "b/2.PNG", "c.webp"]


def test_a_folder_gives_its_pictures_sorted(folder: Path) -> None:
    source = open_source(str(folder))
    assert labels(source) == SORTED
    facts = inspect_source(str(folder))
    assert (facts.name, facts.count, facts.channels) == ("My-photos", 4, 3)
    assert (facts.epoch_images, facts.hflip) == (4, False)
    packed = prepare(str(folder), size=9, progress=False)
    left = noise(9, 12, 3, seed=1)[:, 2:11]  # b/10.png, cropped in the middle: round(1.5) = 2
    np.testing.assert_array_equal(packed.images[1], left)


def test_a_folder_follows_links_to_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(folder)
    (folder / "z.png").symlink_to(picture(tmp_path / "elsewhere.png", noise(8, 8, 3)))
    (folder / "y.png").symlink_to("nowhere.png")
    packed = prepare(str(tmp_path / "linked"), size=8, progress=False)
    np.testing.assert_array_equal(packed.images[-1], noise(8, 8, 3))
    assert packed.skipped == 1
    assert (packed.path / "skipped.txt").read_text().startswith("y.png\t")


def zip_of(root: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(root))
    return path


def tar_of(root: Path, path: Path) -> Path:
    mode = {".gz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for file in sorted(root.rglob("*")):
            archive.add(file, f"./{file.relative_to(root)}", recursive=False)
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "noname"])
def test_an_archive_is_as_good_as_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    archive = (zip_of if name == "x.zip" else tar_of)(folder, tmp_path / name)
    assert labels(open_source(str(archive))) in (SORTED, [f"./{label}" for label in SORTED])
    packed = prepare(str(archive), size=8, progress=False)
    assert packed.name == name.partition(".")[0]
    np.testing.assert_array_equal(
        packed.images, prepare(str(folder), size=8, progress=False).images
    )


def test_damaged_archives_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    tar = tar_of(folder, tmp_path / "cut.tar.gz")
    tar.write_bytes(tar.read_bytes()[:-400])
    assert "damaged" in refusal(tar)
    zipped = zip_of(folder, tmp_path / "cut.zip")
    zipped.write_bytes(zipped.read_bytes()[:-40])
    assert "not a set of images" in refusal(zipped)


def test_a_damaged_file_in_a_zip_is_skipped(folder: Path, tmp_path: Path) -> None:
    path = zip_of(folder, tmp_path / "x.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("b/2.PNG")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 100] ^= 0xFF
    path.write_bytes(data)
    packed = prepare(str(path), size=8, progress=False)
    assert (packed.n, packed.skipped) == (3, 1)


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 1), (6, 8, 8, 3), (6, 8, 8, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_bytes(tmp_path: Path, shape: tuple[int, ...], order: str) -> None:
    images = noise(*shape)
    np.save(tmp_path / "x.npy", np.asarray(images, order=order))  # type: ignore[call-overload]
    packed = prepare(str(tmp_path / "x.npy"), size=8, progress=False)
    np.testing.assert_array_equal(packed.images, images.reshape(6, 8, 8, -1))


def test_npy_with_channels_first(tmp_path: Path) -> None:
    images = noise(6, 3, 8, 8)
    np.save(tmp_path / "x.npy", images)
    packed = prepare(str(tmp_path / "x.npy"), size=8, progress=False)
    np.testing.assert_array_equal(packed.images, images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8"])
@pytest.mark.parametrize("low", [0, -1])
def test_npy_of_floats(tmp_path: Path, dtype: str, low: int) -> None:
    images = noise(6, 8, 8, 3)
    np.save(tmp_path / "x.npy", (images / 255 * (1 - low) + low).astype(dtype))
    packed = prepare(str(tmp_path / "x.npy"), size=8, progress=False)
    off = np.abs(packed.images.astype(int) - images).max()
    assert off <= (dtype == "f2")  # half precision has too few bits to bring every value back


@pytest.mark.parametrize("key", ["images", "x_train", "x", "arr_0", "anything"])
def test_npz_finds_the_images(tmp_path: Path, key: str) -> None:
    np.savez_compressed(tmp_path / "x.npz", **{key: noise(6, 8, 8), "labels": noise(6)})
    packed = prepare(str(tmp_path / "x.npz"), size=8, progress=False)
    np.testing.assert_array_equal(packed.images[..., 0], noise(6, 8, 8))


def test_npz_prefers_images_to_all_others_and_has_a_test_split(tmp_path: Path) -> None:
    arrays = {"arr_0": noise(4, 8, 8), "images": noise(5, 8, 8), "x_test": noise(2, 8, 8)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert inspect_source(str(tmp_path / "x.npz")).count == 5
    assert inspect_source(str(tmp_path / "x.npz"), split="test").count == 2


def test_arrays_that_are_no_images(tmp_path: Path) -> None:
    def saved(array: np.ndarray) -> Path:
        np.save(tmp_path / "x.npy", array)
        return tmp_path / "x.npy"

    assert "(6, 8)" in refusal(saved(noise(6, 8)))
    assert "(6, 8, 8, 7)" in refusal(saved(noise(6, 8, 8, 7)))
    assert "(0, 8, 8)" in refusal(saved(noise(0, 8, 8)))
    assert "int64" in refusal(saved(noise(6, 8, 8).astype(np.int64)))
    assert "from 0 to 255" in refusal(saved(np.linspace(0, 255, 384).reshape(6, 8, 8)))
    assert "nan" in refusal(saved(np.full((6, 8, 8), np.nan)))
    assert "cannot be read" in refusal(saved(np.array([None] * 6)))
    np.savez(tmp_path / "two.npz", a=noise(6, 8, 8), b=noise(6, 8, 8))
    assert "a (6, 8, 8), b (6, 8, 8)" in refusal(tmp_path / "two.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 and no more")
    assert "bad.npz" in refusal(tmp_path / "bad.npz")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUM")
    assert "bad.npy" in refusal(tmp_path / "bad.npy")


# ---- torchvision ---------------------------------------------------------------------------------


def test_torchvision_fakedata(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    assert inspect_source("torchvision:FakeData").name == "fakedata"
    fewer = partial(datasets.FakeData, size=20, image_size=(3, 12, 12))
    monkeypatch.setattr(datasets, "FakeData", fewer)
    packed = prepare("torchvision:FakeData", size=12, workers=4, progress=False)
    assert (packed.n, packed.channels) == (20, 3)
    for image, (expected, _) in zip(packed.images, fewer(), strict=False):
        np.testing.assert_array_equal(image, np.asarray(expected))
    assert "no test split" in refusal("torchvision:FakeData", split="test")


def test_torchvision_gets_the_arguments_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    seen = []

    class Made:
        def __init__(self, root: str, train: bool, transform: object = None) -> None:
            seen.append((root, train))

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Image.Image:
            return Image.fromarray(noise(8, 8, seed=index))

    monkeypatch.setattr(datasets, "MNIST", Made)
    packed = prepare(f"torchvision:MNIST:{tmp_path}", size=8, split="test", progress=False)
    np.testing.assert_array_equal(packed.images[1, ..., 0], noise(8, 8, seed=1))
    assert packed.channels == 1
    prepare("torchvision:MNIST", size=8, progress=False)
    assert seen == [
        (str(tmp_path), False),
        (os.environ["FASTDCGAN_CACHE"] + "/torchvision/MNIST", True),
    ]


def test_torchvision_classes_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    seen = []

    class Rooms:
        def __init__(self, root: str, classes: str | list[str] = "train") -> None:
            seen.append((root, classes))

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Image.Image:
            return Image.fromarray(noise(8, 8))

    monkeypatch.setattr(datasets, "LSUN", Rooms)
    chosen = prepare(f"torchvision:LSUN:{tmp_path}?classes=a_train,b_train", size=8, progress=False)
    whole = prepare(f"torchvision:LSUN:{tmp_path}", size=8, progress=False)
    assert seen == [(str(tmp_path), ["a_train", "b_train"]), (str(tmp_path), "train")]
    assert chosen.path != whole.path
    assert "cannot choose classes" in refusal("torchvision:FakeData?classes=a")


def test_torchvision_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from torchvision import datasets

    assert "MNIST" in refusal("torchvision:mnst").partition("did you mean")[2]
    assert "no data set named ''" in refusal("torchvision:")

    class Offline:
        def __init__(self, root: str, download: bool) -> None:
            assert download
            raise RuntimeError("no route\nto host")

    monkeypatch.setattr(datasets, "CIFAR10", Offline)
    assert "no route to host" in refusal("torchvision:CIFAR10")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install torchvision" in refusal("torchvision:CIFAR10")


# ---- what cannot work ----------------------------------------------------------------------------


def test_what_is_not_there_or_holds_no_images(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    (tmp_path / "empty" / "more.csv").write_text("hello")
    assert "none of its 2 files" in refusal(tmp_path / "empty")
    assert "none of its 2 files" in refusal(zip_of(tmp_path / "empty", tmp_path / "x.zip"))
    assert "none of its 2 files" in refusal(tar_of(tmp_path / "empty", tmp_path / "x.tar"))
    assert "not a set of images" in refusal(tmp_path / "empty" / "notes.txt")
    assert "one picture" in refusal(picture(tmp_path / "one.png", noise(8, 8)))


@pytest.mark.parametrize("name", ["x.npy", "x.zip", "", "images-idx3-ubyte"])
def test_sources_without_a_test_split_say_so(tmp_path: Path, name: str) -> None:
    root = tmp_path / "images"
    if name == "x.npy":
        root.mkdir()
        np.save(root / name, noise(6, 8, 8))
    elif name == "x.zip":
        picture(root / "a.png", noise(8, 8))
        zip_of(root, root / name)
    elif name == "":
        picture(root / "a.png", noise(8, 8))
    else:
        root.mkdir()
        idx(root / name, noise(6, 8, 8))
    assert "no test split" in refusal(root / name, split="test")
    if name == "images-idx3-ubyte":
        assert "no test split" in refusal(root, split="test")


def test_what_may_not_be_read_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def locked(path: Any) -> Iterator[Any]:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert "b cannot be read: Permission denied" in refusal(folder)

    def shut(path: Path, *args: Any, **options: Any) -> io.IOBase:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.bin").write_bytes(b"1234")
    monkeypatch.setattr(Path, "open", shut)
    assert "x.bin: permission denied" in refusal(tmp_path / "x.bin")


def test_bad_options_are_one_line(folder: Path) -> None:
    assert "split 'dev'" in refusal(folder, split="dev")
    assert "5 channels" in refusal(folder, channels=5)
    assert "0 workers" in refusal(folder, workers=0)
    with pytest.raises(InputError, match="0 pixels"):
        prepare(str(folder), size=0)


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdcgan.data.sources import cache_folder

    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTDCGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastdcgan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastdcgan"
