"""Tensors to pixels, grids, and files that are whole or as they were."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdcgan.data import atomic_write, grid, save_image, to_uint8
from fastdcgan.errors import InputError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_brings_every_value_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images = torch.from_numpy(values).double() / 127.5 - 1
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(to_uint8(images.to(dtype)), values.transpose(0, 2, 3, 1))


def test_to_uint8_rounds_and_clamps() -> None:
    images = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 0.5, 0.999, 1.0, 9.0]).view(8, 1, 1, 1)
    assert to_uint8(images.requires_grad_()).ravel().tolist() == [0, 0, 0, 128, 191, 255, 255, 255]


def test_to_uint8_puts_channels_last() -> None:
    images = torch.rand(2, 3, 5, 7) * 2 - 1
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = to_uint8(images.to(memory_format=layout))
        assert pixels.shape == (2, 5, 7, 3)
        assert pixels.flags.c_contiguous
        expected = np.rint((images.numpy() + 1) * 127.5).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(pixels, expected)


@given(
    n=st.integers(1, 20),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 4),
    columns=st.integers(1, 8) | st.none(),
    padding=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_grid_has_every_image_in_its_place(
    n: int, height: int, width: int, channels: int, columns: int | None, padding: int
) -> None:
    images = np.maximum(noise(n, height, width, channels), 1)
    sheet = grid(images, columns, padding)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    assert sheet.shape == (
        rows * (height + padding) + padding,
        columns * (width + padding) + padding,
        channels,
    )
    for index in range(n):
        y = padding + index // columns * (height + padding)
        x = padding + index % columns * (width + padding)
        np.testing.assert_array_equal(sheet[y : y + height, x : x + width], images[index])
    assert np.count_nonzero(sheet) == images.size


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_lossless_files_bring_the_pixels_back(
    tmp_path: Path, suffix: str, channels: int, mode: str
) -> None:
    pixels = np.maximum(noise(9, 12, channels), 1)
    save_image(tmp_path / f"x{suffix}", pixels)
    with Image.open(tmp_path / f"x{suffix}") as image:
        assert image.mode == mode or suffix == ".webp"
        np.testing.assert_array_equal(np.asarray(image.convert(mode)).reshape(pixels.shape), pixels)
    assert os.listdir(tmp_path) == [f"x{suffix}"]


@pytest.mark.parametrize(
    ("name", "channels"), [("x", 3), ("x.xyz", 3), ("x.jpg", 4), ("x.jpeg", 2)]
)
def test_formats_that_cannot_be_written_are_one_line(
    tmp_path: Path, name: str, channels: int
) -> None:
    with pytest.raises(InputError, match="end its name in") as caught:
        save_image(tmp_path / name, noise(4, 4, channels))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_jpeg(tmp_path: Path) -> None:
    save_image(tmp_path / "x.jpg", np.full((8, 8, 3), 90, np.uint8))
    assert np.abs(np.asarray(Image.open(tmp_path / "x.jpg")).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("fsync", [False, True])
def test_atomic_write_replaces_the_file(tmp_path: Path, fsync: bool) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    old = path.open()

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        assert path.read_text() == "old"

    atomic_write(path, write, fsync)
    assert path.read_text() == "new"
    assert old.read() == "old"
    assert os.listdir(tmp_path) == ["x"]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "x", write)
