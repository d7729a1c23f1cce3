"""The harness itself: one tile through the interpreter, against PyTorch."""

import pytest
import torch
import triton
import triton.language as tl

SIDE = 16


@triton.jit
def product(a, b, wide, narrow, SIDE: tl.constexpr):
    """wide = a b in fp32, narrow = the same as stored in the dtype of a."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    acc = tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee")
    tl.store(wide + at, acc)
    tl.store(narrow + at, acc.to(narrow.dtype.element_ty))


@triton.jit
def convert(source, target, COUNT: tl.constexpr):
    """target = source, in its own dtype."""
    at = tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_tile_of_a_product(dtype):
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    wide, narrow = torch.empty(SIDE, SIDE), torch.empty(SIDE, SIDE, dtype=dtype)
    product[(1,)](a, b, wide, narrow, SIDE)
    torch.testing.assert_close(wide.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_and_ties_to_even(dtype):
    step = torch.finfo(dtype).eps
    ties = [1 + step / 2, 1 + 1.5 * step, 1 + step * 0.51, 1 + step * 0.49]
    values = torch.tensor([*ties, float("inf"), float("nan"), 0.0, -0.0, 1e-3, -3.7, 1e5, 65519.0,
                           -1 - step / 2, 3.0e-8, 2.0, 1 / 3])  # fmt: skip
    back = torch.empty(16, dtype=dtype)
    convert[(1,)](values, back, 16)
    torch.testing.assert_close(back, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    wide = torch.empty(16)
    convert[(1,)](back, wide, 16)
    torch.testing.assert_close(wide, back.float(), rtol=0, atol=0, equal_nan=True)
