"""Ways through the latent space from one vector to the next. Not here: what is drawn on the way,
and where it is written (generation.py)."""

from typing import Literal

import torch
from torch import Tensor

from fastdcgan.errors import InputError

Curve = Literal["spherical", "linear"]

_NEARLY = 1e-6
"""Below this angle (radians) a sphere is flat, in float32; so near to pi no arc is the shortest."""


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(1 - t) a + t b.

    Args:
        a, b: latent vectors, shape (nz,).
        t: shape (T,); 0 is a, 1 is b.

    Returns:
        Shape (T, nz), dtype of `a`.
    """
    return (1 - t)[:, None] * a + t[:, None] * b


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(sin((1 - t) w) a + sin(t w) b) / sin(w), where w is the angle between a and b.

    z ~ N(0, 1) in many dimensions lies near a sphere of radius sqrt(nz), which a straight line
    leaves and this does not (Shoemake 1985; for latent vectors White 2016, arXiv:1609.04468).
    Vectors of the same direction are interpolated as `lerp` does.

    Args, Returns: as of `lerp`.

    Raises:
        InputError: a and b point in opposite directions, or one of them is 0.
    """
    lengths = a.norm() * b.norm()
    if not lengths > 0:
        raise InputError("no arc leads to or from a vector of zeros: take the linear curve")
    # Of two unit vectors, by their sum and difference: exact where arccos of the product is not.
    u, v = a / a.norm(), b / b.norm()
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    if angle < _NEARLY:
        return lerp(a, b, t)
    if torch.pi - angle < _NEARLY:
        raise InputError("no arc is the shortest between opposite vectors: take the linear curve")
    weights = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
    return weights[0][:, None] * a + weights[1][:, None] * b


def walk(keys: Tensor, steps: int, *, curve: Curve = "spherical", loop: bool = False) -> Tensor:
    """From each key to the next in `steps` equal steps of t.

    Args:
        keys: latent vectors, shape (K, nz), K at least 2.
        steps: at least 1.
        curve: "spherical" (slerp) or "linear" (lerp).
        loop: go back from the last key to the first, which is then not repeated.

    Returns:
        Shape ((K - 1) * steps + 1, nz), with `loop` (K * steps, nz): rows 0, steps, 2 * steps ...
        are the keys.

    Raises:
        InputError: as of `slerp`.
    """
    between = slerp if curve == "spherical" else lerp
    t = torch.arange(steps, dtype=keys.dtype, device=keys.device) / steps
    ends = keys.roll(-1, 0) if loop else keys[1:]
    legs = [between(a, b, t) for a, b in zip(keys, ends, strict=False)]
    return torch.cat(legs if loop else [*legs, keys[-1:]])
