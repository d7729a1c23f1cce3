"""How a net's weights are updated: PyTorch's Adam, and what follows an update, a moving average of
the net and copies of its weights in 16 bits, all in one launch where there are kernels. Not here:
where gradients come from."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .aside import aside
from .functional import runs_kernels

if TYPE_CHECKING:
    from .modules.copies import WorkingCopies

MOST = 48
"""Parameters of a launch: a launch has room for 4 KB of arguments, and up to ten pointers are for
each of them (its gradient, moments, count, copy and average, and a norm's buffers)."""


EARLY = 1 << 16
"""Elements of a parameter from which on an update of its own, beside a backward pass, is worth a
launch: all weights of a convolution between features have more."""


class Average:
    """An exponential moving average: average <- average + share * (value - average) for floating
    tensors, share = max(9 / (10 + t), 1 - decay) at update t; others are copied.

    Args:
        averages, values: alike in shape, dtype and device. They stay where they are.
        decay: 0.999 remembers about the last thousand updates.
    """

    def __init__(self, averages: Iterable[Tensor], values: Iterable[Tensor], decay: float) -> None:
        self.of: dict[Tensor, Tensor] = dict(zip(values, averages, strict=True))
        """The average of each value."""
        self.least = 1 - decay
        device = next(iter(self.of)).device
        # On the device, because a CUDA graph repeats whatever the host gives it.
        self.updates = torch.zeros((), device=device)
        """Updates until now, float32."""

    @torch.no_grad()
    def update(self, but: Collection[Tensor] = ()) -> None:
        """Takes in the values as they are now, but those that are in already; the twin of what the
        kernel does."""
        # 1 - d, in a form that float32 does not cancel.
        share = (9 / (10 + self.updates)).clamp(min=self.least)
        values = [value for value in self.of if value.is_floating_point() and value not in but]
        averages = [self.of[value] for value in values]
        if share.device.type == "cpu":  # one pass over memory, where launches cost nothing
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, share.to(average.dtype))
        else:
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, share.to(steps[0].dtype))
            torch._foreach_add_(averages, steps)
        if counts := [value for value in self.of if not value.is_floating_point()]:
            torch._foreach_copy_([self.of[count] for count in counts], counts)
        self.updates.add_(1)


class Adam(torch.optim.Adam):
    """torch.optim.Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980), whose step is one launch
    where there are kernels (`functional.runs_kernels`): for one group of `MOST` float32 parameters
    or less that all have gradients, without weight decay, amsgrad and the like; else PyTorch's.

    A step also moves `average` and writes `copies`, where they are given, by the same launch.
    State and state_dict are PyTorch's: each loads the other's. torch.amp.GradScaler works as with
    PyTorch's fused Adam, on the device alone; gradients are left unscaled.

    A CUDA graph may hold a step: the counts are on the device, and so is the learning rate, which
    `refresh` takes there from its group.

    `early` lets a backward pass update large parameters as their gradients come.

    Args:
        *given, **options: as torch.optim.Adam's.
        eps_inside: add eps before the bias correction, as Keras does: m / (sqrt(v) + eps), times
            rate sqrt(1 - beta2^t) / (1 - beta1^t). Default False: after it, as PyTorch.
    """

    average: Average | None = None
    """Of parameters and buffers of the net that these parameters are of."""
    copies: WorkingCopies | None = None
    """Of that net's weights."""
    _rate: Tensor | None = None
    _given_rate: float | None = None
    _tickets: Tensor | None = None
    _early: dict[Tensor, None]
    """Updated already, in this step."""
    _known: tuple[int, int] | None = None
    """Steps until now, and the version of the tensor that counts them: while that is the same, its
    device need not be asked."""

    def __init__(self, *given: Any, eps_inside: bool = False, **options: Any) -> None:
        super().__init__(*given, **options)
        self.eps_inside = eps_inside
        self._early = {}

    def prepare(self) -> None:
        """Makes the state that PyTorch's Adam makes in its first step."""
        for p in self._parameters():
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
                self._known = 0, self.state[p]["step"]._version

    def refresh(self) -> None:
        """Takes notice of another learning rate in the group. To be called before a CUDA graph
        that holds a step is replayed; a step does it by itself."""
        rate = self.param_groups[0]["lr"]
        if isinstance(rate, Tensor):  # PyTorch's own way to change it
            return
        if self._rate is None:
            device = self._parameters()[0].device
            self._rate = torch.full((), rate, dtype=torch.float32, device=device)
            self._tickets = torch.zeros((), dtype=torch.int32, device=device)
        elif rate != self._given_rate:
            self._rate.fill_(rate)
        self._given_rate = rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's."""
        super().load_state_dict(state_dict)
        self._known = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update by the gradients as they are; returns what the closure does."""
        early, self._early = self._early, {}
        rest = [p for p in self._parameters() if p not in early]
        if closure is None and self._in_one_launch(rest):
            self._launch(rest)
            self._known = None
            return None
        gradients = {p: p.grad for p in early}
        for p in early:  # PyTorch leaves out what has no gradient
            p.grad = None
        self._widen()
        with self._corrected():
            result = super().step(closure)
        for p, gradient in gradients.items():
            p.grad = gradient
        if self.copies is not None:
            self.copies.refresh()
        if self.average is not None:
            self.average.update(early)
        return result

    @contextlib.contextmanager
    def _corrected(self) -> Iterator[None]:
        """Inside, the groups' eps is what PyTorch's Adam takes for one that is inside: it adds it
        to sqrt(v / c), c = 1 - beta2^t, and so it is eps / sqrt(c)."""
        kept = [group["eps"] for group in self.param_groups]
        if self.eps_inside:
            first = self._parameters()[0]
            count = self.state[first].get("step")
            if count is None:
                steps = 0
            elif self._known is not None and self._known[1] == count._version:
                steps = self._known[0]
            else:
                steps = int(count)
            for group in self.param_groups:
                group["eps"] /= (1 - group["betas"][1] ** (steps + 1)) ** 0.5
        try:
            yield
            if self.eps_inside:
                self._known = steps + 1, self.state[first]["step"]._version
        finally:
            for group, eps in zip(self.param_groups, kept, strict=True):
                group["eps"] = eps

    @contextlib.contextmanager
    def early(self, on: bool = True) -> Iterator[None]:
        """Inside, a backward pass that gives each parameter its whole gradient also updates those
        of `EARLY` elements or more as soon as theirs is there, beside what it does next (aside.py).
        The step that follows updates the others, and is one with all. Nothing where not `on`, or
        where gradients are scaled: whether one of them overflows is not known before the end."""
        self._early = {}
        every = sorted(self._parameters(), key=lambda p: -p.numel())
        chosen = [p for p in every[:-1] if on and p.numel() >= EARLY]  # one is left to the step
        hooks = [p.register_post_accumulate_grad_hook(self._update) for p in chosen]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        """Of one parameter, if a launch takes it."""
        if self._in_one_launch([parameter]):
            self.refresh()  # in the first stream
            with aside(parameter.grad):
                self._launch([parameter], last=False)
            self._early[parameter] = None

    def _parameters(self) -> list[nn.Parameter]:
        return list(itertools.chain(*(group["params"] for group in self.param_groups)))

    def _widen(self) -> None:
        """Gradients in the parameters' dtype from now on, as PyTorch's Adam takes them."""
        for p in self._parameters():
            if p.grad is not None and p.grad.dtype != p.dtype:
                wide, p.grad = p.grad.to(p.dtype), None
                p.grad_dtype = p.dtype
                p.grad = wide

    def _in_one_launch(self, parameters: list[Any]) -> bool:
        """Whether the kernel takes these, and the average and copies of all."""
        every = self._parameters()
        (group, *others), device = self.param_groups, every[0].device
        unknown = ("weight_decay", "amsgrad", "maximize", "differentiable")
        if others or any(group[name] for name in unknown) or isinstance(group["lr"], Tensor):
            return False
        missing = any(p.grad is None for p in parameters)
        if not runs_kernels(device) or len(parameters) > MOST or missing:
            return False
        self.prepare()
        copied = {} if self.copies is None else self.copies.of
        followed = {} if self.average is None else self.average.of
        known = set(every)
        if not copied.keys() <= known or (followed and not known <= followed.keys()):
            return False
        gradients: dict[Tensor, Tensor] = {p: p.grad for p in parameters if p.grad is not None}
        own = [p for p in parameters if p in copied]
        narrow = {copied[p].dtype for p in own} == {gradients[p].dtype for p in own}
        pairs = [pair for pair in followed.items() if pair[0].is_floating_point()]
        for p in parameters:
            slots = self.state[p]
            if slots["step"].device != device:
                return False
            pairs += [(p, slots["exp_avg"]), (p, slots["exp_avg_sq"])]
        wide = [t for pair in pairs for t in pair]
        wide += [g for p, g in gradients.items() if not (narrow and p in copied)]
        pairs += gradients.items()
        return all(t.dtype == torch.float32 for t in wide) and all(_alike(*pair) for pair in pairs)

    def _launch(self, parameters: list[Any], last: bool = True) -> None:
        """Of these. The last launch of an update also moves the average of the buffers, and counts
        the update."""
        from .gpu.adam import update  # imports Triton, which some devices lack

        self.refresh()
        assert self._rate is not None
        copied = {} if self.copies is None else self.copies.of
        parameters = sorted(parameters, key=lambda p: p not in copied)
        average, group, own = self.average, self.param_groups[0], set(self._parameters())
        followed = {} if average is None else average.of
        rest = [value for value in followed if last and value not in own]
        buffers = [value for value in rest if value.is_floating_point()]
        values: list[Tensor] = [*parameters, *buffers]
        counts = [value for value in rest if not value.is_floating_point()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in group["betas"])
        scale = getattr(self, "grad_scale", None)  # both are there or none: GradScaler's contract
        found_inf = getattr(self, "found_inf", None)
        update(
            values=tuple(values),
            narrow=tuple(g for g in gradients if g.dtype != torch.float32),
            gradients=tuple(g for g in gradients if g.dtype == torch.float32),
            first_moments=tuple(slots["exp_avg"] for slots in state),
            second_moments=tuple(slots["exp_avg_sq"] for slots in state),
            steps=tuple(slots["step"] for slots in state),
            copies=tuple(copied[p] for p in parameters if p in copied),
            averages=tuple(followed[value] for value in values if followed),
            counts=tuple(counts), counted=tuple(followed[count] for count in counts),
            updates=self._rate if average is None else average.updates,
            least=0.0 if average is None else float(average.least), rate=self._rate,
            share1=1.0 - beta1, share2=1.0 - beta2, log1=log1, log2=log2,
            eps=float(group["eps"]), scale=self._rate if scale is None else scale,
            found_inf=self._rate if found_inf is None else found_inf, tickets=self._tickets,
            SCALED=scale is not None, INSIDE=self.eps_inside, LAST=last,
        )  # fmt: skip
        increment_version([*values, *(followed[v] for v in [*values, *counts] if followed)])
        if self.copies is not None:
            self.copies.written(p for p in parameters if p in copied)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether these have the same elements at the same places, without gaps."""
    last = one.dim() == 4 and one.is_contiguous(memory_format=torch.channels_last)
    same = one.device == other.device and one.shape == other.shape
    return (last or one.is_contiguous()) and same and _places(one) == _places(other)


def _places(tensor: Tensor) -> list[int]:
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
