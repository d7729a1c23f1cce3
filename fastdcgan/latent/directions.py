"""Directions of the latent space along which a generator's first layer changes most. Not here: what
is drawn along them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdcgan import models
from fastdcgan.latent.draw import Generator


@dataclass(frozen=True, eq=False)
class Directions:
    """What `principal_directions` returns, the strongest first."""

    vectors: Tensor
    """(K, nz), float32 on the CPU, orthonormal: z + a * vectors[k] goes `a` standard deviations of
    z ~ N(0, 1) along direction k."""
    shares: Tensor
    """(K,): of the variance of the first layer's output."""


def principal_directions(net: Generator, count: int | None = None) -> Directions:
    """The eigenvectors of A A^T, where z A is what the first layer and its BatchNorm in eval mode
    make of z, but for a constant: the closed form of Shen and Zhou 2021 (SeFa, arXiv:2007.06600).

    With z ~ N(0, 1) they are the principal components of that output, brought back to z, for which
    Haerkoenen et al. 2020 (GANSpace, arXiv:2004.02546) draw samples: a linear layer needs none.
    Each points to where its largest number is positive.

    Args:
        net: not fused; it is not changed.
        count: at most nz; None: all nz.
    """
    weight = next(models.fold(net).parameters()).detach().double().cpu()
    matrix = weight.T if weight.dim() == 2 else weight.flatten(1)  # a dense layer's is (out, nz)
    squares, columns = torch.linalg.eigh(matrix @ matrix.T)
    vectors = columns.T.flip(0)[:count]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    shares = squares.flip(0)[:count] / squares.sum()
    return Directions((vectors * largest.sign()).float(), shares.float())
