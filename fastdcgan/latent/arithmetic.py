"""Arithmetic with the mean latent vectors of groups of samples, as in figure 7 of the DCGAN paper
(Radford et al. 2016, arXiv:1511.06434, section 6.3.2). Not here: what is drawn (generation.py) and
how the sheet looks (sheets.py)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdcgan.errors import InputError

NOISE = 0.25
"""The paper's: the result's neighbours are it plus uniform noise of this scale."""


@dataclass(frozen=True)
class Group:
    """Some samples, whose mean is added or taken away."""

    sign: int
    """1 or -1."""
    numbers: tuple[int, ...]


def parse_groups(text: str) -> list[Group]:
    """ "1,2,3 - 4,5,6 + 7,8,9" as its groups.

    Raises:
        InputError: it is not of this form.
    """
    squeezed = re.sub(r"\s*([,+-])\s*", r"\1", text.strip())
    if not re.fullmatch(r"[+-]?\d+(,\d+)*([+-]\d+(,\d+)*)*", squeezed):
        raise InputError(
            f'--arithmetic "{text}" was given; give groups of sample numbers with + and - between '
            'them, as "1,2,3 - 4,5,6 + 7,8,9"'
        )
    return [
        Group(-1 if sign == "-" else 1, tuple(int(n) for n in numbers.split(",")))
        for sign, numbers in re.findall(r"([+-]?)([\d,]+)", squeezed)
    ]


def combine(groups: Sequence[Group], parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The means of the groups, (G, nz), and the sum of those means by their signs, (nz,).

    Args:
        groups: whose signs count.
        parts: the latent vectors of each group, shape (numbers in it, nz).
    """
    means = torch.stack([part.mean(0) for part in parts])
    signs = torch.tensor([group.sign for group in groups], dtype=means.dtype)
    return means, (signs[:, None] * means).sum(0)


def neighbourhood(z: Tensor, seed: int) -> Tensor:
    """Nine vectors, (9, nz): the fifth, the middle of 3 x 3, is z; the others are z plus uniform
    noise in [-NOISE, NOISE)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(9, len(z), generator=generator, dtype=z.dtype) * (2 * NOISE) - NOISE
    noise[4] = 0
    return z + noise
