"""Poisson blending (Perez et al. 2003) of many images at once: inside the hole the gradients are
the made ones', at its edge the values are the given ones'. The equations are solved by SciPy.

OpenCV's seamlessClone was measured beside it on 32 x 32 and 64 x 64 images. It takes three colours,
no hole at the image's border, erodes the hole by pixels that are a good part of a small one, and
reads the target under the hole, which here is what must not be known: 14.4 dB inside the mask on
Fashion-MNIST where this has 17.5.
"""

from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from fastdcgan.inpainting.masks import Bools

Images = np.ndarray[Any, np.dtype[np.float64]]


def blend(made: Images, given: Images, hole: Bools, strength: Images | float = 1.0) -> Images:
    """Fills the hole of `given`: minimises, over the pixels in it, the sum over all neighbours p, q
    of ((x_p - x_q) - strength (made_p - made_q))^2, where outside of the hole x is `given`.

    Args:
        made: (N, H, W, C), float64; all of it is read.
        given: as `made`; what is in the hole does not matter.
        hole: (H, W), neither empty nor everything.
        strength: of the made gradients, one number or (N,). 0 gives the smoothest fill, a membrane.

    Returns:
        (N, H, W, C), equal to `given` outside of the hole.
    """
    n, height, width, channels = made.shape
    inside = hole.ravel()
    differences = _differences(height, width)
    strengths = np.broadcast_to(np.asarray(strength, np.float64), (n,)).repeat(channels)
    wanted = differences @ _columns(made) * strengths
    columns = _columns(given).copy()
    own, others = differences[:, inside], differences[:, ~inside]
    right = own.T @ (wanted - others @ columns[~inside])
    columns[inside] = splu((own.T @ own).tocsc()).solve(right)
    filled: Images = columns.reshape(height, width, n, channels).transpose(2, 0, 1, 3)
    return filled


def trust(made: Images, given: Images, hole: Bools) -> Images:
    """How far the made gradients can be believed, for each image: the least squares coefficient, in
    [0, 1], of the given gradients on the made ones among neighbours that are both seen. (N,)"""
    height, width = hole.shape
    differences = _differences(height, width)
    seen = abs(differences) @ hole.ravel().astype(float) == 0  # no end in the hole
    chosen = differences[seen]
    x, y = ((chosen @ _columns(a)).reshape(-1, len(a), a.shape[3]) for a in (made, given))
    power = (x * x).sum((0, 2))
    coefficient = (x * y).sum((0, 2)) / np.where(power > 0, power, 1)
    clipped: Images = coefficient.clip(0, 1)
    return clipped


def _differences(height: int, width: int) -> sparse.csr_matrix:
    """Pixels (H W) -> the differences of all neighbours, below each other and beside each other."""

    def along(n: int) -> sparse.spmatrix:
        return sparse.diags([-np.ones(n - 1), np.ones(n - 1)], [0, 1], shape=(n - 1, n))

    down = sparse.kron(along(height), sparse.identity(width))
    across = sparse.kron(sparse.identity(height), along(width))
    return sparse.csr_matrix(sparse.vstack([down, across]))


def _columns(images: Images) -> Images:
    """(N, H, W, C) -> (H W, N C)."""
    pixels: Images = images.transpose(1, 2, 0, 3).reshape(images.shape[1] * images.shape[2], -1)
    return pixels
