"""Each check says so when what it looks at is broken: by breaking it."""

import subprocess
import sys
import types
from importlib.metadata import version
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.diagnosis import (
    apart,
    blocks,
    data,
    examine,
    expectations,
    layers,
    machine,
    steps,
    timings,
)
from fastdcgan.diagnosis.rows import Row, guarded
from fastdcgan.errors import InputError
from fastdcgan.training.step import Step
from fastdcgan_kernels import dcgan, functional
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry
from fastdcgan_kernels.choice.types import Block


def test_a_check_that_raises_is_a_failed_row_and_keeps_its_others():
    def check():
        yield Row("first", "ok", "fine")
        raise RuntimeError("\n  out of luck  \nmore")

    first, second = guarded("whole", check)
    assert first == Row("first", "ok", "fine")
    assert second == Row("whole", "failed", "RuntimeError: out of luck")


def test_the_layers_are_those_of_the_nets():
    found = layers.layers(3, torch.float32)
    assert list(found) == [f"{net}{i}" for net in "GD" for i in range(1, 6)]
    g, d = found["G2"], found["D3"]
    assert (g.transposed, g.norm, g.groups, g.geometry.N) == (True, True, 1, 3)
    assert (d.transposed, d.norm, d.groups, d.geometry.N) == (False, True, 2, 6)
    assert [found[f"G{i}"].norm for i in range(1, 6)] == [True] * 4 + [False]
    assert [found[f"D{i}"].norm for i in range(1, 6)] == [False] + [True] * 3 + [False]
    sides = [(b.geometry.CL, b.geometry.H) for n, b in found.items() if n[0] == "D"]
    assert sides == [(3, 64), (64, 32), (128, 16), (256, 8), (512, 4)]


def test_the_nets_that_are_trained_are_made_of_these_layers():
    """The list of the kernels' tools, and models.py."""
    widths, found = {"nz": dcgan.NZ, "ngf": dcgan.WIDTH, "ndf": dcgan.WIDTH}, []
    for net in models.build("dcgan", size=layers.SIZE, channels=layers.CHANNELS, **widths):
        modules = [module for module in net.modules() if not list(module.children())]
        for module, after in pairwise([*modules, nn.Identity()]):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                sizes = module.in_channels, module.out_channels, *module.stride, *module.padding
                transposed = isinstance(module, nn.ConvTranspose2d)
                found.append((transposed, *sizes, isinstance(after, nn.BatchNorm2d)))
    assert found == [
        (one.transposed, one.ci, one.co, *[one.stride] * 2, *[one.pad] * 2, one.norm)
        for one in dcgan.layers(layers.SIZE, layers.CHANNELS)
    ]


@pytest.fixture
def two_layers(monkeypatch):
    """G5 and D4 alone, and narrow."""

    def few(batch, dtype):
        return {
            "G5": Block(True, Geometry(4, 8, 8, 16, 16, 16, 3, 2, 1), dtype, False, 1),
            "D4": Block(False, Geometry(4, 4, 4, 16, 8, 8, 12, 2, 1), dtype, True, 2),
        }

    monkeypatch.setattr(blocks, "layers", few)


def test_blocks_that_are_right(two_layers, cpu):
    rows = blocks.check_blocks(cpu)
    assert [(row.name, row.verdict) for row in rows] == [("G5", "ok"), ("D4", "ok")]
    for row in rows:
        assert 0 < row.values["rms_errors"]["float32"] < 1e-4


def test_a_wrong_result_and_a_wrong_gradient_are_seen(two_layers, cpu, monkeypatch):
    class Off(torch.autograd.Function):
        """x, with a gradient 1 % too large."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 1.01

    up, down = functional.conv_transpose_act, functional.conv_bn_act
    monkeypatch.setattr(functional, "conv_transpose_act", lambda *a, **k: up(*a, **k) * 1.01)
    monkeypatch.setattr(functional, "conv_bn_act", lambda x, *a, **k: down(Off.apply(x), *a, **k))
    result, gradient = blocks.check_blocks(cpu)
    assert result.verdict == gradient.verdict == "failed"
    assert "float32: wrong, RMS error 0.0" in result.detail
    assert "of result 1," in gradient.detail  # the gradient of x
    assert "FASTDCGAN_IMPL=reference" in result.advice


def test_an_implementation_that_cannot_be_here_is_said(two_layers, cpu, monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    for row in blocks.check_blocks(cpu):
        assert row.verdict == "failed"
        assert "FASTDCGAN_IMPL=triton" in row.detail


def test_the_plan_of_a_gpu(cpu, monkeypatch):
    """In the words of the kernels' plan for that target; how layers run is asked of it as well."""
    target = targets.TARGETS["sm_90"]
    monkeypatch.setattr(targets, "target_of", lambda device: target)
    monkeypatch.setattr(layers, "runs_kernels", lambda device: True)
    rows = {row.name: row for row in expectations.plan_rows(cpu)}
    assert rows["G2"].detail.startswith("4x4x512 to 8x8x256: hybrid, tile ")
    assert "descriptors" in rows["G2"].detail
    assert not rows["G2"].values["measured"]
    assert "python -m fastdcgan_kernels.tuner" in rows["tuner"].advice


def test_unwritable_caches(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FASTDCGAN_CACHE", str(file / "cache"))
    (row,) = data.cache_rows()
    assert row.verdict == "failed"
    assert "FASTDCGAN_CACHE" in row.advice
    monkeypatch.setenv("FASTDCGAN_CACHE", str(tmp_path / "to" / "be" / "made"))
    (row,) = data.cache_rows()
    assert row.verdict == "ok"
    assert list(tmp_path.iterdir()) == [file]


def test_a_step_that_reads_a_value_back_is_seen(packed, cpu, monkeypatch):
    original = Step.__call__

    def waits(self, images, z, **options):
        row = original(self, images, z, **options)
        if images.device.type == "cpu":
            float(row[0])
        return row

    assert [row.verdict for row in steps._without_waiting(packed, cpu)] == ["ok"]
    monkeypatch.setattr(Step, "__call__", waits)
    (row,) = guarded("whole step", lambda: steps._without_waiting(packed, cpu))
    assert row.verdict == "failed"
    assert "a step waits for the device" in row.detail


def test_losses_that_are_not_finite_are_seen(packed, cpu, monkeypatch):
    original = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a, **k: original(*a, **k) * float("nan"))
    (row,) = steps.training_rows(packed, cpu)
    assert row.verdict == "failed"


class Whole:
    """A whole step that was, or was not, captured."""

    def __init__(self, graphed, row=0.0):
        self.graphed, self.row, self.made = graphed, row, 0

    def __call__(self):
        self.made += 1
        return torch.full((5,), self.row)


@pytest.mark.parametrize(
    ("graphed", "row", "verdict"),
    [(True, 0.5, "ok"), (True, float("nan"), "failed"), (False, 0.5, "failed")],
)
def test_what_is_said_of_a_graph(graphed, row, verdict, monkeypatch, cpu):
    monkeypatch.setattr(steps, "start", lambda *a, say, **k: Whole(graphed, row))
    (found,) = steps._captured(None, cpu)
    assert found.verdict == verdict


def test_blocks_that_training_leaves_aside_are_seen(monkeypatch, cpu):
    """The graph is then one of plain PyTorch's."""
    line = "--impl: fused blocks do not work here (0.9 away); plain PyTorch"
    monkeypatch.setattr(steps, "start", lambda *a, say, **k: say(line) or Whole(True, 0.5))
    (found,) = steps._captured(None, cpu)
    assert (found.verdict, found.detail) == ("failed", line)


def test_ways_are_timed_by_turns(cpu, monkeypatch):
    order, clock = [], iter(range(1000))

    class Noted(Whole):
        def __call__(self):
            order.append(self.row)
            return super().__call__()

    monkeypatch.setattr(timings.time, "perf_counter", lambda: next(clock))
    seconds = timings.interleaved([Noted(True, 1), Noted(True, 2)], cpu, steps=2, rounds=3)
    assert order == [1, 1, 2, 2] * 3
    assert seconds == [[0.5] * 3, [0.5] * 3]


def test_ways_that_do_not_run_are_said_and_the_others_timed(monkeypatch):
    def start(packed, device, *, say, batch_size, **options):
        if options.get("impl") == "triton":
            raise InputError("no kernels here")
        if "compile" in options:
            raise RuntimeError("no compiler\nat all")
        if "cuda_graph" in options:
            say("a line")
        return Whole(True)

    monkeypatch.setattr(timings, "start", start)
    monkeypatch.setattr(timings, "amp_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(timings, "finish", lambda device: None)
    rows = {row.name: row for row in timings.timing_rows(None, torch.device("cuda", 0))}
    said = {name: (row.verdict, row.detail) for name, row in rows.items() if not row.values}
    assert said == {
        "--impl triton": ("not possible here", "no kernels here"),
        "--compile": ("failed", "RuntimeError: no compiler"),
        "--cuda-graph off": ("warning", "a line"),
    }
    timed = {name for name, row in rows.items() if "images_per_second" in row.values}
    assert timed == {"--amp", "without --amp", "--impl reference"}


def test_a_way_that_is_clearly_faster_is_advised():
    """And a warning where it leaves something off."""
    medians = {"base": 0.2, "plain": 0.1, "more": 0.1, "alike": 0.19}
    found = {}
    for flags in medians:
        way = timings.Way(flags, {}, less=flags == "plain")
        row = timings._row(way, medians, 10, "base")
        assert row.values["images_per_second"] == pytest.approx(10 / medians[flags])
        found[flags] = row.verdict, bool(row.advice)
    assert found == {
        "base": ("ok", False), "plain": ("warning", True), "more": ("ok", True),
        "alike": ("ok", False),
    }  # fmt: skip


def rows_of(check):
    return guarded(check.name, check.rows)


def test_what_children_say_is_judged(monkeypatch):
    """Wrong kernels, another status, no JSON at all, and nothing but an exit."""

    def says(make, text, status=0):
        code = f"print({text!r}); import sys; sys.exit({status})"
        popen = subprocess.Popen
        with monkeypatch.context() as patch:
            patch.setattr(
                apart.subprocess, "Popen", lambda _, **k: popen([sys.executable, "-c", code], **k)
            )
            check = make()
        (row,) = rows_of(check)
        return row

    wrong = says(apart.interpreter, '{"wrong": ["down: wrong"], "kernels": [], "runs": 1}')
    assert (wrong.verdict, wrong.detail) == ("failed", "1 of 1 small runs; down: wrong")
    spills = '[{"kernel": "gather", "matrix_instructions": 4}]'
    assert says(apart.compiler, spills).verdict == "ok"
    assert says(apart.compiler, spills, 1).verdict == "warning"
    assert says(apart.compiler, "Segmentation", -11).detail == "ended with status 245"
    versions = {"triton": "3.6.0", "numpy": "2.4.1"}
    monkeypatch.setattr(apart, "version", versions.__getitem__)
    old = says(apart.interpreter, '{"wrong": ["down: wrong"], "kernels": [], "runs": 1}')
    assert old.verdict == "not possible here"


def nvml(monkeypatch, present):
    """A driver with two GPUs, or none."""

    class NVMLError(Exception):
        pass

    def init():
        if not present:
            raise NVMLError("no library")

    fake = types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=init, nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12080,
        nvmlSystemGetDriverVersion=lambda: "570.1", nvmlDeviceGetCount=lambda: 2,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_a_gpu_that_pytorch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nvml(monkeypatch, present=False)
    assert machine._no_gpu().verdict == "not possible here"
    nvml(monkeypatch, present=True)
    row = machine._no_gpu()
    assert row.verdict == "warning"
    assert row.detail.startswith("2 by the driver, none by PyTorch: ")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "pytorch.org" in machine._no_gpu().advice
    (driver,) = machine._driver()
    assert "570.1" in driver.detail
    assert "12.8" in driver.detail


def test_gpus_are_listed(monkeypatch, cpu):
    def properties(index):
        return types.SimpleNamespace(
            name=f"GPU {index}", major=9, minor=index, multi_processor_count=132,
            total_memory=80 * 2**30,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found = {0: targets.TARGETS["sm_90"], 1: None}
    monkeypatch.setattr(targets, "target_of", lambda device: found[device.index])
    first, second = machine._gpus(torch.device("cuda", 0))
    assert (first.name, first.verdict) == ("cuda:0", "ok")
    assert first.detail == "GPU 0, 80 GiB, 132 multiprocessors, sm_90; kernels as for sm_90"
    assert (second.name, second.verdict) == ("cuda:1", "warning")
    assert [row.name for row in machine._gpus(cpu)] == ["cuda:0", "cuda:1", "device"]


def test_a_device_that_does_not_start_is_said_and_nothing_else_tried(monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    (section,) = examine(torch.device("cuda", 0))
    first, *rest = section.rows
    assert (first.name, first.verdict) == ("device", "failed")
    assert first.detail == "RuntimeError: CUDA error: no kernel image is available"
    assert "PyTorch" in {row.name for row in rest}


def test_versions_are_those_installed(cpu):
    rows = {row.name: row for row in machine.facts(cpu)}
    assert rows["PyTorch"].values["torch"] == torch.__version__
    assert rows["Triton"].values["triton"] == version("triton")
    assert rows["CPU"].values["threads"] == torch.get_num_threads()
    assert all(row.verdict != "failed" for row in rows.values())


def test_too_few_threads_and_no_compiler_are_warnings(monkeypatch, cpu):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CXX", "/nonexistent")
    (few,) = machine._cpu()
    assert few.verdict == "warning"
    assert "OMP_NUM_THREADS" in few.advice
    (none,) = machine._cpp()
    assert (none.verdict, none.detail) == ("warning", "/nonexistent was not found")
