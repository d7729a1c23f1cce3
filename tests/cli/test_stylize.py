"""`python -m fastdcgan.stylize` as users run it, and the example that calls the library."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.stylize import main

EXAMPLES = Path(__file__).parents[2] / "examples"
MAP = ["--content", "blue-marble@42,15", "--style", "blue-marble@24,5,2", "--from", "run"]


@pytest.fixture(scope="module")
def folder(command, tiny_data, tmp_path_factory):
    """A finished run of 4 steps in run/, its data in real.npy."""
    folder = tmp_path_factory.mktemp("stylize")
    args = "--image-size 32 --nz 6 --ngf 4 --ndf 4 --batch-size 8 --steps 4 --no-tensorboard"
    done = command(
        "fastdcgan.train", "--data", tiny_data, *args.split(), "--out", "run", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    np.save(folder / "real.npy", np.load(tiny_data))
    np.save(folder / "grey.npy", np.load(tiny_data)[..., 0])
    return folder


def test_both_spaces_and_both_ways_as_json(command, folder):
    args = ["--in", "both", "--reverse", "--steps", "4", "--restarts", "1", "--n", "2"]
    done = command(
        "fastdcgan.stylize", *MAP, *args, "--json", "--sheet", "s.png", "--out", "out", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    changes = json.loads(line)["changes"]
    assert [c["space"] for c in changes] == ["pixels", "latent", "pixels", "latent"]
    for change in changes:
        assert {"gram_before", "gram_after", "edges", "content", "style"} <= change.keys()
    assert changes[0]["content"] == changes[2]["style"]
    assert changes[0]["gram_after"] < changes[0]["gram_before"]
    with Image.open(folder / "s.png") as sheet:
        assert sheet.size == (6 + 4 * (96 + 6), 18 + 3 * (96 + 6)), "1 row there, 2 rows back"
    assert len(list((folder / "out").iterdir())) == 2, "one content image in two spaces"


def test_a_set_and_a_seed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = ["--content", "real.npy", "--style", "blue-marble@24,5", "--from", "run", "--n", "3"]
    args += ["--features", "discriminator", "--steps", "5"]
    for name, more in {"a": [], "b": [], "c": ["--strength", "0"]}.items():
        assert main([*args, *more, "--out", f"{name}.npz"]) == 0
    assert "Gram distance" in capsys.readouterr().out
    a, b, c = (np.load(f"{name}.npz")["images"] for name in "abc")
    assert a.shape == (3, 32, 32, 3)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert main([*args, "--out", "a.npz"]) == 1
    assert "a.npz exists already" in capsys.readouterr().err


def test_the_example_runs(folder, environment):
    """With fewer steps: the example's own are for people who wait."""
    script = (
        "import runpy, sys, functools, fastdcgan.stylisation.files as files\n"
        "files.stylize = functools.partial(files.stylize, steps=2, restarts=1)\n"
        "sys.argv = ['x', 'run', 'blue-marble@42,15', 'blue-marble@24,5', 'example.png']\n"
        f"runpy.run_path({str(EXAMPLES / 'stylize.py')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "latent" in done.stdout
    assert (folder / "example.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*MAP[:4], "--from", "nowhere"], "nowhere"),
        ([*MAP, "--content", "grey.npy"], "has images of 1 channel; the run's have 3"),
        ([*MAP, "--style", "blue-marble@north"], "is no place on the map"),
        ([*MAP, "--style", "blue-marble@0,0,200"], "more than the map has"),
        ([*MAP, "--content", "missing"], "no images at"),
        ([*MAP, "--strength", "1.5"], "--strength 1.5"),
        ([*MAP, "--steps", "0"], "--steps 0"),
        ([*MAP, "--sheet", "real.npy"], "cannot write real.npy"),
        ([*MAP, "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    assert main(args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
