"""Masks: their shapes and shares, and the weights of what is seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdcgan.errors import InputError
from fastdcgan.inpainting.masks import contextual_weights, make_mask

SIZES = st.sampled_from([28, 32, 64, 128])


@settings(max_examples=40, deadline=None)
@given(size=SIZES, kind=st.sampled_from(["center", "left", "random"]), share=st.floats(0.05, 0.9))
def test_shares_are_what_was_asked_for(size, kind, share):
    mask = make_mask(kind, size, share=share, seed=1)
    assert mask.hole.shape == (size, size)
    assert mask.share == pytest.approx(share, abs=2 / size)
    assert mask.weights.sum() == pytest.approx(1)
    assert (mask.weights >= 0).all()
    assert not mask.weights[mask.hole].any()
    assert np.array_equal(mask.hole, make_mask(kind, size, share=share, seed=1).hole)


@settings(max_examples=20, deadline=None)
@given(size=SIZES)
def test_shapes_of_the_fixed_masks(size):
    y, x = np.mgrid[:size, :size]
    quarter = size // 4
    middle = (abs(y - (size - 1) / 2) < quarter) & (abs(x - (size - 1) / 2) < quarter)
    assert np.array_equal(make_mask("center", size).hole, middle)
    assert np.array_equal(make_mask("left", size).hole, x < size // 2)
    assert np.array_equal(make_mask("grid", size).hole, (y % 4 != 0) | (x % 4 != 0))
    assert make_mask("random", size).hole.sum() == round(0.8 * size * size)
    for kind, factor in (("full", 1), ("lowres", 4)):
        mask = make_mask(kind, size)
        assert mask.hole.all()
        assert (mask.sees_all, mask.factor) == (True, factor)
        assert mask.weights.shape == (size // factor, size // factor)
        assert mask.weights.sum() == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(hole=st.lists(st.booleans(), min_size=144, max_size=144), window=st.sampled_from([3, 5, 7]))
def test_weights_are_the_hidden_share_about_each_pixel(hole, window):
    hole = np.array(hole).reshape(12, 12)
    hole[0, 0], hole[0, 1] = True, False
    expected = np.zeros((12, 12))
    half = window // 2
    for y in range(12):
        for x in range(12):
            if not hole[y, x]:
                about = hole[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
                expected[y, x] = about.sum() / window**2
    found = contextual_weights(hole, window)
    assert np.allclose(found, expected / expected.sum(), atol=1e-12)


def test_a_file_hides_where_it_is_white(tmp_path):
    pixels = np.zeros((32, 32), np.uint8)
    pixels[3:9, 20:] = 255
    pixels[30, 30] = 127
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "mask.png")
    assert np.array_equal(make_mask(str(tmp_path / "mask.png"), 32).hole, pixels > 127)
    with pytest.raises(InputError, match="has 32 x 32 pixels; the run's images have 64 x 64"):
        make_mask(str(tmp_path / "mask.png"), 64)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        make_mask(str(tmp_path / "text.png"), 32)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("middle", {}, "neither center"),
        ("grid", {"share": 0.5}, "it is for center, left, random"),
        ("left", {"share": 1.0}, "--share 1.0"),
        ("left", {"share": 0.001}, "hides no pixel"),
        ("center", {"window": 4}, "must be odd"),
    ],
)
def test_what_cannot_be_is_said(spec, options, message):
    with pytest.raises(InputError, match=message):
        make_mask(spec, 32, **options)
