"""The counter against PyTorch's own and against sums by hand; then what a step is to cost."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model
from benchmarks.counting import (
    counting,
    multi_tensor_launches,
    size,
    traffic,
    work_of_launch,
)
from fastdcgan_kernels import functional
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import TARGETS, assume
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.launch import recording
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from tests.benchmarks import synthetic_gpu

H100 = cost_model.DEVICES["h100"]
BATCH = 128


def meta(*shape, dtype=torch.bfloat16):
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def on_h100(how):
    return cost_model._on(H100, how)


def ours(run, how="materialised"):
    with targets.implementation("triton"), on_h100(how), counting() as work:
        run()
    return work


# Conv2d or ConvTranspose2d; channels in and out, side, stride.
LAYERS = [
    (True, 100, 512, 1, 1), (True, 512, 256, 4, 2), (True, 64, 3, 32, 2), (False, 3, 64, 64, 2),
    (False, 64, 128, 32, 2), (False, 512, 1, 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue", "vendor"])
def test_flops_of_a_layer_are_those_of_pytorchs_counter(layer, how):
    """Forward, input gradient and weight gradient. Kernels make more: their tiles' padding."""
    up, ci, co, side, stride = layer
    shape = (ci, co, 4, 4) if up else (co, ci, 4, 4)
    x = meta(BATCH, ci, side, side).requires_grad_()
    weight = meta(*shape, dtype=torch.float32).requires_grad_()
    options = {"stride": stride, "padding": stride - 1, "activation": "none"}

    def run():
        op = functional.conv_transpose_act if up else functional.conv_act
        op(x, weight, **options).sum().backward()

    work = ours(run, how)
    with FlopCounterMode(display=False) as counter:
        plain = torch.nn.functional.conv_transpose2d if up else torch.nn.functional.conv2d
        plain(x, weight.to(x.dtype), None, stride, stride - 1).sum().backward()
    assert sum(w.useful for w in work) == counter.get_total_flops()
    # 100 channels are padded to 128, an image's 3 to 4 or 16 a tap, 1 to 16 or, as rows, 64.
    padding = {100: 1.3, 3: 2, 1: 40}.get(min(ci, co), 1) if how != "vendor" else 1
    made = sum(w.flops for w in work) / counter.get_total_flops()
    assert 1 <= made <= padding
    assert (made > 1) == (padding > 1)


def test_bytes_of_a_launch_by_hand():
    """D's second layer: bf16 in and out, its weight cast, fp32 partials of its tiles."""
    x, weight = meta(BATCH, 64, 32, 32), meta(128, 64, 4, 4, dtype=torch.float32)
    gamma, running = meta(128, dtype=torch.float32), meta(128, dtype=torch.float32)
    count = torch.zeros((), dtype=torch.int64, device="meta")

    def run():
        functional.conv_bn_act(
            x, weight, None, gamma, gamma, running, running.clone(), stride=2, padding=1,
            training=True, momentum=0.1, eps=1e-5, activation="leaky_relu", slope=0.2,
            batches=count,
        )  # fmt: skip

    _clone, cast, convolution, activate = ours(run)
    assert (cast.name, cast.read, cast.written) == ("_to_copy", 128 * 1024 * 4, 128 * 1024 * 2)
    assert convolution.name == "gather_descriptors"
    moved = 2 * 128 * 4 + 8  # the running buffers and their count, by the last program to arrive
    partials = convolution.programs * (2 * 128 * 4 + 4)
    read = BATCH * 32 * 32 * 64 * 2 + 128 * 1024 * 2
    written = BATCH * 16 * 16 * 128 * 2
    assert convolution.programs == BATCH * 16 * 16 / 256  # pixels
    assert convolution.read == read + partials + 2 * 128 * 4 + moved
    assert convolution.written == written + partials + (5 + 3) * 128 * 4 + moved
    assert activate.read == BATCH * 16 * 16 * 128 * 2 + 5 * 128 * 4
    assert activate.written == BATCH * 16 * 16 * 128 * 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["store", "statistics", "gradient"])
def test_a_persistent_launch_asks_for_what_its_tiles_do(transposed, kind):
    """As the launch that has a program for each tile; here with a last tile that is not full."""
    g = Geometry(BATCH + 2, 4, 4, 256, 8, 8, 128, 2, 1)
    small, large = meta(g.N, 256, 4, 4), meta(g.N, 128, 8, 8)
    x, out = (small, large) if transposed else (large, small)
    epilogue = Epilogue(kind, bias=None if kind == "gradient" else meta(out.shape[1]))
    if kind == "gradient":
        epilogue = Epilogue(kind, aux=out, coef=meta(3, 1, out.shape[1], dtype=torch.float32))
    found = []
    for engine in ("gluon", "descriptors"):
        tile = Tile(128, 128, 64, 1, 4, 4, engine)
        with assume(TARGETS["sm_90"]), recording() as launches:
            blocks.convolve(
                Operand(x), meta(256, 128, 4, 4), g, transposed=transposed, epilogue=epilogue,
                tile=tile,
            )  # fmt: skip
        found.append(work_of_launch(launches[0]))
    persistent, plain = found
    assert persistent.name == "gather_gluon"
    assert persistent.programs == min(132, plain.programs)
    # Its counts are those of a group's tiles; with descriptors each tile of channels has its own.
    assert 0 <= plain.written - persistent.written <= 4 * 4 * plain.programs
    persistent = replace(persistent, written=plain.written)
    assert persistent == replace(plain, name="gather_gluon", programs=persistent.programs)


def test_a_hybrid_gradient_by_hand():
    """D's first two layers, backward: what is between them is read once as the second weight's
    operand, and once as the activation that the second's data gradient undoes."""
    picture, between = BATCH * 64 * 64 * 3 * 2, BATCH * 32 * 32 * 64 * 2
    x, gamma = meta(BATCH, 3, 64, 64), meta(128, dtype=torch.float32)
    first, second = (meta(*shape, 4, 4, dtype=torch.float32).requires_grad_()
                     for shape in ((64, 3), (128, 64)))  # fmt: skip

    def run():
        h = functional.conv_act(x, first, stride=2, padding=1, activation="relu", defer=True)
        functional.conv_bn_act(
            h, second, None, gamma, gamma, None, None, stride=2, padding=1, training=True,
            momentum=0.1, eps=1e-5, activation="relu",
        ).sum().backward()  # fmt: skip

    work = [w for w in ours(run, "hybrid") if w.name != "_to_copy"]
    data, weight, add, image, add_image = work[-5:]
    assert (data.name, data.read) == ("gather_descriptors", 3 * between // 2 + 128 * 1024 * 2)
    assert data.written == between
    assert (weight.name, weight.read) == ("weight_gradient_descriptors", 3 * between // 2)
    assert (image.name, image.read) == ("image_weight_gradient", between + picture)
    assert add.name == add_image.name == "reduce_splits"


def step_of_tiles(launch):
    """Bytes that all programs of a launch load, one step after the other."""
    given = launch.named
    element = given.get("small", given.get("x"))
    element = getattr(element, "base", element).element_size()
    programs = math.prod(launch.grid[:-1])  # those that SPLIT adds share the steps
    left, right = given["BLOCK_M"] * given["BLOCK_K"], given["BLOCK_N"] * given["BLOCK_K"]
    if "small" in given:
        pixels = given["groups"] * given["images"] * given["P"] * given["Q"]
        steps = pixels // given["BLOCK_K"]
        left *= 2 if given["SMALL_PROLOGUE"] == "normgrad" else 1
        right *= given.get("TAPS", 1)  # side by side
        right *= 2 if given["LARGE_PROLOGUE"] == "normgrad" else 1
    else:
        channels, taps = (given["CS"], 4) if given["TRANSPOSED"] else (given["CL"], 16)
        steps = taps * channels // given["BLOCK_K"]
        left *= 2 if given["PROLOGUE"] == "normgrad" else 1
        # A program makes several tiles where there are more than two a multiprocessor.
        rows = -(-given["images"] * given["P"] * given["Q"] // given["BLOCK_M"])
        columns = -(-given["CO"] // given["BLOCK_N"])
        programs = rows * given["PHASE"] ** 2 * columns * given["groups"]
    return programs * steps * (left + right) * element


@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_through_the_l2_are_those_of_all_steps_of_all_tiles(how, dtype, monkeypatch):
    """D's second to fourth layer, forward and backward, by the arguments of each launch."""
    weights = [meta(2 * c, c, 4, 4, dtype=torch.float32).requires_grad_() for c in (64, 128, 256)]
    x = meta(2 * BATCH, 64, 32, 32, dtype=dtype).requires_grad_()

    launches = []

    def noted(launch):
        launches.append((launch, work_of_launch(launch)))
        return launches[-1][1]

    def run():
        h = x
        for weight in weights:
            gamma = meta(len(weight), dtype=torch.float32)
            h = functional.conv_bn_act(
                h, weight, None, gamma, gamma, None, None, stride=2, padding=1, training=True,
                momentum=0.1, eps=1e-5, activation="relu", stat_groups=2,
                defer=weight is not weights[-1],
            )  # fmt: skip
        h.sum().backward()

    monkeypatch.setattr("benchmarks.counting.work_of_launch", noted)
    ours(run, how)
    seen = 0
    for launch, work in launches:
        given = launch.named
        if "PRECISION" not in given:
            assert work.l2 == work.bytes
            continue
        seen += 1
        names = ("small", "small_aux", "large", "large_aux", "x", "x_aux", "w")
        reads = [name for name in traffic(work.name, given)[0] if name in names]
        once = sum(size(getattr(given[name], "base", given[name])) for name in reads)
        assert work.l2 == work.bytes - once + step_of_tiles(launch)
    assert seen == 9


def test_features_of_an_image_pass_the_l2_once_by_hand():
    """G's last layer: 12 tiles of 128 small pixels for an image's 1024, each with a weight of 64
    columns. Borders of tiles and padding around the image count as if they were loaded."""
    x, weight = meta(BATCH, 64, 32, 32), meta(64, 3, 4, 4)
    options = {"stride": 2, "padding": 1, "activation": "tanh"}
    work = {w.name: w for w in ours(lambda: functional.conv_transpose_act(x, weight, **options))}
    up = work["image_up"]
    features, image = BATCH * 32 * 32 * 64 * 2, BATCH * 64 * 64 * 3 * 2
    assert (up.read, up.written) == (features + 64 * 48 * 2, image)
    assert up.tile_loads == 12 * BATCH * (128 + 64) * 64 * 2
    assert up.l2 == up.tile_loads + image
    assert 1.5 * features == 12 * 128 * 64 * 2 * BATCH


def test_launches_of_known_operations():
    a, b = (torch.empty(64, 1024, device="meta") for _ in range(2))
    with counting() as work:
        c = a.t().reshape(-1)  # a copy
        c.view(64, 1024)[:, 1].expand(64).detach()  # nothing
        c += 1.0
        b.zero_()
        a.to(torch.float32)  # nothing: it is
        a.to(torch.bfloat16)
        torch.empty_like(a)  # nothing
        torch.zeros(5, device="meta")
        a.expand(3, 64, 1024) + 1.0
    size = a.numel() * 4
    assert [(w.launches, w.read, w.written) for w in work] == [
        (1, size, size), (1, size, size), (1, 0, size), (1, size, size // 2), (1, 0, 20),
        (1, size, 3 * size),
    ]  # fmt: skip


def test_lists_of_tensors_are_cut_as_pytorch_cuts_them():
    """65,536 elements a chunk, 320 chunks a launch, and a limit of tensors."""
    assert multi_tensor_launches([10] * 36, 4) == 1
    assert multi_tensor_launches([10] * 37, 4) == 2
    assert multi_tensor_launches([320 * 65_536], 4) == 1
    assert multi_tensor_launches([320 * 65_536 + 1], 4) == 2
    assert multi_tensor_launches([65_536] * 30, 1) == 1
    with counting() as work:
        tensors = [torch.empty(1000, device="meta") for _ in range(10)]
        torch._foreach_lerp_(tensors, [t.clone() for t in tensors], 0.1)
        torch._foreach_copy_(tensors, tensors[::-1])
    lerp, copy = work[10:]
    assert (lerp.launches, lerp.read, lerp.written) == (1, 80_000, 40_000)
    assert (copy.launches, copy.read, copy.written) == (1, 40_000, 40_000)


def test_batch_norm_of_pytorch_reads_its_input_twice():
    """The statistics of a channel are there after its last value; then all are read again."""
    x = torch.empty(8, 16, 4, 4, device="meta", requires_grad=True)
    norm = torch.nn.BatchNorm2d(16, affine=False, track_running_stats=False)
    with counting() as work:
        norm(x).backward(torch.empty_like(x))
    size, few = 8 * 16 * 16 * 4, 2 * 16 * 4
    forward, backward = work
    assert (forward.launches, forward.read) == (2, 2 * size)
    assert forward.written == size + few
    assert (backward.launches, backward.read) == (2, 4 * size + few)


def test_a_roofline_by_hand():
    """2 launches: one of FLOPs, one of bytes."""
    from benchmarks.counting import Work

    work = [Work("a", 1, 10**6, 10**6, 798 * 10**9), Work("b", 1, 2 * 10**9, 10**9, 10**6)]
    one = cost_model.Cost("", work, 4, replayed=True)
    assert one.roofline(H100, "bf16") == pytest.approx(1e-3 + 1e-3)
    assert one.predicted(H100, "bf16") == pytest.approx(2e-3 + 2 * cost_model.REPLAYED)


def test_seconds_of_a_launch_by_hand():
    """Bound by FLOPs, by memory, by the L2; and a few programs of many."""
    from benchmarks.counting import Work

    rates = {"flops": 1e12, "bytes": 1e9, "l2": 4e9}
    assert cost_model.seconds_of(Work("", 1, 10**6, 0, 10**10), **rates) == (0.01, 0.01)
    assert cost_model.seconds_of(Work("", 1, 10**6, 10**6, 10**6), **rates) == (0.002, 0.002)
    product = Work("", 1, 10**6, 10**6, 10**9, tile_loads=39 * 10**6, operands=10**6, programs=33)
    assert product.l2 == 40 * 10**6
    assert cost_model.seconds_of(product, **rates) == (0.002, 0.01)
    assert cost_model.seconds_of(product, **rates, multiprocessors=132) == (0.002, 0.04)
    assert cost_model.seconds_of(product, **rates, multiprocessors=16) == (0.002, 0.01)


def test_the_l2_of_a_device_is_given_or_assumed_by_its_clock():
    assert H100.l2 == pytest.approx(6.25e12, rel=0.01)  # between 5.5 and 7 TB/s
    a100 = cost_model.DEVICES["a100"]
    assert a100.l2 / H100.l2 == pytest.approx(108 / 132 * 1.41 / 1.83)
    assert replace(a100, l2=5e12).l2 == 5e12


@pytest.fixture(scope="module")
def steps():
    names = ("prologue", "materialised", "default", "eager-amp")
    return {
        name: cost_model.cost(name, device=H100, batch=BATCH, size=64, dtype="bf16")
        for name in names
    }


def test_a_step_makes_few_launches(steps):
    launches = {name: step.launches for name, step in steps.items()}
    assert launches["prologue"] <= 61
    assert launches["default"] <= 78
    assert launches["default"] <= launches["materialised"] - 14
    assert launches["eager-amp"] > 2.5 * launches["prologue"]


def test_a_step_moves_few_bytes(steps):
    assert steps["prologue"].bytes * 2.18 <= steps["eager-amp"].bytes
    assert steps["default"].bytes * 1.86 <= steps["eager-amp"].bytes


def test_a_step_wastes_no_flops(steps):
    """2,274 MFLOP an image are three passes of G and D's: without weight gradients of D in G's
    step, without gradients of images and noise that nobody takes."""
    for name in ("prologue", "default"):
        assert steps[name].useful / BATCH / 1e6 == pytest.approx(2274, rel=1e-3)
        assert steps[name].flops / BATCH / 1e6 == pytest.approx(2274, rel=0.02)
    assert steps["eager-amp"].useful / BATCH / 1e6 == pytest.approx(2482, rel=1e-3)


# Layers of D on two batches, and of G: GFLOP, FLOPs a byte of operands, floor in us, and what the
# kernels were expected to take (of 5.5 to 7 TB/s), read from their tiles by hand.
TABLE = [
    ("D2 forward", 17.2, 85, 21.5, (29, 37)), ("D3 forward", 17.2, 85, 21.5, (29, 37)),
    ("D4 forward", 17.2, 64, 21.5, (38, 49)), ("D4 weight", 17.2, 64, 21.5, (38, 49)),
    ("D3 weight", 17.2, 64, 21.5, (38, 49)), ("G2 forward", 8.6, 64, 10.8, (19, 24)),
    ("G3 forward", 8.6, 85, 10.8, (14, 18)), ("G2 data", 8.6, 43, 10.8, (29, 37)),
]  # fmt: skip


def test_launches_of_a_step_are_those_of_the_table(steps):
    work = steps["default"].work
    forward = [w for w in work if w.name == "gather_descriptors"]
    weights = [w for w in work if w.name == "weight_gradient_descriptors"]
    found = {
        **dict(zip(("G2 forward", "G3 forward"), forward, strict=False)),
        **dict(zip(("D2 forward", "D3 forward", "D4 forward"), forward[3:], strict=False)),
        **dict(zip(("D4 weight", "D3 weight"), weights, strict=False)),
        "G2 data": forward[-1],
    }
    for name, gflop, a_byte, floor, (least, most) in TABLE:
        w = found[name]
        assert round(w.flops / 1e9, 1) == gflop, name
        assert round(w.flops / w.tile_loads) == a_byte, name
        seconds, predicted = cost_model.seconds_on(H100, w, "bf16")
        assert round(seconds * 1e6, 1) == floor, name
        assert least <= predicted * 1e6 <= most, name


@pytest.mark.parametrize(("batch", "expected"), [(128, 93_000), (1024, 142_000)])
def test_a_step_is_predicted_as_slow_as_its_tiles(batch, expected):
    """To 30 % of what was estimated from each kernel's tile by hand; the roofline is far above."""
    one = cost_model.cost("default", device=H100, batch=batch, size=64, dtype="bf16")
    assert batch / one.predicted(H100, "bf16") == pytest.approx(expected, rel=0.3)
    assert batch / one.roofline(H100, "bf16") > 1.3 * expected


def test_the_command(command, tmp_path):
    file = tmp_path / "cost.md"
    run = command(
        "benchmarks.cost_model", "--batch", 8, "--image-size", 32, "--device", "l4", "--dtype",
        "fp32", "--markdown", file,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = file.read_text()
    assert "Nothing here was measured" in text
    assert f"`python -m benchmarks.cost_model --batch 8 --image-size 32 --device l4 --dtype fp32 " \
           f"--markdown {file}`" in text  # fmt: skip
    for name in (*cost_model.OURS.values(), *cost_model.EAGER.values()):
        assert f"| {name} |" in text
    assert "## Tiles of the products" in text
    run = command("benchmarks.cost_model", "--batch", 8, "--image-size", 32, "--json")
    found = json.loads(run.stdout)
    assert found["prediction"] is True
    assert len(found["tiles"]) > 20
    assert all(0 < one["predicted_seconds"] < 1e-3 for one in found["tiles"])
    assert not any("best" in one for one in found["tiles"])  # these are the peaks it chose by
    run = command(
        "benchmarks.cost_model", "--batch", 8, "--image-size", 32, "--json", "--l2", "1e9"
    )
    slow = json.loads(run.stdout)
    assert any(one["best_seconds"] < one["predicted_seconds"]
               for one in slow["tiles"] if "best" in one)  # fmt: skip
    for step, slower in zip(found["steps"], slow["steps"], strict=True):
        assert slower["l2_seconds"] > 5 * step["l2_seconds"]
        assert slower["roofline_seconds"] == step["roofline_seconds"]
    for step in found["steps"]:
        assert step["predicted_seconds"] >= step["l2_seconds"] > step["roofline_seconds"] > 0
        assert sum(kernel["bytes"] for kernel in step["kernels"].values()) == step["bytes"]


def test_a_run_stands_beside_its_prediction(command, tmp_path):
    """Its card's peaks are taken; what it did not measure stays empty, or as assumed."""
    run = synthetic_gpu.summary()
    (tmp_path / "summary.json").write_text(json.dumps(run))
    done = command("benchmarks.cost_model", "--batch", 100, "--measured", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "500 TFLOP/s in 16 bit, 494.7 in TF32, 1 TB/s (16 bit: measured; TF32: " in done.stdout
    assert "4 TB/s from the L2 (measured)" in done.stdout
    assert f"Predicted for {synthetic_gpu.CARD}: " in done.stdout
    assert "prediction but those called measured" in done.stdout
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    measured = {row[0]: row[-2:] for row in rows if len(row) == 13}
    assert measured[cost_model.OURS["default"]] == ["1.100", "90,909"]
    assert measured[cost_model.OURS["prologue"]] == ["1.500", "66,667"]
    assert measured[cost_model.EAGER["eager"]] == ["3.300", "30,303"]
    assert measured[cost_model.EAGER["eager-amp"]] == ["-", "-"]
    del run["items"]["machine"]["l2"], run["items"]["machine"]["product"]
    device = cost_model.device_of(run)
    assert (device.multiprocessors, device.bytes, device.flops16) == (100, 1e12, H100.flops16)
    assert device.l2 == pytest.approx(H100.l2 * 100 / 132)
    assert "assumed" in device.l2_source
    assert cost_model.device_of({}).name == "a card of unknown name"
    (tmp_path / "summary.json").write_text(json.dumps({**run, "rehearsal": True}))
    for arguments, words in (
        ((tmp_path,), "is a rehearsal: no GPU was measured"),
        ((tmp_path / "none",), "holds no run"),
        ((tmp_path, "--dtype", "fp32"), "goes with --image-size 64 and --dtype bf16"),
    ):
        done = command("benchmarks.cost_model", "--measured", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_bad_arguments_get_one_line(command):
    for arguments, words in (
        (("--device", "voodoo2"), "--device voodoo2 was given; give one of h100"),
        (("--batch", "1"), "--batch 1 was given"),
        (("--l2", "0"), "--l2 0 was given; give bytes a second"),
        (("--image-size", "65"), "--image-size 65 was given; give 32, 64, 128 or 256"),
    ):
        run = command("benchmarks.cost_model", *arguments)
        assert run.returncode == 2
        assert words in run.stderr
        assert "Traceback" not in run.stderr


def test_help_does_not_wait_for_torch(command, environment):
    assert "--device" in command("benchmarks.cost_model", "--help").stdout
    check = "import sys, benchmarks.cost_model; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
