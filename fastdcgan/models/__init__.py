"""The nets: DCGAN as in the PyTorch example and the TensorFlow tutorial, their initialisation,
reading anyone's checkpoints of them, and sampling. Not here: anything that trains them."""

from collections.abc import Sequence
from typing import Literal

from fastdcgan.errors import InputError
from fastdcgan.models.checkpoints import (
    discriminator_from,
    generator_from,
    load_weights,
    read_state_dict,
)
from fastdcgan.models.dcgan import (
    SIZES,
    Discriminator,
    Generator,
    SNGANDiscriminator,
    begin_as_resizing,
    weights_init,
)
from fastdcgan.models.folding import fold
from fastdcgan.models.sampling import sample
from fastdcgan.models.tf28 import TF28Discriminator, TF28Generator

__all__ = [
    "SIZES",
    "Discriminator",
    "Generator",
    "SNGANDiscriminator",
    "TF28Discriminator",
    "TF28Generator",
    "begin_as_resizing",
    "build",
    "discriminator_from",
    "fold",
    "generator_from",
    "load_weights",
    "read_state_dict",
    "sample",
    "weights_init",
]


def build(
    net: Literal["dcgan", "tf28"],
    *,
    size: int,
    nz: int,
    ngf: int,
    ndf: int,
    channels: int,
    net_d: Literal["dcgan", "sngan"] = "dcgan",
    norm_g: Literal["batch", "none"] = "batch",
    norm_d: Literal["batch", "none"] = "batch",
    spectral_norm: bool = False,
    minibatch_std: bool = False,
    classes: Sequence[str] | None = None,
) -> tuple[Generator, Discriminator] | tuple[TF28Generator, TF28Discriminator]:
    """Return a generator and its discriminator, initialised in that order from torch's seed.

    Args:
        net: "dcgan", the PyTorch example's nets, or "tf28", the TensorFlow tutorial's.
        size: side of the images in pixels: 32, 64, 128 or 256; 28 for "tf28".
        nz: length of a latent vector.
        ngf, ndf: feature maps beside the image layer of either net. The widths of "tf28" are
            fixed, and it does not read these.
        channels: image channels, 1 to 4.
        net_d: the discriminator beside the generator of "dcgan": its own, or "sngan", which has
            spectral norm and none of the three below.
        norm_g: of the generator.
        norm_d, spectral_norm, minibatch_std: of the discriminator.
            "tf28" reads spectral_norm alone.
        classes: names of the classes, which both nets then take labels of; None: no labels.

    Raises:
        InputError: for any other value.
    """
    if net == "dcgan":
        netG = Generator(size, nz, ngf, channels, norm=norm_g, classes=classes)
        if net_d == "sngan":
            return netG, SNGANDiscriminator(size, ndf, channels, classes=classes)
        return netG, Discriminator(
            size,
            ndf,
            channels,
            norm=norm_d,
            spectral_norm=spectral_norm,
            minibatch_std=minibatch_std,
            classes=classes,
        )
    if net == "tf28":
        if size != 28:
            raise InputError(f"image size {size!r} was given; the tf28 nets make 28: give size 28")
        return TF28Generator(nz, channels, classes=classes), TF28Discriminator(
            channels, spectral_norm=spectral_norm, classes=classes
        )
    raise InputError(f'net={net!r} was given; give "dcgan" or "tf28"')
