"""The spectrum's two numbers beside formulas for images whose spectrum is known."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.metrics.spectrum import (
    ROUNDING,
    Texture,
    peaks,
    power_spectrum,
    radial,
    texture,
)
from fastdcgan.models import Generator, begin_as_resizing

LUCK = np.random.default_rng(0)


def pixels(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def noise(deviation, count=256, side=32, channels=3, seed=0):
    random = np.random.default_rng(seed)
    return pixels(random.normal(128, deviation, (count, side, side, channels)))


def spectrum(*chunks, **options):
    return power_spectrum(chunks, **options)


def test_the_power_is_that_of_a_textbook_periodogram():
    """scipy's, of one row at a time, of images that change along one axis only."""
    lines = LUCK.normal(128, 30, (8, 32))
    images = np.repeat(pixels(lines)[:, None, :, None], 32, 1)
    # Down the columns such an image is constant, so the window's own transform stands there.
    window = scipy.signal.windows.hann(32, sym=False)
    down = np.abs(np.fft.fft(window)) ** 2
    x = images[:, 0, :, 0].astype(float)
    across = np.abs(np.fft.fft((x - x.mean(1, keepdims=True)) * window)) ** 2
    expected = down[:, None] * across.mean(0) + ROUNDING * (window**2).sum() ** 2
    assert spectrum(images) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_white_noise_is_flat_and_as_strong_as_its_variance():
    found = radial(spectrum(noise(20)))
    window = scipy.signal.windows.hann(32, sym=False)
    strength = (20**2 + 2 * ROUNDING) * (window**2).sum() ** 2
    # The slowest loses what an image's mean has of it.
    assert found[1:] == pytest.approx(np.full(15, strength), rel=0.05)
    assert peaks(spectrum(noise(20))) == pytest.approx(np.ones(4), rel=0.05)


def test_noise_twice_as_strong_is_6_decibels_away():
    found = texture(spectrum(noise(10)), spectrum(noise(20, seed=1)))
    assert found.spectrum_db == pytest.approx(20 * np.log10(2), abs=0.15)
    assert found.peak == pytest.approx(1, abs=0.05)


def test_blur_is_as_far_as_its_filter_says():
    sharp = np.random.default_rng(2).normal(128, 40, (256, 64, 64, 1))
    blurred = scipy.ndimage.convolve1d(sharp, [0.25, 0.5, 0.25], axis=2, mode="wrap")
    along = np.fft.fftfreq(64)
    gain = np.broadcast_to(np.cos(np.pi * along) ** 4, (64, 64))
    expected = np.sqrt(np.mean((10 * np.log10(radial(gain.copy()))) ** 2))
    found = texture(spectrum(pixels(sharp)), spectrum(pixels(blurred)))
    assert found.spectrum_db == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("period", [2, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_is_a_peak_of_its_frequency_and_direction(period, axis):
    """Stripes of amplitude a add a^2 times the window's power there, once for a cosine at half the
    sampling frequency, and a quarter of it at either sign of another."""
    side, deviation, a = 64, 12, 6
    plain = np.random.default_rng(3).normal(128, deviation, (256, side, side, 1))
    stripes = a * np.cos(2 * np.pi * np.arange(side) / period)
    lined = plain + np.expand_dims(stripes, [0, 2, 3] if axis == 0 else [0, 1, 3])
    found = peaks(spectrum(pixels(lined))) / peaks(spectrum(pixels(plain)))
    window = scipy.signal.windows.hann(side, sym=False)
    line = np.abs(np.fft.fft(window)) ** 2
    of_stripes = a**2 * (1 if period == 2 else 1 / 4) * window.sum() ** 2 * line.mean()
    of_noise = (deviation**2 + ROUNDING) * (window**2).sum() ** 2
    hit = (0 if axis == 0 else 2) + (1 if period == 2 else 0)
    assert found[hit] == pytest.approx(1 + of_stripes / of_noise, rel=0.05)
    assert np.delete(found, hit) == pytest.approx(np.ones(3), rel=0.05)
    assert texture(spectrum(pixels(plain)), spectrum(pixels(lined))).peak == found.max()


def test_the_nets_own_stride_leaves_a_peak_and_smoothing_takes_it_away():
    """Zeros between pixels, as a transposed convolution of stride 2 sees them."""
    small = np.random.default_rng(4).normal(0, 30, (256, 16, 16, 1))
    spread = np.zeros((256, 32, 32, 1))
    spread[:, ::2, ::2] = small
    nearest = small.repeat(2, 1).repeat(2, 2)
    real = spectrum(pixels(128 + nearest))
    assert texture(real, spectrum(pixels(128 + spread))).peak > 2


def test_the_first_images_are_taken_whatever_the_chunks():
    images = noise(20, count=40)
    whole = spectrum(images, count=20)
    assert np.array_equal(whole, spectrum(images[:7], images[7:11], images[11:], count=20))
    assert np.array_equal(whole, spectrum(images[:20]))
    assert not np.array_equal(whole, spectrum(images))


def test_images_of_one_colour_are_no_division_by_zero():
    flat = spectrum(np.full((4, 32, 32, 3), 7, np.uint8))
    found = texture(flat, flat)
    assert (found.spectrum_db, found.peak) == (0, 1)
    far = texture(spectrum(noise(20)), flat)
    assert far.spectrum_db == pytest.approx(10 * np.log10(20**2 / ROUNDING), abs=1)


def test_small_images_have_none():
    tiny = spectrum(noise(20, side=8))
    assert texture(tiny, tiny) == Texture(None, None)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([16, 28, 31, 64]),
    st.integers(-60, 60),
    st.integers(0, 2**32 - 1),
)
def test_a_set_beside_itself_mirrored_or_brighter_is_the_same(channels, side, brighter, seed):
    images = noise(10, count=3, side=side, channels=channels, seed=seed)
    here = spectrum(images)
    for other in (images, images[::-1], images[..., ::-1], images.swapaxes(1, 2)):
        found = texture(here, spectrum(other))
        assert found.spectrum_db == pytest.approx(0, abs=1e-9)
        assert sorted(peaks(spectrum(other))) == pytest.approx(sorted(peaks(here)))
    moved = images.astype(int) + brighter
    if moved.min() >= 0 and moved.max() <= 255:
        found = texture(here, spectrum(moved.astype(np.uint8)))
        assert (found.spectrum_db, found.peak) == pytest.approx((0, 1), abs=1e-9)


def test_an_image_of_a_net_that_begins_as_resizing_has_no_grid():
    found = []
    for begin in (lambda net: None, begin_as_resizing):
        torch.manual_seed(0)
        netG = Generator(64, 100, 8, 3)
        begin(netG)
        with torch.no_grad():
            images = netG(torch.randn(64, 100))
        drawn = (images * 20 / images.std() + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
        found.append(float(peaks(spectrum(drawn.numpy())).max()))
    assert found[0] > 3
    assert found[1] < 1.5
