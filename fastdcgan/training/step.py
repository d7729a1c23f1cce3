"""One training step: the algorithm, and nothing around it.

No function here reads a value back from the device, so a step never waits for it. The losses go
into a row of a tensor that the loop reads when it wants to.

`*labels` are the classes of a batch, (B,) int64, where the nets have classes, and nothing where
they have none. Generated images get the labels of the real ones beside them: so a class is as
frequent in both, a paired loss compares images of one class, a penalty between a real and a
generated image has the class of both, and nothing more is drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdcgan.models.regularised import MinibatchStd, power_iteration
from fastdcgan.training import distributed
from fastdcgan.training.augmentation import Augmentation
from fastdcgan.training.compiling import Compiler
from fastdcgan.training.losses import Loss, Role
from fastdcgan.training.regularisers import Penalty, without_tf32
from fastdcgan.training.state import TrainState
from fastdcgan_kernels.aside import forked
from fastdcgan_kernels.choice.targets import implementation
from fastdcgan_kernels.functional import runs_cpu_kernels, runs_kernels
from fastdcgan_kernels.modules.block import stat_groups
from fastdcgan_kernels.modules.copies import WorkingCopies
from fastdcgan_kernels.placing import joined, placed, side_by_side

READINGS = ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_g")
"""What a step measures: both losses, penalties left out, and the mean D(x), D(G(z)) before and
after D's update: probabilities with bce, else D's output. Of several updates of D the last."""


NEARLY = 2.0**-64
"""A logit's gradient that stands for 0 where it is to be divided by."""


def judges_alone(netD: nn.Module) -> bool:
    """Whether D's logit of an image depends on no other image of the batch."""
    coupling = (nn.modules.batchnorm._BatchNorm, MinibatchStd)
    return not any(isinstance(module, coupling) for module in netD.modules())


def generate(netG: nn.Module, z: Tensor, *labels: Tensor) -> Tensor:
    """G(z)."""
    out: Tensor = netG(z, *labels)
    return out


def discriminate(netD: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """D's logits of one batch."""
    logits: Tensor = netD(images, *labels)
    return logits


def discriminate_through(netD: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """D's logits of images that G is to learn from: another function than `discriminate`, because
    compiled it has another gradient."""
    return discriminate(netD, images, *labels)


def discriminate_aside(netD: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """D's logits of images from which nobody learns: another function, compiled without one."""
    with torch.no_grad():
        return discriminate(netD, images, *labels)


def discriminate_both(netD: nn.Module, both: Tensor, *labels: Tensor) -> Tensor:
    """A fused D's logits of real and, behind them, as many generated images: one pass over both,
    each normalised by its own statistics."""
    logits: Tensor
    with stat_groups(2):
        logits = netD(both, *(each.repeat(2) for each in labels))
    return logits


class Step:
    """Trains `state` by one batch a call.

    Args:
        state: is changed in place by every call.
        batch_size: rows of a whole batch in this process, of one update of D. With `compile`,
            batches of this size run compiled; a ragged one, once an epoch, runs eagerly rather
            than compile everything again.
        autocast: dtype of the matrix products; None leaves them in the parameters' dtype.
            Losses, BatchNorm statistics, parameters and optimisers stay in float32.
        compile: compile both nets' passes, forward and backward, and what is not one kernel already
            of the losses, with torch.compile, as whole graphs. Where that fails (no C++ compiler,
            say), goes on eagerly.
        overlap: weight gradients, and updates of layers that have theirs, in a second stream beside
            the rest of the way back (fastdcgan_kernels/aside.py): where D takes both batches in one
            pass, and not in compiled passes, which read gradients on their way.
        say: is called with one line where compilation failed.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        batch_size: int,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        overlap: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.state = state
        self.compiler = Compiler(compile, say)
        self.compiles = compile
        self.batch_size = batch_size
        self.autocast = autocast
        self.overlap = overlap
        self.impl = state.config.impl
        """How fused blocks run: "auto", "reference" or "triton"."""
        self.eagerly = False
        """Whether to leave compiled parts aside. Compiling takes `impl` for a constant."""
        simultaneous = state.config.updates == "simultaneous"
        self._train = self._simultaneous if simultaneous else self._alternating
        parts: tuple[Callable[..., Tensor], ...] = (
            generate,
            discriminate,
            discriminate_through,
            discriminate_aside,
            discriminate_both,
        )
        self._compiled = {part: self.compiler(part) for part in parts}
        self.loss = Loss(state.config, self.compiler)
        self.penalty = Penalty(state.config)
        self.shown = Augmentation(state.config, state.clock)
        # Float16's gradients are scaled, and have no room for a factor.
        self._judges_alone = judges_alone(state.netD) and autocast != torch.float16
        if compile and simultaneous and not self._judges_alone:
            # Both losses go back through one pass over the fakes, each on its own, so its saved
            # tensors are needed twice and must not be given away to the first.
            torch._functorch.config.donated_buffer = False
        # Made at the first step that needs them, which is in no CUDA graph.
        self._copies: list[WorkingCopies] = []

    def side_by_side(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Where kernels write `batch` real and as many generated images, if these stand side by
        side in memory, for D to take both in one pass without a copy. None: nothing is gained."""
        config, device = self.state.config, self.state.device
        alternating = config.updates == "alternating" and config.n_critic == 1
        with implementation(self.impl):
            if not (alternating and runs_kernels(device)) or self.shown.changes:
                return None, None
        assert config.channels is not None
        shape = batch, config.channels, config.image_size, config.image_size
        return side_by_side(*shape, self.autocast or torch.float32, device)

    def __call__(
        self, images: Tensor, z: Tensor, *labels: Tensor, share: float = 1.0,
        behind: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One step on real `images` (B, C, H, W), latent vectors `z` (B, nz, 1, 1) and, where the
        nets have classes, `labels` (B,) int64; B being `n_critic` times `batch_size`, or less.

        Args:
            share: this process's part of the global batch; 1 where there is one process.
            behind: where the generated images may be written, as of `side_by_side`.

        Returns:
            The `READINGS`, shape (5,), float32 on the device, times `share`: their sum over all
            processes is the mean over the global batch.
        """
        state = self.state
        state.netG.train()
        state.netD.train()
        whole = self.batch_size * state.config.n_critic
        self._whole = images.shape[0] == whole and not self.eagerly
        with implementation(self.impl):
            with placed(behind):
                row = self._train(images, z, share, *labels)
            if state.clock is not None:
                state.clock.add_(1)
        state.step += 1
        return row

    def refresh(self) -> None:
        """Takes notice of what something else than a step has changed: weights, by a loaded
        checkpoint, say, and learning rates. For a replay of this step by a graph it is to be called
        before."""
        for optimiser in (self.state.optD, self.state.optG):
            optimiser.refresh()
        for copies in self._copies:
            if not copies.fresh():
                copies.refresh()

    def leave_kernels(self) -> None:
        """Runs in plain PyTorch from now on, as if kernels had never run."""
        self.impl = "reference"
        for optimiser in (self.state.optD, self.state.optG):
            optimiser.copies = None
        while self._copies:
            self._copies.pop().leave()

    def _alternating(self, images: Tensor, z: Tensor, share: float, *labels: Tensor) -> Tensor:
        """The PyTorch example's step: D learns from a real and from a fake batch, each with its
        own BatchNorm statistics, then G learns from the updated D. With `n_critic` D does so that
        many times, each time on other images, and G learns from the last ones it made."""
        state = self.state
        with self._working_copies():
            for part, z_part, *y in self._parts(images, z, share, *labels):
                state.optD.zero_grad(set_to_none=True)
                self._iterate_norms()
                fake = self._run(generate, state.netG, z_part, *y)
                real, faked = self.shown(part), self.shown(fake.detach())
                loss_d, d_real, d_fake = self._judge(real, faked, share, *y)
                self._penalise(real, faked, share, *y)
                self._update(0, state.optD, state.netD)

            state.optG.zero_grad(set_to_none=True)
            # G's loss needs the gradient through D to its images, never that of D's weights.
            state.netD.requires_grad_(False)
            try:
                logits = self._run(discriminate_through, state.netD, self.shown(fake), *y)
                against = None
                if self.loss.paired:  # with what the updated D says of the real images
                    against = self._run(discriminate_aside, state.netD, real, *y)
                roles: tuple[Role, ...] = ("wanted",)
                with self._overlapping(1):
                    loss_g, d_fake_g = self._back(1, logits, roles, share, against).split(1)
            finally:
                state.netD.requires_grad_(True)
            self._update(1, state.optG, state.netG)
        return torch.cat([loss_d, loss_g, d_real, d_fake, d_fake_g])

    def _simultaneous(self, images: Tensor, z: Tensor, share: float, *labels: Tensor) -> Tensor:
        """The TensorFlow tutorial's step: both gradients at the same weights, and one pass of D
        over the fakes for both losses, so that its dropout is the same in both."""
        state = self.state
        state.optD.zero_grad(set_to_none=True)
        state.optG.zero_grad(set_to_none=True)
        self._iterate_norms()
        fake = self._run(generate, state.netG, z, *labels)
        given = fake.detach().requires_grad_() if self._judges_alone else fake
        real, faked = self.shown(images), self.shown(given)
        of_real = self._run(discriminate, state.netD, real, *labels)
        of_fake = self._run(discriminate_through, state.netD, faked, *labels)
        if self.loss.paired:
            row, both = self._loss(0, torch.cat([of_real, of_fake]), ("real", "fake"), share)
            loss_d, d_real, d_fake = row.split(1)
            real_gradient, fake_gradient = both.chunk(2)
        else:
            row, real_gradient = self._loss(0, of_real, ("real",), share)
            row_too, fake_gradient = self._loss(0, of_fake, ("fake",), share)
            loss_d, d_real, d_fake = row[:1] + row_too[:1], row[1:], row_too[1:]
        wanted, gradient = self._loss(1, of_fake, ("wanted",), share, of_real)
        logits, parameters = [of_real, of_fake], list(state.netD.parameters())
        of_g = list(state.netG.parameters())
        if self._judges_alone:
            # Of one image the gradients of both losses are the same but for a factor, that of its
            # logit: one pass back through D has both. No logit's may be 0 for that; as close to it
            # no other digit of D's sums changes.
            fake_gradient = fake_gradient.masked_fill(fake_gradient.abs() <= NEARLY, NEARLY)
            torch.autograd.backward(
                logits, [real_gradient, fake_gradient], inputs=[*parameters, given]
            )
            factor = gradient.double() / fake_gradient
            assert given.grad is not None
            fake.backward((given.grad * factor[:, None, None, None]).to(fake.dtype), inputs=of_g)
        else:
            torch.autograd.backward(
                logits, [real_gradient, fake_gradient], inputs=parameters, retain_graph=True
            )
            of_fake.backward(gradient, inputs=of_g)
        self._penalise(real, faked, share, *labels)
        self._update(0, state.optD, state.netD)
        self._update(1, state.optG, state.netG)
        return torch.cat([loss_d, wanted[:1], d_real, d_fake, d_fake])

    def _parts(
        self, images: Tensor, z: Tensor, share: float, *labels: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """The batches of D's updates, of equal size but for one image; as many in every process,
        also of a ragged batch, because each update waits for all of them."""
        whole = round(len(z) / share) if share else 0  # that of all processes
        needed = -(-whole // (self.batch_size * distributed.processes()))
        count = max(1, min(self.state.config.n_critic, needed))
        if count == 1:
            yield images, z, *labels
        else:
            given = (each.tensor_split(count) for each in (images, z, *labels))
            yield from zip(*given, strict=True)

    def _judge(
        self, real: Tensor, fake: Tensor, share: float, *labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Backward from D's loss on a real and a generated batch, each with its own statistics: the
        loss, and the mean D of either."""
        netD = self.state.netD
        if self._in_one_pass():
            logits = self._run(discriminate_both, netD, joined(real, fake), *labels)
            with self._overlapping(0):
                row = self._back(0, logits, ("real", "fake"), share)
        elif self.loss.paired:
            logits = torch.cat([self._run(discriminate, netD, x, *labels) for x in (real, fake)])
            row = self._back(0, logits, ("real", "fake"), share)
        else:  # one after the other: so half the activations are held at a time
            logits = self._run(discriminate, netD, real, *labels)
            loss_real, d_real = self._back(0, logits, ("real",), share).split(1)
            logits = self._run(discriminate, netD, fake, *labels)
            loss_fake, d_fake = self._back(0, logits, ("fake",), share).split(1)
            return loss_real + loss_fake, d_real, d_fake
        return row[:1], row[1:2], row[2:]

    def _iterate_norms(self) -> None:
        if self.state.config.spectral:
            power_iteration(self.state.netD)

    def _penalise(self, real: Tensor, fake: Tensor, share: float, *labels: Tensor) -> None:
        """Adds the gradients of D's penalty, in the steps that have it, to those of its loss."""
        if self.penalty.due(self.state.step):
            with without_tf32():
                penalty = self.penalty(self.state.netD, real, fake, *labels) * share
                self.state.scalers[0].scale(penalty).backward()

    def _in_one_pass(self) -> bool:
        """Whether D takes its two batches in one pass: where blocks take groups of statistics."""
        device = self.state.device
        return runs_kernels(device) or (self.autocast is None and runs_cpu_kernels(device))

    @contextmanager
    def _working_copies(self) -> Iterator[None]:
        """Inside, kernels read the weights in the dtype of the products, cast once an update."""
        with ExitStack() as stack:
            if self.autocast is not None and runs_kernels(self.state.device):
                if not self._copies:
                    # Gradients in 16 bits where they need no more: not in float16, unscaled; not
                    # added up over processes, or a loss and a penalty. Compiled passes would cast
                    # there and back.
                    narrow = self.autocast == torch.bfloat16
                    narrow = narrow and not self.compiles and not dist.is_initialized()
                    for optimiser, net, one in (
                        (self.state.optD, self.state.netD, narrow and not self.penalty.chosen),
                        (self.state.optG, self.state.netG, narrow),
                    ):
                        optimiser.copies = WorkingCopies(net, self.autocast, narrow=one)
                        self._copies.append(optimiser.copies)
                self.refresh()
                for copies in self._copies:
                    stack.enter_context(copies)
            yield

    def _run(self, part: Callable[..., Tensor], net: nn.Module, *x: Tensor) -> Tensor:
        context: AbstractContextManager[object] = nullcontext()
        if self.autocast is not None and self.state.device.type != "meta":
            context = torch.autocast(self.state.device.type, dtype=self.autocast)
        with context:
            return (self._compiled[part] if self._whole else part)(net, *x)

    def _back(
        self,
        scaler: int,
        logits: Tensor,
        roles: tuple[Role, ...],
        share: float,
        against: Tensor | None = None,
    ) -> Tensor:
        """Backward from the loss on these logits; see `Loss`."""
        row, gradient = self._loss(scaler, logits, roles, share, against)
        logits.backward(gradient)
        return row

    def _loss(
        self,
        scaler: int,
        logits: Tensor,
        roles: tuple[Role, ...],
        share: float,
        against: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the mean D of each batch that the logits are of, times `share`; and the
        scaled gradient of the loss."""
        scale = self.state.scalers[scaler]
        return self.loss(logits, roles, share, scale, compiled=self._whole, against=against)

    @contextmanager
    def _overlapping(self, which: int) -> Iterator[None]:
        """Inside, a backward pass through D (0) or G (1) puts aside what it need not wait for. Not
        an update before its time: gradients that are scaled, or are summed over processes or with a
        penalty's first."""
        state, on = self.state, self.overlap and not (self.compiles and self._whole)
        optimiser = (state.optD, state.optG)[which]
        later = state.scalers[which].is_enabled() or dist.is_initialized()
        later = later or (which == 0 and self.penalty.chosen)
        with forked(state.device, on), optimiser.early(on and not later):
            yield

    def _update(self, scaler: int, optimiser: torch.optim.Adam, net: nn.Module) -> None:
        distributed.sum_gradients(net.parameters())
        self.state.scalers[scaler].step(optimiser)
        self.state.scalers[scaler].update()
