"""The 28x28 nets of the TensorFlow DCGAN tutorial, with Keras's padding, order and statistics.
Not here: its training step, and any reading of Keras files.

A Keras weight fits by transposition alone: Dense (in, out) by `.T`, Conv2D (kh, kw, in, out) and
Conv2DTranspose (kh, kw, out, in) by `.permute(3, 2, 0, 1)`, all others as they are. For that, the
12544 features after the generator's Dense layer, and the 6272 ahead of the discriminator's, keep
Keras's order: row, column, channel.
"""

from collections.abc import Sequence

import torch
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
from fastdcgan.models.regularised import spectrally_normalise
from fastdcgan_kernels import Dropout, KerasBatchNorm2d

SIZE = 28

# Keras's defaults, where PyTorch has 0.01, 1e-5 and 0.1.
LEAKY_SLOPE = 0.3
BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01  # the share of the new value: Keras's 0.99 is the share of the old one


class KerasBatchNorm(KerasBatchNorm2d):
    """BatchNorm over dimension 1 with Keras's constants and moving variance, of (B, C) as of (B, C,
    H, W): after a Dense layer n is the batch size, so that n / (n - 1) shows."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def _check_input_dim(self, input: Tensor) -> None:
        if self.training and input.numel() // self.num_features < 2:
            raise InputError(
                "one image was given, and one value has no batch statistics; "
                "give 2 images or more, or use running statistics"
            )


def _norm(channels: int) -> KerasBatchNorm2d:
    return KerasBatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)


class Permute(nn.Module):
    """`Tensor.permute` as a layer, between PyTorch's NCHW and the order of Keras's features."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class TF28Generator(nn.Module):
    """Latent vectors to 28x28 images: Dense to 7x7x256, then 5x5 transposed convolutions.

    Args:
        nz: length of a latent vector. Default 100 (the tutorial's noise_dim).
        channels: image channels, 1 to 4. Default 1 (the tutorial).
        classes: as in `dcgan.Generator`.

    Raises:
        InputError: for any other value.
    """

    def __init__(
        self, nz: int = 100, channels: int = 1, *, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        check_counts(nz=nz)
        check_channels(channels)
        self.size, self.nz, self.channels = SIZE, nz, channels
        self.classes = check_classes(classes)
        # "same" at stride 2 cuts 1 pixel before and 2 after; `padding` cuts 1 on either side, and
        # the negative pad the last row and column.
        self.main = nn.Sequential(
            nn.Linear(nz, 7 * 7 * 256, bias=False),
            KerasBatchNorm(7 * 7 * 256),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            nn.Unflatten(1, (7, 7, 256)),
            Permute(0, 3, 1, 2),
            nn.ConvTranspose2d(256, 128, 5, stride=1, padding=2, bias=False),
            _norm(128),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=1, bias=False),
            nn.ZeroPad2d((0, -1, 0, -1)),
            _norm(64),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            nn.ConvTranspose2d(64, channels, 5, stride=2, padding=1, bias=False),
            nn.ZeroPad2d((0, -1, 0, -1)),
            nn.Tanh(),
        )
        self.apply(keras_init)
        if self.classes is not None:
            self.embedding = embedding_of(self.classes, nz)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images in [-1, 1].

        Args:
            z: latent vectors ~ N(0, 1), shape (B, nz) or (B, nz, 1, 1), dtype of the weights.
            labels: the class of each, (B,) int64, where the net has classes; else None.

        Returns:
            Shape (B, channels, 28, 28), dtype of `z`, channels_last.

        Raises:
            InputError: if `z` has another shape, or holds one vector in training mode, or labels
                are missing or too many.
        """
        z = flat_latents(z, self.nz)
        check_labels("generator", self.classes, labels, z.shape[0])
        if labels is not None:
            z = placed(z, self.embedding, labels)
        images: Tensor = self.main(z)
        return images


class TF28Discriminator(nn.Module):
    """28x28 images to one logit each: two 5x5 convolutions with Dropout 0.3, then Dense.

    Args:
        channels: image channels, 1 to 4. Default 1 (the tutorial).
        spectral_norm: divide every weight by its largest singular value. Default False.
        classes: as in `dcgan.Discriminator`.

    Raises:
        InputError: for any other value.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        spectral_norm: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_channels(channels)
        self.size, self.channels, self.spectral_norm = SIZE, channels, spectral_norm
        self.classes = check_classes(classes)
        outputs = 1 if self.classes is None else 1 + EMBEDDING
        # "same" at stride 2 pads 1 pixel before and 2 after; Conv2d alone pads both sides alike.
        self.main = nn.Sequential(
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(channels, 64, 5, stride=2),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            Dropout(0.3),
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(64, 128, 5, stride=2),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            Dropout(0.3),
            Permute(0, 2, 3, 1),
            nn.Flatten(),
            nn.Linear(7 * 7 * 128, outputs),
        )
        self.apply(keras_init)
        if self.classes is not None:
            self.embedding = embedding_of(self.classes, EMBEDDING, std=EMBEDDING**-0.5)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logit of "real" for each image; with labels, of "real and of this class".

        Args:
            x: images in [-1, 1], shape (B, channels, 28, 28), any memory format, dtype of the
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
            return projected(logits, self.embedding, labels)
        return logits.flatten()

    def probability(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return sigmoid(forward(x, labels)), shape (B,)."""
        return torch.sigmoid(self(x, labels))


def keras_init(module: nn.Module) -> None:
    """Initialise one module as Keras does; give it to `net.apply`. Kernels become Glorot uniform,
    biases 0; any other module is left alone. The constructors above have already applied it.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
