"""`python -m fastdcgan.generate`: on our runs, on foreign checkpoints, and the files it writes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdcgan import models
from fastdcgan.generate import main


@pytest.fixture(scope="module")
def run(command, tiny_data, tmp_path_factory):
    """A finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("generate")
    args = "--image-size 32 --nz 6 --ngf 4 --ndf 4 --batch-size 8 --steps 6 --no-tensorboard"
    done = command(
        "fastdcgan.train", "--data", tiny_data, *args.split(), "--out", "run", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def generate(command, run):
    def call(*args):
        return command("fastdcgan.generate", *args, cwd=run.parent)

    return call


def test_grid_npz_and_single_files(generate, run):
    root = run.parent
    done = generate("--from", "run", "--n", "10", "--out", "grid.png", "--each", "each")
    assert done.returncode == 0, done.stderr
    assert generate("--from", "run", "--n", "10", "--out", "a.npz").returncode == 0
    images = np.load(root / "a.npz")["images"]
    assert images.shape == (10, 32, 32, 3)
    assert images.dtype == np.uint8
    files = sorted((root / "each").iterdir())
    assert len(files) == 10
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as opened:
            assert np.array_equal(np.asarray(opened), image)
    with Image.open(root / "grid.png") as grid:
        assert grid.size[0] >= 4 * 32
    state = models.read_state_dict(run / "netG_ema.safetensors")
    net = models.generator_from(state).eval()
    z = torch.empty(256, 6, 1, 1).normal_(generator=torch.Generator().manual_seed(0))[:10]
    with torch.no_grad():
        expected = ((net(z) + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(expected.numpy() - images).max() <= 1


def test_seeds_and_prefixes(run, monkeypatch):
    root = run.parent
    monkeypatch.chdir(root)
    for name, args in {
        "few": ["--n", "5"],
        "many": ["--n", "300"],
        "other": ["--n", "5", "--seed", "1"],
        "tight": ["--n", "64", "--truncation", "0.1"],
        "wide": ["--n", "64"],
        "raw": ["--n", "5", "--no-ema"],
        "batch": ["--n", "5", "--statistics", "batch"],
    }.items():
        assert main(["--from", "run", *args, "--out", f"{name}.npz"]) == 0
    images = {p.stem: np.load(p)["images"].astype(float) for p in root.glob("*.npz")}
    assert np.array_equal(images["few"], images["many"][:5])
    for name in ("other", "raw", "batch"):
        assert not np.array_equal(images["few"], images[name])
    assert images["tight"].std(0).mean() < images["wide"].std(0).mean() / 3


def test_any_checkpoint(run):
    """A checkpoint of a run, its safetensors, and an example's .pth of 64 pixels."""
    root = run.parent
    newest = sorted((run / "checkpoints").glob("*.pt"))[-1]
    example = nn.Sequential()
    below = 10
    for width in (16, 8, 4, 2):
        first = width == 16
        example.append(
            nn.ConvTranspose2d(below, width, 4, 1 if first else 2, 0 if first else 1, bias=False)
        )
        example.extend([nn.BatchNorm2d(width), nn.ReLU()])
        below = width
    example.append(nn.ConvTranspose2d(2, 3, 4, 2, 1, bias=False))
    state = {f"module.main.{k}": v for k, v in example.state_dict().items()}
    torch.save(state, root / "netG_epoch_3.pth")
    for name, source, size in (
        ("checkpoint", newest, 32),
        ("weights", run / "netG_ema.safetensors", 32),
        ("example", root / "netG_epoch_3.pth", 64),
    ):
        assert (
            main(["--from", str(source), "--n", "4", "--out", str(root / f"any-{name}.npz")]) == 0
        )
        assert np.load(root / f"any-{name}.npz")["images"].shape == (4, size, size, 3)
    a, b = (np.load(root / f"any-{name}.npz")["images"] for name in ("checkpoint", "weights"))
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from", "nowhere", "--out", "x.png"], "nowhere"),
        (["--from", ".", "--out", "x.png"], "is no run"),
        (["--from", "run/plot.png", "--out", "x.png"], "plot.png"),
        (["--from", "run/netD.safetensors", "--out", "x.png"], "netD.safetensors"),
        (["--from", "run", "--out", "x.xyz"], "x.xyz"),
        (["--from", "run", "--out", "run/plot.png"], "exists already"),
        (["--from", "run", "--n", "0", "--out", "x.png"], "--n 0 was given"),
        (["--from", "run", "--truncation", "-1", "--out", "x.png"], "--truncation -1.0 was given"),
        (["--from", "run"], "nowhere to write to"),
        (["--from", "run", "--out", "/proc/x.png"], "cannot write"),
        (["--from", "run", "--out", "x.png", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_clear_line(run, monkeypatch, capsys, args, message):
    monkeypatch.chdir(run.parent)
    assert main(args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_run_in_a_process_of_its_own(generate):
    done = generate("--from", "nowhere", "--out", "x.png")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr
