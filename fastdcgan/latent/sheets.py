"""Sheets of samples with words on them: numbered grids, and the figure of latent arithmetic."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdcgan.data.picture import Pixels, grid
from fastdcgan.latent.arithmetic import Group

GAP = 2  # pixels between images, as in other grids


def numbered_grid(images: Pixels) -> Pixels:
    """As `grid`, with each image's number below it, in three channels (with alpha, four)."""
    from PIL import Image, ImageDraw

    height, width = images.shape[1:3]
    text = _text_height(height)
    ground = grid(_colour(images), padding=text + 2 * GAP)
    picture = Image.fromarray(ground)
    draw = ImageDraw.Draw(picture)
    step_x, step_y = width + text + 2 * GAP, height + text + 2 * GAP
    columns = (ground.shape[1] - text - 2 * GAP) // step_x
    for index in range(len(images)):
        x = text + 2 * GAP + index % columns * step_x + width // 2
        y = (index // columns + 1) * step_y + GAP
        _write(draw, (x, y), str(index), text, "ma")
    return np.asarray(picture)


def arithmetic_sheet(
    groups: Sequence[Group], parts: list[Pixels], means: Pixels, results: Pixels
) -> Pixels:
    """A column for each group (its samples, numbered, and below a line their mean), its sign before
    it, and at the right the result among its eight neighbours, larger by a frame.

    Args:
        groups: the terms.
        parts: of each group, its samples (N, H, W, C).
        means: (G, H, W, C).
        results: nine images, the result in the middle.
    """
    from PIL import Image, ImageDraw

    *parts, means, results = (_colour(p) for p in [*parts, means, results])
    height, width, channels = means.shape[1:]
    text, sign = _text_height(height), max(16, width // 2)
    cell = height + text + 2 * GAP
    most = max(3, *(len(part) for part in parts))
    left = len(parts) * (sign + width) + sign  # of the results
    shape = (most * cell + height + 6 * GAP, left + 3 * (width + GAP), channels)
    picture = Image.fromarray(np.zeros(shape, np.uint8))
    draw = ImageDraw.Draw(picture)
    below = most * cell + 3 * GAP
    middle = below + height // 2
    for column, (group, part, mean) in enumerate(zip(groups, parts, means, strict=True)):
        x = column * (sign + width) + sign
        for row, (number, image) in enumerate(zip(group.numbers, part, strict=True)):
            y = (most - len(part) + row) * cell
            picture.paste(Image.fromarray(image), (x, y))
            _write(draw, (x + width // 2, y + height + GAP), str(number), text, "ma")
        draw.line([(x, below - 2 * GAP), (x + width - 1, below - 2 * GAP)], fill="white")
        picture.paste(Image.fromarray(mean), (x, below))
        if column or group.sign < 0:
            mark = "+" if group.sign > 0 else "-"
            _write(draw, (x - sign // 2, middle), mark, sign, "mm")
    top = below + height - 3 * (height + GAP) + GAP
    _write(draw, (left - sign // 2, middle), "=", sign, "mm")
    for index, image in enumerate(results):
        x, y = left + index % 3 * (width + GAP), top + index // 3 * (height + GAP)
        picture.paste(Image.fromarray(image), (x, y))
    x, y = left + width + GAP, top + height + GAP
    draw.rectangle([x - GAP, y - GAP, x + width + 1, y + height + 1], outline="white", width=GAP)
    return np.pad(np.asarray(picture), [(3 * GAP, 3 * GAP)] * 2 + [(0, 0)])


def _text_height(height: int) -> int:
    return max(9, min(14, height // 4))


def _colour(images: Pixels) -> Pixels:
    """Grey as RGB, grey with alpha as RGBA: what words are drawn on."""
    channels = images.shape[-1]
    return images if channels > 2 else images[..., [0, 0, 0, 1][: 3 + (channels == 2)]]


def _write(draw: Any, at: tuple[int, int], words: str, size: int, anchor: str) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    draw.text(at, words, fill="white", font=font, anchor=anchor)
