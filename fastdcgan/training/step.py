"""One training step: the algorithm, and nothing around it.

No function here reads a value back from the device, so a step never waits for it. The losses go
into a row of a tensor that the loop reads when it wants to.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from fastdcgan.training import distributed
from fastdcgan.training.compiling import Compiler
from fastdcgan.training.losses import bce
from fastdcgan.training.state import TrainState
from fastdcgan_kernels import step as kernels
from fastdcgan_kernels.functional import runs_kernels
from fastdcgan_kernels.modules import WorkingCopies, stat_groups
from fastdcgan_kernels.plan import implementation

READINGS = ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_g")
"""What a step measures: both losses, and the mean D(x), D(G(z)) before and after D's update."""


def generate(netG: nn.Module, z: Tensor) -> Tensor:
    """G(z)."""
    out: Tensor = netG(z)
    return out


def real_loss(netD: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """D's loss on real images, and the mean probability it gives them."""
    logits = netD(images)
    return bce(logits, 1.0), _probability(logits)


def fake_loss(netD: nn.Module, fake: Tensor) -> tuple[Tensor, Tensor]:
    """D's loss on generated images, and the mean probability it gives them."""
    logits = netD(fake)
    return bce(logits, 0.0), _probability(logits)


def both_logits(netD: nn.Module, images: Tensor, fake: Tensor) -> Tensor:
    """A fused D's logits of real and generated images, as many of each: one pass over both, each
    normalised by its own statistics."""
    logits: Tensor
    with stat_groups(2):
        logits = netD(torch.cat([images.to(fake.dtype), fake]))
    return logits


def fake_logits(netD: nn.Module, fake: Tensor) -> Tensor:
    """D's logits of generated images."""
    logits: Tensor = netD(fake)
    return logits


def generator_loss(netD: nn.Module, fake: Tensor) -> tuple[Tensor, Tensor]:
    """G's non-saturating loss, and the mean probability D gives its images."""
    logits = netD(fake)
    return bce(logits, 1.0), _probability(logits)


def both_fake_losses(netD: nn.Module, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D's and G's losses from one pass over the generated images, and their mean probability."""
    logits = netD(fake)
    return bce(logits, 0.0), bce(logits, 1.0), _probability(logits)


def _probability(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().mean()


class Step:
    """Trains `state` by one batch a call.

    Args:
        state: is changed in place by every call.
        batch_size: rows of a whole batch in this process. With `compile`, batches of this size run
            compiled; a ragged one, once an epoch, runs eagerly rather than compile everything
            again.
        autocast: dtype of the matrix products; None leaves them in the parameters' dtype.
            Losses, BatchNorm statistics, parameters and optimisers stay in float32.
        compile: compile forward and backward of each loss with torch.compile, as whole graphs.
            Where that fails (no C++ compiler, say), goes on eagerly.
        say: is called with one line where compilation failed.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        batch_size: int,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.state = state
        self.compiler = Compiler(compile, say)
        self.batch_size = batch_size
        self.autocast = autocast
        simultaneous = state.config.updates == "simultaneous"
        self._train = self._simultaneous if simultaneous else self._alternating
        parts: tuple[Callable[..., object], ...] = (
            generate,
            real_loss,
            fake_loss,
            both_logits,
            fake_logits,
            generator_loss,
            both_fake_losses,
        )
        # Made by the first step in kernels, outside of any graph.
        self._copies: list[WorkingCopies] = []
        self._targets = self._one = torch.empty(0)
        self._eager: dict[Callable[..., object], Callable[..., object]] = {f: f for f in parts}
        self._compiled = {f: self.compiler(f) for f in parts}
        if compile and simultaneous:
            # Both losses go back through one pass over the fakes, so its saved tensors are needed
            # twice and must not be given away to the first.
            torch._functorch.config.donated_buffer = False

    def __call__(self, images: Tensor, z: Tensor, *, share: float = 1.0) -> Tensor:
        """One step on real `images` (B, C, H, W) and latent vectors `z` (B, nz, 1, 1).

        Args:
            share: this process's part of the global batch; 1 where there is one process.

        Returns:
            The `READINGS`, shape (5,), float32 on the device, times `share`: their sum over all
            processes is the mean over the global batch.
        """
        state = self.state
        state.netG.train()
        state.netD.train()
        self._call = self._compiled if images.shape[0] == self.batch_size else self._eager
        with implementation(state.config.impl):
            if self._fused():
                readings = self._in_kernels(images, z, share)
            else:
                readings = torch.stack(self._train(images, z, share)).float() * share
            if state.ema is not None:
                state.ema.update()
        state.step += 1
        return readings

    def _fused(self) -> bool:
        """Whether the steps are the example's, on fused nets and by kernels."""
        config = self.state.config
        if config.impl == "reference" or config.updates == "simultaneous":
            return False
        return runs_kernels(self.state.device)

    def refresh(self) -> None:
        """Takes notice of weights that something else than a step has changed."""
        for copies in self._copies:
            if not copies.fresh():
                copies.refresh()

    def _in_kernels(self, images: Tensor, z: Tensor, share: float) -> Tensor:
        """`_alternating` with as few launches as there are ways to have: D's two batches in one
        pass, each loss and its gradient in one kernel, weights cast once an update."""
        state = self.state
        device = z.device
        if self.autocast is not None and not self._copies:
            self._copies = [WorkingCopies(net, self.autocast) for net in (state.netD, state.netG)]
        if not self._targets.numel():
            self._targets = torch.tensor([1.0, 0.0]).to(device)
            self._one = torch.ones((), device=device)
        self.refresh()
        with ExitStack() as stack:
            for copies in self._copies:
                stack.enter_context(copies)
            state.optD.zero_grad(set_to_none=True)
            fake = self._run(generate, state.netG, z)[0]
            logits = self._run(both_logits, state.netD, images, fake.detach())[0]
            row_d = self._back(0, logits, self._targets, share)
            self._update(0, state.optD, state.netD)
            self.refresh()

            state.optG.zero_grad(set_to_none=True)
            # G's loss needs the gradient through D to its images, never that of D's weights.
            state.netD.requires_grad_(False)
            logits = self._run(fake_logits, state.netD, fake)[0]
            row_g = self._back(1, logits, self._targets[:1], share)
            state.netD.requires_grad_(True)
            self._update(1, state.optG, state.netG)
        self.refresh()
        return torch.cat([row_d[:1], row_g[:1], row_d[1:], row_g[1:]])

    def _back(self, scaler: int, logits: Tensor, targets: Tensor, share: float) -> Tensor:
        """Backward from the loss on these logits; its reading and the probabilities."""
        scale = self.state.scalers[scaler]
        factor = scale.scale(self._one) if scale.is_enabled() else None
        row, gradient = kernels.bce(logits, targets, share=share, scale=factor)
        logits.backward(gradient)
        return row

    def _alternating(self, images: Tensor, z: Tensor, share: float) -> list[Tensor]:
        """The PyTorch example's step: D learns from a real and from a fake batch, each with its
        own BatchNorm statistics, then G learns from the updated D."""
        state = self.state
        state.optD.zero_grad(set_to_none=True)
        loss_real, d_real = self._run(real_loss, state.netD, images)
        self._backward(0, loss_real * share)
        fake = self._run(generate, state.netG, z)[0]
        loss_fake, d_fake = self._run(fake_loss, state.netD, fake.detach())
        self._backward(0, loss_fake * share)
        loss_d = loss_real + loss_fake
        self._update(0, state.optD, state.netD)

        state.optG.zero_grad(set_to_none=True)
        # G's loss needs the gradient through D to its images, never that of D's weights.
        state.netD.requires_grad_(False)
        loss_g, d_fake_g = self._run(generator_loss, state.netD, fake)
        self._backward(1, loss_g * share)
        state.netD.requires_grad_(True)
        self._update(1, state.optG, state.netG)
        return [loss_d.detach(), loss_g.detach(), d_real, d_fake, d_fake_g]

    def _simultaneous(self, images: Tensor, z: Tensor, share: float) -> list[Tensor]:
        """The TensorFlow tutorial's step: both gradients at the same weights, and one pass of D
        over the fakes for both losses, so that its dropout is the same in both."""
        state = self.state
        state.optD.zero_grad(set_to_none=True)
        state.optG.zero_grad(set_to_none=True)
        fake = self._run(generate, state.netG, z)[0]
        loss_real, d_real = self._run(real_loss, state.netD, images)
        loss_fake, loss_g, d_fake = self._run(both_fake_losses, state.netD, fake)
        loss_d = loss_real + loss_fake
        self._backward(0, loss_d * share, inputs=list(state.netD.parameters()), retain_graph=True)
        self._backward(1, loss_g * share, inputs=list(state.netG.parameters()))
        self._update(0, state.optD, state.netD)
        self._update(1, state.optG, state.netG)
        return [loss_d.detach(), loss_g.detach(), d_real, d_fake, d_fake]

    def _run(self, part: Callable[..., object], net: nn.Module, *x: Tensor) -> tuple[Tensor, ...]:
        context: AbstractContextManager[object] = nullcontext()
        if self.autocast is not None and self.state.device.type != "meta":
            context = torch.autocast(self.state.device.type, dtype=self.autocast)
        with context:
            out = self._call[part](net, *x)
        return out if isinstance(out, tuple) else (out,)

    def _backward(
        self,
        scaler: int,
        loss: Tensor,
        *,
        inputs: list[nn.Parameter] | None = None,
        retain_graph: bool = False,
    ) -> None:
        scaled = self.state.scalers[scaler].scale(loss)
        scaled.backward(inputs=inputs, retain_graph=retain_graph)

    def _update(self, scaler: int, optimiser: torch.optim.Adam, net: nn.Module) -> None:
        distributed.sum_gradients(net.parameters())
        if self.state.config.keras_epsilon:
            # m / (sqrt(v) + e) * sqrt(c) is m / (sqrt(v / c) + e / sqrt(c)), c = 1 - beta2^t.
            for group in optimiser.param_groups:
                correction = 1 - group["betas"][1] ** (self.state.step + 1)
                group["eps"] = self.state.config.adam_eps / correction**0.5
        self.state.scalers[scaler].step(optimiser)
        self.state.scalers[scaler].update()
