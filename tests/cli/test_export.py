"""`python -m fastdcgan.export`, as users run it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan import models
from fastdcgan.errors import RunError
from fastdcgan.export import main
from fastdcgan.exporting import formats

onnxruntime = pytest.importorskip("onnxruntime")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run of two steps in run/."""
    from fastdcgan.training import TrainConfig, train

    root = tmp_path_factory.mktemp("export")
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    np.save(root / "tiny.npy", images)
    sizes = {"image_size": 32, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8, "steps": 2}
    train(TrainConfig(data=str(root / "tiny.npy"), out=root / "run", tensorboard=False, **sizes))
    return root


def test_help_needs_no_torch(environment):
    script = (
        "import sys\n"
        "from fastdcgan import export, generate\n"
        "for command in (export, generate):\n"
        "    try:\n"
        "        command.main(['--help'])\n"
        "    except SystemExit:\n"
        "        assert not {'torch', 'onnx', 'huggingface_hub', 'imageio'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert "--fold" in done.stdout
    assert "--arithmetic" in done.stdout


def test_every_format_of_a_run(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    formats = ["onnx", "torchscript", "torch-export", "safetensors"]
    assert main(["--from", "run", "--to", *formats, "--license", "mit"]) == 0
    out = root / "run" / "export-generator"
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.onnx", "model.pt", "model.pt2", "model.safetensors",
        "samples.png",
    }  # fmt: skip
    assert capsys.readouterr().out.count("from PyTorch") == 4
    assert json.loads((out / "config.json").read_text()) == {
        "size": 32, "nz": 6, "ngf": 4, "channels": 3, "norm": "batch",
    }  # fmt: skip
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert "trained for 2 steps" in card.text
    net = models.generator_from(root / "run" / "netG_ema.safetensors").eval()
    z = torch.empty(256, 6, 1, 1).normal_(generator=torch.Generator().manual_seed(0))[:64]
    with torch.no_grad():
        images = net(z)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    (found,) = session.run(None, {"z": z.flatten(1).numpy()})
    np.testing.assert_allclose(found, images.numpy(), atol=1e-4)
    with Image.open(out / "samples.png") as picture:
        first = np.asarray(picture)[2:34, 2:34]
    assert np.abs(first - ((images[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1.5


def test_the_exported_folder_is_a_source_again(root, monkeypatch):
    from fastdcgan.generate import main as generate

    monkeypatch.chdir(root)
    assert main(["--from", "run", "--no-ema", "--out", "raw"]) == 0
    assert generate(["--from", "raw", "--n", "4", "--out", "a.npz"]) == 0
    assert generate(["--from", "run", "--no-ema", "--n", "4", "--out", "b.npz"]) == 0
    a, b = np.load("a.npz")["images"], np.load("b.npz")["images"]
    assert np.array_equal(a, b)
    checkpoint = max((root / "run" / "checkpoints").glob("step-*.pt"))
    assert main(["--from", str(checkpoint), "--net", "d", "--to", "torchscript"]) == 0
    out = root / "run" / "export-discriminator"
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.pt"}
    assert "trained for 2 steps" in (out / "README.md").read_text()


def test_pushed_after_it_is_written(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    seen = []

    def create(self, repo_id, private, exist_ok):
        seen.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(self, *, repo_id, folder_path):
        seen.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
        return "https://huggingface.co/me/net/commit/0"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert main(["--from", "run", "--out", "pushed", "--push", "me/net", "--private"]) == 0
    assert seen == [
        ("me/net", True),
        ("me/net", ["README.md", "config.json", "model.safetensors", "samples.png"]),
    ]
    assert "https://huggingface.co/me/net/commit/0" in capsys.readouterr().out

    def offline(self, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert main(["--from", "run", "--out", "kept", "--push", "me/net"]) != 0
    error = capsys.readouterr().err
    assert "no route to host; kept is written" in error
    assert len(error.splitlines()) == 1
    assert (root / "kept" / "model.safetensors").exists()


def test_a_file_with_other_numbers_gets_no_name(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    whole = formats.FORMATS["torchscript"]
    monkeypatch.setitem(
        formats.FORMATS,
        "torchscript",
        formats.Format(whole.file, whole.write, lambda path: lambda z: whole.read(path)(z) + 1e-3),
    )
    before = set(root.iterdir())
    assert main(["--from", "run", "--to", "torchscript", "--out", "wrong"]) != 0
    assert "away from PyTorch's" in capsys.readouterr().err
    assert set(root.iterdir()) == before
    assert issubclass(RunError, RuntimeError)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from", "nowhere"], "nowhere"),
        (["--from", "."], "is no run"),
        (["--from", "run/plot.png", "--out", "x"], "plot.png"),
        (["--from", "run/netD.safetensors", "--out", "x"], "netD.safetensors"),
        (["--from", "run", "--net", "d", "--out", "tiny.npy"], "tiny.npy exists already"),
        (["--from", "run", "--out", "run"], "run exists already"),
        (["--from", "run", "--fold"], "--fold was given with --to safetensors"),
        (["--from", "run", "--license", "other"], "needs --license-name"),
        (["--from", "run", "--device", "abacus"], "--device abacus"),
        (["--from", "run", "--out", "/proc/x/y"], "cannot write"),
    ],
)
def test_bad_input_is_one_clear_line(root, monkeypatch, capsys, args, message):
    monkeypatch.chdir(root)
    before = set(root.iterdir())
    assert main(args) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert set(root.iterdir()) == before


@pytest.mark.parametrize("missing", ["huggingface_hub", "onnx"])
def test_what_is_not_installed_is_said(root, monkeypatch, capsys, missing):
    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--from", "run", "--to", "onnx", "--out", "x"]) != 0
    assert "pip install 'fastdcgan[export]'" in capsys.readouterr().err
    assert not (root / "x").exists()
