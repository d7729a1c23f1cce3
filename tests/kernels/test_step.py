"""What a step has besides its nets (in the interpreter): loss and gradient, crops against
plain PyTorch, working copies of weights. Their update is in test_adam.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdcgan.data.feeds import cut
from fastdcgan_kernels import fuse, plan, step
from fastdcgan_kernels.modules import WorkingCopies
from tests.kernels import exact
from tests.kernels.exact import DTYPES, Draw, close


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


@pytest.fixture(params=["triton", "reference"])
def either(request):
    """The kernel, and its twin in plain PyTorch."""
    with plan.implementation(request.param):
        yield


@pytest.mark.parametrize("targets", [(1.0,), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_probability_and_gradient(dtype, targets, either):
    """1,030 logits are more than one block; +-90 are where a sigmoid is 0 or 1 in float32."""
    groups = len(targets)
    logits = Draw(dtype).normal(groups * 1030, spread=3.0)
    logits[:4] = torch.tensor([90.0, -90.0, 0.0, 30.0])
    share, scale = 0.25, torch.tensor(8.0)
    row, gradient = step.bce(logits, torch.tensor(targets), share=share, scale=scale)
    truth = logits.double().requires_grad_()
    losses = [
        F.binary_cross_entropy_with_logits(part, torch.full_like(part, target))
        for part, target in zip(truth.chunk(groups), targets, strict=True)
    ]
    (sum(losses) * share * scale.double()).backward()
    probabilities = truth.detach().sigmoid().unflatten(0, (groups, -1)).mean(1)
    torch.testing.assert_close(row[0].double(), sum(losses).detach() * share, rtol=1e-6, atol=0)
    torch.testing.assert_close(row[1:].double(), probabilities * share, rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    close(gradient, truth.grad, None if dtype == torch.float32 else truth.grad.to(dtype))


def test_the_loss_of_a_certain_logit_keeps_its_digits(either):
    """log(1 + e^-20) is 2e-9, which 1 + 2e-9 in float32 has forgotten."""
    row, _ = step.bce(torch.full((5,), 20.0), torch.tensor([1.0]))
    truth = F.softplus(torch.tensor(-20.0, dtype=torch.float64))
    torch.testing.assert_close(row[0].double(), truth, rtol=1e-6, atol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 20, 32]), st.integers(0, 9),
    st.booleans(), st.sampled_from(DTYPES), st.integers(0, 1000),
)  # fmt: skip
def test_crops_are_the_feeds_bits(b, channels, size, margin, flip, dtype, seed):
    """Every uint8 value, cropped and turned, as plain PyTorch makes it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(bound, *shape):
        return torch.randint(bound, shape, generator=generator)

    side = size + margin
    images = draw(256, 5, side, side, channels).to(torch.uint8)
    rows, top, left = draw(5, b), draw(margin + 1, b), draw(margin + 1, b)
    flipped = draw(2, b) if flip else None
    x = torch.arange(size).expand(b, -1)
    if flip:
        x = torch.where(flipped[:, None].bool(), x.flip(1), x)
    y = torch.arange(size) + top[:, None]
    expected = cut(images, rows, y, x + left[:, None], dtype)
    ours = step.crop(images, rows, size, dtype, corner=(top, left), flipped=flipped)
    assert torch.equal(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    if not margin and not flip:
        assert torch.equal(step.crop(images, rows, size, dtype), expected)


def net():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.LeakyReLU(0.2),
    ]  # fmt: skip
    return fuse(nn.Sequential(*layers).to(memory_format=torch.channels_last))


def trained(own, copies, steps=3):
    """Losses and weights of a few steps in bfloat16."""
    optimiser = torch.optim.SGD(own.parameters(), 0.1)
    x, found = Draw(torch.bfloat16).normal(2, 3, 8, 8), []
    for _ in range(steps):
        optimiser.zero_grad()
        with plan.implementation("triton"):
            if copies is None:
                loss = own(x).float().square().mean()
            else:
                with copies:
                    loss = own(x).float().square().mean()
        loss.backward()
        optimiser.step()
        if copies is not None:
            assert not copies.fresh()
            copies.refresh()
            assert copies.fresh()
        found.append(loss.detach())
    return found, [p.detach().clone() for p in own.parameters()]


def test_working_copies_change_no_bit():
    first, second = net(), net()
    copies = WorkingCopies(second, torch.bfloat16)
    assert not copies.fresh()
    copies.refresh()
    for mine, twin in zip(trained(second, copies), trained(first, None), strict=True):
        for a, b in zip(mine, twin, strict=True):
            assert torch.equal(a, b)


def test_working_copies_are_read_inside_alone_and_in_their_own_dtype():
    own = net()
    copies = WorkingCopies(own, torch.bfloat16)
    copies.refresh()
    x = Draw(torch.bfloat16).normal(2, 3, 8, 8)
    with plan.implementation("triton"), torch.no_grad():
        expected, wide = own(x), own(x.float())
        for copy in copies._copies:
            copy.zero_()
        assert torch.equal(own(x), expected)
        with copies:
            assert own(x).count_nonzero() == 0
            assert torch.equal(own(x.float()), wide)
        assert torch.equal(own(x), expected)
    assert not any("_working" in vars(m) for m in own.modules())
    own.load_state_dict(net().state_dict())
    assert not copies.fresh()


def test_a_refresh_between_the_ways_is_an_error():
    """The backward of old weights would read new ones."""
    own = net()
    copies = WorkingCopies(own, torch.bfloat16)
    copies.refresh()
    with plan.implementation("triton"), copies:
        loss = own(Draw(torch.bfloat16).normal(2, 3, 8, 8)).float().sum()
    copies.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_working_copies_in_a_compiled_net():
    """As a graph without breaks, whose later calls read what was refreshed since."""
    first, second = net(), net()
    copies = WorkingCopies(second, torch.bfloat16)
    copies.refresh()
    compiled = torch.compile(second, backend="aot_eager", fullgraph=True)
    x = Draw(torch.bfloat16).normal(2, 3, 8, 8)
    for _ in range(3):
        with plan.implementation("triton"):
            first(x).float().square().mean().backward()
            with copies:
                compiled(x).float().square().mean().backward()
        for mine, twin in zip(second.parameters(), first.parameters(), strict=True):
            assert torch.equal(mine.grad, twin.grad)
        with torch.no_grad():
            for own in (first, second):
                torch._foreach_sub_([*own.parameters()], [p.grad for p in own.parameters()])
                own.zero_grad()
        copies.refresh()
    for mine, twin in zip(second.buffers(), first.buffers(), strict=True):
        assert torch.equal(mine, twin)
