"""Which implementation and which tile: policy alone, without a kernel."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fastdcgan_kernels import measured, plan
from fastdcgan_kernels.geometry import Geometry, Tile, cdiv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [1, 2, 64, 100, 128, 129, 512]
TARGETS = [*plan.TARGETS.values(), plan.INTERPRETER]
# (channels of the small side, of the large side, small side's pixels) of the 64-pixel DCGAN.
SIDES = [(512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32)]
ENDS = [(100, 512), (1, 512)]  # on one pixel


def layers(batch):
    """Geometry of every layer, up and down alike."""
    for small, large, side in SIDES:
        yield Geometry(batch, side, side, small, 2 * side, 2 * side, large, 2, 1)
    for small, large in ENDS:
        yield Geometry(batch, 1, 1, small, 4, 4, large, 1, 0)


def tasks(batch, groups=1):
    """What the blocks of the DCGAN ask for, by kernel, prologue and epilogue."""
    for geometry, dtype in product(layers(batch), DTYPES):
        image = "image_" if geometry.CL == 3 else ""
        for prologue in ("none", "both"):
            yield plan.Task(f"{image}weight_gradient", geometry, dtype, prologue, "store", groups)
        for op, prologue, epilogue in product(
            ("up", "down"),
            ("none", "activate", "normgrad", "actgrad"),
            ("store", "statistics", "gradient"),
        ):
            yield plan.Task(image + op, geometry, dtype, prologue, epilogue, groups)


def steps_of(task, tile):
    """Steps along the sum, as the kernels count them."""
    g = task.geometry
    if task.op.endswith("weight_gradient"):
        return cdiv(g.N // task.groups * g.P * g.Q, tile.depth)
    if task.op == "up":
        return (4 if g.stride > 1 else 1) * cdiv(g.CS, tile.depth)
    return 16 * cdiv(g.CL, tile.depth)


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def check(task, tile, target):
    assert all(power_of_two(n) for n in (tile.rows, tile.columns, tile.depth, tile.split))
    assert min(tile.rows, tile.columns, tile.depth) >= 16  # the least that a dot takes
    assert plan.shared_bytes(task, tile) <= target.shared_bytes
    assert tile.warps in (1, 4, 8)
    assert 1 <= tile.stages <= 4
    if task.op in ("image_up", "image_down"):
        assert tile.split == 1  # their sums are one part
    elif tile.split > 1:
        share = cdiv(steps_of(task, tile), tile.split)
        assert cdiv(steps_of(task, tile), share) == tile.split, "a part of the sum is empty"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_tile_fits_its_target(target, batch):
    for task in tasks(batch):
        tile = plan.tile_for(task, target)
        check(plan._bucketed(task), tile, target)
        if target.name in ("sm_90", "sm_100"):
            assert tile.rows >= 64


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_neighbours_are_few_and_fit(target, groups):
    for task in tasks(128, groups):
        first, *others = plan.neighbours(task, target)
        assert first == plan.tile_for(task, target)
        assert len({first, *others}) == 1 + len(others) <= 13
        for tile in others:
            sizes = (tile.rows, tile.columns, tile.depth, tile.split)
            assert all(power_of_two(n) for n in sizes)
            assert min(sizes[:3]) >= 16
            assert plan.shared_bytes(task, tile) <= target.shared_bytes
        if task.op in ("image_up", "image_down"):
            assert {tile.split for tile in others} <= {1}


def test_neighbours_of_a_wide_tile_do_not_spill(monkeypatch):
    """Results of a program are in its registers: 128 a thread with 8 warps, 64 with 4."""
    wide = Tile(128, 256, 16, warps=8, stages=2)
    monkeypatch.setattr(plan, "_heuristic", lambda task, target: wide)
    task = next(task for task in tasks(128) if task.op == "up")
    first, *others = plan.neighbours(task, plan.TARGETS["sm_90"])
    assert first == wide
    for tile in others:
        assert tile.rows * tile.columns // (32 * tile.warps) <= {4: 64, 8: 128}[tile.warps]


def test_neighbours_try_the_other_way_to_load_where_there_is_one():
    task = next(task for task in tasks(128) if task.op == "up")
    for name, ways in (("sm_80", {False}), ("sm_90", {False, True})):
        tiles = plan.neighbours(task, plan.TARGETS[name])
        assert {tile.descriptors for tile in tiles} == ways


def test_larger_tiles_where_there_is_work():
    """A large batch fills the device with large tiles; a small one gets smaller tiles or parts."""
    target = plan.TARGETS["sm_90"]
    geometry = Geometry(512, 16, 16, 128, 32, 32, 64, 2, 1)
    task = plan.Task("down", geometry, torch.bfloat16, "none", "statistics", 1)
    assert plan.tile_for(task, target) == Tile(128, 128, 64, 1, 8, 3, descriptors=True)
    small = plan.tile_for(replace(task, geometry=replace(geometry, N=1)), target)
    assert small.rows * small.columns < 128 * 128
    assert small.split > 1


def test_a_batch_between_powers_of_two_shares_the_decision_of_the_next():
    assert [plan.bucket(n) for n in (1, 2, 3, 128, 129, 256)] == [1, 2, 4, 128, 256, 256]
    target = plan.TARGETS["sm_80"]
    for tiles in zip(
        *([plan.tile_for(task, target) for task in tasks(n)] for n in (129, 200, 256)), strict=True
    ):
        assert len(set(tiles)) == 1


TASK = plan.Task("up", next(layers(100)), torch.float16, "none", "store", 1)
BLOCK = plan.Block("up", next(layers(100)), torch.float16, True, 1)


def test_what_is_asked_is_recorded_once_and_bucketed():
    with plan.recording() as asked, plan.override("vendor"):
        for n in (100, 128, 65):
            geometry = replace(TASK.geometry, N=n)
            plan.tile_for(replace(TASK, geometry=geometry), plan.INTERPRETER)
            plan.choose(replace(BLOCK, geometry=geometry), plan.INTERPRETER)
    geometry = replace(TASK.geometry, N=128)
    assert list(asked) == [replace(TASK, geometry=geometry), replace(BLOCK, geometry=geometry)]
    plan.tile_for(replace(TASK, op="down"), plan.INTERPRETER)
    assert len(asked) == 2


def test_stored_choices_come_before_defaults_and_after_overrides(monkeypatch):
    asked, tile = [], Tile(16, 16, 16)
    monkeypatch.setattr(measured, "stored_choice", lambda *given: asked.append(given) or "vendor")
    monkeypatch.setattr(measured, "stored_tile", lambda *given: asked.append(given) or tile)
    target = replace(plan.TARGETS["sm_90"], device="NVIDIA H100")
    assert plan.choose(BLOCK, target) == plan.Choice("vendor", measured=True)
    assert plan.tile_for(TASK, target) == tile
    whole = replace(TASK.geometry, N=128)
    assert asked == [
        (replace(BLOCK, geometry=whole), "NVIDIA H100"),
        (replace(TASK, geometry=whole), "NVIDIA H100"),
    ]
    with plan.override("prologue"):
        assert plan.choose(BLOCK, target) == plan.Choice("prologue")


def test_override_is_the_innermost_and_ends():
    target = plan.TARGETS["sm_90"]
    assert plan.choose(BLOCK, target) == plan.Choice("materialised")
    with plan.override("vendor"):
        with plan.override("reference"):
            assert plan.choose(BLOCK, target).how == "reference"
        assert plan.choose(BLOCK, target).how == "vendor"
    assert plan.choose(BLOCK, target).how == "materialised"


def test_override_names_what_it_takes():
    wrong = plan.override("cudnn")
    with pytest.raises(ValueError, match=r"how='cudnn'.*materialised, prologue, vendor, reference"):
        wrong.__enter__()


def test_assume_is_for_meta_tensors_alone():
    meta = torch.device("meta")
    assert plan.target_of(meta) is None
    with plan.assume(plan.TARGETS["sm_80"]):
        with plan.assume(plan.TARGETS["gfx950"]):
            assert plan.target_of(meta) == plan.TARGETS["gfx950"]
            assert plan.target_of(torch.device("cpu")) == plan.INTERPRETER
        assert plan.target_of(meta) == plan.TARGETS["sm_80"]
    assert plan.target_of(meta) is None


def test_cpu_has_kernels_in_the_interpreter_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert plan.target_of(torch.device("cpu")) is None


@pytest.mark.parametrize("given", plan.MODES)
def test_mode_is_read_from_the_environment(monkeypatch, given):
    monkeypatch.setenv("FASTDCGAN_IMPL", given)
    assert plan.mode() == given


def test_mode_is_auto_unless_told(monkeypatch):
    monkeypatch.delenv("FASTDCGAN_IMPL", raising=False)
    assert plan.mode() == "auto"
    monkeypatch.setenv("FASTDCGAN_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"FASTDCGAN_IMPL='cuda'.*auto, reference, triton"):
        plan.mode()


@pytest.fixture
def gpu(monkeypatch):
    """target_of(cuda) with a device of these properties."""

    def target(hip=None, **properties):
        plan._cuda_target.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        properties = {"name": "Some GPU", "multi_processor_count": 7, **properties}
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties)
        )
        return plan.target_of(torch.device("cuda", 3))

    yield target
    plan._cuda_target.cache_clear()


@pytest.mark.parametrize(
    ("major", "minor", "known"),
    [(8, 0, "sm_80"), (8, 6, "sm_80"), (8, 9, "sm_89"), (9, 0, "sm_90"), (10, 0, "sm_100"),
     (10, 3, "sm_100"), (12, 0, "sm_120"), (12, 1, "sm_120"), (7, 5, None), (11, 0, None),
     (13, 0, None)],
)  # fmt: skip
def test_capability_takes_the_known_target_below_of_its_family(gpu, major, minor, known):
    target = gpu(major=major, minor=minor)
    assert (target and target.name) == known
    if target:
        assert (target.multiprocessors, target.device) == (7, "Some GPU")
        assert target.shared_bytes == plan.TARGETS[known].shared_bytes


@pytest.mark.parametrize(("has", "may"), [(101_376, 101_376), (1 << 20, 166_912)])
def test_a_device_with_less_shared_memory_says_so(gpu, has, may):
    assert gpu(major=8, minor=6, shared_memory_per_block_optin=has).shared_bytes == may


@pytest.mark.parametrize(
    ("arch", "known"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950"), ("gfx90a", None)],
)
def test_amd_is_known_by_its_architecture(gpu, arch, known):
    target = gpu(hip="7.0", gcnArchName=arch)
    assert (target and (target.name, target.multiprocessors, target.device)) == (
        known and (known, 7, "Some GPU")
    )


def test_the_shipped_targets_have_no_measured_choices():
    """inspect.py compiles the same tiles on every machine."""
    assert not any(target.device for target in plan.TARGETS.values())
    assert measured.stored_tile(TASK, "") is None
    assert measured.stored_choice(BLOCK, "") is None


VERSIONS = {"3.6.0": False, "3.7.1": True, "3.10.0+git1": True, "4.0": True, "unknown": False}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "setting"), [
    (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "tf32"),
])  # fmt: skip
def test_tf32_is_loaded_by_descriptors_where_triton_rounds_it(dtype, setting, version, monkeypatch):
    """Forward and both gradients; also where a measured tile asks for descriptors. What is not
    rounded to TF32 is as it was."""
    import triton

    from fastdcgan_kernels import blocks, convolution
    from fastdcgan_kernels.launch import recording

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(convolution, "triton_version", convolution.triton_version.__wrapped__)
    tile = Tile(64, 64, 32, 1, 8, 2, descriptors=True)
    monkeypatch.setattr(plan, "tile_for", lambda task, target: tile)
    torch.backends.cudnn.conv.fp32_precision = setting

    def image(channels, side):
        return torch.empty(8, channels, side, side, device="meta", dtype=dtype)

    weight = torch.empty(128, 64, 4, 4, device="meta")
    with plan.assume(plan.TARGETS["sm_90"]), recording() as launches:
        given = image(64, 16), None, weight, None, False, 2, "none", 0.0, "none", 0.0
        blocks.conv_act(*given)
        blocks.conv_act_backward(
            image(128, 8), image(128, 8), *given[:3], None, *given[4:], True, True, False
        )
    rounded = VERSIONS[version] or dtype != torch.float32 or setting == "ieee"
    way = "descriptors" if rounded else "pointers"
    kernels = [launch.kernel.fn.__name__ for launch in launches]
    assert kernels == [f"gather_{way}", f"gather_{way}", f"weight_gradient_{way}"]


@pytest.mark.parametrize(
    ("target", "setting", "dtype", "expected"),
    [
        ("sm_90", "tf32", torch.float32, "tf32"),
        ("sm_90", "ieee", torch.float32, "ieee"),
        ("sm_90", "tf32", torch.bfloat16, "ieee"),
        ("gfx950", "tf32", torch.float32, "ieee"),
    ],
)
def test_float32_products_are_as_pytorchs_convolutions_are_told(target, setting, dtype, expected):
    from fastdcgan_kernels import blocks
    from fastdcgan_kernels.launch import recording

    x = torch.empty(2, 16, 8, 8, device="meta", dtype=dtype)
    weight = torch.empty(8, 16, 4, 4, device="meta")
    torch.backends.cudnn.conv.fp32_precision = setting
    with plan.assume(plan.TARGETS[target]), recording() as launches:
        blocks.conv_act(x, None, weight, None, False, 2, "none", 0.0, "relu", 0.0)
    assert launches[0].arguments["PRECISION"] == expected
