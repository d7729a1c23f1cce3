"""The model of a tile's time: its counts are the kernels' own, and each peak by itself gives a time
that can be had by hand."""

from dataclasses import replace

import pytest
import torch

from fastdcgan_kernels.choice import choose, model, targets
from fastdcgan_kernels.choice.devices import DEVICES, L2_A_CLOCK
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.descriptors import triton_version
from fastdcgan_kernels.gpu.launch import recording
from fastdcgan_kernels.gpu.tile import Operand

D3 = Geometry(256, 8, 8, 256, 16, 16, 128, 2, 1)
D2 = Geometry(256, 16, 16, 128, 32, 32, 64, 2, 1)
D5 = Geometry(256, 1, 1, 1, 4, 4, 512, 1, 0)
G1 = Geometry(128, 1, 1, 100, 4, 4, 512, 1, 0)
TILE = Tile(128, 128, 64, 1, 8, 3, "descriptors")


def task_of(op, geometry=D3, epilogue="store", groups=1):
    return Task(op, geometry, torch.bfloat16, "none", epilogue, groups)


def meta(*shape):
    memory = torch.channels_last
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=memory)


@pytest.mark.parametrize(
    ("engine", "g"),
    [*(("pointers", g) for g in (D3, D2, D5, G1)),
     *(("descriptors", g) for g in (D3, D2))],  # the others' channels are no whole 16 bytes
)  # fmt: skip
@pytest.mark.parametrize(
    ("op", "groups"),
    [("conv", 1), ("conv", 2), ("conv_transposed", 2), ("weight_gradient", 1)],
)
@pytest.mark.parametrize("split", [1, 4])
def test_programs_are_those_of_the_launch(op, g, groups, split, engine):
    tile = replace(TILE, engine=engine, split=split)
    small, large = meta(g.N, g.CS, g.P, g.Q), meta(g.N, g.CL, g.H, g.W)
    weight, up = meta(g.CS, g.CL, 4, 4), op == "conv_transposed"
    with targets.assume(TARGETS["sm_90"]), recording() as launches:
        if op == "weight_gradient":
            given = Operand(small), Operand(large)
            blocks.weight_gradient(*given, g, transposed=True, dtype=torch.float32, tile=tile)
        else:
            source = Operand(small if up else large)
            blocks.convolve(source, weight, g, transposed=up, groups=groups, tile=tile)
    programs = 1
    for axis in launches[0].grid:
        programs *= axis
    assert launches[0].kernel.fn.__name__.endswith(engine)
    task = task_of(op, g, groups=groups)
    # By pointers a tile has no more columns than a power of two covers.
    assert model.work_of(task).programs(tile) == programs


@pytest.mark.parametrize(
    ("precision", "kernels"),
    [("ieee", ["gather_pointers"]), ("tf32", ["gather_pointers", "gather_descriptors"])],
)
def test_full_precision_is_by_pointers(precision, kernels, monkeypatch):
    """Without matrix instructions, products of what comes by descriptors spill. (In TF32 Triton
    before 3.7 is by pointers, too.)"""
    monkeypatch.setattr(blocks, "precision_of", lambda x: precision)
    source, weight = meta(256, 128, 16, 16).float(), meta(256, 128, 4, 4).float()
    task = replace(task_of("conv"), dtype=torch.float32)
    with targets.assume(TARGETS["sm_90"]), recording() as launches:
        assert choose.tile_for(task, TARGETS["sm_90"]).engine == "descriptors"
        blocks.convolve(Operand(source), weight, D3, transposed=False)
    expected = kernels[0] if triton_version() < (3, 7) else kernels[-1]
    assert launches[0].kernel.fn.__name__ == expected


def of_one_peak(**peaks):
    """sm_90 with these peaks, all others without bound. Per multiprocessor: of 132."""
    bound = dict.fromkeys(("flops16", "flops32", "bytes", "l2", "clock"), 1e40)
    known = TARGETS["sm_90"]
    return replace(known, peaks=replace(known.peaks, **{**bound, **peaks}))


# D3 forward on 256 images: 128 programs of 128 x 128, 32 steps of 64.
STEPS, PROGRAMS = 32, 256


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        # two waves, each of 2 * 128 * 128 * 64 FLOPs a step
        ({"flops16": 132e12}, 2 * STEPS * 2 * 128 * 128 * 64 / 1e12),
        # ... of 256 rows and columns of 128 bytes a step, and the tile that is stored
        ({"l2": 132e9}, 2 * (STEPS * 256 * 128 + 128 * 128 * 2) / 1e9),
        # the large side, the weight, the small side
        (
            {"bytes": 1e12},
            2 * (256 * 16 * 16 * 128 + 256 * 128 * 16 + 256 * 8 * 8 * 256) / 1e12,
        ),
    ],
)
def test_seconds_by_hand_where_one_peak_bounds_them(peaks, expected):
    task = task_of("conv")
    assert model.work_of(task).programs(TILE) == PROGRAMS
    assert model.predicted_seconds(task, TILE, of_one_peak(**peaks)) == pytest.approx(expected)


def test_seconds_by_hand_of_a_program_by_itself():
    """By the clock alone, with loads that wait: 256 x 128 by 8 warps, one program at a time."""
    tile, clock = replace(TILE, rows=256), 1e9
    task, target = task_of("conv"), of_one_peak(clock=clock)
    assert model.resident(task, tile, target) == 1
    arrive = STEPS * model.LATENCY / 2  # two of three stages are on their way
    end = model.EPILOGUE["store"] * 128 * 8 / 4  # results of a thread, warps, four at a time
    alone = arrive + STEPS * model.WAIT + model.LATENCY + end
    assert model.predicted_seconds(task, tile, target) == pytest.approx(alone / clock)
    statistics = task_of("conv", epilogue="statistics")
    more = (model.EPILOGUE["statistics"] - model.EPILOGUE["store"]) * 128 * 8 / 4
    found = model.predicted_seconds(statistics, tile, target)
    assert found == pytest.approx((alone + more) / clock)


def test_instructions_of_a_prologue_by_hand():
    """By the clock alone, one program at a time, whose instructions take longer than its loads."""
    tile, clock = Tile(64, 64, 64, 1, 8, 4), 1e9
    plain, target = task_of("conv"), of_one_peak(clock=clock)
    task = replace(plain, prologue="activate")
    programs = model.work_of(task).programs(tile)
    waves = -(-programs // 132)
    assert model.resident(task, tile, target) == 1
    copies = 2 * 64 * 64 * 2 / 16 / 256  # by a thread, a step
    loop = model.LOOP["pointers"] + model.COPY * copies + model.TRANSFORM * 64 * 64 / 256
    told = 8 / 4 * (STEPS * loop + model.EPILOGUE["store"] * 64 * 64 / 256)
    expected = waves * (told + STEPS * model.WAIT + model.LATENCY)
    assert model.predicted_seconds(task, tile, target) == pytest.approx(expected / clock)
    assert model.predicted_seconds(plain, tile, target) < expected / clock


@pytest.mark.parametrize(
    ("prologue", "epilogue", "large", "small"),
    [
        ("none", "store", 1, 1), ("activate", "statistics", 1, 1), ("normgrad", "store", 2, 1),
        ("none", "gradient", 1, 2), ("actgrad", "actgrad", 2, 2),
    ],
)  # fmt: skip
def test_memory_sees_each_tensor_once(prologue, epilogue, large, small):
    """With an aux beside the operand, or beside the result."""
    task = replace(task_of("conv", epilogue=epilogue), prologue=prologue)
    sides = large * 256 * 16 * 16 * 128 + small * 256 * 8 * 8 * 256
    assert model.work_of(task).bytes == 2 * (sides + 16 * 256 * 128)


@pytest.mark.parametrize(
    ("name", "tile", "expected"),
    [
        ("sm_80", replace(TILE, engine="pointers"), 65_536), ("sm_90", TILE, 98_304),
        ("sm_120", TILE, 65_536), ("gfx942", Tile(64, 64, 64, 1, 4, 3), 32_768),
        ("gfx950", Tile(64, 64, 64, 1, 4, 3), 49_152),
    ],
)  # fmt: skip
def test_shared_memory_is_that_of_compiled_kernels(name, tile, expected):
    """To 2 % for barriers and padding: docs/inspect.md."""
    found = model.shared_bytes(task_of("conv"), tile, TARGETS[name])
    assert found == pytest.approx(expected, rel=0.02)


def test_a_split_sum_costs_its_parts_and_a_launch():
    task, target = task_of("weight_gradient"), of_one_peak(bytes=1e12)
    one, four = (
        model.predicted_seconds(task, replace(TILE, split=split), target) for split in (1, 4)
    )
    parts, weight = 4 * 16 * 256 * 128 * 4, 16 * 256 * 128 * 4
    moved = model.PART * 2 * parts + weight
    assert four - one == pytest.approx(moved / 1e12 + model.REPLAYED)


def test_residents_are_those_of_compiled_kernels():
    """By the tables of docs/inspect.md, and of the same kernels with larger tiles."""
    statistics = task_of("conv", epilogue="statistics")
    for name, task, tile, programs in (
        ("sm_90", statistics, TILE, 2),
        ("sm_90", statistics, replace(TILE, rows=256), 1),
        ("sm_90", task_of("conv", epilogue="gradient"), TILE, 1),
        ("sm_90", statistics, replace(TILE, columns=64, warps=4), 3),
        ("sm_80", statistics, replace(TILE, engine="pointers"), 1),
        ("sm_80", task_of("conv"), replace(TILE, columns=64, warps=4, engine="pointers"), 2),
        ("sm_120", statistics, TILE, 1),
    ):
        assert model.resident(task, tile, TARGETS[name]) == programs, (name, task, tile)


def test_a_device_with_fewer_multiprocessors_has_less_of_all():
    task, target = task_of("conv"), TARGETS["sm_90"]
    half = replace(target, multiprocessors=66)
    whole, seconds = (model.predicted_seconds(task, TILE, each) for each in (target, half))
    assert seconds == pytest.approx(2 * whole, rel=0.05)
    target = of_one_peak(bytes=1e12)
    half = replace(target, multiprocessors=66)
    whole, seconds = (model.predicted_seconds(task, TILE, each) for each in (target, half))
    assert seconds == pytest.approx(2 * whole)


def test_every_target_has_the_peaks_of_a_card_of_its_kind():
    for name, target in TARGETS.items():
        peaks = target.peaks
        assert (peaks.target, peaks.multiprocessors) == (name, target.multiprocessors)
        assert peaks in DEVICES.values()
        # a multiprocessor's FLOPs a clock: a power of two, or somewhat below where measured
        rate = peaks.flops16 / peaks.multiprocessors / peaks.clock
        assert min(abs(rate / 2**power - 1) for power in range(9, 14)) < 0.2
        assert peaks.l2 == pytest.approx(L2_A_CLOCK * peaks.multiprocessors * peaks.clock)
