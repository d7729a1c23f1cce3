"""The default tiles and those that the tuner tries: they fit their targets."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastdcgan_kernels import dcgan
from fastdcgan_kernels.choice import choose, heuristics
from fastdcgan_kernels.choice.geometry import Geometry, Tile, cdiv
from fastdcgan_kernels.choice.targets import INTERPRETER, TARGETS
from fastdcgan_kernels.choice.types import Task

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [1, 2, 64, 100, 128, 129, 512]
EVERY = [*TARGETS.values(), INTERPRETER]


def tasks(batch, groups=1):
    """What the blocks of the DCGAN ask for, by kernel, prologue and epilogue."""
    layers = dict.fromkeys(layer.geometry(batch) for layer in dcgan.layers())
    for geometry, dtype in product(layers, DTYPES):
        image = "image_" if geometry.CL == 3 else ""
        for prologue in ("none", "both"):
            yield Task(f"{image}weight_gradient", geometry, dtype, prologue, "store", groups)
        for op, prologue, epilogue in product(
            ("conv_transposed", "conv"),
            ("none", "activate", "normgrad", "actgrad"),
            ("store", "statistics", "gradient", "actgrad"),
        ):
            yield Task(image + op, geometry, dtype, prologue, epilogue, groups)


def bucketed(task):
    """As a decision knows it."""
    with choose.recording() as asked:
        choose.tile_for(task, INTERPRETER)
    return next(iter(asked))


def steps_of(task, tile):
    """Steps along the sum, as the kernels count them."""
    g = task.geometry
    if task.op.endswith("weight_gradient"):
        return cdiv(g.N // task.groups * g.P * g.Q, tile.depth)
    if task.op == "conv_transposed":
        return (4 if g.stride > 1 else 1) * cdiv(g.CS, tile.depth)
    return 16 * cdiv(g.CL, tile.depth)


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def check(task, tile, target):
    assert all(power_of_two(n) for n in (tile.rows, tile.columns, tile.depth, tile.split))
    assert min(tile.rows, tile.columns, tile.depth) >= 16  # the least that a dot takes
    assert heuristics.shared_bytes(task, tile) <= target.shared_bytes
    assert tile.warps in (1, 4, 8)
    assert 1 <= tile.stages <= 4
    if task.op in ("image_conv_transposed", "image_conv"):
        assert tile.split == 1  # their sums are one part
    elif tile.split > 1:
        share = cdiv(steps_of(task, tile), tile.split)
        assert cdiv(steps_of(task, tile), share) == tile.split, "a part of the sum is empty"


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_tile_fits_its_target(target, batch):
    for task in tasks(batch):
        tile = choose.tile_for(task, target)
        check(bucketed(task), tile, target)
        if target.name in ("sm_90", "sm_100"):
            assert tile.rows >= 64


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_neighbours_are_few_and_fit(target, groups):
    for task in tasks(128, groups):
        first, *others = heuristics.neighbours(task, target)
        assert first == choose.tile_for(task, target)
        assert len({first, *others}) == 1 + len(others) <= 13
        for tile in others:
            sizes = (tile.rows, tile.columns, tile.depth, tile.split)
            assert all(power_of_two(n) for n in sizes)
            assert min(sizes[:3]) >= 16
            assert heuristics.shared_bytes(task, tile) <= target.shared_bytes
        if task.op in ("image_conv_transposed", "image_conv"):
            assert {tile.split for tile in others} <= {1}


def test_neighbours_of_a_wide_tile_do_not_spill(monkeypatch):
    """Results of a program are in its registers: 128 a thread with 8 warps, 64 with 4."""
    wide = Tile(128, 256, 16, warps=8, stages=2)
    monkeypatch.setattr(heuristics, "default_tile", lambda task, target: wide)
    task = next(task for task in tasks(128) if task.op == "conv_transposed")
    first, *others = heuristics.neighbours(task, TARGETS["sm_90"])
    assert first == wide
    for tile in others:
        assert tile.rows * tile.columns // (32 * tile.warps) <= {4: 64, 8: 128}[tile.warps]


def test_neighbours_try_the_other_way_to_load_where_there_is_one():
    task = next(task for task in tasks(128) if task.op == "conv_transposed")
    for name, ways in (("sm_80", {"pointers"}), ("sm_90", {"pointers", "descriptors"})):
        tiles = heuristics.neighbours(task, TARGETS[name])
        assert {tile.engine for tile in tiles} == ways


def test_larger_tiles_where_there_is_work():
    """A large batch fills the device with large tiles; a small one gets smaller tiles or parts."""
    target = TARGETS["sm_90"]
    geometry = Geometry(512, 16, 16, 128, 32, 32, 64, 2, 1)
    task = Task("conv", geometry, torch.bfloat16, "none", "statistics", 1)
    assert choose.tile_for(task, target) == Tile(128, 128, 64, 1, 8, 3, engine="descriptors")
    small = choose.tile_for(replace(task, geometry=replace(geometry, N=1)), target)
    assert small.rows * small.columns < 128 * 128
    assert small.split > 1


def test_a_batch_between_powers_of_two_shares_the_decision_of_the_next():
    assert [heuristics.bucket(n) for n in (1, 2, 3, 128, 129, 256)] == [1, 2, 4, 128, 256, 256]
    target = TARGETS["sm_80"]
    for tiles in zip(
        *([choose.tile_for(task, target) for task in tasks(n)] for n in (129, 200, 256)),
        strict=True,
    ):
        assert len(set(tiles)) == 1
