"""The update of a net in one launch on the GPU itself, eager and in a CUDA graph, against PyTorch's
Adam in float64. `pytest -m gpu tests/gpu`."""

import copy

import pytest
import torch
from torch import nn

from fastdcgan_kernels.adam import Adam, Average
from fastdcgan_kernels.choice.geometry import gradient_dtype
from fastdcgan_kernels.modules.copies import WorkingCopies

pytestmark = pytest.mark.gpu
GROUP = {"lr": 0.1, "betas": (0.5, 0.999), "eps": 1e-8}


@pytest.mark.parametrize("graph", [False, True])
def test_steps_are_pytorchs(graph):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(256, 512, 4, 2, 1), nn.BatchNorm2d(512), nn.Conv2d(3, 5, 4, 2, 1))
    net = net.to("cuda", memory_format=torch.channels_last)
    start, twin = copy.deepcopy(net), copy.deepcopy(net).double()
    average = copy.deepcopy(net).requires_grad_(False)
    ours = Adam(net.parameters(), **GROUP, fused=True, capturable=True)
    theirs = torch.optim.Adam(twin.parameters(), **GROUP, foreach=False)
    averages, values = (n.state_dict(keep_vars=True).values() for n in (average, net))
    ours.average = Average(averages, values, 0.9)
    ours.copies = WorkingCopies(net, torch.bfloat16, narrow=True)
    for p in net.parameters():
        p.grad = torch.empty_like(p, dtype=gradient_dtype(p))
    expected = Average(
        [v.clone() for v in twin.state_dict().values()],
        twin.state_dict(keep_vars=True).values(),
        0.9,
    )
    ours.prepare()
    ours.refresh()
    recorded = None
    for t in range(6):
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
            mine.grad.normal_()
            other.grad = mine.grad.double()
        rate = 0.1 if t < 4 else 0.025
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate
        if graph and t > 0:
            if recorded is None:
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
                    ours.step()
            ours.refresh()
            recorded.replay()
        else:
            ours.step()
        theirs.step()
        expected.update()
    assert ours._tickets == 0
    parameters = zip(net.parameters(), twin.parameters(), start.parameters(), strict=True)
    for mine, other, before in parameters:
        moved = mine.detach().double() - before.double()
        torch.testing.assert_close(moved, other.detach() - before, rtol=1e-4, atol=1e-5)
        assert ours.state[mine]["step"] == 6
    for mine, other in zip(ours.average.of.values(), expected.of.values(), strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=1e-5)
    for weight, narrow in ours.copies.of.items():
        assert torch.equal(narrow, weight.bfloat16())
