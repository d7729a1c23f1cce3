"""The baselines compute what they are said to: counted by PyTorch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers

CPU, B = torch.device("cpu"), 2
MFLOP = B * 1e6


def mflop(workload):
    """Per image, of one call."""
    with FlopCounterMode(display=False) as counter:
        workload.run()
    return counter.get_total_flops() / MFLOP


def test_steps(monkeypatch):
    """2,274 with nothing wasted. The example also forms D's weight gradients in G's step (and
    throws them away): as many as in one pass of D."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    assert mflop(peers.example_step(CPU, B)) == pytest.approx(2482, abs=1)
    assert mflop(peers.tuned_step(CPU, B, amp=None)) == pytest.approx(2274, abs=1)


def test_nets(monkeypatch):
    """Forward 209.3 in G, 207.6 in D; D backward without the images' gradient."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    for sampling in (peers.example_sampling(CPU, B), peers.tuned_sampling(CPU, B, amp=None)):
        assert mflop(sampling) == pytest.approx(209.3, abs=0.1)
    first = 2 * 3 * 64 * 16 * 32 * 32 / 1e6
    for make in (
        peers.example_discriminator,
        lambda *a, **o: peers.tuned_discriminator(*a, None, **o),
    ):
        assert mflop(make(CPU, B, backward=False)) == pytest.approx(207.6, abs=0.1)
        assert mflop(make(CPU, B, backward=True)) == pytest.approx(3 * 207.6 - first, abs=0.3)
