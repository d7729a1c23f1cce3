"""The step against an independent plain PyTorch implementation, and what it must not do."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.training.config import TrainConfig, preset
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import READINGS, Step
from tests.training.steps import NoSync, batches, largest_difference

CPU = torch.device("cpu")
SMALL = {"image_size": 32, "channels": 3, "nz": 12, "ngf": 8, "ndf": 8, "batch_size": 6}


def plain_nets(size, channels, nz, ngf, ndf):
    """The example's nets, written as lists of layers: NCHW, Sigmoid at D's end."""
    widths = [2**i for i in range(size.bit_length() - 3)]
    g, below = [], nz
    for i, width in enumerate(reversed(widths)):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        g += [nn.ConvTranspose2d(below, width * ngf, 4, stride, padding, bias=False)]
        g += [nn.BatchNorm2d(width * ngf), nn.ReLU()]
        below = width * ngf
    g += [nn.ConvTranspose2d(below, channels, 4, 2, 1, bias=False), nn.Tanh()]
    d, below = [], channels
    for i, width in enumerate(widths):
        d += [nn.Conv2d(below, width * ndf, 4, 2, 1, bias=False)]
        d += [nn.BatchNorm2d(width * ndf)] if i else []
        d += [nn.LeakyReLU(0.2)]
        below = width * ndf
    d += [nn.Conv2d(below, 1, 4, 1, 0, bias=False), nn.Sigmoid(), nn.Flatten(0)]
    return nn.Sequential(*g), nn.Sequential(*d)


class Plain:
    """The example's loop body on plain layers: BCELoss on probabilities, Adam as PyTorch has it."""

    def __init__(self, netG, netD, config):
        self.netG, self.netD = netG, netD
        self.optG, self.optD = (
            torch.optim.Adam(n.parameters(), config.lr, (config.beta1, config.beta2), foreach=False)
            for n in (netG, netD)
        )

    def step(self, images, z):
        netG, netD, criterion = self.netG, self.netD, nn.BCELoss()
        images = images.contiguous()
        real, fake_label = torch.ones(len(images)).to(z), torch.zeros(len(images)).to(z)
        netD.zero_grad()
        criterion(netD(images), real).backward()
        fake = netG(z)
        criterion(netD(fake.detach()), fake_label).backward()
        self.optD.step()
        netG.zero_grad()
        criterion(netD(fake), real).backward()
        self.optG.step()


def away_from_kinks(netG, netD, data, config, steps):
    """As many batches of `data` in which no ReLU's input comes within rounding of 0 (3e-6 standard
    deviations) while these nets train on them. There a last-bit difference of the convolutions
    (channels_last against NCHW) decides a derivative, and Adam makes a whole step of it."""
    run, chosen = Plain(copy.deepcopy(netG).double(), copy.deepcopy(netD).double(), config), []
    while len(chosen) < steps:
        images, z = next(data)
        tried, nearest = copy.deepcopy(run), []
        for module in (*tried.netG, *tried.netD):
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.register_forward_pre_hook(
                    lambda m, args, into=nearest: into.append(args[0].abs().min() / args[0].std())
                )
        tried.step(images.double(), z.double())
        if min(nearest) > 3e-6:
            run.step(images.double(), z.double())
            chosen.append((images, z))
    return chosen


# In float32 the bound is a twentieth of one step of 2e-4; in float64 it is rounding.
@pytest.mark.parametrize(
    ("dtype", "bound", "one_pass"),
    [(torch.float64, 1e-10, False), (torch.float64, 1e-10, True), (torch.float32, 1e-5, False)],
)
@pytest.mark.parametrize("size", [32, 64])
def test_20_steps_equal_the_plain_implementation(dtype, bound, one_pass, size, monkeypatch):
    """`one_pass`: D takes real and fake together, as it does where kernels run."""
    monkeypatch.setattr(Step, "_in_one_pass", lambda self: one_pass)
    config = TrainConfig(**{**SMALL, "image_size": size})
    state = TrainState(config, CPU, dtype=dtype)
    plainG, plainD = (n.to(dtype) for n in plain_nets(size, 3, 12, 8, 8))
    plainG.load_state_dict(
        {k.removeprefix("main."): v.clone() for k, v in state.netG.state_dict().items()}
    )
    plainD.load_state_dict(
        {k.removeprefix("main."): v.clone() for k, v in state.netD.state_dict().items()}
    )
    start = copy.deepcopy(plainG)
    data = batches(config, 1000, dtype=dtype, ragged=4)
    if dtype == torch.float32:
        data = away_from_kinks(plainG, plainD, data, config, 20)
    data = list(itertools.islice(data, 20))
    step = Step(state, batch_size=config.batch_size)
    for images, z in data:
        step(images, z)
    plain = Plain(plainG, plainD, config)
    for images, z in data:
        plain.step(images, z)
    assert largest_difference(state.netG, plainG) < bound
    assert largest_difference(state.netD, plainD) < bound
    assert largest_difference(start, plainG) > 1e-3, "the plain loop must have trained"
    tracked = [b for k, b in state.netD.named_buffers() if k.endswith("num_batches_tracked")]
    assert {int(b) for b in tracked} == {60}, "real, fake, fake move D's statistics in each step"


def test_a_step_by_fused_kernels_is_the_reference_step():
    """In Triton's interpreter. Adam's first moments are half the gradients, whose largest error is
    compared with their largest value: the parameters themselves have moved by a sign only."""
    config = TrainConfig(**SMALL)
    states = []
    for impl in ("reference", "triton"):
        state = TrainState(dataclasses.replace(config, impl=impl), CPU)
        row = Step(state, batch_size=6)(*next(batches(config, 1)))
        states.append((state, row))
    (plain, row), (fused, fused_row) = states
    torch.testing.assert_close(fused_row, row, rtol=1e-5, atol=1e-6)
    for name in ("optG", "optD"):
        for theirs, ours in zip(
            getattr(plain, name).state.values(), getattr(fused, name).state.values(), strict=True
        ):
            error = (ours["exp_avg"] - theirs["exp_avg"]).abs().max()
            assert error < 1e-4 * theirs["exp_avg"].abs().max()
    for theirs, ours in zip(plain.netD.buffers(), fused.netD.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_readings_are_the_losses_and_mean_probabilities():
    config = TrainConfig(**SMALL)
    state = TrainState(config, CPU, dtype=torch.float64)
    netG, netD = copy.deepcopy(state.netG), copy.deepcopy(state.netD)
    images, z = next(batches(config, 1, dtype=torch.float64))
    row = dict(zip(READINGS, Step(state, batch_size=6)(images, z).tolist(), strict=True))
    real = netD(images).sigmoid().detach()
    fake = netD(netG(z)).sigmoid().detach()
    assert row["loss_d"] == pytest.approx(float(-(real.log().mean() + (1 - fake).log().mean())))
    assert row["d_real"] == pytest.approx(float(real.mean()))
    assert row["d_fake"] == pytest.approx(float(fake.mean()))
    # D has learnt to tell this very batch apart, so it now gives the fakes less.
    assert row["d_fake_g"] < row["d_fake"]
    assert row["loss_g"] > float(-fake.log().mean())


class WeightGradients(TorchDispatchMode):
    """Counts convolution backwards by whether they form the weight's gradient."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1][:2]))
        return func(*args, **(kwargs or {}))


def test_no_wasted_gradients():
    """D (4 convolutions at 32) and G (4): weights twice for D's two batches, once for G; images'
    gradients never for D's first layer in D's step; D's weights never in G's step."""
    config = TrainConfig(**SMALL)
    step = Step(TrainState(config, CPU), batch_size=6)
    images, z = next(batches(config, 1))
    with WeightGradients() as seen:
        step(images, z)
    d_step, g_step = seen.masks[:8], seen.masks[8:]
    assert [weight for _, weight in d_step] == [True] * 8
    assert [x for x, _ in d_step] == [True, True, True, False] * 2
    assert g_step == [(True, False)] * 4 + [(True, True)] * 3 + [(False, True)]


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("name", ["dcgan", "tf28"])
def test_a_step_makes_no_host_sync(name, scaling):
    config = preset(name, **({**SMALL} if name == "dcgan" else {"channels": 1, "batch_size": 4}))
    state = TrainState(config, CPU, scaling=scaling)
    step = Step(state, batch_size=config.batch_size)
    data = list(batches(config, 2))
    with NoSync():
        for images, z in data:
            step(images, z)
    with pytest.raises(AssertionError, match="host sync"), NoSync():
        bool(images.sum() > 0)


@pytest.mark.parametrize("name", ["dcgan", "tf28"])
def test_the_whole_step_runs_on_the_meta_device(name):
    config = preset(name, **({} if name == "dcgan" else {"batch_size": 8}), channels=1)
    state = TrainState(config, torch.device("meta"))
    step = Step(state, batch_size=config.batch_size)
    images = torch.empty(config.batch_size, 1, config.image_size, config.image_size, device="meta")
    z = torch.randn(config.batch_size, config.nz, 1, 1, device="meta")
    for _ in range(2):
        assert step(images, z).shape == (len(READINGS),)
    assert all(p.device.type == "meta" for p in state.netG.parameters())


def test_activations_stay_channels_last():
    config = TrainConfig(**SMALL)
    state = TrainState(config, CPU)
    strides = []
    for net in (state.netG, state.netD):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda m, i, o: strides.append(
                        o.is_contiguous(memory_format=torch.channels_last)
                    )
                )
    step = Step(state, batch_size=6)
    step(*next(batches(config, 1)))
    assert strides
    assert all(strides)
    for net in (state.netG, state.netD):
        for p in net.parameters():
            if p.dim() == 4:
                assert p.is_contiguous(memory_format=torch.channels_last)
                assert p.grad is not None
                assert p.grad.stride() == p.stride()


@pytest.mark.parametrize("name", ["dcgan", "tf28"])
def test_compiled_equals_eager_over_20_steps_without_recompilation(name):
    """Tolerance: as in the float32 comparison above, and for the same reason."""
    overrides = SMALL if name == "dcgan" else {"channels": 1, "batch_size": 4}
    config = preset(name, **overrides)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = list(batches(config, 20, ragged=3))
    nets = []
    for compiled in (False, True):
        state = TrainState(config, CPU)
        for net in (state.netG, state.netD):
            for module in net.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # compiled dropout draws other numbers than eager dropout
        step = Step(state, batch_size=config.batch_size, compile=compiled, say=pytest.fail)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for images, z in data:
                readings = step(images, z)
        assert readings.isfinite().all()
        nets.append(state)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for a, b in ((nets[0].netG, nets[1].netG), (nets[0].netD, nets[1].netD)):
        assert largest_difference(a, b) < 4e-4
    assert not any("_orig_mod" in key for key in nets[1].state_dict()["netG"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_weights_statistics_and_losses_in_float32(dtype):
    config = TrainConfig(**SMALL)
    state = TrainState(config, CPU, scaling=dtype == torch.float16)
    seen = {}
    for module in state.netD.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.update(conv=o.dtype))
    before = copy.deepcopy(state.netG)
    step = Step(state, batch_size=6, autocast=dtype)
    for images, z in batches(config, 3):
        row = step(images, z)
    assert seen["conv"] == dtype
    assert row.dtype == torch.float32
    assert row.isfinite().all()
    for tensor in itertools.chain(state.netG.state_dict().values(), state.netD.parameters()):
        assert tensor.dtype in (torch.float32, torch.int64)
    assert largest_difference(before, state.netG) > 1e-5


def test_an_overflowing_gradient_is_skipped_and_the_scale_lowered():
    config = TrainConfig(**SMALL)
    state = TrainState(config, CPU, scaling=True)
    step = Step(state, batch_size=6)
    images, z = next(batches(config, 1))
    step(images, z)
    before = {k: v.clone() for k, v in state.netD.named_parameters()}
    scale = state.scalers[0].get_scale()
    step(images * float("inf"), z)
    assert all(torch.equal(before[k], v) for k, v in state.netD.named_parameters())
    assert state.scalers[0].get_scale() < scale


SIMULTANEOUS = {  # whether D judges each image alone
    "tf28": (True, {"net": "tf28", "image_size": 28, "channels": 1}),
    "hinge": (True, {"norm_d": "none", "loss": "hinge"}),
    "least squares": (True, {"norm_d": "none", "loss": "lsgan"}),
    "paired": (True, {"norm_d": "none", "loss": "relativistic"}),
    "instance norm, augmented": (True, {"norm_d": "instance", "diffaugment": "color,translation"}),
    "batch norm": (False, {}),
    "minibatch deviation": (False, {"norm_d": "none", "minibatch_std": True}),
}


@pytest.mark.parametrize("name", SIMULTANEOUS)
def test_one_pass_back_through_d_has_both_gradients(name):
    """In float64 the update by one pass is the update by two, also of images of which D is so sure
    that its loss has no gradient there (hinge)."""
    alone, options = SIMULTANEOUS[name]
    options = {"net": "dcgan", "image_size": 32, "channels": 3, "ngf": 4, "ndf": 4} | options
    if options["net"] == "tf28":
        del options["ngf"], options["ndf"]
    config = TrainConfig(batch_size=6, updates="simultaneous", **options)
    data = list(batches(config, 2, dtype=torch.float64))
    found = []
    for passes in (1, 2):
        torch.manual_seed(0)
        state = TrainState(config, CPU, dtype=torch.float64)
        with torch.no_grad():  # images that differ, and opinions on either side of the hinge
            for net in (state.netG, state.netD):
                [p for p in net.parameters() if p.dim() > 1][-1].mul_(1e6)
        step = Step(state, batch_size=6)
        assert step._judges_alone == alone
        step._judges_alone &= passes == 1
        plain, fakes = step._loss, []

        def loss(scaler, logits, roles, *more, plain=plain, fakes=fakes):
            row, gradient = plain(scaler, logits, roles, *more)
            fakes.extend([gradient] * (roles == ("fake",)))
            return row, gradient

        step._loss = loss
        for images, z in data:
            torch.manual_seed(1)
            readings = step(images, z)
        assert name != "hinge" or {0.0} < set(torch.cat(fakes).tolist())
        found.append((state, readings))
    (one, readings), (two, readings_too) = found
    torch.testing.assert_close(readings, readings_too, rtol=1e-6, atol=0)
    for net in ("netG", "netD"):
        for a, b in zip(
            getattr(one, net).parameters(), getattr(two, net).parameters(), strict=True
        ):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-12)


def test_simultaneous_updates_equal_two_gradient_tapes():
    """The TensorFlow tutorial's step in float64: gradients of both losses at the same weights, and
    Adam as Keras writes it, with epsilon beside the uncorrected second moment."""
    config = preset("tf28", channels=1, batch_size=3)
    state = TrainState(config, CPU, dtype=torch.float64)
    for module in state.netD.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    netG, netD = copy.deepcopy(state.netG), copy.deepcopy(state.netD)
    data = list(batches(config, 5, dtype=torch.float64))
    step = Step(state, batch_size=3)
    for images, z in data:
        step(images, z)
    moments = {}
    for t, (images, z) in enumerate(data, start=1):
        fake = netG(z)
        real_logits, fake_logits = netD(images), netD(fake)
        loss_d = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        loss_g = F.softplus(-fake_logits).mean()
        for net, loss in ((netD, loss_d), (netG, loss_g)):
            gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            for p, g in zip(net.parameters(), gradients, strict=True):
                m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                moments[p] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        with torch.no_grad():  # only now do any weights move
            for p, (m, v) in moments.items():
                rate = 1e-4 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
                p -= rate * m / (v.sqrt() + 1e-7)
    assert largest_difference(state.netG, netG) < 1e-9
    assert largest_difference(state.netD, netD) < 1e-9


def test_learning_rates_differ_where_asked():
    state = TrainState(TrainConfig(**SMALL, lr=1e-3, lr_d=5e-5), CPU)
    assert state.optG.param_groups[0]["lr"] == 1e-3
    assert state.optD.param_groups[0]["lr"] == 5e-5


def test_ema_is_the_published_average():
    config = TrainConfig(**SMALL, ema_decay=0.5)
    state = TrainState(config, CPU)
    expected = {k: v.clone().double() for k, v in state.netG.state_dict().items()}
    step = Step(state, batch_size=6)
    for t, (images, z) in enumerate(batches(config, 12)):
        step(images, z)
        decay = min(0.5, (1 + t) / (10 + t))
        for key, value in state.netG.state_dict().items():
            moving = value.is_floating_point()
            expected[key] = expected[key] * decay + value * (1 - decay) if moving else value.clone()
    assert state.ema is not None
    for key, value in state.ema.average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)
