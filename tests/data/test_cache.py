"""prepare(): packed once, opened at once after that, whole or absent whatever happens."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data import Packed, cache, decode, prepare
from fastdcgan.data.sources import Item, Source
from fastdcgan.errors import InputError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 pictures of 64x64, each of its own colour."""
    root = tmp_path / "pictures"
    root.mkdir()
    for index in range(100):
        Image.new("RGB", (64, 64), (index, 2 * index, 0)).save(root / f"{index:03}.png")
    return root


def pack(folder: Path, **options: Any) -> Packed:
    return prepare(str(folder), **{"size": 64, "progress": False, **options})


def entries(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.iterdir() if not file.name.endswith(".lock"))


def refuse_to_decode(*args: object) -> np.ndarray:
    raise AssertionError("decoded again")


@pytest.mark.parametrize("workers", [1, 5])
def test_images_are_packed_in_the_order_of_the_source(folder: Path, workers: int) -> None:
    packed = pack(folder, workers=workers)
    assert packed.images.shape == (100, 64, 64, 3)
    assert packed.images.dtype == np.uint8
    np.testing.assert_array_equal(packed.images[:, 0, 0, 0], range(100))
    assert (packed.images == packed.images[:, :1, :1]).all()


def test_the_manifest_says_what_was_packed(folder: Path, cache: Path) -> None:
    packed = pack(folder, channels=1, size=16)
    facts = json.loads((packed.path / "manifest.json").read_text())
    data = (packed.path / "images.u8").read_bytes()
    assert data == packed.images.tobytes()
    assert facts["sha256"] == packed.sha256 == hashlib.sha256(data).hexdigest()
    assert packed.nbytes == len(data) == 100 * 16 * 16
    assert (facts["location"], facts["n"], facts["epoch_images"]) == (str(folder), 100, 100)
    assert (facts["size"], facts["window"], facts["channels"]) == (16, 16, 1)
    assert (facts["split"], facts["skipped"], facts["hflip"]) == ("train", 0, False)
    assert packed.path.parent == cache
    assert packed.path.name.startswith("pictures-16-")
    assert sorted(file.name for file in packed.path.iterdir()) == ["images.u8", "manifest.json"]


def test_the_second_call_opens_without_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(folder)
    monkeypatch.setattr(decode, "decode", refuse_to_decode)
    second = pack(folder)
    assert second.path == first.path
    np.testing.assert_array_equal(second.images, first.images)
    monkeypatch.chdir(folder.parent)
    assert pack(Path("pictures")).path == first.path


def test_every_option_that_changes_the_pixels_has_an_entry_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pictures").symlink_to(folder)
    packed = [
        pack(folder),
        pack(folder, size=32),
        pack(folder, channels=1),
        pack(tmp_path / "other" / "pictures"),
    ]
    assert len({each.path for each in packed}) == len(packed)


def test_writing_to_the_images_never_reaches_the_file(folder: Path) -> None:
    packed = pack(folder)
    packed.images[:] = 7
    assert (pack(folder).images != 7).any()


@pytest.mark.parametrize("change", ["touch", "add", "remove"])
def test_a_changed_source_is_said_and_packed_again(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    first = pack(folder)
    if change == "touch":
        Image.new("RGB", (64, 64), "white").save(folder / "000.png")
        os.utime(folder / "000.png", ns=(1, 1))
    elif change == "add":
        Image.new("RGB", (64, 64), "white").save(folder / "zzz.png")
    else:
        (folder / "000.png").unlink()
    capsys.readouterr()
    second = pack(folder)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has changed" in err
    assert second.sha256 != first.sha256
    assert entries(cache) == [second.path.name] == [first.path.name]
    assert (first.images[0] == 0).all()  # whoever had it open keeps what he had
    assert pack(folder).sha256 == second.sha256
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["short", "long", "missing", "manifest", "keys"])
def test_an_entry_that_is_not_whole_is_made_again(folder: Path, damage: str) -> None:
    first = pack(folder)
    images, manifest = first.path / "images.u8", first.path / "manifest.json"
    if damage == "short":
        os.truncate(images, images.stat().st_size - 1)
    elif damage == "long":
        os.truncate(images, images.stat().st_size + 1)
    elif damage == "missing":
        images.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text("{}")
    second = pack(folder)
    assert hashlib.sha256(images.read_bytes()).hexdigest() == first.sha256 == second.sha256


def test_broken_files_are_skipped_counted_and_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (folder / "010.png").read_bytes()
    (folder / "010.png").write_bytes(data[: len(data) // 2])
    (folder / "020.png").write_text("no picture")
    packed = pack(folder, progress=True)
    assert (packed.n, packed.skipped, packed.epoch_images) == (98, 2, 98)
    assert 10 not in packed.images[:, 0, 0, 0]
    listed = [line.split("\t") for line in (packed.path / "skipped.txt").read_text().splitlines()]
    assert [label for label, _ in listed] == ["010.png", "020.png"]
    assert all(reason for _, reason in listed)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "98 images" in err
    assert f"2 skipped (see {packed.path / 'skipped.txt'})" in err


def test_nothing_but_broken_files_is_an_error_with_the_reasons(tmp_path: Path, cache: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_text("no picture")
    with pytest.raises(InputError, match=r"none of the 5 images .* a\.png: not a picture"):
        pack(tmp_path)
    assert entries(cache) == []


def test_little_work_waits_however_large_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    read = decoded = most = 0

    def items(window: int) -> Iterator[Item]:
        nonlocal read, most
        for index in range(1000):
            read += 1
            most = max(most, read - decoded)
            yield str(index), lambda: np.zeros((8, 8, 3), np.uint8)

    def slow(*args: Any) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        time.sleep(1e-4)
        return np.zeros((8, 8, 3), np.uint8)

    source = Source("made", "made", 3, "", items)
    monkeypatch.setattr(cache, "open_source", lambda *args, **options: source)
    monkeypatch.setattr(decode, "decode", slow)
    assert prepare("made", size=8, workers=2, progress=False).n == 1000
    assert most <= 6 * cache.CHUNK


# A process that notes every picture that it decodes, taking its time.
SLOW = """
import sys, time
from fastdcgan.data import cache, decode
plain = decode.decode
def slow(picture, *args):
    if isinstance(picture, bytes):  # decode opens a file and calls itself with the picture
        time.sleep(float(sys.argv[2]))
        print("decoded", flush=True)
    return plain(picture, *args)
decode.decode = slow
print(cache.prepare(sys.argv[1], size=64, workers=1, progress=False).sha256)
"""


def start(folder: Path, environment: dict[str, str], cache: Path, pause: float) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(pause)],
        env={**environment, "FASTDCGAN_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_share_the_work(
    folder: Path, cache: Path, environment: dict[str, str]
) -> None:
    both = [start(folder, environment, cache, 0.01) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(out.count("decoded") for out, _ in outputs) == 100
    assert outputs[0][0].split()[-1] == outputs[1][0].split()[-1]
    assert "waiting for another process" in "".join(err for _, err in outputs)


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(
    folder: Path, cache: Path, environment: dict[str, str]
) -> None:
    process = start(folder, environment, cache, 0.02)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in cache.glob("*/images.u8")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = entries(cache)
    assert left.endswith(".partial")
    packed = pack(folder)
    assert packed.n == 100
    assert packed.sha256 == hashlib.sha256(packed.images.tobytes()).hexdigest()
    assert entries(cache) == [packed.path.name]


def test_a_cache_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to the cache") as caught:
        pack(folder, cache=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, cache: Path, environment: dict[str, str]
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    command = "import sys; from fastdcgan.data.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", limit + command, "--data", str(folder)],
        env={**environment, "FASTDCGAN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the cache")
    assert done.stderr.count("\n") == 1
    assert entries(cache) == []
