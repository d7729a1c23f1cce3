"""What a discriminator may have besides the layers of its paper: spectral norm on its weights, and
the minibatch's standard deviation as a feature. Not here: penalties, which are training's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

ITERATIONS = 15
"""Power iterations at the start, as torch's own spectral_norm has; later, one an update."""


class SpectralNorm(nn.Module):
    """W / sigma(W), sigma = u^T W v the largest singular value of W as a matrix of output channels
    by all else (Miyato et al. 2018, "Spectral normalization for generative adversarial networks",
    algorithm 1). Gradients go through sigma, its vectors u and v taken for constants.

    For torch.nn.utils.parametrize, like torch's own, but for three things. The vectors move by
    `power_iteration`, before each update, and not at every pass: so all passes of an update have
    the same weight, and compiled passes change nothing. It has no matrix product, which autocast
    would round to 16 bits. And it reads a channels_last weight without a copy.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = _matrix(weight.detach())
        self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", torch.empty_like(matrix[0]))
        for _ in range(ITERATIONS):
            self.iterate(matrix)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration: v = W^T u, u = W v, each brought to length 1."""
        matrix = _matrix(weight)
        self.v.copy_(F.normalize((matrix * self.u[:, None]).sum(0), dim=0))
        self.u.copy_(F.normalize((matrix * self.v).sum(1), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its norm, in its shape, dtype and memory format."""
        return weight / ((_matrix(weight) * self.v).sum(1) * self.u).sum()


def _matrix(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).flatten(1)  # a matrix stays what it is


def spectrally_normalise(net: nn.Module) -> None:
    """Gives every convolution, dense layer and embedding of the net `SpectralNorm`, in place. The
    state dict then has "parametrizations.weight.original" for "weight", and the two vectors."""
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))


def power_iteration(net: nn.Module) -> None:
    """One power iteration of every spectral norm in the net: once before each update of it. Device
    work only; does nothing where there is no spectral norm."""
    for module in net.modules():
        if parametrize.is_parametrized(module, "weight"):
            (norm,) = module.parametrizations.weight  # type: ignore[union-attr, misc]
            norm.iterate(module.parametrizations.weight.original)  # type: ignore[union-attr]


class MinibatchStd(nn.Module):
    """One more channel: the standard deviation over the batch of each feature at each place, as a
    mean over all of them, one number for the whole batch. Karras et al. 2018, "Progressive growing
    of GANs", section 3. Under torchrun the batch is the process's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + 1, H, W), dtype of x, channels_last; computed in float32 at
        least. Gradients of every order."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        deviation = (wide.var(0, unbiased=False) + 1e-8).sqrt().mean().to(x.dtype)
        more = deviation.expand(x.shape[0], 1, *x.shape[2:])
        return torch.cat([x, more], dim=1).contiguous(memory_format=torch.channels_last)
