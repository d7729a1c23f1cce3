"""`python -m fastdcgan.inpaint` as users run it, and the example that calls the library."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.inpaint import main

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--steps", "3", "--restarts", "2", "--pool", "16"]


@pytest.fixture(scope="module")
def folder(command, tiny_data, tmp_path_factory):
    """A finished run of 4 steps in run/, its data in real.npy, and odd files."""
    folder = tmp_path_factory.mktemp("inpaint")
    args = "--image-size 32 --nz 6 --ngf 4 --ndf 4 --batch-size 8 --steps 4 --no-tensorboard"
    done = command(
        "fastdcgan.train", "--data", tiny_data, *args.split(), "--out", "run", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    images = np.load(tiny_data)
    np.save(folder / "real.npy", images)
    np.save(folder / "grey.npy", images[..., 0])
    Image.fromarray(images[0]).save(folder / "photo.png")
    Image.fromarray(images[0].repeat(2, axis=0)).save(folder / "large-mask.png")
    (folder / "broken.png").write_text("no picture")
    return folder


def test_help_needs_no_torch(environment):
    script = (
        "import sys\n"
        "from fastdcgan import inpaint, stylize\n"
        "for command in (inpaint, stylize):\n"
        "    try:\n"
        "        command.main(['--help'])\n"
        "    except SystemExit:\n"
        "        assert not {'torch', 'cv2', 'scipy', 'skimage'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    for name in ("inpaint", "stylize"):
        assert done.stdout.count(f"python -m fastdcgan.{name} --") >= 2


def test_json_sheet_and_files(command, folder):
    args = ["--from", "run", "--images", "real.npy", "--n", "5", *QUICK]
    done = command(
        "fastdcgan.inpaint", *args, "--json", "--sheet", "sheet.png", "--out", "filled.npz",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert (report["n"], report["mask"], report["share"]) == (5, "center", 0.25)
    assert report["scores"].keys() == {"ours", "mean", "telea"}
    assert all(scores.keys() == {"psnr", "ssim"} for scores in report["scores"].values())
    filled = np.load(folder / "filled.npz")["images"]
    assert (filled.shape, filled.dtype) == ((5, 32, 32, 3), np.uint8)
    real = np.load(folder / "real.npy")
    seen = np.ones((32, 32), bool)
    seen[8:24, 8:24] = False
    for image in filled:  # its pixels outside of the mask are one of the given images'
        same = [np.array_equal(image[seen], other[seen]) for other in real]
        assert sum(same) == 1
        truth = real[same.index(True)]
        assert not np.array_equal(image, truth)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == (6 + 5 * (96 + 6), 18 + 5 * (96 + 6))


def test_the_same_seed_fills_alike_and_a_picture_becomes_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = ["--from", "run", "--images", "photo.png", "--mask", "left", *QUICK, "--seed", "-1"]
    assert main([*args, "--out", "a"]) == 0
    assert "mask    left: 50.0% hidden" in capsys.readouterr().out
    assert main([*args, "--out", "b.npz"]) == 0
    assert main([*args, "--out", "c.npz", "--seed", "1", "--amp"]) == 0
    a = np.asarray(Image.open("a/000000.png"))
    b, c = (np.load(f"{name}.npz")["images"][0] for name in "bc")
    assert np.array_equal(a, b)
    assert not np.array_equal(b, c)
    assert main([*args, "--out", "b.npz"]) == 1
    assert "b.npz exists already" in capsys.readouterr().err
    assert main([*args, "--out", "b.npz", "--force", "--mask", "lowres", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"].keys() == {"ours", "bicubic"}


def test_the_example_runs(folder, monkeypatch, environment):
    """With fewer steps: the example's own are for people who wait."""
    script = (
        "import runpy, sys, functools, fastdcgan.inpainting.files as files\n"
        "files.inpaint = functools.partial(files.inpaint, steps=2, restarts=1, pool=8)\n"
        "sys.argv = ['inpaint.py', 'run', 'real.npy', 'example.png']\n"
        f"runpy.run_path({str(EXAMPLES / 'inpaint.py')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "telea" in done.stdout
    assert (folder / "example.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from", "nowhere", "--images", "real.npy"], "nowhere"),
        (["--from", ".", "--images", "real.npy"], "is no run"),
        (["--from", "run", "--images", "missing.npy"], "no images at"),
        (["--from", "run", "--images", "grey.npy"], "has images of 1 channel; the run's have 3"),
        (["--from", "run", "--images", "broken.png"], "broken.png cannot be read as a picture"),
        (["--from", "run", "--images", "real.npy", "--mask", "large-mask.png"], "has 32 x 64"),
        (["--from", "run", "--images", "real.npy", "--mask", "nothing"], "--mask nothing"),
        (["--from", "run", "--images", "real.npy", "--n", "0"], "--n 0 was given"),
        (["--from", "run", "--images", "real.npy", "--strength", "2"], "--strength 2.0"),
        (["--from", "run", "--images", "real.npy", "--prior", "-1"], "--prior -1.0"),
        (["--from", "run", "--images", "real.npy", "--out", "x.jpg"], "a .npz file or a folder"),
        (["--from", "run", "--images", "real.npy", "--out", "no/x.npz"], "there is no folder no"),
        (["--from", "run", "--images", "real.npy", "--sheet", "x.xyz"], "cannot write x.xyz"),
        (["--from", "run", "--images", "real.npy", "--device", "abacus"], "--device abacus"),
        (["--from", "run", "--images", "blue-marble@99,0"], "is no place on the map"),
        (["--from", "run/netG.safetensors", "--images", "real.npy"], "netG.safetensors"),
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    assert main(args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_extra_is_one_line(command, environment, folder, tmp_path):
    """With a package that cannot be imported, as if it were not installed."""
    (tmp_path / "cv2.py").write_text("raise ModuleNotFoundError('hidden', name='cv2')")
    done = command(
        "fastdcgan.inpaint", "--from", "run", "--images", "real.npy", cwd=folder,
        env={"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: this needs cv2, which is not installed: pip install 'fastdcgan[edit]'\n"
    )
