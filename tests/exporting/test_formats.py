"""Each format, read by programs that know nothing of this package, against plain PyTorch."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.errors import RunError
from fastdcgan.exporting.formats import FORMATS, check

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NETS = {
    "g": (lambda: models.Generator(size=32, nz=6, ngf=4), (7, 6)),
    "d": (lambda: models.Discriminator(size=32, ndf=4), (7, 3, 32, 32)),
    "sngan-d": (lambda: models.SNGANDiscriminator(size=32, ndf=4), (7, 3, 32, 32)),
    "no-norm-g": (lambda: models.Generator(size=32, nz=6, ngf=4, norm="none"), (7, 6)),
    "tf28-g": (lambda: models.TF28Generator(nz=6), (7, 6)),
    "tf28-d": (lambda: models.TF28Discriminator(), (7, 1, 28, 28)),
}


def made(name):
    """A net whose BatchNorms matter, inputs, and its outputs in float64."""
    torch.manual_seed(0)
    net = NETS[name][0]()
    x = torch.randn(NETS[name][1])
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
    net.eval()
    with torch.no_grad():
        expected = net.double()(x.double())
    return net.float(), x, expected.numpy()


@pytest.mark.parametrize(
    ("name", "fold"),
    [("g", False), ("g", True), ("d", True), ("tf28-g", True), ("tf28-d", False)],
)
def test_onnx_in_its_runtime(name, fold, tmp_path):
    net, x, expected = made(name)
    path = tmp_path / "model.onnx"
    FORMATS["onnx"].write(models.fold(net) if fold else net, x[:3], path)
    session = onnxruntime.InferenceSession(str(path))
    (given,), (told,) = session.get_inputs(), session.get_outputs()
    assert (given.name, told.name) == (("images", "logits") if name[-1] == "d" else ("z", "images"))
    assert given.shape == ["batch", *x.shape[1:]]
    for size in (1, 7):
        (found,) = session.run(None, {given.name: x[:size].numpy()})
        np.testing.assert_allclose(found, expected[:size], atol=1e-4)
    model = onnx.load(path)
    if fold:
        assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert str(Path(models.__file__).parent).encode() not in path.read_bytes()


def test_torchs_own_formats_load_by_torch_alone(tmp_path):
    """One of each: the command's tests have the other two."""
    expected = {}
    for name, to in (("g", "torchscript"), ("d", "torch-export")):
        net, x, expected[name] = made(name)
        np.save(tmp_path / f"{name}.npy", x.numpy())
        path = tmp_path / FORMATS[to].file
        FORMATS[to].write(models.fold(net), x[:3], path)
        with zipfile.ZipFile(path) as parts:
            whole = b"".join(parts.read(part) for part in parts.namelist())
        assert str(Path(models.__file__).parent).encode() not in whole
    script = (
        "import json, sys, numpy, torch\n"
        "nets = {'g': torch.jit.load('model.pt'), 'd': torch.export.load('model.pt2').module()}\n"
        "out = {}\n"
        "for name, net in nets.items():\n"
        "    x = torch.from_numpy(numpy.load(name + '.npy'))\n"
        "    out[name] = [net(x[:size]).tolist() for size in (1, 7)]\n"
        "assert not [name for name in sys.modules if name.startswith('fastdcgan')]\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, outputs in json.loads(done.stdout).items():
        for size, found in zip((1, 7), outputs, strict=True):
            np.testing.assert_allclose(found, expected[name][:size], atol=1e-4)


@torch.no_grad()
def test_wrong_numbers_and_shapes_are_found():
    net, x, _ = made("g")
    assert check(net, net, x) == 0
    with pytest.raises(RunError, match="away from PyTorch's"):
        check(lambda z: net(z) + 2e-4, net, x)
    with pytest.raises(RunError, match="away from PyTorch's"):
        check(lambda z: net(z) * float("nan"), net, x)
    with pytest.raises(RunError, match=r"for a batch of 2 the file gives \(1, 3"):
        check(lambda z: net(z[:1]), net, x)
    check(lambda z: net(z) + 5e-5, net, x)
