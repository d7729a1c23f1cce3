"""`python -m fastdcgan.augment` as users run it: sets of every form, the manifest, going on after a
kill, and one clear line for what cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdcgan.augment import main
from fastdcgan.errors import RunError
from fastdcgan.latent.draw import load_generator
from fastdcgan.synthetic_data import making
from fastdcgan.synthetic_data.drawing import draw_passing

TINY = ["--image-size=32", "--nz=6", "--ngf=4", "--ndf=4", "--batch-size=8", "--steps=3",
        "--no-tensorboard"]  # fmt: skip
CLASSES = ["blue", "green", "red"]


class Means(torch.nn.Module):
    """A network of features that costs nothing: means of 8 x 8 pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labelled images in set.npz, a network in means.pt, a finished call in syn/ and syn-runs/."""
    folder = tmp_path_factory.mktemp("augment")
    random = np.random.default_rng(0)
    images = random.integers(0, 20, (30, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    images[np.arange(30), ..., 2 - np.arange(30) % 3] += 220
    labels = np.array(CLASSES)[np.arange(30) % 3]
    np.savez(folder / "set.npz", images=images, labels=labels)
    np.savez(folder / "other.npz", images=images[::-1], labels=labels)
    np.savez(folder / "bare.npz", images=images)
    np.savez(folder / "few.npz", images=images[:25], labels=np.repeat(["a", "b"], [20, 5]))
    torch.jit.trace(Means(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).save(folder / "means.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*call("syn"), "--to", "folder"]) == 0
    return folder


def call(out, *more, data="set.npz", n="12"):
    return ["--data", data, "--per-class", n, "--out", out, "--features", "means.pt",
            "--reject", "none", *TINY, *more]  # fmt: skip


def set_of(out):
    """The images of a written .npz, and the manifest."""
    with np.load(Path(out) / "images.npz") as held:
        return held["images"], held["labels"], json.loads((Path(out) / "manifest.json").read_text())


def weights(run):
    return load_file(run / "netG.safetensors")


def test_help_needs_no_torch(environment):
    script = (
        "import sys\n"
        "from fastdcgan import augment\n"
        "try:\n"
        "    augment.main(['--help'])\n"
        "except SystemExit:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("python -m fastdcgan.augment --data") == 2
    assert "--r1" in done.stdout  # a training option
    assert "--dry-run" not in done.stdout  # the command's own matter


def test_a_folder_with_its_manifest(folder):
    manifest = json.loads((folder / "syn" / "manifest.json").read_text())
    assert manifest["classes"] == CLASSES
    assert {p.name for p in (folder / "syn").iterdir()} == {*CLASSES, "manifest.json"}
    for name in CLASSES:
        pictures = sorted((folder / "syn" / name).iterdir())
        assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(12)]
        with Image.open(pictures[0]) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
        counts = manifest["counts"][name]
        assert (counts["real"], counts["kept"], counts["rejected"]) == (10, 12, 0)
        assert counts["drawn"] == 12 + counts["copies"]
        assert counts["copy_radius"] > 0
    assert len({counts["seed"] for counts in manifest["counts"].values()}) == 3
    assert manifest["training"]["steps"] == 3
    assert manifest["source"]["data"] == "set.npz"
    assert manifest["versions"]["torch"] == torch.__version__
    assert not (folder / "syn-runs" / "drawn").exists()
    shapes = {tuple(np.load(p).shape) for p in (folder / "syn-runs" / "data").iterdir()}
    assert shapes == {(10, 32, 32, 3)}


def test_each_generator_is_trained_on_its_class(folder):
    with np.load(folder / "set.npz") as held:
        for name in CLASSES:
            mine = held["images"][held["labels"] == name]
            assert np.array_equal(np.load(folder / "syn-runs" / "data" / f"{name}.npy"), mine)


def test_more_sets_from_the_same_runs(folder, monkeypatch, capsys, tmp_path):
    """By name in any order; the same seed draws the same, another one others, D has its say; and
    the second call of the same command trains nothing."""
    monkeypatch.chdir(folder)
    runs = [f"syn-runs/generators/{name}" for name in reversed(CLASSES)]
    args = call(str(tmp_path / "a"), "--to", "npz", "--from", *runs)
    assert main(args) == 0
    assert "36 images in" in capsys.readouterr().out
    images, labels, manifest = set_of(tmp_path / "a")
    assert np.bincount(labels).tolist() == [12] * 3
    assert manifest["training"] is None
    for label, name in enumerate(CLASSES):
        pictures = sorted((folder / "syn" / name).iterdir())
        drawn = np.stack([np.asarray(Image.open(p)) for p in pictures])
        assert np.array_equal(images[labels == label], drawn)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert main(args) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*args, "--force", "--seed", "1"]) == 0
    assert not np.array_equal(images, set_of(tmp_path / "a")[0])
    assert main([*args, "--force", "--reject", "d"]) == 0
    manifest = set_of(tmp_path / "a")[2]
    assert manifest["reject"] == {"rule": "d", "reject_share": 0.2}
    counts = manifest["counts"].values()
    assert sum(c["rejected"] for c in counts) > 0
    assert all(c["kept"] + c["rejected"] + c["copies"] == c["drawn"] for c in counts)
    before = weights(folder / "syn-runs" / "generators" / "red")
    monkeypatch.setattr("fastdcgan.training.train", None)
    assert main(call(str(tmp_path / "b"), "--runs", "syn-runs", "--to", "webdataset")) == 0
    assert "red, 3 of 3: syn-runs/generators/red is trained" in capsys.readouterr().err
    after = weights(folder / "syn-runs" / "generators" / "red")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_generator_of_all_classes(folder, monkeypatch, capsys, tmp_path):
    """--classes: each class is drawn by its own label, also from the run alone."""
    monkeypatch.chdir(folder)
    args = call(str(tmp_path / "a"), "--classes", "--to", "npz", "--seed", "5")
    assert main([*args, "--runs", "classes-runs"]) == 0
    images, labels, manifest = set_of(tmp_path / "a")
    run = Path("classes-runs/generators/all")
    assert [p.name for p in run.parent.iterdir()] == ["all"]
    assert load_generator(run).classes == tuple(CLASSES)
    assert [manifest["counts"][name]["kept"] for name in CLASSES] == [12] * 3
    args = call(str(tmp_path / "b"), "--to", "npz", "--seed", "5", "--from", str(run))
    assert main(args) == 0
    assert np.array_equal(set_of(tmp_path / "b")[0], images)
    assert main([*args, "--force", "--reject", "d", "--reject-share", "0.5"]) == 0
    rejected = [c["rejected"] for c in set_of(tmp_path / "b")[2]["counts"].values()]
    assert min(rejected) > 0
    draw = making.Sampler.pixels

    def showing_labels(self, batches, labels):
        for images in draw(self, batches, labels=labels):
            yield images * 0 + labels.numpy().astype(np.uint8)[:, None, None, None] * 50

    monkeypatch.setattr(making.Sampler, "pixels", showing_labels)
    assert main([*args, "--force"]) == 0
    images, labels, _ = set_of(tmp_path / "b")
    assert (images == labels[:, None, None, None] * 50).all()
    capsys.readouterr()
    assert main(call("new", "--from", str(run), "syn-runs/generators/red", "x")) == 1
    assert main(call("new", "--from", str(run), str(run), str(run))) == 1
    assert main(call("new", "--from", str(run), data="few.npz")) == 1
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert "x" in errors[0]
    assert "draws 3 classes: give it alone" in errors[1]
    assert "does not know of a, b" in errors[2]


def test_copies_never_get_into_a_set(folder, monkeypatch, tmp_path):
    """A generator that draws real images, slightly brightened, among its own."""
    monkeypatch.chdir(folder)
    with np.load("set.npz") as held:
        real = held["images"][held["labels"] == "blue"]
    brighter = np.minimum(real, 252) + 3
    draw = making.Sampler.pixels

    def planting(self, batches, **options):
        for images in draw(self, batches, **options):
            images[::3] = brighter[np.arange(len(images[::3])) % 10]
            yield images

    monkeypatch.setattr(making.Sampler, "pixels", planting)
    runs = [f"syn-runs/generators/{name}" for name in CLASSES]
    assert main(call(str(tmp_path / "a"), "--to", "npz", "--from", *runs)) == 0
    images, labels, manifest = set_of(tmp_path / "a")
    copies = {image.tobytes() for image in brighter}
    assert not any(image.tobytes() in copies for image in images[labels == 0])
    counts = manifest["counts"]["blue"]
    assert (counts["copies"], counts["drawn"], counts["kept"]) == (6, 18, 12)


def test_too_many_rejections_end_in_one_line_and_lose_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = call("short", "--runs", "syn-runs", "--max-draws", "3", "--to", "npz")
    density = [*args, "--reject", "density", "--nearest", "1"]
    assert main(density) == 1  # generators that have learnt nothing are in no real image's ball
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "of 12 images of each class blue has 0 after 36 draws (0 copies, 36 rejected)" in error
    assert "--max-draws" in error
    assert not Path("short").exists()
    looked = []

    def watching(sample, screen, begun, **options):
        found = draw_passing(sample, screen, begun, **options)
        looked.append(found.drawn - begun.drawn)
        return found

    monkeypatch.setattr(making.drawing, "draw_passing", watching)
    assert main([*density, "--max-draws", "5"]) == 1
    assert looked == [24] * 3
    assert main([*args, "--max-draws", "3"]) == 0
    assert np.bincount(set_of("short")[1]).tolist() == [12] * 3


@pytest.fixture(scope="module")
def uninterrupted(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(call("again", "--to", "npz", "--runs", "syn-runs")) == 0
    return set_of(folder / "again")


def test_killed_while_training_it_goes_on(folder, uninterrupted, environment, monkeypatch, capsys):
    """By SIGKILL, in the second class: the first is not trained again, and the set is the same."""
    args = call("killed", "--to", "npz")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdcgan.augment", *args], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "class green" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.wait()
    first = folder / "killed-runs" / "generators" / "blue" / "netG.safetensors"
    trained = first.stat().st_mtime_ns
    assert not (folder / "killed").exists()
    monkeypatch.chdir(folder)
    assert main(args) == 0
    said = capsys.readouterr().err
    assert "class blue, 1 of 3: killed-runs/generators/blue is trained" in said
    assert "class green, 2 of 3: training" in said
    assert first.stat().st_mtime_ns == trained
    images, labels, _ = set_of("killed")
    assert np.array_equal(images, uninterrupted[0])
    assert np.array_equal(labels, uninterrupted[1])


def test_stopped_while_drawing_it_goes_on(folder, uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = call("stopped", "--to", "npz", "--runs", "syn-runs")
    calls = []

    def stopping(sample, screen, begun, **options):
        calls.append(len(begun.images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_passing(sample, screen, begun, **options)

    monkeypatch.setattr(making.drawing, "draw_passing", stopping)
    assert main(args) == 1
    assert "error: stopped; the same command goes on" in capsys.readouterr().err
    assert main(args) == 0
    assert calls == [0, 0, 0, 12, 12, 0]
    assert np.array_equal(set_of("stopped")[0], uninterrupted[0])


def test_a_run_that_was_interrupted_stops_the_command(folder, monkeypatch):
    from fastdcgan.synthetic_data import generators
    from fastdcgan.training import TrainConfig, TrainResult

    monkeypatch.setattr(
        "fastdcgan.training.train",
        lambda config: TrainResult(1, 1.0, config.out, 0.0, 0.0, interrupted=True),
    )
    with pytest.raises(RunError, match="stopped while training class a; the same command goes on"):
        generators._train(TrainConfig(out=folder / "nowhere"), "class a", print)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (call("new", data="bare.npz"), "labels"),
        (call("new", data="missing.npz"), "no images at"),
        (call("new", n="0"), "--per-class 0 was given; it must be at least 1"),
        (call("new", data="few.npz"), "too few images of b (5): a batch takes 8: lower"),
        (
            call("new", "--reject", "density", "--nearest", "10"),
            "too few images of blue (10), green (10), red (10): density looks at 10 neighbours",
        ),
        (call("syn"), "syn exists already: choose another name, or --force"),
        (call("syn-runs", "--force"), "syn-runs is no set of this command"),
        (call("new", "--from", "nowhere", "x", "y"), "nowhere"),
        (call("new", "--from", "syn-runs/generators/red"), "--from was given 1 run, and there are"),
        (call("new", "--runs", "syn-runs", "--ngf", "8"), "--ngf: 4 -> 8"),
        (call("new", "--runs", "syn-runs", data="other.npz"), "were trained on other images"),
        (call("new", "--reject-share", "1"), "--reject-share 1.0 was given"),
        (call("new", "--image-size", "33"), "--image-size 33"),
        (call("new", "--features", "missing.pt"), "--features missing.pt"),
        (call("set.npz/new"), "cannot write"),
        (call("."), "--out . was given"),
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    assert main(args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not Path("new").exists()
