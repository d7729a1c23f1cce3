"""The losses against their formulas, on logits of any dtype and size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdcgan.training.losses import bce


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9), st.sampled_from([0.0, 1.0]))
def test_bce_is_the_mean_negative_log_likelihood(logits, target):
    sign = 1 if target else -1
    expected = sum(math.log1p(math.exp(-sign * x)) for x in logits) / len(logits)
    got = bce(torch.tensor(logits, dtype=torch.float64), target)
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bce_is_finite_and_in_float32_at_least(dtype):
    """-log(sigmoid(-3e4)) is 3e4, where BCELoss on probabilities stops at 100."""
    logits = torch.tensor([-3e4, 3e4], dtype=dtype)
    loss = bce(logits, 1.0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(float(logits[1]) / 2)
