"""`python -m fastdcgan.gallery` as users run it, but for the page itself (tests/browsing)."""

import socket
import subprocess
import sys

import pytest

from fastdcgan import models
from fastdcgan.gallery import main
from fastdcgan.training.checkpoints import save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Somebody's generator in run/."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "run").mkdir()
    netG, _ = models.build("dcgan", size=32, nz=6, ngf=4, ndf=4, channels=3)
    save_weights(netG, folder / "run" / "netG.safetensors", step=1)
    return folder


def test_help_needs_neither_torch_nor_gradio(environment):
    script = (
        "import sys\n"
        "from fastdcgan import gallery\n"
        "try:\n"
        "    gallery.main(['--help'])\n"
        "except SystemExit:\n"
        "    assert not {'torch', 'gradio', 'scipy'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("python -m fastdcgan.gallery --") >= 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from", "nowhere"], "nowhere"),
        (["--from", "."], ". is no run"),
        (["--from", "run", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--from", "run", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["--from", "run", "--port", "70000"], "--port 70000 was given"),
        (["--from", "run", "--seed", "-1"], "--seed -1 was given"),
        (["--from", "run", "--images", "missing.npy"], "no images at"),
        (["--from", "run", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    assert main(["--port", "0", *args]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_port_in_use_is_one_clear_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["--from", "run", "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in line
    assert "--port" in line


def test_a_missing_extra_is_one_line(command, environment, folder, tmp_path):
    """With a package that cannot be imported, as if it were not installed."""
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('hidden', name='gradio')")
    done = command(
        "fastdcgan.gallery", "--from", "run", cwd=folder,
        env={"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: this needs gradio, which is not installed: pip install 'fastdcgan[gallery]'\n"
    )
