"""The fused blocks on the GPU itself: numerics of every kind of layer, way and dtype, CUDA-graph
capture, the tuner, more than 2^31 elements, another current device. Run with `pytest -m gpu`;
tests/gpu/sanitize.sh runs the small ones under compute-sanitizer."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastdcgan_kernels import functional, fuse, reference
from fastdcgan_kernels.choice import choose, targets
from fastdcgan_kernels.choice.geometry import Geometry
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.tile import Epilogue, Operand

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (transposed, stride, x, weight): the layers of the standard nets' kinds, and awkward ones.
LAYERS = {
    "G1": (True, 1, (8, 100, 1, 1), (100, 512, 4, 4)),
    "G2": (True, 2, (8, 512, 4, 4), (512, 256, 4, 4)),
    "G4": (True, 2, (8, 128, 16, 16), (128, 64, 4, 4)),
    "G5": (True, 2, (8, 64, 32, 32), (64, 3, 4, 4)),
    "D1": (False, 2, (8, 3, 64, 64), (64, 3, 4, 4)),
    "D2": (False, 2, (8, 64, 32, 32), (128, 64, 4, 4)),
    "D4": (False, 2, (8, 256, 8, 8), (512, 256, 4, 4)),
    "D5": (False, 1, (8, 512, 4, 4), (1, 512, 4, 4)),
    "ragged": (False, 2, (3, 65, 12, 20), (100, 65, 4, 4)),
    "small": (True, 2, (2, 16, 4, 6), (16, 24, 4, 4)),
}

# Other kernels, strides and paddings, in the same way: of TensorFlow's DCGAN (T), SNGAN's critic
# (S), pix2pix's (P), CycleGAN's generator (C), with (top, left, bottom, right) of the padding.
OTHERS = {
    "T2": (True, 1, (8, 256, 7, 7), (256, 128, 5, 5), (2, 2, 2, 2)),
    "T3": (True, 2, (8, 128, 7, 7), (128, 64, 5, 5), (1, 1, 2, 2)),
    "T4": (True, 2, (8, 64, 14, 14), (64, 1, 5, 5), (1, 1, 2, 2)),
    "T5": (False, 2, (8, 1, 28, 28), (64, 1, 5, 5), (1, 1, 2, 2)),
    "T6": (False, 2, (8, 64, 14, 14), (128, 64, 5, 5), (1, 1, 2, 2)),
    "S1": (False, 1, (8, 3, 32, 32), (64, 3, 3, 3), (1, 1, 1, 1)),
    "S3": (False, 1, (8, 128, 16, 16), (128, 128, 3, 3), (1, 1, 1, 1)),
    "P4": (False, 1, (2, 256, 32, 32), (512, 256, 4, 4), (1, 1, 1, 1)),
    "C2": (False, 2, (4, 64, 64, 64), (128, 64, 3, 3), (1, 1, 1, 1)),
    "C6": (True, 2, (4, 128, 32, 32), (128, 64, 3, 3), (1, 1, 0, 0)),
    "C8": (False, 1, (2, 64, 38, 38), (3, 64, 7, 7), (0, 0, 0, 0)),
    "odd": (False, 2, (3, 24, 9, 13), (40, 24, 3, 3), (1, 0, 1, 1)),
    "1x1": (False, 1, (4, 64, 16, 16), (32, 64, 1, 1), (0, 0, 0, 0)),
}


def draw(*shape, dtype=torch.float32, seed=0, spread=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return values.to(DEVICE, dtype).requires_grad_()


def results(op, x, weight, gamma, beta, stride, upstream, padding=None):
    """Output, buffers and gradients of a block, as float64 on the host."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, gamma, beta)]
    like = gamma.detach()
    mean, var = torch.zeros_like(like), torch.ones_like(like)
    out = op(
        leaves[0], leaves[1], None, leaves[2], leaves[3], mean, var, stride=stride,
        padding=stride - 1 if padding is None else padding, training=True, momentum=0.1, eps=1e-5,
        activation="tanh",
    )  # fmt: skip
    out.backward(upstream.to(out.dtype))
    return [t.detach().double().cpu() for t in (out, mean, var, *(leaf.grad for leaf in leaves))]


def worse(ours, rival, truth):
    """Relative RMS errors of ours and of the rival."""
    size = truth.square().mean().sqrt() + 1e-12
    return [((v - truth).square().mean().sqrt() / size).item() for v in (ours, rival)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue", "vendor"])
@pytest.mark.parametrize("name", LAYERS)
def test_blocks(name, how, dtype, monkeypatch):
    """A DCGAN's layers and awkward ones."""
    transposed, stride, x, weight = LAYERS[name]
    compare(transposed, stride, x, weight, (stride - 1,) * 4, how, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["hybrid", "prologue"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels(name, how, dtype, monkeypatch):
    """Every size of kernel, stride and padding."""
    compare(*OTHERS[name], how, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_kernels_norms_and_activations(dtype):
    """Norms of one image, and activations whose derivative takes their input, in a fused net."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, 32, 7), nn.InstanceNorm2d(32), nn.SiLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.InstanceNorm2d(64, affine=True), nn.GELU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding="same"), nn.ELU(),
        nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.BatchNorm2d(32), nn.Sigmoid(),
        nn.ConvTranspose2d(32, 3, 5, 1, 2), nn.Tanh(),
    )  # fmt: skip
    wide = copy.deepcopy(net).double()
    plain = net.to(DEVICE, memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 20, 28).to(memory_format=torch.channels_last)
    found = []
    for model, own in ((fused, x.to(DEVICE)), (plain, x.to(DEVICE)), (wide, x.double())):
        own.requires_grad_()
        low = model is not wide and dtype != torch.float32
        with torch.autocast(DEVICE, dtype if low else torch.bfloat16, enabled=low):
            out = model(own)
        out.float().square().mean().backward()
        tensors = [out, own.grad, *(p.grad for p in model.parameters())]
        found.append([t.detach().double().cpu() for t in tensors])
    for place, values in enumerate(zip(*found, strict=True)):
        error, allowed = worse(*values)
        assert error <= max(3 * allowed, 1e-5), (place, error, allowed)


def compare(transposed, stride, x, weight, padding, how, dtype, monkeypatch):
    """No further from float64 than twice PyTorch's own blocks in the same dtype, or a few
    roundings. tanh has no kink: no rounding decides a derivative."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    channels = weight[1] if transposed else weight[0]
    op = "conv_transpose_bn_act" if transposed else "conv_bn_act"
    x, weight = draw(*x, dtype=dtype), draw(*weight, seed=1, spread=0.05)
    gamma, beta = draw(channels, seed=2), draw(channels, seed=3)
    shape = getattr(reference, op)(
        x.detach(), weight.detach().to(dtype), None, None, None, None, None, stride=stride,
        padding=padding, training=True, momentum=0.1, eps=1e-5, activation="none",
    ).shape  # fmt: skip
    upstream = draw(*shape, seed=4).detach()
    given = stride, upstream, padding
    with choose.override(how):
        ours = results(getattr(functional, op), x, weight, gamma, beta, *given)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        rival = results(getattr(reference, op), x, weight, gamma, beta, *given)
    wide = [t.detach().double() for t in (x, weight, gamma, beta)]
    truth = results(getattr(reference, op), *wide, stride, upstream.double(), padding)
    floor = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for place, values in enumerate(zip(ours, rival, truth, strict=True)):
        error, allowed = worse(*values)
        assert error <= max(2 * allowed, floor), (place, error, allowed)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors_and_pointers_agree(transposed, groups):
    if not targets.target_of(torch.device(DEVICE, 0)).descriptors:
        pytest.skip("this device has no tensor descriptors")
    geometry = Geometry(8, 8, 8, 64, 16, 16, 128, 2, 1)
    small, large = (draw(*s, dtype=torch.bfloat16).detach().to(memory_format=torch.channels_last)
                    for s in ((8, 64, 8, 8), (8, 128, 16, 16)))  # fmt: skip
    x, y = (small, large) if transposed else (large, small)
    weight = draw(64, 128, 4, 4, dtype=torch.bfloat16, seed=1).detach()
    weight = weight.to(memory_format=torch.channels_last)
    op = "conv_transposed" if transposed else "conv"
    task = Task(op, geometry, x.dtype, "none", "statistics", groups)
    tile = choose.tile_for(task, targets.target_of(torch.device(DEVICE, 0)))
    found, gradients = [], []
    for engine in ("descriptors", "pointers"):
        given = {
            "transposed": transposed, "groups": groups,
            "tile": replace(tile, engine=engine, split=1),
        }  # fmt: skip
        result = blocks.convolve(
            Operand(x), weight, geometry, epilogue=Epilogue("statistics"), **given
        )
        found.append(result.value)
        gradients.append(
            blocks.weight_gradient(Operand(x), Operand(y), geometry, dtype=torch.float32, **given)
        )
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.Tanh(),
    )  # fmt: skip
    return net.to(DEVICE, memory_format=torch.channels_last)


@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue"])
def test_small_net_for_the_sanitizer(how):
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # the kernels follow it; TF32 is 0.002 away
    plain = small_net().double()
    net = fuse(small_net())
    x = draw(3, 3, 16, 16)
    with choose.override(how):
        out = net(x)
        out.square().sum().backward()
    wide = x.detach().double().requires_grad_()
    expected = plain(wide)
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-2, atol=1e-2)


def test_a_training_step_in_a_cuda_graph_is_the_step():
    """PyTorch's recipe: warm up on a side stream, capture forward and backward, replay."""
    net = fuse(small_net())
    twin = copy.deepcopy(net)
    static = torch.zeros(4, 3, 16, 16, device=DEVICE)

    def step(model, x):
        model.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        return loss

    start = copy.deepcopy(net.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, static)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = step(net, static)
    net.load_state_dict(start)
    for seed in range(3):
        x = draw(4, 3, 16, 16, seed=seed).detach()
        static.copy_(x)
        graph.replay()
        expected = step(twin, x)
        torch.testing.assert_close(loss, expected)
        for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_same_bits_twice():
    found = []
    for _ in range(2):
        net = fuse(small_net())
        net(draw(16, 3, 64, 64)).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_compiled_by_inductor():
    net, twin = fuse(small_net()), fuse(small_net())
    x = draw(4, 3, 32, 32).detach()
    out = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(out, twin(x))


def test_more_than_2_to_the_31_elements():
    """The last image of a batch whose output passes 2^31 elements is what it is alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    n = 2**31 // (64 * 64 * 64) + 2
    weight = draw(64, 3, 4, 4, dtype=torch.bfloat16).detach()
    x = torch.zeros(n, 3, 128, 128, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = draw(3, 128, 128, dtype=torch.bfloat16, seed=5).detach()
    options = {"stride": 2, "padding": 1, "activation": "relu"}
    with torch.no_grad():
        out = functional.conv_act(x, weight, None, **options)
        alone = functional.conv_act(x[-1:], weight, None, **options)
    assert out.numel() > 2**31
    assert torch.equal(out[-1:], alone)


def test_another_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    net = fuse(small_net().to("cuda:1"))
    x = draw(4, 3, 16, 16).detach().to("cuda:1")
    with torch.cuda.device(0):
        out = net(x)
    torch.testing.assert_close(out, fuse(small_net())(x.to("cuda:0")).to("cuda:1"))


def test_the_tuner_measures_and_its_choices_are_right(tmp_path, monkeypatch):
    from fastdcgan_kernels import tuner

    monkeypatch.setenv("FASTDCGAN_CACHE", str(tmp_path))
    net, twin = fuse(small_net()), fuse(small_net())
    x = draw(4, 3, 16, 16).detach()
    expected, said = twin(x), []
    tuner.tune(net, x, say=said.append)
    assert said
    assert list(tmp_path.rglob("*.json"))
    fresh = fuse(small_net())
    torch.testing.assert_close(fresh(x), expected, rtol=1e-3, atol=1e-3)
