"""`python -m fastdcgan.generate`: on our runs, on foreign checkpoints, and the files it writes."""

import subprocess
import sys
import tarfile

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
        (["--from", "run", "--out", "x.png", "--batch-size", "0"], "--batch-size 0 was given"),
        (["--from", "run", "--out", "x.png", "--n", "1000000"], "a picture of 1,000,000 images"),
        (["--from", "run", "--out", "x.gif"], "pictures move with --interpolate only"),
        (["--from", "run", "--out", "x.png", "--interpolate", "3"], '--interpolate "3" was given'),
        (["--from", "run", "--out", "x.png", "--interpolate", "1,a"], '"1,a" was given'),
        (["--from", "run", "--out", "x.png", "--interpolate", "1,2 3"], '"1,2 3" was given'),
        (["--from", "run", "--out", "x.gif", "--interpolate", "1,2", "--fps", "0"], "--fps 0"),
        (["--from", "run", "--out", "x.png", "--arithmetic", "1 x 2"], '"1 x 2" was given'),
        (["--from", "run", "--out", "x.npz", "--arithmetic", "1 - 2"], "draws one picture"),
        (
            ["--from", "run", "--out", "x.png", "--arithmetic", "1", "--interpolate", "1,2"],
            "give one of them",
        ),
        (
            ["--from", "run", "--out", "x.png", "--interpolate", "1,2", "--statistics", "batch"],
            "--statistics batch was given",
        ),
        (["--from", "run", "--out", "x-%d.tar"], "numbered by %06d"),
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


def test_walks(run, monkeypatch):
    """A strip has the keys at the ends of its rows; a film of the same walk plays each frame; both
    are made of the images that --n draws."""
    monkeypatch.chdir(run.parent)
    call = ["--from", "run", "--interpolate", "3,0,270", "--seed", "2"]
    assert main([*call, "--frames", "5", "--out", "strip.png"]) == 0
    assert main([*call, "--frames", "5", "--out", "w.npz", "--batch-size", "3"]) == 0
    assert main([*call, "--frames", "5", "--loop", "--curve", "linear", "--out", "w.gif"]) == 0
    assert main(["--from", "run", "--n", "271", "--seed", "2", "--out", "all.npz"]) == 0
    keys = np.load("all.npz")["images"][[3, 0, 270]].astype(int)
    frames = np.load("w.npz")["images"].astype(int)
    assert len(frames) == 11
    assert np.abs(frames[[0, 5, 10]] - keys).max() <= 1
    with Image.open("strip.png") as strip:
        pixels = np.asarray(strip).astype(int)
    assert pixels.shape == (2 + 2 * 34, 2 + 6 * 34, 3)
    for row, column, index in ((0, 0, 0), (0, 2, 2), (0, 5, 5), (1, 0, 5), (1, 5, 10)):
        y, x = 2 + row * 34, 2 + column * 34
        assert np.abs(pixels[y : y + 32, x : x + 32] - frames[index]).max() <= 1
    with Image.open("w.gif") as film:
        assert (film.n_frames, film.size) == (15, (32, 32))


def test_arithmetic_draws_a_sheet(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    call = ["--from", "run", "--arithmetic", "1,2,3 - 4,5,6 + 300", "--out", "sheet.png"]
    assert main(call) == 0
    assert "7 samples in sheet.png" in capsys.readouterr().out
    with Image.open("sheet.png") as sheet:
        first = np.asarray(sheet)
    assert main(call) != 0
    assert "exists already" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0
    with Image.open("sheet.png") as sheet:
        assert np.array_equal(np.asarray(sheet), first), (
            "the noise around the result, too, is seeded"
        )


def test_shards_and_numbers(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    call = ["--from", "run", "--n", "23", "--out", "shards/%06d.tar", "--shard", "10"]
    assert main(call) == 0
    names = []
    for path in sorted((run.parent / "shards").iterdir()):
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    every = [f"{i:06d}.png" for i in range(23)]
    assert names == [every[:10], every[10:20], every[20:]]
    assert main(call) != 0
    assert "shards/000000.tar exists already" in capsys.readouterr().err
    assert main(["--from", "run", "--n", "4", "--numbered", "--out", "numbered.jpg"]) == 0


def test_many_images_take_no_more_memory(run, environment, tmp_path):
    """15 MB of pixels into shards and an array; what grows is a quarter of that at most."""
    script = (
        "import resource\n"
        "from fastdcgan.generate import main\n"
        "def peak(n, name):\n"
        "    for out in (name + '-%06d.tar', name + '.npz'):\n"
        "        call = ['--from', 'run', '--n', str(n), '--shard', '1000']\n"
        "        assert main([*call, '--out', f'{FOLDER}/{out}']) == 0\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(peak(500, 'few'), peak(5000, 'many'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script.replace("{FOLDER}", str(tmp_path))],
        env=environment, cwd=run.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.splitlines()[-1].split())
    assert many - few < 3_750, "kB"
