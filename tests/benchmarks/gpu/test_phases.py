"""What the phases of `python -m benchmarks.gpu` make of a profiler's trace, of the tools' output,
and of tiles that fail. The phases themselves run in test_rehearsal.py."""

import io
import json
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.counting import Work
from benchmarks.gpu import compiling
from benchmarks.gpu.launches import Seen
from benchmarks.gpu.phase import Items, Setting
from benchmarks.gpu.phases import counters, engines, machine, profile, tiles
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.tuner.child import Lost


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
    (step,) = profile.join(launches, profile.timeline(CHROME))
    assert [kernel.seconds for kernel in step] == pytest.approx([4e-6, 8e-6, 5e-6])
    assert profile.span(step) == pytest.approx(35e-6)


def test_the_last_steps_are_joined_each_by_itself():
    """The first ones warm the device up; a kernel of PyTorch's may come in one and not in all."""
    steps = range(profile.REPLAYS + 3)
    kernels = [
        profile.Kernel(name, 10.0 * step + at, 1.0 + step)
        for step in steps
        for at, name in enumerate(("rand", "adam", "copy", "adam"))
        if name != "copy" or step % 2
    ]
    found = profile.join([seen("adam"), seen("adam")], kernels)
    assert [[k.seconds for k in step] for step in found] == [[1.0 + s] * 2 for s in steps][3:]
    last = profile.within_last(found, kernels)
    assert [kernel.name for kernel in last] == ["rand", "copy"]
    assert last[0].start == 10.0 * steps[-1]


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


class Answers:
    """A child that answers with these, or raises them, in turn."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, question):
        self.asked.append(json.loads(question))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer)


def engines_of(*answers):
    """(items, questions) of a case of four tiles."""
    task = Task("conv", Geometry(8, 8, 8, 256, 16, 16, 128, 2, 1), torch.bfloat16, "none",
                "statistics", 1)  # fmt: skip
    tiles = [Tile(128, 128, 64, 1, 4, stages, "gluon") for stages in (4, 5)]
    tiles += [Tile(128, 128, 64, engine="pointers"), Tile(128, 128, 64, engine="descriptors")]
    file, child = io.StringIO(), Answers(*answers)
    debugger = engines.Debugger()
    debugger._said = "warps"
    engines.run(engines.Case("D3", "forward", task, tuple(tiles)), child, Items(file), debugger)
    rows = [json.loads(row) for row in file.getvalue().splitlines()]
    return {row.pop("item").split(": ", 1)[1]: row for row in rows}, child.asked


def test_engines_are_timed_once_they_are_right():
    """The first hangs, the second runs by another kernel, the third is right, the fourth wrong."""
    found, asked = engines_of(
        Lost("hung: it had 20 s to run"), {"kernel": "gather_descriptors", "why": ""},
        {"kernel": "gather_pointers", "why": ""},
        {"kernel": "gather_descriptors", "why": "wrong, RMS error 1"}, [2e-5, 3e-5],
    )  # fmt: skip
    assert len(asked) == 5
    assert [tile["engine"] for tile in asked[-1]["tiles"]] == ["pointers"]
    hung, elsewhere, wrong, right = found.values()
    assert (hung["wrong"], hung["debugger"]) == ("hung: it had 20 s to run", "warps")
    assert elsewhere["skipped"] == "gather_descriptors ran in its place"
    assert wrong["wrong"] == "wrong, RMS error 1"
    assert (right["seconds"], right["vendor_seconds"], right["ratio"]) == (2e-5, 3e-5, 1.5)
    assert (right["layer"], right["pass"], right["engine"]) == ("D3", "forward", "pointers")
    assert not {"wrong", "skipped"} & right.keys()


def test_engines_that_hang_while_they_are_timed_are_said():
    kernels = ["gather_gluon", "gather_gluon", "gather_pointers", "gather_descriptors"]
    found, _ = engines_of(
        *({"kernel": name, "why": ""} for name in kernels), Lost("hung: it had 20 s to run")
    )
    assert len(found) == 4
    assert all("its time was not taken: hung" in one["wrong"] for one in found.values())


def test_the_canary_is_one_tile_of_each_mode(tmp_path):
    hopper = targets.TARGETS["sm_90"]
    first, *rest = engines.cases(hopper, Setting(False, tmp_path, 60.0))
    assert {tile.warps for tile in first.tiles[:2]} == {4, 8}
    assert [tile.engine for tile in first.tiles] == ["gluon", "gluon", "pointers", "descriptors"]
    layers = {(case.layer, case.of) for case in (first, *rest)}
    assert {(f"{net}{at}", of) for net in "GD" for at in (2, 3, 4)
            for of in ("forward", "data gradient")} < layers  # fmt: skip
    for case in (first, *rest):
        kernels = [
            engines.launch_of(case.task, tile, hopper).kernel.fn.__name__ for tile in case.tiles
        ]
        assert kernels == [engines.KERNELS[tile.engine] for tile in case.tiles]


def test_a_missing_debugger_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    debugger = engines.Debugger()
    debugger.look(1)
    assert debugger.said() is None


def test_the_debugger_looks_at_the_process(monkeypatch, tmp_path):
    program = tmp_path / "cuda-gdb"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    debugger = engines.Debugger()
    debugger.look(42)
    said = debugger.said()
    assert "-p 42 -batch -ex info cuda kernels -ex info cuda warps" in said
    assert debugger.said() is None


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
            arguments={"n": n}, options={"num_warps": 4},
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
