"""Working copies of the weights of a net, which its blocks read inside a context (in the
interpreter)."""

import pytest
import torch
from torch import nn

from fastdcgan_kernels import fuse
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.modules.copies import WorkingCopies
from tests.kernels import exact
from tests.kernels.exact import Draw


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


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
        with targets.implementation("triton"):
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
    with targets.implementation("triton"), torch.no_grad():
        expected, wide = own(x), own(x.float())
        for copy in copies.of.values():
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
    with targets.implementation("triton"), copies:
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
        with targets.implementation("triton"):
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
