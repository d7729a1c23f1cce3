"""The whole step as a real CUDA graph, beside itself run eagerly. `pytest -m gpu tests/gpu`."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from fastdcgan.data.feeds import Order, make_feed
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import choose_engine
from fastdcgan.training.readings import Readings
from fastdcgan.training.state import TrainState
from fastdcgan.training.whole_step import WholeStep

pytestmark = pytest.mark.gpu
STEPS, BATCH = 11, 16


def run(graph, impl, dtype, *, compile=False, resident=True, **options):
    """11 steps, a ragged one among every three."""
    device = torch.device("cuda", torch.cuda.current_device())
    config = TrainConfig(
        image_size=32, channels=3, ngf=16, ndf=16, batch_size=BATCH, impl=impl, cuda_graph=graph,
        **options,
    )  # fmt: skip
    engine = dataclasses.replace(
        choose_engine(config, Ranks(), device), autocast=dtype, compile=compile
    )
    state = TrainState(config, device, scaling=dtype == torch.float16)
    pixels = np.random.default_rng(3).integers(0, 256, (40, 36, 36, 3), dtype=np.uint8)
    feed = make_feed(
        types.SimpleNamespace(images=pixels, n=40, window=36, size=32),
        order=Order(40, 40, BATCH, 0), device=device, hflip=True, resident=resident,
        dtype=dtype or torch.float32,
    )  # fmt: skip
    readings = Readings(STEPS, device)
    whole = WholeStep(state, feed, engine=engine, readings=readings, say=pytest.fail)
    with feed:
        for _ in range(STEPS):
            whole()
            readings.count()
    assert whole.graphed == (graph == "on")
    if impl == "auto":  # forward, and backward in the thread of autograd's engine
        assert whole.figures["blocks"]["compared"] > 100
    assert state.step == STEPS
    return state, torch.tensor(readings.take())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_graph_and_eager_agree_step_for_step(impl, dtype, resident, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, rows = run("off", impl, dtype, resident=resident)
    graphed, rows_too = run("on", impl, dtype, resident=resident)
    torch.testing.assert_close(rows_too, rows, rtol=0.02, atol=0.02)
    assert torch.equal(eager.generator.get_state(), graphed.generator.get_state())
    for a, b in zip(eager.tensors(), graphed.tensors(), strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", ["exact", "difference"])
def test_steps_with_a_penalty_and_without_have_a_graph_each(form):
    options = {
        "loss": "relativistic", "r1": 1.0, "r2": 1.0, "penalty_form": form, "penalty_every": 4,
        "norm_g": "none", "norm_d": "none",
    }  # fmt: skip
    _, rows = run("off", "auto", torch.bfloat16, **options)
    _, rows_too = run("on", "auto", torch.bfloat16, **options)
    torch.testing.assert_close(rows_too, rows, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_second_stream_changes_nothing(overlap):
    eager, rows = run("off", "auto", torch.bfloat16, overlap="off")
    graphed, rows_too = run("on", "auto", torch.bfloat16, overlap=overlap)
    torch.testing.assert_close(rows_too, rows, rtol=0.02, atol=0.02)
    for a, b in zip(eager.tensors(), graphed.tensors(), strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)


def test_a_graph_of_compiled_parts():
    _, rows = run("off", "auto", torch.bfloat16)
    _, rows_too = run("on", "auto", torch.bfloat16, compile=True)
    torch.testing.assert_close(rows_too, rows, rtol=0.05, atol=0.05)


def test_a_replay_makes_no_host_sync():
    config = TrainConfig(image_size=32, channels=3, ngf=16, ndf=16, batch_size=BATCH)
    device = torch.device("cuda", torch.cuda.current_device())
    state = TrainState(config, device)
    pixels = np.zeros((64, 32, 32, 3), dtype=np.uint8)
    feed = make_feed(
        types.SimpleNamespace(images=pixels, n=64, window=32, size=32),
        order=Order(64, 64, BATCH, 0), device=device, hflip=False, resident=True,
    )  # fmt: skip
    engine = choose_engine(dataclasses.replace(config, cuda_graph="on"), Ranks(), device)
    whole = WholeStep(state, feed, engine=engine, say=pytest.fail)
    whole()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            row = whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(row).all()
