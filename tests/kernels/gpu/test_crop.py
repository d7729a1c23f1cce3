"""Crops of uint8 images (in the interpreter) against those of the feeds, in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.data.feeds import cut
from fastdcgan_kernels.gpu.crop import squares
from tests.kernels import exact
from tests.kernels.exact import DTYPES


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


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
    ours = squares(images, rows, size, dtype, corner=(top, left), flipped=flipped)
    assert torch.equal(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    if not margin and not flip:
        assert torch.equal(squares(images, rows, size, dtype), expected)
