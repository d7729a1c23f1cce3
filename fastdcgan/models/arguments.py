"""Checks of what a user hands to the nets: sizes when a net is built, tensors when it is called.
It knows no topology; what the numbers mean to a net is said in dcgan.py and tf28.py."""

from torch import Tensor

from fastdcgan.errors import InputError


def check_counts(**counts: int) -> None:
    """Raise InputError unless every named count is a whole number of 1 or more."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InputError(f"{name}={count!r} was given; give a whole number of 1 or more")


def check_channels(channels: int) -> None:
    """Raise InputError unless `channels` is 1 (grey), 2, 3 (RGB) or 4 (RGBA)."""
    if channels not in (1, 2, 3, 4):
        raise InputError(
            f"channels={channels!r} was given; images have 1 (grey) to 4 (RGBA) channels: "
            "give 1, 2, 3 or 4"
        )


def flat_latents(z: Tensor, nz: int) -> Tensor:
    """Return latent vectors of shape (B, nz) or (B, nz, 1, 1) as (B, nz), or raise InputError."""
    if z.shape[1:] not in ((nz,), (nz, 1, 1)):
        raise InputError(
            f"latent vectors of shape {tuple(z.shape)} were given to a generator with nz={nz}; "
            f"give shape (B, {nz}) or (B, {nz}, 1, 1)"
        )
    return z.flatten(1)


def check_images(x: Tensor, channels: int, size: int) -> None:
    """Raise InputError unless `x` has shape (B, channels, size, size)."""
    if x.dim() != 4 or x.shape[1:] != (channels, size, size):
        raise InputError(
            f"images of shape {tuple(x.shape)} were given to a discriminator of "
            f"(B, {channels}, {size}, {size}); resize them, or build the net for their size"
        )
