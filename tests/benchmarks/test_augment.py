"""The parts of `python -m benchmarks.augment` that its page rests on: the interval, the classic
augmentation, equal batches, and that its classifier learns."""

import argparse

import numpy as np
import pytest

from benchmarks.augment import (
    Arm,
    Images,
    Made,
    _batches,
    accuracy,
    flip_and_shift,
    section,
    verdict,
)

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(1, 256, (40, 32, 32, 1), np.uint8)


def test_the_page_has_the_t_interval_and_paired_differences():
    base, other = np.array([0.5, 0.6, 0.7]), np.array([0.52, 0.61, 0.73])
    lines = list(section(50, {Arm("a"): base, Arm("b"): other}, {}, 9))
    # t(0.975, 2) = 4.302653; standard errors 0.1 / sqrt(3) and 0.01 / sqrt(3)
    assert "| a | 60.00 ± 24.84 | |" in lines
    assert "| b | 62.00 ± 26.17 | +2.00 ± 2.48 |" in lines


def test_the_page_says_what_was_drawn():
    counts = {"drawn": 30, "copies": 2, "rejected": 8}
    made = Made("python -m x", 61.0, {"counts": {"a": counts, "b": counts}}, [5, 5], None)
    text = "\n".join(section(50, {Arm("a"): np.array([0.5, 0.6])}, {"one": made}, 9))
    assert "10 steps in all; the call that made the set took 61 s of CPU" in text
    assert "60 images drawn, 4 of them copies of real ones, 16 rejected" in text
    assert "python -m x" in text


def test_a_difference_is_shown_where_its_interval_excludes_zero():
    apart = np.array([0.02, 0.01, 0.03])  # mean 0.02, interval 0.0248
    assert verdict(apart) == "no difference is shown"
    assert verdict(apart + 0.01) == "better than real images alone"
    assert verdict(apart - 0.05) == "worse than real images alone"


def test_flip_and_shift_moves_by_two_pixels_at_most_and_mirrors_half():
    moved = flip_and_shift(PIXELS.repeat(5, axis=0), np.random.default_rng(1))
    wide = np.pad(PIXELS, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places, mirrored = set(), 0
    for index, image in enumerate(moved):
        ways = [
            (y, x, flip)
            for flip in (1, -1)
            for y in range(5)
            for x in range(5)
            if np.array_equal(wide[index // 5, y : y + 32, x : x + 32][:, ::flip], image)
        ]
        assert len(ways) == 1
        places.add(ways[0][:2])
        mirrored += ways[0][2] == -1
    assert len(places) == 25
    assert 60 < mirrored < 140


def test_batches_use_each_image_once_a_pass():
    images = Images(PIXELS, np.arange(40))
    batches = _batches(images, 12, np.random.default_rng(2))
    drawn = np.concatenate([next(batches)[1] for _ in range(10)])
    for start in range(0, 120, 40):
        assert sorted(drawn[start : start + 40]) == list(range(40))


@pytest.mark.parametrize("synthetic", [False, True])
def test_the_classifier_learns_what_it_is_shown(synthetic):
    """Two kinds of squares; from real images alone, or from synthetic ones that show the rest."""
    labels = np.arange(40) % 2
    pixels = np.zeros((40, 32, 32, 1), np.uint8)
    pixels[labels == 1, 8:24, 8:24] = 255
    every, one = Images(pixels, labels), Images(pixels[::2], labels[::2])
    given = argparse.Namespace(batch=8, steps=15)
    if synthetic:
        assert accuracy(one, every, every, False, 0, given) == 1
        assert accuracy(one, None, every, False, 0, given) == 0.5
    else:
        assert accuracy(every, None, every, True, 0, given) == 1
