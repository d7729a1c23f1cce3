"""What the phases of `python -m benchmarks.gpu` make of a profiler's trace, of the tools' output,
and of tiles that fail. The phases themselves run in test_rehearsal.py."""

import io
import json
import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.counting import Work
from benchmarks.gpu import compiling
from benchmarks.gpu.launches import Seen
from benchmarks.gpu.phase import Items, Setting
from benchmarks.gpu.phases import counters, machine, profile, tiles
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.types import Task


def seen(kernel):
    return Seen(kernel, "G2", "forward", "64x64x64", 128, (1,), Work(kernel, 1, 10, 10), None)


def event(name, start, duration, kind="kernel"):
    """As PyTorch's profiler writes one; microseconds."""
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "args": {}}


CHROME = {
    "traceEvents": [
        event("gather_descriptors", 30.0, 8.0),
        event("void at::native::randn_kernel<float>()", 1.0, 2.0),
        event("gather_descriptors", 10.0, 4.0),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 99.0},
        event("Memcpy DtoD (Device -> Device)", 50.0, 1.0, "gpu_memcpy"),
        event("adam", 40.0, 5.0),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_the_timeline_is_the_devices_own_in_its_order():
    found = profile.timeline(CHROME)
    assert [kernel.name.split()[0] for kernel in found] == [
        "void", "gather_descriptors", "gather_descriptors", "adam", "Memcpy"
    ]  # fmt: skip
    assert found[1].seconds == pytest.approx(4e-6)


def test_launches_are_joined_with_kernels_in_their_order():
    launches = [seen("gather_descriptors"), seen("gather_descriptors"), seen("adam")]
    times = profile.join(launches, profile.timeline(CHROME))
    assert times == pytest.approx([4e-6, 8e-6, 5e-6])


@pytest.mark.parametrize(
    "names",
    [["gather_descriptors", "adam"], ["gather_descriptors", "adam", "gather_descriptors"]],
    ids=["one too few", "another order"],
)
def test_launches_that_are_not_these_kernels_are_not_joined(names):
    assert profile.join([seen(name) for name in names], profile.timeline(CHROME)) is None


def test_others_are_summed_by_name():
    kernels = [profile.Kernel(name, 0.0, seconds) for name, seconds in
               (("a", 1.0), ("b", 5.0), ("a", 2.0))]  # fmt: skip
    assert profile._others(kernels) == [
        {"name": "b", "launches": 1, "seconds": 5.0}, {"name": "a", "launches": 2, "seconds": 3.0}
    ]  # fmt: skip


def test_peaks_are_those_that_were_measured(tmp_path):
    setting = Setting(True, tmp_path, 60.0)
    assert profile._peaks(setting)["source"] == "assumed"
    rows = [
        {"phase": "machine", "item": "product", "flops_per_second": 7e14},
        {"phase": "machine", "item": "copy", "bytes_per_second": 3e12},
        {"phase": "machine", "item": "l2", "bytes_per_second": 5e12},
        {"phase": "other", "item": "l2", "bytes_per_second": 1.0},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"torn')
    assert profile._peaks(setting) == {
        "flops_per_second": 7e14, "bytes_per_second": 3e12, "l2_bytes_per_second": 5e12,
        "source": "measured", "multiprocessors": 132,
    }  # fmt: skip


NCU = """==PROF== Connected to process 4242
==PROF== Profiling "gather_descriptors": 0%....100% - 9 passes
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","gather_descriptors","GPU Speed Of Light Throughput","Memory Throughput","%","61.5",""
"0","gather_descriptors","GPU Speed Of Light Throughput","Elapsed Cycles","cycle","41,234",""
"0","gather_descriptors","Launch Statistics","Function Cache Configuration","","CachePreferNone",""
"0","gather_descriptors","SpeedOfLight","","","","SOLBottleneck"
"""


def test_the_counters_are_read_from_ncus_table():
    assert counters.metrics_of(NCU) == {
        "Memory Throughput [%]": 61.5,
        "Elapsed Cycles [cycle]": 41234,
    }
    assert counters.metrics_of("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_the_sanitizers_errors_are_its_last_count():
    output = "1 passed\n========= ERROR SUMMARY: 3 errors\n========= ERROR SUMMARY: 0 errors\n"
    assert counters.errors_of(output) == 0
    assert counters.errors_of("killed") is None


def test_a_missing_ncu_is_said(tmp_path, monkeypatch):
    """Here neither tool is there, or they find nothing on this PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    task = Task("conv", Geometry(2, 4, 4, 8, 8, 8, 8, 2, 1), torch.float32, "none", "store", 1)
    row = {"layer": "D2", "pass": "forward", "kernel": "gather_pointers", "seconds": 1.0,
           "task": profile.task_facts(task)}  # fmt: skip
    line = {"phase": "profile", "item": "2", "rows": [row, {**row, "task": None, "seconds": 9.0}]}
    (tmp_path / "items.jsonl").write_text(json.dumps(line) + "\n")
    file = io.StringIO()
    counters.measure(Items(file), Setting(True, tmp_path, 60.0))
    items = [json.loads(row) for row in file.getvalue().splitlines()]
    assert [item["item"] for item in items] == ["D2 forward: gather_pointers", "memcheck"]
    assert items[0]["missing"] == "ncu (Nsight Compute) is not on the PATH"
    assert items[1]["missing"] == "compute-sanitizer is not on the PATH"


def test_a_contest_is_kept_as_it_went():
    """The default is right, the second raises, the third is wrong, the fourth is the fastest."""
    default, raising, wrong, fast = (Tile(rows, 16, 16) for rows in (16, 32, 64, 128))

    class Trial:
        def prepare(self, tile):
            if tile == raising:
                raise RuntimeError("out of resources")
            return lambda: tile

        def wrong(self, tile):
            return "wrong, RMS error 1" if tile == wrong else ""

    trial = tiles.Watched(Trial())
    for tile, seconds in ((default, 4.0), (raising, None), (wrong, None), (fast, 1.0)):
        try:
            run = trial.prepare(tile)
            if not trial.wrong(run()):
                trial.seconds[tile] = seconds
        except RuntimeError:
            pass
    facts = trial.facts([default, raising, wrong, fast], fast)
    assert [row["why"] for row in facts["candidates"]] == [
        None, "RuntimeError: out of resources", "wrong, RMS error 1", None
    ]  # fmt: skip
    assert facts["gain"] == 4.0
    assert facts["kept"].startswith("128x16x16")


def test_reads_of_the_l2_cache_read_what_they_say():
    """The kernel's sums are compared with their own inside: a block that is not read is noticed."""
    assert machine._reads(torch.device("cpu")) > 0


def compile_one(place):
    """In a process of the pool: the first and the second compile, the third fails or hangs."""
    if place == 2 and compiling._launches[2].arguments["n"] == "hangs":
        time.sleep(600)
    return f"kernel {place}", "CompilationError: no" if place == 2 else ""


@pytest.mark.parametrize("third", ["fails", "hangs"])
def test_compiling_ends_at_its_limit_and_names_what_fails(monkeypatch, third):
    launches = [
        SimpleNamespace(
            kernel=SimpleNamespace(fn=SimpleNamespace(__name__="kernel")),
            arguments={"n": n}, warps=4, stages=2,
        )
        for n in (1, 2, 2, third)
    ]  # fmt: skip
    monkeypatch.setattr(compiling, "_compile", compile_one)
    monkeypatch.setattr(compiling, "_start", lambda target, launchers: None)
    start = time.monotonic()
    found = compiling.compile_all(launches, targets.TARGETS["sm_90"], 3.0)
    assert time.monotonic() - start < 30
    assert (found["kernels"], found["compiled"]) == (3, 2), "the two that are the same are one"
    assert found["failed"] == ({"kernel 2": "CompilationError: no"} if third == "fails" else {})
    assert multiprocessing.active_children() == []
