"""Which answer is taken: overrides first, then what was measured, then the default."""

from dataclasses import replace

import pytest
import torch

from fastdcgan_kernels.choice import choose, measured
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import INTERPRETER, TARGETS
from fastdcgan_kernels.choice.types import Block, Choice, Task

LAYER = Geometry(100, 4, 4, 512, 8, 8, 256, 2, 1)
TASK = Task("conv_transposed", LAYER, torch.float16, "none", "store", 1)
BLOCK = Block(True, LAYER, torch.float16, True, 1)


def test_what_is_asked_is_recorded_once_and_bucketed():
    with choose.recording() as asked, choose.override("vendor"):
        for n in (100, 128, 65):
            geometry = replace(TASK.geometry, N=n)
            choose.tile_for(replace(TASK, geometry=geometry), INTERPRETER)
            choose.choose(replace(BLOCK, geometry=geometry), INTERPRETER)
    geometry = replace(TASK.geometry, N=128)
    assert list(asked) == [replace(TASK, geometry=geometry), replace(BLOCK, geometry=geometry)]
    choose.tile_for(replace(TASK, op="conv"), INTERPRETER)
    assert len(asked) == 2


def test_where_each_image_is_a_group_the_batch_and_its_groups_are_bucketed():
    with choose.recording() as asked:
        for n, groups in ((100, 100), (65, 65), (100, 2)):
            block = replace(BLOCK, geometry=replace(LAYER, N=n), groups=groups)
            choose.choose(block, INTERPRETER)
    assert [(block.geometry.N, block.groups) for block in asked] == [(128, 128), (128, 2)]


def test_stored_choices_come_before_defaults_and_after_overrides(monkeypatch):
    asked, tile = [], Tile(16, 16, 16)
    answers = {Block: "vendor", Task: tile}
    monkeypatch.setattr(
        measured, "stored", lambda *given: asked.append(given) or answers[type(given[0])]
    )
    target = replace(TARGETS["sm_90"], device="NVIDIA H100")
    assert choose.choose(BLOCK, target) == Choice("vendor", measured=True)
    assert choose.tile_for(TASK, target) == tile
    whole = replace(TASK.geometry, N=128)
    assert asked == [
        (replace(BLOCK, geometry=whole), "NVIDIA H100"),
        (replace(TASK, geometry=whole), "NVIDIA H100"),
    ]
    with choose.override("prologue"):
        assert choose.choose(BLOCK, target) == Choice("prologue")


def test_override_is_the_innermost_and_ends():
    target = TARGETS["sm_90"]
    assert choose.choose(BLOCK, target) == Choice("hybrid")
    with choose.override("vendor"):
        with choose.override("reference"):
            assert choose.choose(BLOCK, target).how == "reference"
        assert choose.choose(BLOCK, target).how == "vendor"
    assert choose.choose(BLOCK, target).how == "hybrid"


def test_override_names_what_it_takes():
    with pytest.raises(
        ValueError, match=r"how='cudnn'.*hybrid, materialised, prologue, vendor, reference"
    ):
        choose.override("cudnn")
