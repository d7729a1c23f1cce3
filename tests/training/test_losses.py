"""Losses, penalties and augmentation: each formula against one written differently, and whole steps
with them against plain loops."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.training.augmentation import diffaugment, instance_noise
from fastdcgan.training.compiling import Compiler
from fastdcgan.training.config import TrainConfig, preset
from fastdcgan.training.losses import Loss
from fastdcgan.training.rates import share_left
from fastdcgan.training.regularisers import (
    STEP,
    Penalty,
    between,
    difference,
    image_gradients,
    slope_penalty,
    zero_centred,
)
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import READINGS, Step
from fastdcgan_kernels.choice.choose import recording
from fastdcgan_kernels.choice.targets import TARGETS, assume, implementation
from tests.training.steps import NoSync, batches, largest_difference
from tests.training.textbook import EVERYTHING, TEXTBOOK, log_sigmoid

CPU = torch.device("cpu")
SMALL = {"image_size": 32, "channels": 3, "nz": 12, "ngf": 8, "ndf": 8, "batch_size": 6}
LOSSES = ["bce", "hinge", "lsgan", "wgan-gp", "relativistic"]
NO_SCALE = torch.amp.GradScaler("cpu", enabled=False)


def loss_of(**fields):
    return Loss(TrainConfig(**fields), Compiler(False, print))


def logits(dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 7, generator=draw, dtype=torch.float64) * 2).to(dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_papers(name):
    real, fake = (part.clone().requires_grad_() for part in logits())
    of_d, of_g = (f(real, fake) for f in TEXTBOOK[name])
    mean = torch.sigmoid if name == "bce" else lambda d: d
    loss = loss_of(loss=name)
    close = {"rtol": 1e-7, "atol": 1e-9}

    row, gradient = loss(torch.cat([real, fake]), ("real", "fake"), 0.25, NO_SCALE)
    expected = [of_d, mean(real).mean(), mean(fake).mean()]
    torch.testing.assert_close(row, torch.stack(expected).detach() * 0.25, **close)
    wanted = torch.cat(torch.autograd.grad(of_d, [real, fake])) * 0.25
    torch.testing.assert_close(gradient, wanted, **close)

    row, gradient = loss(fake, ("wanted",), 0.25, NO_SCALE, against=real)
    expected = torch.stack([of_g, mean(fake).mean()]).detach() * 0.25
    torch.testing.assert_close(row, expected, **close)
    (wanted,) = torch.autograd.grad(of_g, fake)
    torch.testing.assert_close(gradient, wanted * 0.25, **close)

    if not loss.paired:
        rows = [loss(d, (role,), 0.25, NO_SCALE)[0] for d, role in ((real, "real"), (fake, "fake"))]
        torch.testing.assert_close(rows[0][0] + rows[1][0], of_d.detach() * 0.25, **close)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_16_bit_logits_is_scaled_and_of_their_dtype(name):
    real, fake = logits(torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = loss_of(loss=name)
    both = torch.cat([real, fake])
    row, gradient = loss(both, ("real", "fake"), 1.0, scaler)
    _, unscaled = loss(both.double(), ("real", "fake"), 1.0, NO_SCALE)
    assert row.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), unscaled * 8, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["bce", "lsgan"])
def test_label_smoothing_is_one_sided(name):
    real, fake = (part.clone().requires_grad_() for part in logits())
    loss = loss_of(loss=name, label_smoothing=0.25)
    if name == "bce":
        of_d = -(0.75 * log_sigmoid(real) + 0.25 * log_sigmoid(-real)).mean()
        of_d = of_d - log_sigmoid(-fake).mean()
    else:
        of_d = 0.5 * ((real - 0.75) ** 2).mean() + 0.5 * (fake**2).mean()
    row, gradient = loss(torch.cat([real, fake]), ("real", "fake"), 1.0, NO_SCALE)
    assert float(row[0]) == pytest.approx(float(of_d.detach()))
    wanted = torch.cat(torch.autograd.grad(of_d, [real, fake]))
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)
    plain = loss_of(loss=name)
    for role in ("fake", "wanted"):
        smoothed, unsmoothed = (x(fake, (role,), 1.0, NO_SCALE) for x in (loss, plain))
        assert torch.equal(smoothed[0], unsmoothed[0])


# --- Penalties ------------------------------------------------------------------------------------


def small_d(**more):
    """D in float64, fused, so that a penalty has to go around the blocks."""
    state = TrainState(TrainConfig(**{**SMALL, **more}), CPU, dtype=torch.float64)
    return state.netD, state


def numerical_gradients(netD, images, step=1e-5):
    """Of the sum of D's logits at a few pixels, by central differences."""
    for index in [(0, 0, 3, 4), (1, 2, 31, 0), (2, 1, 16, 17)]:
        ends = []
        for sign in (1, -1):
            moved = images.clone()
            moved[index] += sign * step
            ends.append(copy.deepcopy(netD)(moved).sum())
        yield index, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("norm_d", ["batch", "none"])
def test_image_gradients_are_ds_slope_and_leave_its_buffers_alone(norm_d):
    netD, _ = small_d(norm_d=norm_d, spectral_norm=True)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    before = copy.deepcopy(dict(netD.named_buffers()))
    found = image_gradients(netD, images)
    for name, buffer in netD.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert found.requires_grad
    with torch.no_grad():
        for index, slope in numerical_gradients(netD, images):
            assert float(found[index]) == pytest.approx(float(slope), rel=1e-4, abs=1e-9)


def test_a_penalty_asks_no_kernel_in_any_mode(monkeypatch):
    """They have first derivatives only, and some of them compute in 16 bits."""
    netD, _ = small_d(norm_d="none")
    netD.float()
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    with implementation("triton"), recording() as asked:
        gradients = image_gradients(netD, torch.rand(2, 3, 32, 32).bfloat16())
        slope_penalty(gradients, 1.0).backward()
    assert not asked
    assert gradients.dtype == torch.float32
    assert all(p.grad is not None for p in netD.parameters() if p.dim() > 1)


def test_penalties_are_the_papers():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    norms = x.numpy().reshape(4, -1).__pow__(2).sum(1) ** 0.5
    assert float(zero_centred(x, 3.0)) == pytest.approx(3.0 / 2 * (norms**2).mean())
    assert float(slope_penalty(x, 10.0)) == pytest.approx(10.0 * ((norms - 1) ** 2).mean())
    assert torch.isfinite(
        torch.autograd.grad(slope_penalty(x.requires_grad_() * 0, 1.0), x)[0]
    ).all()


def test_a_difference_is_the_exact_penalty_in_the_mean():
    """Of a linear D it is a square of a normal number times the slope's: mean 1, variance 2."""
    torch.manual_seed(0)
    netD = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    images = torch.randn(20_000, 3, 2, 2, dtype=torch.float64)
    exact = float(zero_centred(image_gradients(netD, images), 2.0).detach())
    assert float(difference(netD, images, 2.0).detach()) == pytest.approx(exact, rel=0.04)


def test_a_difference_has_the_gradient_that_its_formula_has(monkeypatch):
    """D's passes and the noise written out; the noise is drawn at each call."""
    netD, _ = small_d(norm_d="none")
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    torch.manual_seed(4)
    difference(netD, images, 3.0).backward()
    found = [p.grad.clone() for p in netD.parameters()]
    torch.manual_seed(4)
    moved = images + STEP * torch.randn_like(images)
    plain = nn.Sequential(*(copy.deepcopy(m) for m in netD.main))
    plain.zero_grad()
    slope = (plain(moved).flatten() - plain(images).flatten()) / STEP
    ((slope**2).sum() / 3 * 1.5).backward()
    for ours, p in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-6, atol=1e-9)
    again = [difference(netD, images, 3.0) for _ in range(2)]
    assert not torch.equal(*again)


def test_a_difference_is_near_the_exact_penalty_of_a_net_in_float32():
    """Curvature and rounding are small beside the slope: so over many draws of the noise."""
    netD, _ = small_d(norm_d="none")
    netD.float()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    exact = float(zero_centred(image_gradients(netD, images), 2.0).detach())
    with torch.no_grad():
        found = [float(difference(netD, images, 2.0)) for _ in range(400)]
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.15)


def test_a_difference_runs_fused_blocks_and_no_second_derivative(monkeypatch):
    netD, _ = small_d(norm_d="none")
    netD.float()
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    with implementation("triton"), recording() as asked:
        difference(netD, torch.rand(2, 3, 32, 32).bfloat16(), 1.0).backward()
    assert asked
    assert all(p.grad is not None and p.grad.isfinite().all() for p in netD.parameters())


@pytest.mark.parametrize("form", ["exact", "difference"])
def test_r1_is_at_real_images_and_r2_at_generated_ones(form):
    netD = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Softplus()).double()
    real, fake = torch.randn(2, 4000, 3, 2, 2, dtype=torch.float64) + torch.tensor(
        [3.0, -3.0], dtype=torch.float64
    ).reshape(2, 1, 1, 1, 1)
    given = {"penalty_form": form, "norm_d": "none"}
    alone = [
        float(Penalty(TrainConfig(**{name: 1.0}, **given))(netD, real, fake).detach())
        for name in ("r1", "r2")
    ]
    for found, images in zip(alone, (real, fake), strict=True):
        slopes = image_gradients(netD, images).flatten(1).square().sum(1)
        assert found == pytest.approx(float(slopes.mean().detach()) / 2, rel=0.1)
    both = float(Penalty(TrainConfig(r1=1.0, r2=2.0, **given))(netD, real, fake).detach())
    assert both == pytest.approx(alone[0] + 2 * alone[1], rel=0.1)


def test_rates_fall_in_a_line_over_the_last_part_of_a_run():
    places = (0, 0.4, 0.6, 0.8, 0.9, 1, 1.2)
    assert [share_left(0, x) for x in places] == [1] * 7
    assert [share_left(0.4, x) for x in places] == pytest.approx([1, 1, 1, 0.5, 0.25, 0, 0])
    assert [share_left(1, x) for x in places] == pytest.approx([1, 0.6, 0.4, 0.2, 0.1, 0, 0])


def test_interpolates_lie_between_each_pair_at_a_place_of_its_own():
    real, fake = torch.randn(2, 50, 3, 4, 4, dtype=torch.float64)
    e = (between(real, fake) - fake) / (real - fake)
    places = e.flatten(1)[:, :1]
    torch.testing.assert_close(e.flatten(1), places.expand(-1, 48), rtol=1e-6, atol=1e-6)
    assert 0 <= places.min() < 0.2
    assert 0.8 < places.max() <= 1


def linear_d():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()


def test_a_lazy_penalty_is_taken_every_k_steps_k_times_as_strongly():
    netD = linear_d()
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    slope = float(netD[1].weight.detach().norm())
    lazy = Penalty(TrainConfig(r1=2.0, penalty_every=4))
    assert [step for step in range(9) if lazy.due(step)] == [0, 4, 8]
    assert lazy(netD, images, images).item() == pytest.approx(4 * slope**2)
    sloped = Penalty(TrainConfig(loss="wgan-gp", penalty_every=3))
    assert sloped(netD, images, images).item() == pytest.approx(30 * (slope - 1) ** 2)
    assert not Penalty(TrainConfig()).due(0)


# --- Augmentation ---------------------------------------------------------------------------------


@pytest.fixture
def seeded():
    torch.manual_seed(11)


def test_color_moves_brightness_saturation_and_contrast(seeded):
    """Each image is an affine map of itself, its pixels' means and its own mean: found again by
    least squares."""
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    y = diffaugment(x, ["color"])
    found = []
    for before, after in zip(x, y, strict=True):
        grey = before.mean(0, keepdim=True).expand_as(before)
        basis = torch.stack([before, grey, torch.ones_like(before)], -1).flatten(0, 2)
        solution = torch.linalg.lstsq(basis, after.reshape(-1, 1)).solution[:, 0]
        torch.testing.assert_close(basis @ solution, after.flatten(), rtol=1e-8, atol=1e-8)
        s_and_c, rest, _ = solution.tolist()
        contrast = s_and_c + rest
        found.append((contrast, s_and_c / contrast, float(after.mean() - before.mean())))
    contrast, saturation, brightness = torch.tensor(found).T
    for values, low, high in ((contrast, 0.5, 1.5), (saturation, 0, 2), (brightness, -0.5, 0.5)):
        assert low - 1e-6 <= values.min() < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < values.max() <= high + 1e-6


@pytest.mark.parametrize(("policy", "border"), [("translation", "constant"), ("shift", "reflect")])
def test_an_image_moves_by_whole_pixels_and_its_border_is_zeros_or_its_mirror_image(
    policy, border, seeded
):
    x = torch.rand(200, 2, 16, 16) + 1
    y = diffaugment(x, [policy])
    seen = set()
    for before, after in zip(x, y, strict=True):
        padded = F.pad(before, (2, 2, 2, 2), mode=border)
        places = [
            (i, j)
            for i, j in itertools.product(range(5), range(5))
            if torch.equal(padded[:, i : i + 16, j : j + 16], after)
        ]
        assert len(places) == 1
        seen.update(places)
    assert seen == set(itertools.product(range(5), range(5)))


def test_cutout_zeroes_one_square_of_half_the_side(seeded):
    y = diffaugment(torch.ones(60, 2, 16, 16), ["cutout"])
    sizes = set()
    for image in y:
        rows, columns = (image[0] == 0).any(1), (image[0] == 0).any(0)
        hole = rows[:, None] & columns[None]
        assert torch.equal(image, (~hole).float().expand(2, -1, -1)), "one rectangle, all channels"
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (8, 8)
    assert min(h for h, _ in sizes) >= 4, "at least the half of it is in the image"


def test_gradients_go_through_augmentation(seeded):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def again(x):
        torch.manual_seed(3)
        return diffaugment(x, ["color", "translation", "shift", "cutout"])

    assert torch.autograd.gradcheck(again, x)
    assert not torch.equal(diffaugment(x, ["color"]), diffaugment(x, ["color"]))
    assert diffaugment(x.bfloat16(), ["color", "cutout"]).dtype == torch.bfloat16


def test_instance_noise_fades_by_the_clock(seeded):
    x, clock = torch.zeros(8, 3, 32, 32), torch.zeros(())
    for at, sigma in ((0, 0.4), (5, 0.2), (10, 0.0), (15, 0.0)):
        clock.fill_(at)
        assert float(instance_noise(x, 0.4, clock, 10).std()) == pytest.approx(sigma, rel=0.03)


# --- Whole steps ----------------------------------------------------------------------------------


def plain_steps(state, data, loss, *, r1=0.0, r2=0.0, slope=0.0, n_critic=1):
    """The step as a paper would write it, in plain layers, NCHW, with Adam's own module."""
    netG, netD = copy.deepcopy(state.netG), copy.deepcopy(state.netD)
    nets = []
    for net in (netG, netD):
        plain = nn.Sequential(*(copy.deepcopy(m) for m in net.main))
        nets.append(plain)
    netG, netD = nets
    opts = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in nets]
    of_d, of_g = TEXTBOOK[loss]
    for images, z in data:
        for x, noise in zip(images.tensor_split(n_critic), z.tensor_split(n_critic), strict=True):
            fake = netG(noise)
            opts[1].zero_grad()
            total = of_d(netD(x).flatten(), netD(fake.detach()).flatten())
            at = x
            if slope:
                e = torch.rand(len(x), 1, 1, 1, dtype=torch.float64)
                at = e * x + (1 - e) * fake.detach()
            if r1 or slope:
                at = at.clone().requires_grad_()
                (g,) = torch.autograd.grad(netD(at).sum(), at, create_graph=True)
                square = (g**2).sum((1, 2, 3))
                total = total + r1 / 2 * square.mean() + slope * ((square.sqrt() - 1) ** 2).mean()
            if r2:
                at = fake.detach().clone().requires_grad_()
                (g,) = torch.autograd.grad(netD(at).sum(), at, create_graph=True)
                total = total + r2 / 2 * (g**2).sum() / len(at)
            total.backward()
            opts[1].step()
        opts[0].zero_grad()
        with torch.no_grad():
            real = netD(x).flatten()
        of_g(real, netD(fake).flatten()).backward()
        opts[0].step()
    return netG, netD


# Without BatchNorm in D: its running buffers are not what is compared here.
STEPS = {
    "hinge, R1": {"loss": "hinge", "norm_d": "none", "r1": 5.0},
    "lsgan": {"loss": "lsgan", "norm_d": "none"},
    "relativistic": {"loss": "relativistic", "norm_d": "none", "r1": 0.5},
    "R1 and R2, no norm": {
        "loss": "relativistic", "norm_d": "none", "norm_g": "none", "r1": 0.5, "r2": 0.7,
    },
    "wgan-gp, 3 updates of D": {"loss": "wgan-gp", "n_critic": 3},
}  # fmt: skip


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("what", STEPS)
def test_steps_equal_the_plain_loop(what, one_pass, monkeypatch):
    monkeypatch.setattr(Step, "_in_one_pass", lambda self: one_pass)
    config = TrainConfig(**{**SMALL, **STEPS[what]})
    state = TrainState(config, CPU, dtype=torch.float64)
    n = config.n_critic
    data = list(batches(dataclasses.replace(config, batch_size=3 * n), 4, dtype=torch.float64))
    torch.manual_seed(9)
    netG, netD = plain_steps(
        state, data, config.loss,
        r1=config.r1, r2=config.r2, slope=config.slope_penalty, n_critic=n,
    )  # fmt: skip
    start = copy.deepcopy(state.netD)
    torch.manual_seed(9)
    step = Step(state, batch_size=3)
    for images, z in data:
        step(images, z)
    assert largest_difference(state.netG, netG) < 1e-9
    assert largest_difference(state.netD, netD) < 1e-9
    assert largest_difference(start, netD) > 1e-4


@pytest.mark.parametrize("loss", ["hinge", "lsgan", "relativistic"])
def test_simultaneous_gradients_are_those_at_the_same_weights(loss):
    """After one step Adam's first moments are (1 - beta1) times the gradients."""
    config = preset("tf28", channels=1, batch_size=3, loss=loss)
    state = TrainState(config, CPU, dtype=torch.float64)
    for module in state.netD.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    netG, netD = copy.deepcopy(state.netG), copy.deepcopy(state.netD)
    images, z = next(batches(config, 1, dtype=torch.float64))
    Step(state, batch_size=3)(images, z)
    of_d, of_g = TEXTBOOK[loss]
    real, fake = netD(images), netD(netG(z))
    for net, optimiser, total in (
        (netD, state.optD, of_d(real, fake)),
        (netG, state.optG, of_g(real, fake)),
    ):
        gradients = torch.autograd.grad(total, list(net.parameters()), retain_graph=True)
        for slots, gradient in zip(optimiser.state.values(), gradients, strict=True):
            torch.testing.assert_close(slots["exp_avg"], gradient * 0.1, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_d_sees_all_images_changed_and_g_learns_through_the_change(updates):
    config = TrainConfig(**SMALL, loss="lsgan", norm_d="none", updates=updates)
    state = TrainState(config, CPU)
    step, shown = Step(state, batch_size=6), []

    def black(images):
        shown.append(images.requires_grad)
        return images * 0

    step.shown = black
    row = dict(zip(READINGS, step(*next(batches(config, 1))).tolist(), strict=True))
    assert shown == {"alternating": [False, False, True], "simultaneous": [False, True]}[updates]
    assert row["d_real"] == row["d_fake"]
    assert all(not p.grad.any() for p in state.netG.parameters())


def test_one_update_of_g_for_so_many_of_d():
    config = TrainConfig(**{**SMALL, "n_critic": 3})
    state = TrainState(config, CPU)
    step = Step(state, batch_size=2)
    images, z = next(batches(config, 1))
    step(images, z)
    counts = [int(next(iter(o.state.values()))["step"]) for o in (state.optD, state.optG)]
    assert counts == [3, 1]
    step(images[:3], z[:3])  # a ragged batch: 2 + 1 images
    counts = [int(next(iter(o.state.values()))["step"]) for o in (state.optD, state.optG)]
    assert counts == [5, 2]
    assert state.step == 2


@pytest.mark.parametrize(
    "fields",
    [
        EVERYTHING,
        {"loss": "relativistic", "norm_d": "batch", "spectral_norm": True},
        {"loss": "wgan-gp", "norm_d": "batch"},
        {"net_d": "sngan", "loss": "relativistic", "r1": 1.0, "r2": 1.0, "norm_g": "none",
         "penalty_form": "difference"},
        {"net": "tf28", "image_size": 28, "updates": "simultaneous", "loss": "relativistic",
         "spectral_norm": True, "gradient_penalty": 1.0, "diffaugment": "cutout"},
    ],
    ids=["everything", "relativistic", "wgan-gp", "sngan", "tf28"],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_steps_with_all_of_it_make_no_host_sync(fields, autocast):
    config = TrainConfig(**{**SMALL, **fields})
    state = TrainState(config, CPU, scaling=autocast == torch.float16)
    step = Step(state, batch_size=config.batch_size, autocast=autocast)
    whole = dataclasses.replace(config, batch_size=config.batch_size * config.n_critic)
    before = copy.deepcopy(state.netG.state_dict())
    vectors = copy.deepcopy(dict(state.netD.named_buffers()))
    with NoSync():
        for images, z in list(batches(whole, 2)):
            row = step(images, z)
    assert row.shape == (len(READINGS),)
    assert row.isfinite().all()
    assert state.is_finite()
    for name, buffer in state.netD.named_buffers():
        if name.endswith(".0.u") and len(buffer) > 1:
            assert not torch.equal(buffer, vectors[name]), "spectral norm follows the weights"
    if state.clock is not None:
        assert float(state.clock) == 2
    if autocast is not torch.float16:  # its first step may be one that overflowed
        assert not torch.equal(before["main.0.weight"], state.netG.state_dict()["main.0.weight"])
    for p in state.netD.parameters():
        assert p.dtype == torch.float32
        assert p.grad.stride() == p.stride()


@pytest.mark.parametrize(
    "fields",
    [
        EVERYTHING,
        {"loss": "relativistic"},
        {"loss": "wgan-gp"},
        {"net_d": "sngan", "norm_g": "none", "r1": 1.0, "r2": 1.0, "penalty_form": "difference"},
    ],
)
def test_steps_with_all_of_it_run_on_the_meta_device_as_kernels(fields):
    """What a device would launch, without one: nothing there can read a value back."""
    config = TrainConfig(**{**SMALL, **fields}, impl="triton")
    state = TrainState(config, torch.device("meta"))
    step = Step(state, batch_size=6)
    images = torch.empty(6 * config.n_critic, 3, 32, 32, device="meta")
    z = torch.empty(len(images), 12, 1, 1, device="meta")
    with assume(TARGETS["sm_90"]), recording() as asked:
        for _ in range(2):
            assert step(images, z).shape == (len(READINGS),)
    assert asked, "blocks ran as kernels"


@pytest.mark.parametrize("form", ["exact", "difference"])
def test_a_penalty_is_multiplied_in_float32_forward_and_backward(monkeypatch, form):
    """TF32's rounding is as large as a difference. Other passes keep PyTorch's setting."""
    seen, conv = [], torch.backends.cudnn.conv

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(conv.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(conv.fp32_precision)
            return gradient

    taken = Penalty.__call__
    monkeypatch.setattr(Penalty, "__call__", lambda self, *given: Told.apply(taken(self, *given)))
    config = TrainConfig(**SMALL, r1=1.0, penalty_form=form, norm_d="none")
    conv.fp32_precision = "tf32"
    step = Step(TrainState(config, CPU), batch_size=6)
    step(torch.rand(6, 3, 32, 32), torch.randn(6, 12, 1, 1))
    assert seen == ["ieee", "ieee"]
    assert conv.fp32_precision == "tf32"


def test_the_penalty_of_a_scaled_loss_is_scaled_alike():
    """Adam sees the same gradient with fp16's loss scale and without."""
    moments = []
    for scaling in (False, True):
        state = TrainState(TrainConfig(**SMALL, r1=100.0), CPU, scaling=scaling)
        Step(state, batch_size=6)(*next(batches(state.config, 1)))
        moments.append([slots["exp_avg"] for slots in state.optD.state.values()])
    for plain, scaled in zip(*moments, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-7)


def test_compiled_equals_eager():
    """The penalty stays eager; spectral norm's vectors do not move between a compiled pass and its
    backward, of which a pairing loss has two in a row."""
    fields = {**SMALL, "loss": "relativistic", "r1": 1.0, "spectral_norm": True, "n_critic": 2}
    config = TrainConfig(**{**fields, "minibatch_std": True, "instance_noise": 0.0})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = dataclasses.replace(config, batch_size=12)
    data, nets = list(batches(whole, 3)), []
    for compiled in (False, True):
        state = TrainState(config, CPU)
        step = Step(state, batch_size=6, compile=compiled, say=pytest.fail)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for images, z in data:
                step(images, z)
        nets.append(state)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert largest_difference(nets[0].netG, nets[1].netG) < 4e-4
    assert largest_difference(nets[0].netD, nets[1].netD) < 4e-4


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": "wgan-gp", "label_smoothing": 0.1}, "--label-smoothing was given; --loss wgan"),
        ({"label_smoothing": 1.0}, "must be in"),
        ({"loss": "wgan-gp", "gradient_penalty": 0.0}, "no bound"),
        ({"loss": "wgan-gp", "r1": 1.0}, "leave --r1 out"),
        ({"r1": -1.0}, "--r1 -1.0 was given"),
        ({"penalty_every": 4}, "and no penalty"),
        ({"r1": 1.0, "sync_bn": True}, "--sync-bn was given"),
        ({"diffaugment": "color,blur"}, "--diffaugment color,blur was given"),
        ({"diffaugment": ""}, "--diffaugment"),
        ({"instance_noise_steps": 5}, "no --instance-noise"),
        ({"n_critic": 0}, "--n-critic 0 was given"),
        ({"n_critic": 2, "updates": "simultaneous"}, "--n-critic 2 was given"),
        ({"net": "tf28", "image_size": 28, "minibatch_std": True}, "--minibatch-std was given"),
        ({"net": "tf28", "image_size": 28, "norm_d": "batch"}, "--norm-d batch was given"),
        ({"net": "tf28", "image_size": 28, "net_d": "sngan"}, "--net-d was given"),
        ({"net": "tf28", "image_size": 28, "norm_g": "none"}, "--norm-g was given"),
        ({"net_d": "sngan", "norm_d": "batch"}, "the discriminator of --net-d sngan has no norm"),
        ({"net_d": "sngan", "minibatch_std": True}, "--minibatch-std was given"),
        ({"loss": "wgan-gp", "r2": 1.0}, "leave --r2 out"),
        ({"r2": float("nan")}, "--r2 nan was given"),
        ({"penalty_form": "difference"}, "add --r1 or --r2"),
        ({"penalty_form": "difference", "r2": 1.0}, "add --norm-d none"),
        (
            {"penalty_form": "difference", "r2": 1.0, "norm_d": "none", "minibatch_std": True},
            "with --minibatch-std D's answer .* leave that out",
        ),
        ({"lr_decay": 1.5}, "--lr-decay 1.5 was given"),
    ],
)
def test_what_cannot_be_is_said(fields, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**fields).validate()


def test_what_goes_together():
    TrainConfig(loss="lsgan", label_smoothing=0.1, r1=1.0, sync_bn=True, norm_d="none").validate()
    preset("tf28", loss="wgan-gp", spectral_norm=True, diffaugment="color, cutout").validate()
    assert TrainConfig().norm == TrainConfig(r1=1.0).norm == "batch"
    assert TrainConfig(loss="wgan-gp").norm == TrainConfig(spectral_norm=True).norm == "none"
    assert TrainConfig(loss="wgan-gp", norm_d="batch").norm == "batch"
    assert TrainConfig(loss="wgan-gp").slope_penalty == 10
