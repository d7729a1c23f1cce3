"""Tools to try a step out and compare it with another, leaving no trace: how the parts that need a
GPU are checked on the user's own, before they are trusted."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.amp import GradScaler

from fastdcgan.training.state import TrainState
from fastdcgan_kernels.adam import Adam

MOVED, SPACINGS = 1e-3, 2
"""How far each element of what an update writes may be from the formulas: this share of what the
update moves it by, and so many spacings of its dtype at its size. 1 - beta^t of a first step has
lost three of float32's seven digits where it is not computed with care, and a sum is rounded once
or twice; a 16-bit copy may round either way; what is smaller than normal numbers may become 0.
What is missing, stale or swapped is off by about the update itself."""


@contextmanager
def undone(state: TrainState, tensors: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts tensors, random states and step back to what they are now, in
    place, and calls it at the end."""
    saved, step, noise = [t.clone() for t in tensors], state.step, random_states(state)

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        state.step = step
        if state.device.type == "cuda":
            torch.cuda.set_rng_state(noise[0], state.device)
        else:
            torch.set_rng_state(noise[0])
        if state.generator is not None:
            state.generator.set_state(noise[1])

    try:
        yield undo
    finally:
        undo()


def random_states(state: TrainState) -> list[Tensor]:
    cuda = state.device.type == "cuda"
    own = [] if state.generator is None else [state.generator.get_state()]
    return [torch.cuda.get_rng_state(state.device) if cuda else torch.get_rng_state(), *own]


@contextmanager
def still(optimisers: Iterable[Adam]) -> Iterator[None]:
    """Inside, updates move no weight."""
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    rates = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = 0.0
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def finite(tensors: list[Tensor]) -> bool:
    """Whether they are, all of them. Waits for the device."""
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def furthest(before: list[Tensor], after: list[Tensor], replayed: list[Tensor]) -> float:
    """The largest |replayed - after| / |after - before| of any tensor."""
    apart = [
        torch.stack([(c - b).double().norm(), (b - a).double().norm()])
        for a, b, c in zip(before, after, replayed, strict=True)
    ]
    off, moved = torch.stack(apart).cpu().unbind(1)
    return float((off / moved.clamp(min=1e-30)).max())


def mean_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """|found - expected| / |expected|, the RMS over the tensors that are not all zero."""
    pairs = [
        torch.stack([(b - a).double().norm(), a.double().norm()])
        for a, b in zip(expected, found, strict=True)
    ]
    off, size = torch.stack(pairs).cpu().unbind(1)
    return float((off / size)[size > 0].square().mean().sqrt())


@torch.no_grad()
def wrong_update(optimiser: Adam, scaler: GradScaler) -> list[str]:
    """Has the optimiser make one more update by the gradients that it has, and compares all that it
    writes with Adam's formulas; names what differs."""
    parameters: list[Tensor] = optimiser.param_groups[0]["params"]
    gradients = {p: p.grad.double() for p in parameters if p.grad is not None}
    written = [*gradients, *(t for p in gradients for t in optimiser.state[p].values())]
    if optimiser.average is not None:
        written += [*optimiser.average.of.values(), optimiser.average.updates]
    before = {t: t.clone() for t in written}
    for p in gradients:
        assert p.grad is not None
        p.grad.mul_(scaler.get_scale())  # exact: a power of two, which the update takes out again
    scaler.step(optimiser)
    scaler.update()
    apart: dict[str, Tensor] = {}
    for name, found, old, new in _adam(optimiser, before, gradients):
        kind = torch.finfo(found.dtype if found.is_floating_point() else torch.float64)
        allowed = MOVED * (new - old).abs() + SPACINGS * kind.eps * new.abs() + kind.tiny
        wrong = ~((found - new).abs() <= allowed).all()
        apart[name] = apart[name] | wrong if name in apart else wrong
    return [name for name, wrong in apart.items() if wrong]


def _adam(
    optimiser: Adam, before: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """What an update wrote: its name, itself, the value before, and in float64 what the formulas
    (https://arxiv.org/abs/1412.6980, algorithm 1) make of that and of what the update wrote itself
    on the way: so a mistake is named where it is made."""
    group = optimiser.param_groups[0]
    (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
    copies = {} if optimiser.copies is None else optimiser.copies.of
    for p, g in gradients.items():
        count, m, v = (optimiser.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq"))
        old, old_m, old_v, t = (before[x].double() for x in (p, m, v, count))
        yield "step", count, t, t + 1
        t = t + 1
        yield "exp_avg", m, old_m, beta1 * old_m + (1 - beta1) * g
        yield "exp_avg_sq", v, old_v, beta2 * old_v + (1 - beta2) * g.square()
        correction = (1 - beta2**t).sqrt()
        root = v.double().sqrt() / correction + (eps / correction if optimiser.eps_inside else eps)
        yield "parameters", p, old, old - rate / (1 - beta1**t) * m.double() / root
        if p in copies:
            yield "16-bit copies", copies[p], p.double(), p.double()
    if optimiser.average is not None:
        updates, least = optimiser.average.updates, optimiser.average.least
        share = (9 / (10 + before[updates].double())).clamp(min=least)
        yield "average", updates, before[updates].double(), before[updates].double() + 1
        for value, average in optimiser.average.of.items():
            old, new = before[average].double(), value.double()
            if value.is_floating_point():
                new = old + share * (new - old)
            yield "average", average, old, new
