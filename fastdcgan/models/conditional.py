"""What the nets of a class-conditional GAN have besides those of their papers: an embedding of the
label, ahead of G and behind D. Not here: where labels come from (data/labels.py).

Both nets stay the standard ones, D with more outputs, so fused blocks, the working copies in 16
bits and CUDA graphs take them as they are. G's label moves z, and is not joined to it: joined, the
label's vector grew until BatchNorm had scaled z away, and all images of a class were alike (on
Fashion-MNIST z's share of the first layer's variance fell from 0.77 to 0.10 in 4,700 steps). As a
place in z's own space it always has z's noise about it. In D the label comes behind the last layer
and not in as one more image plane: that would be a pass over the images at their full size, and
under `--diffaugment` a plane that must not be moved with the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdcgan.errors import InputError

EMBEDDING = 32
"""Numbers that stand for a label in D; in G as many as in z."""
RADIUS = 5.0
"""Of the sphere on which the classes lie in G's latent space. Two at right angles are 7 standard
deviations of z apart."""


def check_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the classes as a net keeps them, or InputError: two names or more, no two
    alike; None: a net that knows no classes."""
    if classes is None:
        return None
    names = tuple(map(str, classes))
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"classes={list(names)} was given; give the names of 2 classes or more, each once"
        )
    return names


def embedding_of(classes: tuple[str, ...], length: int, *, std: float = 1.0) -> nn.Embedding:
    """A learnt vector for each class, (classes, length), that begins as N(0, std^2)."""
    embedding = nn.Embedding(len(classes), length)
    nn.init.normal_(embedding.weight, std=std)
    return embedding


def check_labels(
    net: str, classes: tuple[str, ...] | None, labels: Tensor | None, batch: int
) -> None:
    """Raise InputError unless there are labels where the net has classes, one an image. Their
    values are not looked at: that would wait for the device."""
    if (labels is None) != (classes is None):
        raise InputError(
            f"labels were given to a {net} without classes: leave them out"
            if classes is None
            else f"no labels were given to a {net} of {len(classes)} classes: give one an image"
        )
    if labels is not None and (labels.shape != (batch,) or labels.dtype != torch.int64):
        raise InputError(
            f"labels of shape {tuple(labels.shape)}, {labels.dtype} were given for {batch} images; "
            f"give shape ({batch},), torch.int64"
        )


def placed(z: Tensor, embedding: nn.Embedding, labels: Tensor) -> Tensor:
    """z + RADIUS * e(y) / |e(y)|, which a conditional G is given: a class is a place in the latent
    space, about which z is drawn (the supervised Gaussian mixture of Ben-Yosef & Weinshall 2018,
    "Gaussian mixture generative adversarial networks", with learnt means).

    Args:
        z: (B, nz).
        embedding: e, (classes, nz).
        labels: y, (B,) int64, on the device of z.

    Returns:
        As z. Gradients of every order.
    """
    e: Tensor = embedding(labels)
    place = e * (RADIUS * e.square().sum(1, keepdim=True).rsqrt())
    return z + place.to(z.dtype)


def projected(outputs: Tensor, embedding: nn.Embedding, labels: Tensor) -> Tensor:
    """psi(x) + <e(y), phi(x)>, the logit of a conditional D: Miyato & Koyama 2018, "cGANs with
    projection discriminator", equation 4, but for phi. There the last features are summed over
    their places; here phi is linear in them and learnt, more outputs of the layer that gives psi.

    Args:
        outputs: [psi, phi] of each image, (B, 1 + EMBEDDING).
        embedding: e. It begins as N(0, 1 / EMBEDDING), so that <e, phi> is as large as psi.
        labels: y, (B,) int64.

    Returns:
        (B,), in the wider of the dtypes of `outputs` and e (no 16-bit sum). Gradients of every
        order.
    """
    product: Tensor = outputs[:, 1:] * embedding(labels)
    return outputs[:, 0] + product.sum(1)


def in_turn(n: int, classes: Sequence[str]) -> Tensor:
    """Labels of `n` images, each class as often: 0, 1, 2, ..., 0, 1, ...; (n,) int64."""
    return torch.arange(n) % len(classes)


COLUMNS, ROWS = 8, 32  # of a sheet: more classes than rows are not shown


def by_class(z: Tensor, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What to draw for a sheet of COLUMNS columns with a row for each class (or, of few classes,
    some rows for each): the same latent vectors for all.

    Args:
        z: (COLUMNS * COLUMNS, ...).

    Returns:
        Latent vectors and labels, as many of each; on the device of z.
    """
    shown = min(len(classes), ROWS)
    each = COLUMNS * -(-COLUMNS // shown)
    labels = torch.arange(shown, device=z.device).repeat_interleave(each)
    return z[:each].repeat(shown, *[1] * (z.dim() - 1)), labels
