"""`python -m fastdcgan.evaluate` as users run it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastdcgan.evaluate import main
from fastdcgan.latent.draw import draw, load_generator
from fastdcgan.metrics import evaluate

SCORES = {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
SCORES |= {"spectrum_db", "peak"}


@pytest.fixture(scope="module")
def folder(command, tiny_data, tmp_path_factory):
    """A finished run of 4 steps in run/, and its data in real.npy."""
    folder = tmp_path_factory.mktemp("evaluate")
    args = "--image-size 32 --nz 6 --ngf 4 --ndf 4 --batch-size 8 --steps 4 --no-tensorboard"
    done = command(
        "fastdcgan.train", "--data", tiny_data, *args.split(), "--out", "run", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    np.save(folder / "real.npy", np.load(tiny_data))
    return folder


def test_help_needs_no_torch(environment):
    script = (
        "import sys, fastdcgan.metrics\n"
        "from fastdcgan import evaluate\n"
        "try:\n"
        "    evaluate.main(['--help'])\n"
        "except SystemExit:\n"
        "    assert not {'torch', 'torchmetrics', 'sklearn'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert "--neighbours" in done.stdout


def test_a_run_as_json_and_with_neighbours(command, folder):
    done = command(
        "fastdcgan.evaluate",
        *("--real", "real.npy", "--fake", "run", "--json", "--neighbours", "near.png"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert SCORES | {f"{name}_floor" for name in SCORES} | {"n", "features"} <= found.keys()
    assert (found["n"], found["features"], found["image_size"]) == (18, "lite0", 32)
    assert all(isinstance(found[name], float) for name in SCORES)
    assert found["fid"] > found["fid_floor"], "four steps of training"
    assert "n is 18, not 10,000: there are 36 real images" in done.stderr
    with Image.open(folder / "near.png") as sheet:
        assert sheet.size == (2 + 66 + 8 + 2 + 6 * 66, 2 + 16 * 66), "16 rows of 1 and 6"
        # The last six columns are training images: blocks of 8 x 8 pixels, enlarged to 16 x 16.
        nearest = np.asarray(sheet)[2:66, 2 + 66 + 8 + 2 :][:, :64]
    real = np.load(folder / "real.npy").repeat(2, axis=1).repeat(2, axis=2)
    assert any(np.array_equal(nearest, image) for image in real)


def test_a_table_for_people_names_network_and_n(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["--real", "real.npy", "--fake", "run", "--n", "8"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "FID[lite0]",
        "KID[lite0]",
        "coverage[lite0]",
        "spectrum, dB ",
        "peak of a grid ",
        "n = 8",
        "32x32x3",
    ):
        assert text in printed


def test_a_file_of_the_runs_images_scores_as_the_run(folder, monkeypatch):
    """The same images drawn, from an array, and from pictures."""
    monkeypatch.chdir(folder)
    images = np.concatenate(list(draw(load_generator(folder / "run"), 18)))
    np.savez("fake.npz", images=images)
    (folder / "pictures").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "pictures" / f"{index:02d}.png")
    run, *files = (
        evaluate("real.npy", fake, n=18, progress=False).comparison.scores
        for fake in ("run", "fake.npz", "pictures")
    )
    for scores in files:  # in another order, which only the ten splits of IS can tell
        assert (scores.precision, scores.coverage) == (run.precision, run.coverage)
        assert scores.fid == pytest.approx(run.fid, rel=1e-6)
        assert scores.kid == pytest.approx(run.kid, rel=1e-6)


def test_a_source_beside_itself_is_not_the_same_images(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scores = evaluate("real.npy", "real.npy", n=9, progress=False).comparison.scores
    assert scores.fid > 1


def test_real_images_follow_the_size_and_channels_of_the_fakes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    grey = np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8)
    np.save("grey.npy", grey)
    facts = evaluate("real.npy", "grey.npy").facts
    assert "real.npy has images of 3 channels: compared as 1" in capsys.readouterr().err
    assert (facts["image_size"], facts["channels"]) == (20, 1)
    assert "12 + 12 of 36 images, 20x20x1" in facts["real"]
    assert evaluate("real.npy", "grey.npy", image_size=16, progress=False).facts["image_size"] == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--real", "real.npy", "--fake", "nowhere"], "--fake nowhere is neither a run nor images"),
        (["--real", "nowhere", "--fake", "run"], "no images at"),
        (["--real", "real.npy", "--fake", "run", "--n", "5"], "--n 5 was given"),
        (["--real", "few.npy", "--fake", "run"], "8 real images"),
        (
            ["--real", "real.npy", "--fake", "run", "--image-size", "64"],
            "--image-size 64 was given",
        ),
        (["--real", "real.npy", "--fake", "run/netD.safetensors"], "netD.safetensors"),
        (["--real", "real.npy", "--fake", "run", "--features", "vgg"], "--features vgg"),
        (["--real", "real.npy", "--fake", "run", "--device", "abacus"], "--device abacus"),
        (["--real", "real.npy", "--fake", "run", "--neighbours", "x.xyz"], "x.xyz"),
        (["--real", "real.npy", "--fake", "run", "--neighbours", "no/x.png"], "no/x.png"),
        (["--real", "real.npy", "--fake", "run", "--probe", "real.npy"], "no labels"),
        (["--real", "real.npy", "--fake", "real.npy", "--probe", "real.npy"], "real.npy"),
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    np.save("few.npy", np.load("real.npy")[:8])
    assert main(args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_extra_is_one_line(command, environment, folder, tmp_path):
    """With packages that cannot be imported, as if they were not installed."""
    (tmp_path / "torchmetrics.py").write_text("raise ImportError('hidden')")
    done = command(
        "fastdcgan.evaluate",
        *("--real", "real.npy", "--fake", "run", "--json"),
        cwd=folder,
        env={"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "pip install 'fastdcgan[metrics]'" in done.stderr
