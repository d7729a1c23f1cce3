"""The counter against PyTorch's own and against sums by hand; then what a step is to cost."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model
from benchmarks.counting import counting, multi_tensor_launches
from fastdcgan_kernels import functional, plan

H100 = cost_model.DEVICES["h100"]
BATCH = 128


def meta(*shape, dtype=torch.bfloat16):
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def on_h100(how):
    return cost_model._on(H100, how)


def ours(run, how="materialised"):
    with plan.implementation("triton"), on_h100(how), counting() as work:
        run()
    return work


# Conv2d or ConvTranspose2d; channels in and out, side, stride.
LAYERS = [
    (True, 100, 512, 1, 1), (True, 512, 256, 4, 2), (True, 64, 3, 32, 2), (False, 3, 64, 64, 2),
    (False, 64, 128, 32, 2), (False, 512, 1, 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("how", ["materialised", "prologue", "vendor"])
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

    _clone, cast, convolution, merge, activate = ours(run)
    assert (cast.name, cast.read, cast.written) == ("_to_copy", 128 * 1024 * 4, 128 * 1024 * 2)
    assert convolution.name == "gather_descriptors"
    assert convolution.read == BATCH * 32 * 32 * 64 * 2 + 128 * 1024 * 2
    tiles, rest = divmod(convolution.written - BATCH * 16 * 16 * 128 * 2, 2 * 128 * 4 + 4)
    assert rest == 0
    assert tiles == BATCH * 16 * 16 / 128  # pixels
    moved = 2 * 128 * 4 + 8
    assert merge.read == tiles * (2 * 128 * 4 + 4) + 2 * 128 * 4 + moved
    assert merge.written == (5 + 3) * 128 * 4 + moved
    assert activate.read == BATCH * 16 * 16 * 128 * 2 + 5 * 128 * 4
    assert activate.written == BATCH * 16 * 16 * 128 * 2


def test_a_first_layers_weight_gradient_by_hand():
    """D's first two layers, backward: nothing as large as what is between them is moved but once,
    for the second weight."""
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

    work = {w.name: w for w in ours(run, "prologue")}
    assert work["image_down"].written == between + between // 16
    through, parts = work["image_weight_gradient_through"], H100.multiprocessors
    assert through.written == parts * 64 * 48 * 4
    assert through.read == between + between // 16 + picture + 128 * 1024 * 2 + 3 * 128 * 4
    products = BATCH * (16 * 16 * 128 * 64 * 16 + 32 * 32 * 64 * 3 * 16)
    assert through.useful == 2 * products
    assert through.flops == 2 * (products + BATCH * 32 * 32 * 64 * 16)  # 64 columns for 48


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


@pytest.fixture(scope="module")
def steps():
    names = ("prologue", "default", "eager-amp")
    return {
        name: cost_model.cost(name, device=H100, batch=BATCH, size=64, dtype="bf16")
        for name in names
    }


def test_a_step_makes_few_launches(steps):
    assert steps["prologue"].launches <= 76
    assert steps["eager-amp"].launches > 2.5 * steps["prologue"].launches


def test_a_step_moves_few_bytes(steps):
    assert steps["prologue"].bytes * 2.5 <= steps["eager-amp"].bytes


def test_a_step_wastes_no_flops(steps):
    """2,274 MFLOP an image are three passes of G and D's: without weight gradients of D in G's
    step, without gradients of images and noise that nobody takes."""
    for name in ("prologue", "default"):
        assert steps[name].useful / BATCH / 1e6 == pytest.approx(2274, rel=1e-3)
        assert steps[name].flops / BATCH / 1e6 == pytest.approx(2274, rel=0.02)
    assert steps["eager-amp"].useful / BATCH / 1e6 == pytest.approx(2482, rel=1e-3)


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
    run = command("benchmarks.cost_model", "--batch", 8, "--image-size", 32, "--json")
    found = json.loads(run.stdout)
    assert found["prediction"] is True
    for step in found["steps"]:
        assert step["predicted_seconds"] >= step["roofline_seconds"] > 0
        assert sum(kernel["bytes"] for kernel in step["kernels"].values()) == step["bytes"]


def test_bad_arguments_get_one_line(command):
    for arguments, words in (
        (("--device", "voodoo2"), "--device voodoo2 was given; give one of h100"),
        (("--batch", "1"), "--batch 1 was given"),
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
