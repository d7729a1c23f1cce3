"""The tiles that a task may have: they fit their targets, and the default is the model's first."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from fastdcgan_kernels import dcgan
from fastdcgan_kernels.choice import choose, heuristics, model
from fastdcgan_kernels.choice.geometry import Geometry, Tile, bucket, cdiv
from fastdcgan_kernels.choice.targets import INTERPRETER, TARGETS
from fastdcgan_kernels.choice.types import Task

DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [1, 2, 100, 512]
EVERY = [*TARGETS.values(), INTERPRETER]
SM_90 = TARGETS["sm_90"]
LAYERS = list(dict.fromkeys(layer.geometry(1) for layer in dcgan.layers()))


def tasks(batch, groups=1):
    """What the blocks of the DCGAN ask for, by kernel, prologue and epilogue."""
    for layer, dtype in product(LAYERS, DTYPES):
        geometry = replace(layer, N=batch)
        image = "image_" if geometry.CL == 3 else ""
        for prologue in ("none", "both"):
            yield Task(f"{image}weight_gradient", geometry, dtype, prologue, "store", groups)
        for op, prologue, epilogue in product(
            ("conv_transposed", "conv"),
            ("none", "activate", "normgrad", "actgrad"),
            ("store", "statistics", "gradient", "actgrad"),
        ):
            yield Task(image + op, geometry, dtype, prologue, epilogue, groups)


def layer(name, batch, op, epilogue="store", groups=1):
    """A task of one of the DCGAN's layers, in bf16."""
    (found,) = (each for each in dcgan.layers() if each.name == name)
    return Task(op, found.geometry(batch), torch.bfloat16, "none", epilogue, groups)


def bucketed(task):
    """As a decision knows it."""
    with choose.recording() as asked:
        choose.tile_for(task, INTERPRETER)
    return next(iter(asked))


def steps_of(task, tile):
    """Steps along the sum, as the kernels count them."""
    g = task.geometry
    if task.op.endswith("weight_gradient"):
        return task.groups * cdiv(g.N // task.groups * g.P * g.Q, tile.depth)
    if task.op == "conv_transposed":
        return (4 if g.stride > 1 else 1) * cdiv(g.CS, tile.depth)
    return 16 * cdiv(g.CL, tile.depth)


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def results_of_a_thread(tile, target):
    return tile.rows * tile.columns / (tile.warps * target.warp_size)


def check(task, tile, target):
    """What holds for every candidate, by what compiled without spills: docs/inspect.md."""
    assert all(power_of_two(n) for n in (tile.rows, tile.columns, tile.depth, tile.split))
    assert min(tile.rows, tile.columns, tile.depth) >= 16  # the least that a dot takes
    assert model.shared_bytes(task, tile, target) <= target.shared_bytes
    assert tile.warps in (1, 4, 8)
    assert 1 <= tile.stages <= 4
    if target.name in ("sm_90", "sm_100"):  # of their matrix instructions' first operand
        weight_first = tile.engine == "descriptors" and task.op != "weight_gradient"
        assert (tile.columns if weight_first else tile.rows) >= 64
    if task.op in ("image_conv_transposed", "image_conv"):
        assert tile.split == 1  # their sums are one part
    elif tile.split > 1:
        share = cdiv(steps_of(task, tile), tile.split)
        assert cdiv(steps_of(task, tile), share) == tile.split, "a part of the sum is empty"
    if target is INTERPRETER:
        return
    most = 64
    if tile.engine == "descriptors":
        assert task.prologue == "none"
        wide = task.dtype != torch.float32 and tile.warps == 8 and target.name != "sm_120"
        most = 128 if wide else 64
        if task.op == "conv":
            assert task.geometry.CL % tile.depth == 0
    elif task.prologue != "none" or task.epilogue in ("gradient", "actgrad"):
        most = 16 if task.prologue != "none" and tile.warps == 4 else 32
    if task.op == "image_conv_transposed":
        most = 64  # other warps than these would spill there
    assert results_of_a_thread(tile, target) <= most


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_default_fits_its_target(target, batch):
    for task in tasks(batch):
        check(bucketed(task), choose.tile_for(task, target), target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_candidate_fits_and_the_default_is_the_models_best(target, groups):
    for task in tasks(128, groups):
        every = list(heuristics.candidates(task, target))
        assert 0 < len(every) == len(set(every)) < 400  # as many predictions at a first call
        for tile in every:
            check(task, tile, target)
        seconds = [model.predicted_seconds(task, tile, target) for tile in every]
        default = choose.tile_for(task, target)
        assert default == every[seconds.index(min(seconds))]


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_tuner_tries_the_default_then_the_models_next(target, groups):
    for task in tasks(128, groups):
        found = heuristics.neighbours(task, target)
        assert found[0] == choose.tile_for(task, target)
        assert 0 < len(found) == len(set(found)) <= heuristics.TRIED
        sizes = Counter((tile.engine, tile.rows, tile.columns) for tile in found)
        assert max(sizes.values()) <= heuristics.OF_A_SIZE
        for tile in found:
            check(task, tile, target)
        if target is not INTERPRETER:
            assert {*found} <= {*heuristics.candidates(task, target)}
            assert {tile.engine for tile in found} == {*heuristics.engines(task, target)}
            best = [tile for tile in found if tile.engine == found[0].engine]
            seconds = [model.predicted_seconds(task, tile, target) for tile in best]
            assert seconds == sorted(seconds)


def test_both_engines_are_tried_where_a_target_has_both_and_the_task_fits():
    task = layer("D3", 128, "conv")
    for name, engines in (("sm_80", {"pointers"}), ("sm_90", {"pointers", "descriptors"})):
        tiles = heuristics.neighbours(task, TARGETS[name])
        assert {tile.engine for tile in tiles} == engines
    assert choose.tile_for(task, SM_90).engine == "descriptors"
    for other in (
        replace(task, prologue="activate"),
        replace(task, geometry=replace(task.geometry, CL=100)),  # 200 bytes a pixel
        replace(task, op="image_conv", geometry=replace(task.geometry, CL=3)),
    ):
        assert heuristics.engines(other, SM_90) == ("pointers",)


@pytest.mark.parametrize(("channels", "depths"), [(128, {64, 32}), (96, {32}), (72, set())])
def test_a_convolutions_boxes_hold_one_tap(channels, depths):
    task = layer("D3", 128, "conv")
    task = replace(task, geometry=replace(task.geometry, CL=channels))
    found = [
        tile for tile in heuristics.candidates(task, SM_90) if tile.engine == "descriptors"
    ]  # fmt: skip
    assert {tile.depth for tile in found} == depths


def test_a_weight_gradients_boxes_are_rows_of_pixels():
    """Where boxes cut rows of 12 or 24 pixels, or one has images of two groups, loads are by
    pointers."""
    task = layer("D3", 128, "weight_gradient")
    assert choose.tile_for(task, SM_90).engine == "descriptors"
    for p, q in ((12, 12), (8, 24)):
        odd = replace(task, geometry=replace(task.geometry, P=p, Q=q, H=2 * p, W=2 * q))
        assert {tile.engine for tile in heuristics.candidates(odd, SM_90)} == {"pointers"}
    small = layer("D4", 2, "weight_gradient")  # images of 4 x 4
    for groups, depths in ((1, {32, 16}), (2, {16})):
        every = heuristics.candidates(replace(small, groups=groups), SM_90)
        assert {tile.depth for tile in every if tile.engine == "descriptors"} == depths


@pytest.mark.parametrize(
    ("name", "op", "epilogue", "groups"),
    [
        ("D4", "conv", "statistics", 2),
        ("D4", "weight_gradient", "store", 2),
        ("D3", "conv", "statistics", 2),
        ("D4", "conv_transposed", "store", 2),
    ],
)
def test_a_card_that_is_nearly_full_keeps_its_tile(name, op, epilogue, groups):
    """128 programs for 132 multiprocessors; half a tile would load a third more."""
    task = layer(name, 256, op, epilogue, groups)
    tile = choose.tile_for(task, SM_90)
    assert tile.rows * tile.columns >= 128 * 128
    assert tile.split == 1
    assert model.work_of(task).programs(tile) == 128


@pytest.mark.parametrize("batch", [128, 256, 1024])
@pytest.mark.parametrize("name", ["D2", "D3", "D4", "G2", "G3", "G4"])
def test_a_weight_gradient_is_split_and_keeps_its_tile(name, batch):
    task = layer(name, batch, "weight_gradient")
    tile = choose.tile_for(task, SM_90)
    assert tile.rows >= 128
    assert tile.columns == 128  # where CL is 64, of two taps
    assert 128 <= model.work_of(task).programs(tile) <= 264


def test_more_than_32_parts_where_the_card_is_filled_by_parts_alone():
    task = layer("D1", 256, "image_weight_gradient")
    assert choose.tile_for(task, SM_90).split > 32


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_a_small_batch_fills_the_card_with_parts_or_small_tiles(name):
    target = TARGETS[name]
    for task in (layer("D3", 2, "conv", "statistics"), layer("D4", 8, "conv_transposed")):
        tile = choose.tile_for(task, target)
        largest = replace(tile, rows=128, columns=128, split=1)
        programs = model.work_of(task).programs
        assert programs(tile) >= 4 * programs(largest)
        assert programs(tile) >= target.multiprocessors // 4


def intensity(tile):
    """FLOPs of a byte in 16 bit."""
    return tile.rows * tile.columns / (tile.rows + tile.columns)


def with_peaks(**times):
    """sm_90, some of its peaks so many times as high."""
    peaks = {name: getattr(SM_90.peaks, name) * by for name, by in times.items()}
    return replace(SM_90, peaks=replace(SM_90.peaks, **peaks))


def test_a_slow_l2_is_for_large_tiles_and_slow_products_are_for_full_cards():
    gathers = [layer(name, 256, "conv", "statistics", 2) for name in ("D2", "D3", "D4")]
    gathers += [layer(name, 128, "conv_transposed", "statistics") for name in ("G2", "G3", "G4")]
    slow, fast = with_peaks(l2=0.25), with_peaks(l2=8, flops16=0.25)
    changed = 0
    for task in gathers:
        tiles = [choose.tile_for(task, target) for target in (slow, SM_90, fast)]
        least, _, most = map(intensity, tiles)
        assert least >= intensity(tiles[1]) >= most
        changed += least > most
    assert changed >= 3


def test_slow_memory_is_for_few_parts():
    task = layer("D3", 256, "weight_gradient")
    parts = [choose.tile_for(task, with_peaks(bytes=by)).split for by in (10, 1, 0.05)]
    assert parts[0] >= parts[1] > parts[2]


def test_a_batch_between_powers_of_two_shares_the_decision_of_the_next():
    assert [bucket(n) for n in (1, 2, 3, 128, 129, 256)] == [1, 2, 4, 128, 256, 256]
    target = TARGETS["sm_80"]
    for tiles in zip(
        *([choose.tile_for(task, target) for task in tasks(n)] for n in (129, 200, 256)),
        strict=True,
    ):
        assert len(set(tiles)) == 1


def test_the_interpreter_has_few_large_operations():
    geometry = Geometry(512, 16, 16, 128, 32, 32, 64, 2, 1)
    task = Task("conv", geometry, torch.bfloat16, "none", "statistics", 1)
    assert choose.tile_for(task, INTERPRETER) == Tile(512, 128, 64, 1, 1, 1)
