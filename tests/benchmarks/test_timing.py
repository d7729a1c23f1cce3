"""Rounds in turn, handed to pytest-benchmark as they were measured; CUDA events on a tape."""

import json
import re

import pytest

from benchmarks.timing import CudaClock, Workload


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
