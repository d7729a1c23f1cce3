"""The step of nets that learn classes: against a plain loop in float64, by kernels, without host
syncs, on the meta device. Not here: whole runs with classes (test_classes.py)."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdcgan.training import TrainConfig
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import READINGS, Step
from fastdcgan_kernels.choice.targets import TARGETS, assume
from fastdcgan_kernels.gpu.launch import recording
from tests.training.steps import NAMES, NoSync
from tests.training.steps import SMALL_WITH_CLASSES as SMALL
from tests.training.textbook import EVERYTHING, TEXTBOOK

CPU = torch.device("cpu")


def batches(config, steps, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    rows, size = config.batch_size * config.n_critic, config.image_size
    for _ in range(steps):
        images = torch.rand(rows, config.channels, size, size, generator=generator) * 2 - 1
        z = torch.randn(rows, config.nz, 1, 1, generator=generator)
        y = torch.randint(3, (rows,), generator=generator)
        images = images.to(device, dtype, memory_format=torch.channels_last)
        yield images, z.to(device, dtype), y.to(device)


class Plain(nn.Module):
    """A conditional net written out: one-hot labels times a matrix, on plain layers."""

    def __init__(self, net):
        super().__init__()
        self.main = nn.Sequential(*(copy.deepcopy(m) for m in net.main))
        self.table = nn.Parameter(net.embedding.weight.detach().clone())

    def e(self, y):
        return F.one_hot(y, len(self.table)).to(self.table.dtype) @ self.table


class PlainG(Plain):
    def forward(self, z, y):
        e = self.e(y)
        return self.main((z.flatten(1) + 5 * e / e.norm(dim=1, keepdim=True))[:, :, None, None])


class PlainD(Plain):
    def forward(self, x, y):
        psi, phi = self.main(x).flatten(1).split([1, self.table.shape[1]], 1)
        return psi.flatten() + torch.einsum("be,be->b", self.e(y), phi)


def plain_steps(state, data, config):
    """A paper's loop, one batch after the other; generated images have the real ones' labels."""
    netG, netD = PlainG(state.netG), PlainD(state.netD)
    optG, optD = (torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (netG, netD))
    of_d, of_g = TEXTBOOK[config.loss]
    for batch in data:
        for x, z, y in zip(*(t.tensor_split(config.n_critic) for t in batch), strict=True):
            fake = netG(z, y)
            optD.zero_grad()
            total = of_d(netD(x, y), netD(fake.detach(), y))
            at = x
            if config.slope_penalty:
                e = torch.rand(len(x), 1, 1, 1, dtype=torch.float64)
                at = e * x + (1 - e) * fake.detach()
            if config.r1 or config.slope_penalty:
                at = at.clone().requires_grad_()
                (g,) = torch.autograd.grad(netD(at, y).sum(), at, create_graph=True)
                square = (g**2).sum((1, 2, 3))
                slope = config.slope_penalty * ((square.sqrt() - 1) ** 2)
                total = total + (config.r1 / 2 * square + slope).mean()
            total.backward()
            optD.step()
        optG.zero_grad()
        with torch.no_grad():
            real = netD(x, y)
        of_g(real, netD(fake, y)).backward()
        optG.step()
    return netG, netD


# Without BatchNorm in D: its running buffers are not what is compared here.
STEPS = {
    "bce": {"norm_d": "none"},
    "hinge, R1": {"loss": "hinge", "norm_d": "none", "r1": 5.0},
    "relativistic": {"loss": "relativistic", "norm_d": "none"},
    "wgan-gp, 2 updates of D": {"loss": "wgan-gp", "n_critic": 2},
}


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("what", STEPS)
def test_steps_equal_the_plain_loop(what, one_pass, monkeypatch):
    monkeypatch.setattr(Step, "_in_one_pass", lambda self: one_pass)
    config = TrainConfig(**{**SMALL, **STEPS[what]})
    state = TrainState(config, CPU, dtype=torch.float64, classes=NAMES)
    data = list(batches(config, 4, dtype=torch.float64))
    torch.manual_seed(9)
    plain = plain_steps(state, data, config)
    start = [net.embedding.weight.detach().clone() for net in (state.netG, state.netD)]
    torch.manual_seed(9)
    step = Step(state, batch_size=config.batch_size)
    for batch in data:
        step(*batch)
    for net, expected, before in zip((state.netG, state.netD), plain, start, strict=True):
        pairs = [*zip(net.main.state_dict().values(), expected.main.state_dict().values())]  # noqa: B905
        for a, b in [*pairs, (net.embedding.weight, expected.table)]:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        moved = (net.embedding.weight - before).abs().amax(1)
        assert moved.min() > 1e-4, "every class has learnt"


def test_steps_by_fused_kernels_are_the_reference_steps():
    """In Triton's interpreter. Adam's first moments are compared: the parameters themselves move by
    a sign at first."""
    config = TrainConfig(**{**SMALL, "batch_size": 2})
    states, rows = [], []
    for impl in ("reference", "triton"):
        state = TrainState(dataclasses.replace(config, impl=impl), CPU, classes=NAMES)
        step = Step(state, batch_size=2)
        rows.append(torch.stack([step(*batch) for batch in batches(config, 2)]))
        states.append(state)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-4)
    for name in ("optG", "optD"):
        slots = (getattr(state, name).state.values() for state in states)
        for theirs, ours in zip(*slots, strict=True):
            error = (ours["exp_avg"] - theirs["exp_avg"]).abs().max()
            assert error < 1e-2 * theirs["exp_avg"].abs().max()


TF28 = {"net": "tf28", "image_size": 28, "updates": "simultaneous", "loss": "lsgan",
        "spectral_norm": True, "diffaugment": "cutout"}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "autocast"),
    [
        (EVERYTHING, torch.bfloat16),
        ({"loss": "relativistic"}, torch.float16),
        ({"loss": "wgan-gp", "norm_d": "batch"}, None),
        (TF28, torch.bfloat16),
    ],
    ids=["everything", "relativistic", "wgan-gp", "tf28"],
)
def test_steps_make_no_host_sync(fields, autocast):
    config = TrainConfig(**{**SMALL, **fields})
    state = TrainState(config, CPU, scaling=autocast == torch.float16, classes=NAMES)
    step = Step(state, batch_size=config.batch_size, autocast=autocast)
    with NoSync():
        for batch in list(batches(config, 2)):
            row = step(*batch)
    assert row.shape == (len(READINGS),)
    assert row.isfinite().all()
    assert state.is_finite()
    for net in (state.netG, state.netD):
        gradients = [p.grad for n, p in net.named_parameters() if n.startswith("embedding")]
        assert [g.dtype for g in gradients] == [torch.float32]
        if autocast is not torch.float16:  # its first step may be one that overflowed
            assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("fields", [EVERYTHING, {"loss": "wgan-gp"}])
def test_steps_run_on_the_meta_device_as_kernels(fields):
    config = TrainConfig(**{**SMALL, **fields}, impl="triton")
    state = TrainState(config, torch.device("meta"), classes=NAMES)
    step = Step(state, batch_size=4)
    with assume(TARGETS["sm_90"]), recording() as asked:
        for batch in batches(config, 2, device="meta"):
            assert step(*batch).shape == (len(READINGS),)
    assert asked, "blocks ran as kernels"
