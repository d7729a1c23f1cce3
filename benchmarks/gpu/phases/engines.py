"""Each engine that makes a tile, pointers, descriptors and Gluon, on the big layers, forward and
data gradient: whether its values are right, then its time beside cuDNN's. All in a process of its
own (engine.py), because a kernel in Gluon may hang: that costs 20 s and is reported."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.compiling import compile_all
from benchmarks.gpu.launches import task_facts
from benchmarks.gpu.phase import Items, Setting
from fastdcgan_kernels import dcgan
from fastdcgan_kernels.choice import heuristics, persistent, targets
from fastdcgan_kernels.choice.geometry import Engine, Tile
from fastdcgan_kernels.choice.types import Target, Task
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.launch import Launch, recording
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from fastdcgan_kernels.tuner import tuning
from fastdcgan_kernels.tuner.child import Child, Lost

KERNELS = {
    "pointers": "gather_pointers", "descriptors": "gather_descriptors", "gluon": "gather_gluon"
}  # fmt: skip
MOST = 4
"""Tiles in Gluon for a layer."""
COMPILE_SHARE = 0.4
"""Of the phase's time."""
LOOK_SECONDS = 20.0
"""For the debugger at a process that hangs."""


@dataclass(frozen=True)
class Case:
    """A layer in one pass, and the tiles that are tried for it."""

    layer: str
    of: str
    task: Task
    tiles: tuple[Tile, ...]

    def name(self, tile: Tile) -> str:
        """Of an item."""
        return f"{self.layer} {self.of}: {tuning.words_of(tile)}"


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    target = targets.target_of(setting.device)
    assert target is not None
    every = [
        case for case in cases(target, setting)
        if any(to.wants(case.name(tile)) for tile in case.tiles)
    ]  # fmt: skip
    debugger = Debugger()
    # What Triton keeps tells kernels by their source and constants: here nothing is older.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if not setting.rehearsal:
            launches = [launch_of(case.task, t, target) for case in every for t in case.tiles]
            to.put("compiled", **compile_all(launches, target, COMPILE_SHARE * setting.limit))
        child = Child(
            [sys.executable, "-m", "benchmarks.gpu.engine", str(setting.device)],
            look=debugger.look,
        )  # fmt: skip
        for case in every:
            run(case, child, to, debugger)
        child.close()


def cases(target: Target, setting: Setting) -> Iterator[Case]:
    """The first has few tiles: one of each mode that Gluon has, as a canary, first. Behind the
    layers of a step are D4 on images that fill no box, and in two groups."""
    batch = setting.size.batches[0]
    layers = [one for one in dcgan.layers() if one.stride == 2 and min(one.ci, one.co) > 4]
    most = 2  # one of each mode
    for layer in layers[:1] if setting.rehearsal else layers:
        for forward in (True, False):
            yield _case(layer, forward, batch, 1, target, setting, most)
            most = MOST
    if not setting.rehearsal:
        for images, groups in ((18, 1), (32, 2)):
            yield _case(layers[-1], True, images, groups, target, setting, most)


def _case(
    layer: dcgan.Layer, forward: bool, images: int, groups: int, target: Target, setting: Setting,
    most: int,
) -> Case:  # fmt: skip
    g, dtype = layer.geometry(images), torch.bfloat16
    if setting.rehearsal:  # in the interpreter, which rounds bf16 otherwise
        g, dtype = replace(g, CS=16, CL=8), torch.float32
    op = "conv_transposed" if layer.transposed == forward else "conv"
    task = Task(op, g, dtype, "none", "statistics" if forward else "store", groups)
    default = heuristics.default_tile(task, target)
    in_gluon = persistent.tiles(task, target)[:most]
    if setting.rehearsal:
        in_gluon = [replace(default, engine="gluon")]
    others: tuple[Engine, ...] = ("pointers", "descriptors")
    tiles = (*in_gluon, *(replace(default, engine=engine) for engine in others))
    name = layer.name
    if images != setting.size.batches[0]:
        name += f" of {images}{' in 2 groups' if groups > 1 else ''}"
    return Case(name, "forward" if forward else "data gradient", task, tiles)


def launch_of(task: Task, tile: Tile, target: Target) -> Launch:
    """What a tile launches, on tensors without data."""

    def image(n: int, channels: int, *sides: int) -> torch.Tensor:
        shape, order = (n, channels, *sides), torch.channels_last
        return torch.empty(shape, dtype=task.dtype, device="meta", memory_format=order)

    g, transposed = task.geometry, task.op == "conv_transposed"
    x = image(g.N, g.CS, g.P, g.Q) if transposed else image(g.N, g.CL, g.H, g.W)
    with targets.assume(target), recording() as launches:
        blocks.convolve(
            Operand(x), image(g.CS, g.CL, 4, 4), g, transposed=transposed, tile=tile,
            epilogue=Epilogue(task.epilogue, slope=0.2),
        )  # fmt: skip
    return launches[0]


def run(case: Case, child: Child, to: Items, debugger: "Debugger") -> None:
    """Values of each tile, then times of those that are right, in turn with cuDNN."""
    asked = {"task": task_facts(case.task)}
    right: list[Tile] = []
    for tile in case.tiles:
        found = _facts(case, tile)
        try:
            answer = json.loads(child.ask(json.dumps({**asked, "tile": asdict(tile)})))
        except Lost as error:
            to.put(case.name(tile), **found, wrong=str(error), debugger=debugger.said())
            continue
        if answer["kernel"] != KERNELS[tile.engine]:
            to.put(case.name(tile), **found, skipped=f"{answer['kernel']} ran in its place")
        elif answer["why"]:
            to.put(case.name(tile), **found, wrong=answer["why"])
        else:
            right.append(tile)
    if not right:
        return
    try:
        tiles = [asdict(tile) for tile in right]
        *seconds, vendor = json.loads(child.ask(json.dumps({**asked, "tiles": tiles})))
    except Lost as error:
        for tile in right:
            why = f"right, but its time was not taken: {error}"
            to.put(case.name(tile), **_facts(case, tile), wrong=why, debugger=debugger.said())
        return
    for tile, own in zip(right, seconds, strict=True):
        facts = {"seconds": own, "vendor_seconds": vendor, "ratio": vendor / own}
        to.put(case.name(tile), **_facts(case, tile), **facts)


def _facts(case: Case, tile: Tile) -> dict[str, Any]:
    return {
        "layer": case.layer, "pass": case.of, "engine": tile.engine, "tile": tuning.words_of(tile),
        "images": case.task.geometry.N,
    }  # fmt: skip


class Debugger:
    """What cuda-gdb says of a process that hangs, where it is installed."""

    def __init__(self) -> None:
        self._said: str | None = None

    def look(self, pid: int) -> None:
        """At kernels and warps."""
        if shutil.which("cuda-gdb") is None:
            return
        command = ["cuda-gdb", "-p", str(pid), "-batch", "-ex", "info cuda kernels"]
        done = subprocess.run(
            [*command, "-ex", "info cuda warps"], capture_output=True, text=True,
            timeout=LOOK_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._said = done.stdout[-4000:]

    def said(self) -> str | None:
        """Since it was last asked."""
        said, self._said = self._said, None
        return said
