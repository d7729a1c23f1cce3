"""What all tests share: a cache of their own, one thread a process, Triton's interpreter, PyTorch's
settings as they were before each test, and a way to run commands."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import interpreter
from tests.forks import Command, Forks

ROOT = Path(__file__).parent.parent

# The tests run side by side; PyTorch's own threads would only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

# Triton's interpreter makes millions of short-lived objects, hardly any of them in a cycle.
gc.set_threshold(200_000, 20, 100)


def pytest_configure(config):
    """Kernels run in Triton's interpreter on CPU tensors, which has to be said before Triton is
    imported; only `pytest -m gpu` compiles them and runs them on the device."""
    # Jobs in the background ignore Ctrl-C, and so would commands of tests, which send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: needs a GPU; run by `pytest -m gpu`, else skipped")
    config.addinivalue_line("markers", "convergence: trains whole nets, 200 steps each")
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu are always collected; without `-m gpu`, or without a GPU, they say why they
    did not run."""
    if config.option.markexpr == "gpu":
        import torch

        why = "" if torch.cuda.is_available() else "no GPU here"
    else:
        why = "run with -m gpu (this process has Triton's interpreter on)"
    if why:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Packed images of the tests never touch the user's cache."""
    os.environ["FASTDCGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def bfloat16_in_the_interpreter():
    """Patches the interpreter before any kernel runs in it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.patch_bfloat16()


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.quicken()


@pytest.fixture
def drawn_plots():
    """For tests that look at a run's plot.png."""


@pytest.fixture(autouse=True)
def blank_plots(request, monkeypatch):
    """Without `drawn_plots` it is blank: drawing it takes most of the time of a tiny run."""
    if "drawn_plots" in request.fixturenames:
        return

    def blank(out, brief=False):
        from matplotlib.figure import Figure

        return Figure(figsize=(1, 1))

    monkeypatch.setattr("fastdcgan.training.journal.figure", blank)


@contextlib.contextmanager
def restored_settings():
    """Inside, PyTorch's global settings may be changed; afterwards they are as before."""
    import torch
    from torch import backends

    # The wider ones first: what is not set follows them.
    attributes = [
        (backends, "fp32_precision"),
        (backends.cudnn, "fp32_precision"),
        (backends.cudnn.conv, "fp32_precision"),
        (backends.cuda.matmul, "fp32_precision"),
        *((backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    ]
    settings = [
        *((lambda a=a: getattr(*a), lambda value, a=a: setattr(*a, value)) for a in attributes),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
    ]
    if torch.cuda.is_initialized():
        settings.append((torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode))
    before = [get() for get, _ in settings]
    try:
        yield
    finally:
        for (get, put), value in zip(settings, before, strict=True):
            if get() != value:
                put(value)


@pytest.fixture(autouse=True)
def settings_of_each_test():
    """A test that changes PyTorch's settings changes them for itself alone."""
    with restored_settings():
        yield


@pytest.fixture(scope="session")
def environment():
    """Environment in which a subprocess finds the packages from a bare checkout too."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**own, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def forks(environment, tmp_path_factory):
    made = Forks(environment, tmp_path_factory.mktemp("outputs"))
    yield made
    made.end()


@pytest.fixture(scope="session")
def command(environment, forks):
    """Runs `python -m MODULE ARGS...` as a user does: command("fastdcgan.train", "--help"). Where
    neither the start is looked at (`--help` has to be there at once) nor what Python reads at its
    own (`env`), it is a fork of a process that has imported PyTorch."""

    def run(module, *args, cwd=None, env=None, timeout=300):
        args = [*map(str, args)]
        if env is None and "--help" not in args:
            return forks.run([module, *args], cwd or os.getcwd(), timeout)
        return subprocess.run(
            [sys.executable, "-m", module, *args],
            cwd=cwd,
            env={**environment, **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def start(forks):
    """The same, returning while the command runs, as `subprocess.Popen` does."""

    def begin(module, *args, cwd):
        return Command(forks, [module, *map(str, args)], cwd)

    return begin


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """An .npy of 36 smooth colour images of 32x32: 4 whole batches of 8 and a ragged one of 4."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (36, 4, 4, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npy"
    np.save(path, coarse.repeat(8, axis=1).repeat(8, axis=2))
    return path
