"""Operators beside plain PyTorch, in a step of small nets: what rounding makes of right ones, and
what a missing tap, an image that is off by a pixel and other mistakes make of wrong ones. The
figures beside `compared.ALLOWED` are these, printed by `pytest -s`."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdcgan_kernels import fuse
from fastdcgan_kernels.choice import choose
from fastdcgan_kernels.compared import ALLOWED, TWINS, Compared
from fastdcgan_kernels.gpu import (
    batchnorm,
    blocks,
    conv_image,
    conv_pointers,
    conv_weight,
)
from fastdcgan_kernels.gpu.tile import Result
from fastdcgan_kernels.modules.block import stat_groups
from fastdcgan_kernels.ops import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last
PRODUCTS = ("y", "result", "gradient of x", "gradient of the weight")
"""Results that are sums over taps."""


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")


def dcgan(w, norm=True):
    """Generator and discriminator for 16 pixels, with the DCGAN's initial weights."""

    def normed(layer, activation):
        return [layer, *([nn.BatchNorm2d(layer.out_channels)] if norm else []), activation]

    up, down, bias = nn.ConvTranspose2d, nn.Conv2d, not norm
    netG = nn.Sequential(
        *normed(up(10, 2 * w, 4, 1, 0, bias=bias), nn.ReLU()),
        *normed(up(2 * w, w, 4, 2, 1, bias=bias), nn.ReLU()),
        up(w, 3, 4, 2, 1, bias=bias), nn.Tanh(),
    )  # fmt: skip
    netD = nn.Sequential(
        down(3, w, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2),
        *normed(down(w, 2 * w, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2)),
        down(2 * w, 1, 4, 1, 0, bias=bias),
    )  # fmt: skip
    for module in (*netG, *netD):
        if isinstance(module, up | down):
            nn.init.normal_(module.weight, 0.0, 0.02)
    return netG, netD


def step(dtype, how="materialised", *, norm=True):
    """(error, whose) of all operators in a step of both nets, the largest first."""
    width, batch = 8 if how == "hybrid" else 4, 2  # to 4 channels it would activate nothing
    torch.manual_seed(0)
    netG, netD = (fuse(net.to(memory_format=CHANNELS_LAST)) for net in dcgan(width, norm))
    smooth = F.interpolate(torch.rand(batch, 3, 4, 4) * 2 - 1, scale_factor=4.0)
    weights = {p.data_ptr(): name for name, p in netD.named_parameters()}
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with (
        choose.override(how),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        Compared(weights) as compared,
    ):
        fake = netG(torch.randn(batch, 10, 1, 1))
        with stat_groups(2):
            real, faked = netD(torch.cat([smooth.to(fake.dtype), fake.detach()])).float().chunk(2)
        ((F.softplus(-real) + F.softplus(faked)).mean() * scale).backward()
        netD.requires_grad_(False)
        (F.softplus(-netD(fake).float()).mean() * scale).backward()
    assert compared.unchecked == 0
    return compared.errors()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue", "vendor"])
def test_right_operators_are_within_a_quarter_of_what_is_allowed(how, dtype):
    errors = step(dtype, how)
    print(f"{dtype} {how}: right {errors[0]}")
    assert errors[0][0] < ALLOWED[dtype] / 4
    seen = {whose.split()[0] for _, whose in errors}
    ways = {
        "hybrid": {*TWINS} - {"activate_backward"},
        "materialised": {*TWINS},
        "prologue": {name for name in TWINS if not name.startswith("activate")},
    }
    assert seen >= ways.get(how, set())
    assert any("of 0.weight" in whose for _, whose in errors)


def test_without_norm_biases_are_compared_too():
    errors = step(torch.float32, norm=False)
    assert errors[0][0] < ALLOWED[torch.float32] / 4
    assert any("gradient of the bias" in whose for _, whose in errors)


@pytest.mark.parametrize("how", ["hybrid", "materialised", "prologue"])
def test_norms_of_images_and_other_activations_are_compared_too(how):
    net = fuse(nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(8, 8, 4, 2, 1, bias=False), nn.InstanceNorm2d(8), nn.GELU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ELU(), nn.Conv2d(8, 1, 4, 2, 1), nn.Sigmoid(),
    ))  # fmt: skip
    with choose.override(how), Compared() as compared:
        net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert compared.errors()[0][0] < ALLOWED[torch.float32] / 4


def break_products(monkeypatch, weight, picture, gradient):
    """Every sum over taps is of what these make of its weight and its picture; every gradient of a
    weight is what the last makes of it."""

    def convolution_by(run):
        def broken(source, w, *given, **options):
            return run(replace(source, value=picture(source.value)), weight(w), *given, **options)

        return broken

    def gradient_by(run):
        return lambda *given, **options: gradient(run(*given, **options))

    for module in (conv_pointers, conv_image):
        monkeypatch.setattr(module, "convolve", convolution_by(module.convolve))
    for module in (conv_weight, conv_image):
        monkeypatch.setattr(module, "weight_gradient", gradient_by(module.weight_gradient))


def without_a_tap(w):
    w = w.clone(memory_format=CHANNELS_LAST)
    w[:, :, 1, 2] = 0
    return w


def off_by_a_pixel(x):
    return x.roll(1, 3).contiguous(memory_format=CHANNELS_LAST)


def same(x):
    return x


BROKEN = {
    "a missing tap": (without_a_tap, same, without_a_tap),
    "off by a pixel": (off_by_a_pixel, same, off_by_a_pixel),  # a filter moved is a picture moved
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", BROKEN)
def test_every_product_that_is_broken_is_far_beyond_what_is_allowed(fault, dtype, monkeypatch):
    break_products(monkeypatch, *BROKEN[fault])
    errors = [one for one in step(dtype) if one[1].split(": ")[1] in PRODUCTS]
    errors = [one for one in errors if not one[1].startswith("activate")]
    print(f"{dtype} {fault}: from {errors[-1]} to {errors[0]}")
    assert len(errors) >= 22  # nine layers run there, and most have two gradients
    assert errors[-1][0] > 4 * ALLOWED[dtype]


def scaled(result, which):
    """5 % off: one of several results, or the value of a convolution."""
    if isinstance(result, tuple):
        return (*result[:which], result[which] * 1.05, *result[which + 1 :])
    if isinstance(result, Result):
        return replace(result, value=result.value * 1.05)
    return result * 1.05


MISTAKES = {  # where, in which of several results, in which way, what the error is said of
    "statistics": (blocks, "conv_bn", 1, "materialised", "mean"),
    "pointwise": (batchnorm, "pointwise", 0, "materialised", "activate of"),
    "activation": (batchnorm, "activation_backward", 0, "materialised", "gradient of y"),
    "sums": (batchnorm, "activation_backward", 1, "materialised", "gradient of gamma"),
    "biases": (batchnorm, "column_sum", 0, "materialised", "gradient of the bias"),
    "activated": (batchnorm, "pointwise", 0, "hybrid", "activate of"),
    "undone": (conv_pointers, "convolve", 0, "hybrid", "gradient of x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_twentieth_is_seen_where_it_is_made(mistake, monkeypatch):
    module, name, which, how, whose = MISTAKES[mistake]
    run = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **more: scaled(run(*given, **more), which))
    errors = step(torch.float32, how, norm=mistake != "biases")
    allowed = ALLOWED[torch.float32]
    beyond = [named for error, named in errors if not error <= allowed]
    assert beyond
    assert any(whose in named for named in beyond), beyond


def test_what_is_no_number_is_an_error_unless_it_is_right():
    from fastdcgan_kernels.compared import relative_error

    right, inf = torch.tensor([1.0, 2.0, 3.0]), float("inf")
    assert relative_error(right.half(), right) == 0
    assert relative_error(torch.tensor([1.0, 2.0, inf]).half(), torch.tensor([1.0, 2.0, 1e6])) == 0
    assert relative_error(torch.tensor([1.0, 2.0, inf]).half(), right) == inf
    assert relative_error(torch.tensor([1.0, 2.0, torch.nan]), right).isnan()
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == inf
    assert relative_error(torch.tensor([2e-7]).half(), torch.tensor([1.5e-7])) == 0  # one spacing
    compared = Compared()
    compared._errors = [("a", torch.tensor(0.5)), ("b", torch.tensor(torch.nan))]
    assert compared.errors() == [(inf, "b"), (0.5, "a")]
    assert json.dumps(compared.errors()[1]) == '[0.5, "a"]'


def test_results_and_state_are_untouched():
    """The same bits as outside."""

    def run():
        torch.manual_seed(0)
        block = torch.nn.Sequential(
            torch.nn.Conv2d(5, 6, 4, 2, 1), torch.nn.BatchNorm2d(6), torch.nn.ReLU()
        )
        out = fuse(block)(torch.randn(2, 5, 8, 4))
        out.square().sum().backward()
        return [out, *(p.grad for p in block.parameters()), *block.buffers()]

    plain = run()
    with Compared():
        compared = run()
    assert all(map(torch.equal, plain, compared))


def test_a_twin_that_does_not_fit_into_the_memory_is_left_out(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(TWINS, "conv_act", full)
    with Compared() as compared:
        fuse(torch.nn.Sequential(torch.nn.Conv2d(5, 6, 4, 2, 1)))(torch.randn(2, 5, 8, 4))
    assert (compared.unchecked, compared.errors()) == (1, [])


def test_every_operator_has_a_twin():
    names = {name for name in dir(ops) if not name.startswith(("_", "cpu"))} - {"name"}
    assert names == set(TWINS)
