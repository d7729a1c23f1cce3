"""The update of a net's weights in one launch (in the interpreter) against torch.optim.Adam, with
the average and the copies that it writes; and whose state each of them takes over."""

import copy
import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fastdcgan_kernels import adam
from fastdcgan_kernels.adam import Adam, Average
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import gradient_dtype
from fastdcgan_kernels.gpu.adam import BLOCK
from fastdcgan_kernels.gpu.launch import recording, watching
from fastdcgan_kernels.modules.copies import WorkingCopies
from tests.kernels import exact
from tests.kernels.exact import Draw

CPU = torch.device("cpu")
GROUP = {"lr": 0.1, "betas": (0.5, 0.999), "eps": 1e-8}


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


@pytest.fixture(autouse=True)
def kernels():
    with targets.implementation("triton"):
        yield


class Net(nn.Module):
    """A weight that has a copy, its bias, a norm with buffers, and a parameter of any size."""

    def __init__(self, ci, co, size):
        super().__init__()
        self.norm = nn.BatchNorm2d(co)
        self.other = nn.Parameter(torch.randn(size))
        self.conv = nn.Conv2d(ci, co, 4, 2, 1)
        self.to(memory_format=torch.channels_last)


def made(ci=3, co=5, size=1030, seed=0):
    torch.manual_seed(seed)
    net = Net(ci, co, size)
    nn.init.normal_(net.norm.running_mean)
    return net


def averaged(net, decay=0.9):
    net, twin = net.state_dict(keep_vars=True), copy.deepcopy(net).requires_grad_(False)
    return Average(twin.state_dict(keep_vars=True).values(), net.values(), decay)


def wide(net):
    """The net in float64, with PyTorch's plain Adam."""
    net = copy.deepcopy(net).double()
    return net, torch.optim.Adam(net.parameters(), **GROUP, foreach=False)


def give_gradients(draw, *nets, scale=1.0):
    """The same gradients to all; and what else a step changes: the norm's buffers."""
    for each in zip(*(net.parameters() for net in nets), strict=True):
        spread = 10.0 ** torch.randint(-6, 2, (), generator=draw.generator).item()
        g = draw.normal(*each[0].shape, spread=spread) * scale
        g = g.to(gradient_dtype(each[0]))
        for p in each:
            p.grad = torch.empty_like(p, dtype=gradient_dtype(p)).copy_(g)
    mean = draw.normal(*nets[0].norm.running_mean.shape)
    for net in nets:
        net.norm.running_mean += mean.to(net.norm.running_mean.dtype)
        net.norm.num_batches_tracked += 2


def launches_of(step):
    with recording() as launches:
        step()
    return launches


def moments(optimiser):
    return [optimiser.state[p] for p in optimiser.param_groups[0]["params"]]


def close(ours, truth, rtol=2e-6, atol=1e-7):
    torch.testing.assert_close(ours.detach().double(), truth.detach(), rtol=rtol, atol=atol)


def agree(ours, theirs, start):
    """Moments and how far parameters have moved, steps of 0.1, but for what float32 rounds."""
    for mine, twin in zip(moments(ours), moments(theirs), strict=True):
        assert mine["step"] == twin["step"]
        # Gradients that cancel leave a mean that is as exact as they are large.
        gradients = (twin["exp_avg_sq"] / (1 - GROUP["betas"][1])).sqrt()
        assert ((mine["exp_avg"] - twin["exp_avg"]).abs() <= 3e-7 * gradients).all()
        exact.close(mine["exp_avg_sq"], twin["exp_avg_sq"])
    of = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], start, strict=True)
    for mine, twin, before in of:
        close(mine.detach() - before, twin.detach() - before.double(), rtol=1e-5, atol=2e-6)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3, 17]), st.sampled_from([1, 2, 5, 31]),
    st.one_of(st.sampled_from([1, 2, 1023, 1024, 1025, 2053]), st.integers(1, 3000)),
    st.sampled_from([None, torch.bfloat16, torch.float16]), st.booleans(), st.booleans(),
    st.sampled_from([0, 9, 1000, 300_000]), st.integers(0, 1000),
)  # fmt: skip
@example(3, 5, 1030, torch.bfloat16, True, True, 0, 0)
@example(3, 1, 1000, None, False, False, 0, 579)  # the one mean of the one channel's is about 0
def test_steps_are_pytorchs_in_float64(ci, co, size, dtype, narrow, average, before, seed):
    """`before`: updates that the state already knows of; `narrow`: the copied weight's gradient
    comes in the copy's dtype."""
    net, draw = made(ci, co, size, seed), Draw(torch.float32, seed)
    twin, theirs = wide(net)
    ours = Adam(net.parameters(), **GROUP)
    ours.prepare()
    give_gradients(draw, net, twin)
    theirs.step()
    for mine, other in zip(moments(ours), moments(theirs), strict=True):
        for name, value in mine.items():
            other[name].copy_(value)
        mine["step"] += before
        other["step"] += before
    with torch.no_grad():
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
            other.copy_(mine)
    if dtype is not None:
        ours.copies = WorkingCopies(net, dtype, narrow=narrow)
    if average:
        ours.average, its_twin = averaged(net), averaged(twin)
    start = [p.detach().clone() for p in net.parameters()]
    for t in range(3):
        give_gradients(draw, net, twin)
        assert net.conv.weight.grad.dtype == (dtype if dtype and narrow else torch.float32)
        assert len(launches_of(ours.step)) == 1
        ours.step()
        theirs.step()
        if average:
            assert ours.average.updates == t + 1
            its_twin.update()
    agree(ours, theirs, start)
    if dtype is not None:
        assert ours.copies.fresh()
        assert torch.equal(ours.copies.of[net.conv.weight], net.conv.weight.to(dtype))
    if average:
        for mine, truth in zip(ours.average.of.values(), its_twin.of.values(), strict=True):
            if mine.is_floating_point():
                close(mine, truth, rtol=1e-5, atol=2e-6)
            else:
                assert mine == truth == 2 * 4


def test_all_of_it_is_one_launch():
    net = made()
    ours = Adam(net.parameters(), **GROUP)
    ours.average, ours.copies = averaged(net), WorkingCopies(net, torch.bfloat16)
    give_gradients(Draw(torch.float32), net)
    (launch,) = launches_of(ours.step)
    assert launch.kernel.fn.__name__ == "adam"
    ours.step()
    assert launch.arguments["tickets"] == 0


def test_early_updates_and_the_step_are_one_update(monkeypatch):
    """To the bit, with average and copies; a step without a backward pass before is whole again."""
    monkeypatch.setattr(adam, "EARLY", 200)
    results, counts = [], []
    for on in (True, False):
        net = made()
        ours = Adam(net.parameters(), **GROUP)
        ours.average, ours.copies = averaged(net), WorkingCopies(net, torch.bfloat16, narrow=True)
        for _ in range(2):
            net.zero_grad()
            loss = sum((p.to(gradient_dtype(p)).float() ** 2).sum() for p in net.parameters())
            launches = []
            with watching(lambda one: launches.append(one.kernel.fn.__name__)):  # noqa: B023
                with ours.early(on):
                    loss.backward()
                ours.step()
            counts.append(len(launches))
        give_gradients(Draw(torch.float32), net)
        assert len(launches_of(ours.step)) == 1
        slots = [t for slot in moments(ours) for t in slot.values()]
        copies, average = ours.copies, ours.average
        results.append([*net.state_dict().values(), *slots, *copies.of.values(),
                        *average.of.values(), average.updates])  # fmt: skip
        assert copies.fresh()
        assert average.updates == 2
    assert counts == [3, 3, 1, 1]  # the weight, the other parameter, the rest
    assert all(map(torch.equal, *results))


def test_what_no_launch_takes_after_early_updates_is_pytorchs(monkeypatch):
    """A parameter without a gradient is left out; what is updated already is not updated twice."""
    monkeypatch.setattr(adam, "EARLY", 200)
    net, plain = made(), made()
    ours = Adam(net.parameters(), **GROUP)
    theirs = torch.optim.Adam(plain.parameters(), **GROUP, foreach=False)
    ours.average, twin = averaged(net), averaged(plain)
    for one, optimiser in ((net, ours), (plain, theirs)):
        for _ in range(2):
            one.zero_grad()
            with ours.early(one is net):
                (one.conv.weight.square().sum() + one.norm.weight.sum()).backward()
            assert one.other.grad is None
            optimiser.step()
            if one is plain:
                twin.update()
            assert one.conv.weight.grad is not None
    for mine, truth in zip(net.parameters(), plain.parameters(), strict=True):
        close(mine, truth.double(), rtol=1e-5, atol=2e-6)
    for mine, truth in zip(ours.average.of.values(), twin.of.values(), strict=True):
        close(mine, truth.double(), rtol=1e-5, atol=2e-6)
    assert ours.average.updates == twin.updates == 2


def test_one_parameter_is_left_to_the_step(monkeypatch):
    monkeypatch.setattr(adam, "EARLY", 1)
    net = made()
    ours = Adam(net.parameters(), **GROUP)
    with ours.early():
        sum(p.square().sum() for p in net.parameters()).backward()
    assert len(ours._early) == len(list(net.parameters())) - 1
    ours.step()
    assert {int(slots["step"]) for slots in moments(ours)} == {1}


def test_a_first_step_keeps_its_digits():
    """1 - 0.999 in float32 has lost three digits of seven; the step is lr to the sign of g."""
    p = nn.Parameter(torch.zeros(100))
    optimiser = Adam([p], lr=1.0, betas=(0.9, 0.999), eps=0.0)
    p.grad = Draw(torch.float32).normal(100)
    optimiser.step()
    close(p, -p.grad.sign().double(), rtol=3e-7)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.0), (0.9, 0.99)])
def test_betas(betas):
    p, q = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7, dtype=torch.float64))
    ours, theirs = Adam([p], betas=betas, lr=0.1), torch.optim.Adam([q], betas=betas, lr=0.1)
    for _ in range(3):
        p.grad = Draw(torch.float32).normal(7)
        q.grad = p.grad.double()
        ours.step()
        theirs.step()
    close(p, q)


def test_a_step_that_overflows_is_skipped_as_pytorchs_fused_adam_does():
    """By GradScaler, on the device alone. What follows an update is done all the same."""
    net, draw = made(), Draw(torch.float32)
    twin = copy.deepcopy(net)
    ours = Adam(net.parameters(), **GROUP, fused=True)
    theirs = torch.optim.Adam(twin.parameters(), **GROUP, fused=True)
    ours.average, ours.copies = averaged(net), WorkingCopies(net, torch.float16)
    expected = averaged(twin)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for t in range(5):
        scale, _ = (scaler.scale(torch.ones(())).item() for scaler in scalers)
        give_gradients(draw, net, twin, scale=scale)
        if t in (0, 3):  # the very first among them
            for each in (net, twin):
                each.other.grad[-1] = (torch.inf, torch.nan)[t % 2]
        for scaler, optimiser in zip(scalers, (ours, theirs), strict=True):
            scaler.step(optimiser)
            scaler.update()
        expected.update()
        assert moments(ours)[0]["step"] == t - (t >= 3)
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):  # unscaled
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0, equal_nan=True)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 16.0
    agree(ours, theirs, [torch.zeros_like(p) for p in net.parameters()])
    assert torch.equal(ours.copies.of[net.conv.weight], net.conv.weight.half())
    for mine, truth in zip(ours.average.of.values(), expected.of.values(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_each_takes_over_the_others_state(first):
    """By way of a file that loads with weights_only=True, as checkpoints do."""
    classes = (Adam, torch.optim.Adam) if first == "ours" else (torch.optim.Adam, Adam)
    net, draw = made(), Draw(torch.float32)
    one = classes[0](net.parameters(), **GROUP)
    for _ in range(3):
        give_gradients(draw, net)
        one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    two = classes[1](other.parameters(), lr=1.0)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert two.param_groups[0]["lr"] == GROUP["lr"]
    give_gradients(draw, net, other)
    one.step()
    two.step()
    for mine, twin in zip(moments(one), moments(two), strict=True):
        assert mine["step"] == twin["step"] == 4
    for mine, twin in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-6, atol=1e-7)
    assert one.state_dict()["state"].keys() == two.state_dict()["state"].keys()


def test_a_replayed_step_counts_and_takes_another_learning_rate():
    """A CUDA graph repeats the launch with the addresses and numbers that it had."""
    net, draw = made(), Draw(torch.float32)
    twin, theirs = wide(net)
    ours, start = Adam(net.parameters(), **GROUP), [p.detach().clone() for p in net.parameters()]
    give_gradients(draw, net, twin)
    (launch,) = launches_of(ours.step)
    for rate in (0.1, 0.1, 0.025):
        for optimiser in (ours, theirs):
            optimiser.param_groups[0]["lr"] = rate
        ours.refresh()
        launch.run(CPU)
        theirs.step()
    agree(ours, theirs, start)


def test_what_the_kernel_has_not_is_pytorchs():
    """And the average and the copies follow."""
    for change in ("decay", "gradient", "memory", "groups", "rate", "dtype"):
        net, draw = made(), Draw(torch.float32)
        twin = copy.deepcopy(net)
        parameters = [list(each.parameters()) for each in (net, twin)]
        options = GROUP | ({"weight_decay": 0.1} if change == "decay" else {})
        if change == "groups":
            parameters = [[{"params": ps[:1]}, {"params": ps[1:]}] for ps in parameters]
        if change == "rate":
            options["lr"] = torch.tensor(0.1)
        ours, theirs = Adam(parameters[0], **options), torch.optim.Adam(parameters[1], **options)
        ours.average, ours.copies = averaged(net), WorkingCopies(net, torch.bfloat16, narrow=True)
        expected = averaged(twin)
        give_gradients(draw, net, twin)
        twin.conv.weight.grad.copy_(net.conv.weight.grad)
        if change == "dtype":  # of a parameter that has no copy
            net.other.grad, net.other.grad_dtype = None, torch.bfloat16
            net.other.grad = twin.other.grad.bfloat16()
            twin.other.grad = net.other.grad.float()
        for each in (net, twin):
            if change == "gradient":
                each.other.grad = None
            if change == "memory":
                each.conv.weight.grad = each.conv.weight.grad.contiguous()
        assert not launches_of(ours.step)
        assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
        theirs.step()
        expected.update()
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, other)
        for mine, other in zip(ours.average.of.values(), expected.of.values(), strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(ours.copies.of[net.conv.weight], net.conv.weight.bfloat16())


def test_a_launch_takes_no_more_than_it_has_room_for():
    for count in (adam.MOST, adam.MOST + 1):
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(count)]
        for p in parameters:
            p.grad = torch.ones(1)
        assert len(launches_of(Adam(parameters).step)) == (count == adam.MOST)


def test_an_average_forgets_its_first_values():
    """Of tensors with more elements than a block; in float32 and, by its twin, in float64."""
    draw = Draw(torch.float32)
    p = nn.Parameter(draw.normal(BLOCK + 7))
    values = [p, draw.normal(5, 3, 4, 4), draw.normal()]
    averages, twins = ([v.detach().clone() for v in values] for _ in range(2))
    twins = [v.double() for v in twins]
    optimiser = Adam([p], lr=0.0)
    p.grad = torch.zeros_like(p)
    optimiser.average = Average(averages, values, 0.7)
    by_pytorch = Average([t.clone() for t in averages], values, 0.7)
    for t in range(30):
        with torch.no_grad():
            for value, twin in zip(values, twins, strict=True):
                value += torch.linspace(0, 1, value.numel()).view_as(value) * (t % 3)
                twin.lerp_(value.double(), 1 - min(0.7, (1 + t) / (10 + t)))
        optimiser.step()
        by_pytorch.update()
    for each in (optimiser.average, by_pytorch):
        for mine, twin in zip(each.of.values(), twins, strict=True):
            exact.close(mine, twin)


def test_writing_a_copy_that_a_backward_needs_is_an_error():
    """The backward of old weights would read new ones."""
    net = made()
    optimiser = Adam(net.parameters(), **GROUP)
    optimiser.copies = WorkingCopies(net, torch.bfloat16)
    held = optimiser.copies.of[net.conv.weight]
    x = torch.ones_like(held, requires_grad=True)
    loss = (x * held).sum()
    give_gradients(Draw(torch.float32), net)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_epsilon_inside_is_kerass(mode):
    """p -= rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps) (keras/optimizers/adam.py),
    with gradients as small as eps, where it matters most."""
    rate, beta1, beta2, eps = 1e-2, 0.9, 0.999, 1e-3
    p = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(0)))
    optimiser = Adam([p], lr=rate, betas=(beta1, beta2), eps=eps, eps_inside=True)
    expected = p.detach().double()
    m = v = torch.zeros(40, dtype=torch.float64)
    with targets.implementation(mode):
        for t in range(1, 5):
            p.grad = 1e-3 * torch.randn(40, generator=torch.Generator().manual_seed(t))
            g = p.grad.double()
            m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
            scale = rate * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            expected = expected - scale * m / (v.sqrt() + eps)
            optimiser.step()
            torch.testing.assert_close(p.double(), expected, rtol=0, atol=3e-7)
    assert optimiser.param_groups[0]["eps"] == eps
