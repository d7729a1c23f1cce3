"""`python -m fastdcgan.data` as a user runs it, and what importing the package loads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for index in range(70):
        Image.new("RGB", (8, 8), (index + 1, 0, 0)).save(root / f"{index:02}.png")
    return root


def test_packs_describes_and_draws(folder: Path, cache: Path, command: Callable[..., Any]) -> None:
    sheet = folder.parent / "sheet.png"
    args = ("--data", folder, "--size", 8, "--sheet", sheet, "--cache", cache)
    done = command("fastdcgan.data", *args)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["source"] == f"{folder} (train)"
    assert facts["images"] == "70, 0 skipped"
    assert (facts["size"], facts["channels"], facts["bytes"]) == ("8x8", "3", "13,440")
    assert Path(facts["path"]).parent == cache
    assert len(facts["sha256"]) == 64
    assert done.stderr.startswith("packed 70 images of photos")
    assert done.stderr.count("\n") == 1
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (82, 82, 3)  # 8 x 8 images of 8, padded by 2
    assert (pixels[2, 2, 0], pixels[79, 79, 0]) == (1, 70)
    assert command("fastdcgan.data", *args).stderr == ""


def test_help_is_torch_free_and_has_examples(environment: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "import fastdcgan.data\n"
        "from fastdcgan.data.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'torchvision', 'PIL', 'rich.progress'} & set(sys.modules)\n"
        "    print('heavy:', *heavy, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == "heavy:\n"
    assert done.stdout.count("python -m fastdcgan.data --data") == 2


def test_packing_does_not_load_torch(folder: Path, environment: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from fastdcgan.data import prepare\n"
        f"prepare({str(folder)!r}, size=8)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_every_public_name_is_there() -> None:
    import fastdcgan.data

    for name in fastdcgan.data.__all__:
        assert getattr(fastdcgan.data, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = fastdcgan.data.nothing


def test_bad_input_is_one_line_and_no_traceback(folder: Path, command: Callable[..., Any]) -> None:
    done = command("fastdcgan.data", "--data", folder / "missing")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: no images at {folder / 'missing'}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--data", "/"],
        ["--size", "0"],
        ["--size", "300"],
        ["--workers", "-1"],
        ["--sheet", "sheet.xyz"],
        ["--sheet", "no/such/folder/sheet.png"],
        ["--split", "test"],
    ],
)
def test_bad_options_are_one_line(
    folder: Path, args: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--data", str(folder), *args]
    if args[0] == "--data":
        (tmp_path / "empty").mkdir()
        given = ["--data", str(tmp_path / "empty")]
    elif args == ["--size", "300"]:
        given = ["--data", "blue-marble", *args]
    assert main(given) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert all(line.startswith(("error: ", "packed ")) for line in lines)


def test_flags_that_do_not_parse_end_with_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--size", "large"])
    assert caught.value.code == 2
