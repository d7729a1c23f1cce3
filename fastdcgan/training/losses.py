"""The losses of D and G on D's logits, each with its formula and paper, and their gradients. Not
here: what is added to D's loss (regularisers.py)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdcgan.training.compiling import Compiler
from fastdcgan.training.config import TrainConfig
from fastdcgan_kernels.functional import bce, runs_kernels

Role = Literal["real", "fake", "wanted"]
"""What a batch of logits is of, and for whom: D's of real or of generated images; or those that G
wants to be taken for real."""
ROLES: tuple[Role, ...] = ("real", "fake", "wanted")


def hinge(d: Tensor, role: Role, smoothing: float = 0.0) -> Tensor:
    """D: max(0, 1 - D(x)) + max(0, 1 + D(G(z))); G: -D(G(z)).

    Lim & Ye 2017, "Geometric GAN"; Miyato et al. 2018, "Spectral normalization", equations 16, 17.
    """
    if role == "wanted":
        return -d
    return F.relu(1 - d if role == "real" else 1 + d)


def lsgan(d: Tensor, role: Role, smoothing: float = 0.0) -> Tensor:
    """D: (D(x) - b)^2 / 2 + (D(G(z)) - a)^2 / 2; G: (D(G(z)) - c)^2 / 2; a = 0, b = 1 - smoothing,
    c = 1.

    Mao et al. 2017, "Least squares GAN", equation 9.
    """
    target = {"real": 1.0 - smoothing, "fake": 0.0, "wanted": 1.0}[role]
    return (d - target).square() / 2


def wasserstein(d: Tensor, role: Role, smoothing: float = 0.0) -> Tensor:
    """D: D(G(z)) - D(x); G: -D(G(z)). It needs a penalty that keeps D's slope near 1.

    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", algorithm 1.
    """
    return d if role == "fake" else -d


def relativistic(real: Tensor, fake: Tensor, role: Role) -> Tensor:
    """D: log(1 + exp(-(D(x) - D(G(z))))), each real image paired with the generated one of its row;
    G ("wanted"): the same with the two exchanged.

    Jolicoeur-Martineau 2018, "The relativistic discriminator" (RSGAN); Huang et al. 2024, "The GAN
    is dead; long live the GAN!" (R3GAN).
    """
    return F.softplus(real - fake if role == "wanted" else fake - real)


SEPARATE: dict[str, Callable[[Tensor, Role, float], Tensor]] = {
    "hinge": hinge,
    "lsgan": lsgan,
    "wgan-gp": wasserstein,
}
"""Losses that are a sum over images, by their flag. bce, too, is one; it has a kernel."""


class Loss:
    """The loss that a run has chosen, and its gradient.

    bce: D: -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))), G: -log sigmoid(D(G(z))): Goodfellow et
    al. 2014, with the loss of G that does not saturate. With label smoothing A, D is to give real
    images 1 - A in place of 1 (Salimans et al. 2016, "Improved techniques", 3.4: one-sided), and
    its loss is the cross-entropy with that.

    Args:
        config: its `loss` and `label_smoothing`.
        compiler: compiles the bce where it is no kernel.
    """

    def __init__(self, config: TrainConfig, compiler: Compiler) -> None:
        self._name, self._smoothing = config.loss, config.label_smoothing
        self._compiled_bce = compiler(bce)
        self._constants: tuple[Tensor, Tensor] | None = None

    @property
    def paired(self) -> bool:
        """Whether it takes logits of real and of generated images together."""
        return self._name == "relativistic"

    def __call__(
        self,
        logits: Tensor,
        roles: tuple[Role, ...],
        share: float,
        scaler: torch.amp.GradScaler,
        *,
        compiled: bool = False,
        against: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss as a mean over each batch, and its gradient.

        Args:
            logits: (batches * B,), any floating dtype.
            roles: of each batch, in the order of `ROLES`.
            share: of this process in the global batch: everything returned is multiplied by it.
            scaler: whose scale the gradient is multiplied by, too.
            compiled: use compiled parts.
            against: the logits of the real images, (B,), for a paired loss and the role "wanted".

        Returns:
            (1 + batches,), float32 (float64 for float64 logits): the sum of the batches' losses;
            the mean of each batch's D: for bce sigmoid of the logits, for others the logits. And
            the gradient, like `logits`.
        """
        if self._constants is None:  # at the first step, which is in no CUDA graph
            values = [
                torch.full((1,), v, device=logits.device) for v in (1 - self._smoothing, 0, 1)
            ]
            self._constants = torch.cat(values).float(), torch.ones((), device=logits.device)
        targets, one = self._constants
        factor = scaler.scale(one) if scaler.is_enabled() else None
        logits = logits.detach()
        if self._name == "bce":
            first = ROLES.index(roles[0])
            wanted = targets[first : first + len(roles)]
            loss = self._compiled_bce if compiled and not runs_kernels(logits.device) else bce
            return loss(logits, wanted, share, factor)
        with torch.enable_grad():
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
            total = self._textbook(wide.chunk(len(roles)), roles, against) * share
            (gradient,) = torch.autograd.grad(total, wide)
        means = wide.detach().unflatten(0, (len(roles), -1)).mean(1) * share
        if factor is not None:
            gradient = gradient * factor
        return torch.cat([total.detach()[None], means]), gradient.to(logits.dtype)

    def _textbook(
        self, batches: tuple[Tensor, ...], roles: tuple[Role, ...], against: Tensor | None
    ) -> Tensor:
        if self.paired:
            real = batches[0] if against is None else against.detach().to(batches[0].dtype)
            return relativistic(real, batches[-1], roles[-1]).mean()
        cost = SEPARATE[self._name]
        each = [
            cost(d, role, self._smoothing).mean() for d, role in zip(batches, roles, strict=True)
        ]
        return torch.stack(each).sum()
