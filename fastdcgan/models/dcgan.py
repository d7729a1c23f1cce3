"""The DCGAN nets of the PyTorch example, for 32 to 256 pixels: same modules, state-dict keys and
initial bits; and SNGAN's discriminator in the place of the example's. Not here: losses, the
training step, and the reading of checkpoints."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcgan.errors import InputError
from fastdcgan.models.arguments import check_channels, check_counts, check_images, flat_latents
from fastdcgan.models.conditional import (
    EMBEDDING,
    check_classes,
    check_labels,
    embedding_of,
    placed,
    projected,
)
from fastdcgan.models.regularised import MinibatchStd, spectrally_normalise

SIZES = (32, 64, 128, 256)


def weights_init(module: nn.Module) -> None:
    """Initialise one module as the DCGAN paper does (Radford et al. 2016, section 4); give it to
    `net.apply`. Convolution weights become N(0, 0.02), BatchNorm weights N(1, 0.02), and biases 0;
    any other module is left alone. The constructors below have already applied it.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def begin_as_resizing(net: nn.Module) -> None:
    """Initialise transposed convolutions of stride 2 anew, so that each begins as an enlargement by
    nearest neighbours and a convolution with a kernel one pixel smaller: w = k * ones(2, 2) with
    k ~ N(0, .), and the deviation that the weights had. Independent weights instead give each
    place of a 2x2 cell another filter, and images a grid of 2, 4, 8 pixels, which training has to
    take away (Odena et al. 2016, "Deconvolution and checkerboard artifacts"; Aitken et al. 2017,
    "Checkerboard artifact free sub-pixel convolution"). The layers stay what they are.
    """
    for layer in net.modules():
        if isinstance(layer, nn.ConvTranspose2d) and layer.stride == (2, 2):
            weight = layer.weight
            *channels, height, width = weight.shape
            kernel = torch.randn(*channels, height - 1, width - 1, dtype=weight.dtype)
            # Each pixel of an enlargement is there twice along either side.
            places = [F.pad(kernel, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]
            new = torch.stack(places).sum(0)
            weight.copy_(new * (weight.std() / new.std()))


def keep_variance(layers: nn.Sequential) -> None:
    """Initialise a generator's convolutions so that features keep their variance from layer to
    layer, as BatchNorm would see to: N(0, sqrt(2 / fan)), the last one's N(0, sqrt(1 / fan)), fan
    being the products that make one output (He et al. 2015, "Delving deep into rectifiers",
    equation 14). Under N(0, 0.02) alone a net without norm draws next to nothing."""
    convolutions = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
    for layer in convolutions:
        # Of a transposed 4x4 convolution from 1x1 one tap makes an output, of one of stride 2 four.
        taps = 1 if layer is convolutions[0] else 4
        gain = 1.0 if layer is convolutions[-1] else 2.0
        nn.init.normal_(layer.weight, 0.0, (gain / (taps * layer.in_channels)) ** 0.5)


class Generator(nn.Module):
    """Latent vectors to images: one 4x4 projection, then stages that double the side to `size`.

    `main` is ConvTranspose2d(k4), BatchNorm2d, ReLU repeated, with ConvTranspose2d, Tanh at the
    end; where there is BatchNorm, no convolution has a bias. The widths are ngf * size/8, ...,
    2 ngf, ngf. At size 64 the keys, the shapes and, under one seed, the initial bits are those of
    the PyTorch example after its `netG.apply(weights_init)`.

    Args:
        size: side of the square images in pixels: 32, 64, 128 or 256. Default 64 (the example).
        nz: length of a latent vector. Default 100 (the example).
        ngf: feature maps ahead of the image layer. Default 64 (the example).
        channels: image channels, 1 to 4. Default 3 (the example).
        norm: "batch" (default, the example), or "none": no BatchNorm; every convolution then has a
            bias, and initial weights that keep the variance (`keep_variance`).
        classes: names of the classes that it draws, by label, which moves z to a place of its own
            (`conditional.placed`). Default: none.

    Raises:
        InputError: for any other value.
    """

    def __init__(
        self,
        size: int = 64,
        nz: int = 100,
        ngf: int = 64,
        channels: int = 3,
        *,
        norm: Literal["batch", "none"] = "batch",
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_size(size)
        check_counts(nz=nz, ngf=ngf)
        check_channels(channels)
        self.size, self.nz, self.ngf, self.channels, self.norm = size, nz, ngf, channels, norm
        self.classes = check_classes(classes)
        bias = norm == "none"

        def activated(outputs: int) -> list[nn.Module]:
            normed = [nn.BatchNorm2d(outputs)] if norm == "batch" else []
            return [*normed, nn.ReLU(inplace=True)]

        width = ngf * size // 8
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(nz, width, 4, stride=1, padding=0, bias=bias),
            *activated(width),
        ]
        while width > ngf:
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=bias),
                *activated(width // 2),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(ngf, channels, 4, stride=2, padding=1, bias=bias), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        self.apply(weights_init)
        if norm == "none":
            keep_variance(self.main)
        if self.classes is not None:
            self.embedding = embedding_of(self.classes, nz)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images in [-1, 1].

        Args:
            z: latent vectors ~ N(0, 1), shape (B, nz) or (B, nz, 1, 1), dtype of the weights.
            labels: the class of each, (B,) int64, where the net has classes; else None.

        Returns:
            Shape (B, channels, size, size), dtype of `z`; channels_last where the weights are
            (`net.to(memory_format=torch.channels_last)`).

        Raises:
            InputError: if `z` has another shape, or labels are missing or too many.
        """
        z = flat_latents(z, self.nz)
        check_labels("generator", self.classes, labels, z.shape[0])
        if labels is not None:
            z = placed(z, self.embedding, labels)
        images: Tensor = self.main(z[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """Images to one logit each: stages that halve the side to 4x4, then one 4x4 convolution.

    `main` is Conv2d(k4, s2), LeakyReLU(0.2), then Conv2d, BatchNorm2d, LeakyReLU repeated, with
    Conv2d(k4, s1) at the end; where there is BatchNorm, no convolution has a bias. The widths are
    ndf, 2 ndf, ..., ndf * size/8. Keys, shapes and initial bits at size 64 are those of the PyTorch
    example. Its closing Sigmoid has no state and is left to `probability`: losses take logits.

    Args:
        size: side of the square images in pixels: 32, 64, 128 or 256. Default 64 (the example).
        ndf: feature maps after the image layer. Default 64 (the example).
        channels: image channels, 1 to 4. Default 3 (the example).
        norm: "batch" (default, the example), or "none": no BatchNorm, and every convolution has a
            bias instead.
        spectral_norm: divide every weight by its largest singular value. Default False.
        minibatch_std: give the last convolution the minibatch's standard deviation as one more
            channel. Default False.
        classes: names of the classes that it judges, by label: the last convolution has more
            outputs, which meet an embedding of the label (`conditional.projected`). Default: none.

    Raises:
        InputError: for any other value.
    """

    def __init__(
        self,
        size: int = 64,
        ndf: int = 64,
        channels: int = 3,
        *,
        norm: Literal["batch", "none"] = "batch",
        spectral_norm: bool = False,
        minibatch_std: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_size(size)
        check_counts(ndf=ndf)
        check_channels(channels)
        self.size, self.ndf, self.channels = size, ndf, channels
        self.norm, self.spectral_norm, self.minibatch_std = norm, spectral_norm, minibatch_std
        self.classes = check_classes(classes)
        self.main = nn.Sequential(*self._layers(1 if classes is None else 1 + EMBEDDING))
        self.apply(weights_init)
        if self.classes is not None:
            self.embedding = embedding_of(self.classes, EMBEDDING, std=EMBEDDING**-0.5)
        if spectral_norm:
            spectrally_normalise(self)

    def _layers(self, outputs: int) -> list[nn.Module]:
        width, bias = self.ndf, self.norm == "none"
        layers: list[nn.Module] = [
            nn.Conv2d(self.channels, width, 4, stride=2, padding=1, bias=bias),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        while width < self.ndf * self.size // 8:
            layers += [
                nn.Conv2d(width, width * 2, 4, stride=2, padding=1, bias=bias),
                *([nn.BatchNorm2d(width * 2)] if self.norm == "batch" else []),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width *= 2
        if self.minibatch_std:
            layers.append(MinibatchStd())
        last = nn.Conv2d(width + self.minibatch_std, outputs, 4, stride=1, padding=0, bias=bias)
        return [*layers, last]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logit of "real" for each image; with labels, of "real and of this class".

        Args:
            x: images in [-1, 1], shape (B, channels, size, size), any memory format, dtype of the
                weights.
            labels: the class of each, (B,) int64, where the net has classes; else None.

        Returns:
            Shape (B,), dtype of `x`.

        Raises:
            InputError: if `x` has another shape, or labels are missing or too many.
        """
        check_images(x, self.channels, self.size)
        check_labels("discriminator", self.classes, labels, x.shape[0])
        logits: Tensor = self.main(x)
        if labels is not None:
            return projected(logits.flatten(1), self.embedding, labels)
        return logits.flatten()

    def probability(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return sigmoid(forward(x, labels)), shape (B,): what the example's discriminator
        returns."""
        return torch.sigmoid(self(x, labels))


class SNGANDiscriminator(Discriminator):
    """SNGAN's standard discriminator (Miyato et al. 2018, "Spectral normalization for generative
    adversarial networks", table 3): every weight under spectral norm, no BatchNorm, and a look at
    each scale before the side is halved.

    `main` is Conv2d(k3, s1), Conv2d(k4, s2), LeakyReLU(0.1) after each, repeated down to 4x4, then
    Conv2d(k3, s1), LeakyReLU(0.1) and the paper's dense layer, as a 4x4 convolution; all have
    biases. The widths are ndf, 2 ndf, 4 ndf and from there on 8 ndf. At 32 pixels and ndf 64 it is
    the paper's; larger images have more stages.

    Args:
        size, ndf, channels, classes: as of `Discriminator`.

    Raises:
        InputError: for any other value.
    """

    def __init__(
        self,
        size: int = 64,
        ndf: int = 64,
        channels: int = 3,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(size, ndf, channels, norm="none", spectral_norm=True, classes=classes)

    def _layers(self, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        before, width, side = self.channels, self.ndf, self.size
        while side > 4:
            layers += [
                nn.Conv2d(before, width, 3, stride=1, padding=1),
                nn.LeakyReLU(0.1, inplace=True),
                nn.Conv2d(width, width, 4, stride=2, padding=1),
                nn.LeakyReLU(0.1, inplace=True),
            ]
            before, width, side = width, min(2 * width, 8 * self.ndf), side // 2
        return [
            *layers,
            nn.Conv2d(before, width, 3, stride=1, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(width, outputs, 4, stride=1, padding=0),
        ]


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise InputError(
            f"image size {size!r} was given; the DCGAN nets make 32, 64, 128 or 256: "
            "resize the images to one of these"
        )
