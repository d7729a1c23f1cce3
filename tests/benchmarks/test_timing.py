"""Rounds in turn, handed to pytest-benchmark as they were measured; CUDA events on a tape."""

import json
import re

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import CudaClock, Workload

MIB = 2**20


def test_rounds_are_in_turn_and_saved_as_measured(mini):
    """The mini benchmarks assert it inside; what cannot be timed leaves the others alone."""
    output, _ = mini
    assert "1 failed, 10 passed, 1 skipped" in output
    assert re.findall(r"^FAILED \S+\[(\w+)\]", output, re.MULTILINE) == ["broken"]
    assert re.search(r"^SKIPPED .*there is no such library here", output, re.MULTILINE)


def test_what_is_saved(mini):
    _, storage = mini
    (path,) = storage.rglob("*.json")
    saved = json.loads(path.read_text())
    entries = {entry["name"]: entry for entry in saved["benchmarks"]}
    entry = entries["test_step[fastdcgan]"]
    assert entry["group"] == "step, batch 16"
    facts = entry["extra_info"]
    assert (facts["family"], facts["variant"], facts["ours"]) == ("step", "fastdcgan", True)
    assert facts["images_per_second"] == pytest.approx(16 / entry["stats"]["median"], rel=1e-3)
    assert entries["test_block[peer-D1]"]["group"] == "block D1 both, batch 16"
    assert saved["machine_info"]["device"] == "cpu"
    assert saved["machine_info"]["threads"] >= 1


def test_cuda_clock_times_the_calls_alone():
    tape = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            tape.append("record")

        def synchronize(self):
            tape.append("wait")

        def elapsed_time(self, end):
            return 12.0  # milliseconds

    class Buffer:
        def zero_(self):
            tape.append("flush")

    workload = Workload(lambda: tape.append("run"), before=lambda: tape.append("before"), repeat=3)
    assert CudaClock(Buffer(), Event)(workload) == pytest.approx(0.004)
    assert tape == ["before", "flush", "record", "run", "run", "run", "record", "wait"]


def test_measuring_on_a_gpu(monkeypatch):
    """With torch.cuda and NVML on a tape: peak memory above what was held before, clocks of the
    rounds, power of each workload alone, and the throttling of either."""
    allocated = iter([1000 * MIB, 1200 * MIB])
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1500 * MIB)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "CudaClock", lambda flush: timing.wall_clock)
    monkeypatch.setattr(timing, "SUSTAINED_SECONDS", 0.01)

    class Sampler:
        made = 0

        def __enter__(self):
            Sampler.made += 1
            return self

        def __exit__(self, *error):
            pass

        def clocks(self):
            return {"sm_mhz": 1980, "throttled": Sampler.made == 3}  # in the second's second alone

        def power(self, images):
            return {"watts": 400.0, "images": images}

    monkeypatch.setattr(timing.Sampler, "of", lambda device: Sampler())
    calls = []
    makers = {
        "alone": lambda: Workload(lambda: calls.append(0), images=8, repeat=2),
        "after": lambda: Workload(lambda: None, images=8, before=lambda: None),
    }
    measured = timing.measure(makers, torch.device("cuda"), rounds=3, warm_up=1)
    assert [len(m.seconds) for m in measured.values()] == [3, 3]
    alone, after = (m.facts for m in measured.values())
    assert (alone["memory_peak_mib"], after["memory_peak_mib"]) == (500, 300)
    assert alone["images"] == 8 * (len(calls) - 2 * (1 + 3))
    assert after["images"] is None  # what `before` costs is not the images' own
    assert (alone["throttled"], after["throttled"]) == (False, True)
