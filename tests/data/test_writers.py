"""Many images into one place: what other programs read there, and that nothing half done stays."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data.video import save_video
from fastdcgan.data.writers import archives, array, shards, single_files
from fastdcgan.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)


def write(context, images=IMAGES):
    with context as add:
        for start in range(0, len(images), 5):
            add(images[start : start + 5])


def decoded(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def test_an_array_is_numpys(tmp_path):
    write(array(tmp_path / "a.npz", 23))
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["images"]
        assert np.array_equal(found["images"], IMAGES)


def test_single_files(tmp_path):
    write(single_files(tmp_path / "each"), IMAGES[..., :1])
    files = sorted((tmp_path / "each").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(23)]
    for file, image in zip(files, IMAGES, strict=True):
        assert np.array_equal(decoded(file.read_bytes()), image[..., 0])


def test_a_zip(tmp_path):
    write(archives(tmp_path / "a.zip", 10))
    with zipfile.ZipFile(tmp_path / "a.zip") as found:
        assert found.testzip() is None
        for name, image in zip(found.namelist(), IMAGES, strict=True):
            assert np.array_equal(decoded(found.read(name)), image)


def test_shards_hold_all_in_order_and_replace_a_longer_series(tmp_path):
    path = tmp_path / "s" / "part-%06d.tar"
    path.parent.mkdir()
    write(archives(path, 4))
    assert len(shards(path)) == 6
    (path.parent / "part-mine.tar").touch()
    write(archives(path, 10))
    found = shards(path)
    assert [p.name for p in found] == [f"part-{i:06d}.tar" for i in range(3)]
    assert (path.parent / "part-mine.tar").exists()
    images, names = [], []
    for file in found:
        with tarfile.open(file) as tar:
            for entry in tar:
                names.append(entry.name)
                images.append(decoded(tar.extractfile(entry).read()))
    assert names == [f"{i:06d}.png" for i in range(23)]
    assert np.array_equal(images, IMAGES)


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_the_same_images_are_the_same_bytes(tmp_path, name, monkeypatch):
    write(archives(tmp_path / name, 10))
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(archives(tmp_path / name, 10))
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize(
    "context",
    [lambda f: array(f / "x.npz", 23), lambda f: archives(f / "x-%06d.tar", 10)],
)
def test_what_stops_halfway_leaves_no_half_file(tmp_path, context):
    def stop_halfway():
        with context(tmp_path) as add:
            add(IMAGES[:13])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    left = [p.name for p in tmp_path.iterdir()]
    assert left in ([], ["x-000000.tar"])


def test_other_patterns_are_refused(tmp_path):
    for name in ("%d.tar", "%06d-%06d.tar"):
        with pytest.raises(InputError, match="numbered by %06d"), archives(tmp_path / name, 3):
            pass


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_gif_plays_every_frame(tmp_path, channels):
    frames = np.zeros((6, 8, 8, channels), np.uint8)
    frames[:, :, :, 0] = np.arange(6)[:, None, None] * 40
    frames[..., -1] = 255 if channels in (2, 4) else frames[..., -1]
    save_video(tmp_path / "a.gif", frames, 20, scale=3)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (
            6,
            (24, 24),
            50,
            0,
        )
        for index in range(6):
            gif.seek(index)
            assert np.asarray(gif.convert("RGB"))[5, 5, 0] == index * 40


def test_an_mp4_plays_every_frame(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    frames = (
        np.zeros((12, 28, 28, 1), np.uint8)
        + np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    )
    save_video(tmp_path / "a.mp4", frames, 25, scale=2)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        meta = video.get_meta_data()
        played = np.stack(list(video.iter_data()))
    assert (meta["fps"], meta["size"], meta["codec"]) == (25, (56, 56), "h264")
    assert played.shape == (12, 56, 56, 3)
    assert np.abs(played.mean(axis=(1, 2, 3)) - np.arange(12) * 20).max() < 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
