"""Tiles of the kernel in Gluon: which fit, and what its plan of one is."""

from dataclasses import replace

import pytest
import torch

from fastdcgan_kernels import dcgan
from fastdcgan_kernels.choice import choose, heuristics, persistent
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.choice.types import Task

HOPPER = TARGETS["sm_90"]
MID = Geometry(128, 8, 8, 256, 16, 16, 128, 2, 1)
TILE = Tile(128, 128, 64, 1, 4, 4, "gluon")


def plan(tile=TILE, geometry=MID, target=HOPPER, transposed=True, **more):
    return persistent.plan_of(geometry, tile, target, transposed=transposed, **more)


def shared(plan):
    """As the kernel allocates: the ring, the buffers of what goes out, barriers of 8 bytes."""
    ring = plan.STAGES * 2 * plan.BLOCK_K * (plan.BLOCK_M + plan.BLOCK_N)
    buffer = 2 * plan.BLOCK_N * plan.BLOCK_M // plan.PIECES
    return ring + plan.CONSUMERS * plan.BUFFERS * buffer + 8 * (2 * plan.STAGES + 4)


def tasks():
    for layer in dcgan.layers():
        for op, kind in (("conv", "store"), ("conv", "statistics"), ("conv", "gradient"),
                         ("conv_transposed", "store"), ("conv_transposed", "statistics"),
                         ("conv_transposed", "gradient")):  # fmt: skip
            yield Task(op, layer.geometry(128), torch.bfloat16, "none", kind, 1)


def test_what_the_tuner_tries_fits():
    seen = set()
    for task in tasks():
        for tile in persistent.tiles(task, HOPPER):
            found = plan(tile, task.geometry, transposed=task.op == "conv_transposed",
                         epilogue=task.epilogue)  # fmt: skip
            assert shared(found) <= HOPPER.shared_bytes
            assert tile.rows * tile.columns // (32 * tile.warps) <= 128  # of a thread
            assert found.CONSUMERS * tile.warps == 8
            seen.add((task.op, task.geometry.P, task.epilogue))
    assert len(seen) == 3 * 2 * 3  # layers, directions, epilogues


def test_both_modes_come_first():
    for task in tasks():
        tiles = persistent.tiles(task, HOPPER)
        if len(tiles) > 1:
            assert {tile.warps for tile in tiles[:2]} == {4, 8}


def test_no_default_is_one():
    for task in tasks():
        assert choose.tile_for(task, HOPPER).engine != "gluon"
        assert all(tile.engine != "gluon" for tile in heuristics.neighbours(task, HOPPER))


@pytest.mark.parametrize(
    "change",
    [
        {"op": "weight_gradient"}, {"dtype": torch.float32}, {"prologue": "activate"},
        {"epilogue": "actgrad"}, {"geometry": replace(MID, stride=1, P=1, Q=1, H=4, W=4, pad=0)},
        {"geometry": replace(MID, CS=96)}, {"op": "image_conv"},
    ],
    ids=str,
)  # fmt: skip
def test_tasks_without_such_tiles(change):
    task = Task("conv_transposed", MID, torch.bfloat16, "none", "store", 1)
    assert persistent.tiles(task, HOPPER)
    assert persistent.tiles(replace(task, **change), HOPPER) == []
    assert persistent.tiles(task, TARGETS["sm_100"]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 64}, {"columns": 32}, {"depth": 32}, {"split": 2}, {"warps": 2}, {"stages": 2},
        {"stages": 7}, {"rows": 256},
    ],
    ids=str,
)  # fmt: skip
def test_tiles_that_do_not_fit(change):
    assert plan()
    assert plan(replace(TILE, **change)) is None


def test_a_box_stays_in_its_group():
    """Of 8 images; the last one of a single group may have fewer."""
    small = replace(MID, P=4, Q=4, H=8, W=8)
    assert plan(geometry=replace(small, N=32), groups=2).RAGGED is False
    assert plan(geometry=replace(small, N=24), groups=2) is None
    assert plan(geometry=replace(small, N=24)).RAGGED is False
    assert plan(geometry=replace(small, N=20)).RAGGED is True


def test_pieces_are_as_few_as_there_is_room_for():
    together = replace(TILE, rows=256, warps=8)
    assert (plan(replace(together, stages=3)).PIECES, plan(together).PIECES) == (1, 2)
    assert plan(together, epilogue="gradient") is None  # its aux has no room
    assert plan(replace(together, stages=3), epilogue="gradient").BUFFERS == 4


def test_pixels_of_a_channel_in_two_halves_of_the_warps_are_one_piece():
    """64 channels are 4 warps' rows: the other 4 have the other pixels, and no piece is whole."""
    narrow = Tile(256, 64, 64, 1, 8, 4, "gluon")
    assert plan(narrow).PIECES == 1
    assert plan(replace(narrow, stages=5)) is None
    assert plan(narrow, epilogue="gradient") is None
