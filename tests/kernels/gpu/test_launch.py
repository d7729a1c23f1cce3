"""Launches that start early: which do, and that every kernel waits before all else. That compiled
kernels wait before they touch memory is in ../inspect/."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.targets import TARGETS, assume, early
from fastdcgan_kernels.gpu import launch
from fastdcgan_kernels.gpu.crop import squares
from fastdcgan_kernels.gpu.launch import recording

FOLDER = Path(launch.__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")


def kernels():
    """Functions with a parameter PDL, which `Launch` gives to kernels alone, but `begin`."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []
            if "PDL" in names and node.name != "begin":
                yield node


def launched():
    """Names of what files hand to `Launch` as its kernel."""
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        jitted = {
            node.name for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any("jit(do_not_specialize" in ast.unparse(d) for d in node.decorator_list)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Launch":
                names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
                yield from names
        yield from jitted


def test_every_kernel_waits_before_all_else():
    found = {}
    for node in kernels():
        body = node.body[1:] if isinstance(node.body[0].value, ast.Constant) else node.body
        found[node.name] = ast.unparse(body[0])
        assert ast.unparse(node.args.args[-1]) in ("PDL: tl.constexpr", "PDL: gl.constexpr")
    assert set(found.values()) == {"begin(PDL)"}
    assert found.keys() >= set(launched()) - {"kernel"}
    assert len(found) >= 17


def crop_on(target):
    with assume(target), recording() as launches:
        images = torch.empty(4, 8, 8, 3, dtype=torch.uint8, device=META)
        squares(images, torch.empty(2, dtype=torch.int64, device=META), 8, torch.float32)
    return launches[0]


@pytest.mark.parametrize("name", TARGETS)
def test_launches_start_early_where_the_target_has_it(name):
    has = name in ("sm_90", "sm_100", "sm_120")
    found = crop_on(TARGETS[name])
    assert found.given["PDL"] is found.pdl is has
    assert found.options.get("launch_pdl", False) is has
    with early(False):
        found = crop_on(TARGETS[name])
        assert found.given["PDL"] is found.pdl is False
        assert "launch_pdl" not in found.options
    assert crop_on(TARGETS[name]).pdl is has


def test_on_the_cpu_none_does():
    seen = []
    with launch.watching(seen.append):
        squares(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.tensor([0]), 8, torch.float32)
    assert [one.pdl for one in seen] == [False]


@pytest.mark.parametrize(("driver", "has"), [(12020, False), (12030, True), (13000, True)])
def test_a_driver_that_is_too_old_for_graphs_has_none(monkeypatch, driver, has):
    properties = SimpleNamespace(name="H", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(targets, "_driver", lambda: driver)
    targets._cuda_target.cache_clear()
    try:
        assert targets.target_of(torch.device("cuda", 0)).pdl is has
    finally:
        targets._cuda_target.cache_clear()
