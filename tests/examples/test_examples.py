"""The quick-start scripts run as they are, on tiny settings."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.training import TrainConfig, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """examples/NAME.py as a module."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    np.save(folder / "a.npy", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    sizes = {"image_size": 32, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8, "steps": 1}
    config = TrainConfig(data=str(folder / "a.npy"), out=folder / "run", tensorboard=False, **sizes)
    return train(config).out


def test_export_onnx(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    example("export_onnx").main(run, tmp_path / "exported")
    assert "drawn by ONNX Runtime" in capsys.readouterr().out
    with Image.open(tmp_path / "exported" / "one.png") as image:
        assert image.size == (32, 32)


def test_generate_walk(run, tmp_path):
    example("generate_walk").main(run, tmp_path / "walk.gif", steps=3)
    with Image.open(tmp_path / "walk.gif") as film:
        assert (film.n_frames, film.size) == (9, (128, 128))


def test_fuse_autoencoder(monkeypatch, capsys):
    """Fused, and not by falling back: C++ on the CPU, for which the interpreter makes way."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plain, fused = example("fuse_autoencoder").main(steps=12, batch=4, width=16)
    np.testing.assert_allclose(fused, plain, rtol=1e-3)
    assert np.mean(plain[-4:]) < np.mean(plain[:4])
    said = capsys.readouterr().out
    assert said.count("fused encoder") == 3
    assert said.count("fused decoder") == 3
    assert "times as fast on this" in said


def test_gallery(run, tmp_path, capsys):
    example("gallery").main(run, tmp_path / "samples.png")
    assert "drawn by http://127.0.0.1:" in capsys.readouterr().out
    with Image.open(tmp_path / "samples.png") as image:
        assert min(image.size) > 4 * 32


def test_augment(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(16) % 2)
    sizes = {"image_size": 32, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8, "steps": 1}
    main = example("augment").main
    main(str(tmp_path / "set.npz"), tmp_path / "more", **sizes, tensorboard=False)
    assert "(100, 32, 32, 3) of 0 1" in capsys.readouterr().out
