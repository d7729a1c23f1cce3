"""The loss with its gradient: the kernel (in the interpreter) and its twin against plain PyTorch in
float64."""

import pytest
import torch
import torch.nn.functional as F

from fastdcgan_kernels import functional
from fastdcgan_kernels.choice import targets as choices
from fastdcgan_kernels.gpu.launch import recording
from tests.kernels import exact
from tests.kernels.exact import DTYPES, Draw, close


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


@pytest.fixture(params=["triton", "reference"])
def either(request):
    """The kernel, and its twin in plain PyTorch."""
    with choices.implementation(request.param):
        yield


@pytest.mark.parametrize("targets", [(1.0,), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_probability_and_gradient(dtype, targets, either):
    """1,030 logits are more than one block; +-90 are where a sigmoid is 0 or 1 in float32."""
    groups = len(targets)
    logits = Draw(dtype).normal(groups * 1030, spread=3.0)
    logits[:4] = torch.tensor([90.0, -90.0, 0.0, 30.0])
    share, scale = 0.25, torch.tensor(8.0)
    row, gradient = functional.bce(logits, torch.tensor(targets), share=share, scale=scale)
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
    row, _ = functional.bce(torch.full((5,), 20.0), torch.tensor([1.0]))
    truth = F.softplus(torch.tensor(-20.0, dtype=torch.float64))
    torch.testing.assert_close(row[0].double(), truth, rtol=1e-6, atol=0)


def test_doubles_are_left_to_the_twin():
    logits = Draw(torch.float64).normal(7)
    with choices.implementation("triton"), recording() as launches:
        _, gradient = functional.bce(logits, torch.tensor([1.0]))
    assert not launches
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, (logits.sigmoid() - 1) / 7)
