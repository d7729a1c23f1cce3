"""Latent arithmetic: what is understood, and the numbers, against numpy in float64."""

import numpy as np
import pytest
import torch

from fastdcgan.errors import InputError
from fastdcgan.latent.arithmetic import Group, combine, neighbourhood, parse_groups
from fastdcgan.latent.sheets import arithmetic_sheet, numbered_grid


def test_groups_are_read():
    expected = [Group(1, (1, 2, 3)), Group(-1, (4, 5)), Group(1, (60,))]
    assert parse_groups("1,2,3 - 4,5 + 60") == expected
    assert parse_groups(" 1, 2,3-4 ,5+60 ") == expected
    assert parse_groups("-7+8") == [Group(-1, (7,)), Group(1, (8,))]


@pytest.mark.parametrize(
    "text", ["", "a", "1,2 -", "1,,2", "1 - -2", "1.5", "1*2", ",1", "1 2", "1,2 - 3 4"]
)
def test_what_is_no_groups_is_one_line(text):
    with pytest.raises(InputError, match="give groups of sample numbers") as error:
        parse_groups(text)
    assert "\n" not in str(error.value)


def test_means_are_added_by_their_signs():
    random = np.random.default_rng(0)
    parts = [random.standard_normal((n, 5)) for n in (3, 2, 1)]
    groups = [Group(sign, tuple(range(len(p)))) for sign, p in zip((1, -1, 1), parts, strict=True)]
    means, result = combine(groups, [torch.tensor(part) for part in parts])
    np.testing.assert_allclose(means, [part.mean(axis=0) for part in parts])
    np.testing.assert_allclose(
        result, parts[0].mean(axis=0) - parts[1].mean(axis=0) + parts[2].mean(axis=0)
    )


def test_the_result_is_amid_uniform_noise():
    z = torch.randn(1000, dtype=torch.float64)
    around = neighbourhood(z, seed=3)
    assert torch.equal(around[4], z)
    noise = (around - z)[[0, 1, 2, 3, 5, 6, 7, 8]]
    assert noise.abs().max() <= 0.25
    assert noise.std() == pytest.approx(0.5 / 12**0.5, rel=0.03)
    assert torch.equal(around, neighbourhood(z, seed=3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_sheet_shows_every_part(channels):
    random = np.random.default_rng(0)
    groups = parse_groups("1,2,3,4 - 5")
    parts = [random.integers(0, 256, (n, 32, 32, channels), np.uint8) for n in (4, 1)]
    means, results = (random.integers(0, 256, (n, 32, 32, channels), np.uint8) for n in (2, 9))
    sheet = arithmetic_sheet(groups, parts, means, results)
    assert sheet.shape[2] == (4 if channels in (2, 4) else 3)
    rows = np.lib.stride_tricks.sliding_window_view(sheet, (32, 32), axis=(0, 1))
    for image in [*parts[0], *parts[1], *means, *results]:
        colour = image if channels > 2 else image[..., [0, 0, 0, 1][: channels + 2]]
        same = (rows[..., 7, 9] == colour[7, 9]).all(axis=-1)
        assert any(
            np.array_equal(rows[y, x].transpose(1, 2, 0), colour) for y, x in np.argwhere(same)
        )


def test_a_numbered_grid_has_its_images_where_they_were():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), np.uint8)
    sheet = numbered_grid(images)
    pad = (sheet.shape[1] - 3 * 32) // 4
    for index, image in enumerate(images):
        y, x = pad + index // 3 * (32 + pad), pad + index % 3 * (32 + pad)
        assert np.array_equal(sheet[y : y + 32, x : x + 32], image.repeat(3, axis=-1))
        below = sheet[y + 32 : y + 32 + pad, x : x + 32]
        assert below.max() > 200, "its number"
