"""Which candidates are tried, and which of them is kept. Each is first checked against plain
PyTorch on random data, and then timed; what is wrong or slower is dropped, and said; the rest is
stored.

A candidate that raises (out of memory, a compiler, a driver) has proved nothing. So "reference",
plain PyTorch, is stored only if it beat the default's time, or if the default gave wrong numbers,
and no kernel did better. If the default raised, another right kernel is stored, because it runs
where the default does not; if there is none, nothing is, and a later run asks again.

A candidate that may hang runs in a process of its own first (trying.py).

Not here: the experiments (trials.py), which tiles are tried (choice/heuristics.py), the file
(choice/measured.py).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..choice import choose, heuristics, measured, persistent
from ..choice.targets import target_of
from ..choice.types import Answer, Block, How, Question, Target, Task
from ..gpu import launch

GAIN = 0.02  # share of the default's time that a candidate must save; less is noise
Say = Callable[[str], None]
Timer = Callable[[Callable[[], Any]], float]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def candidates_for(asked: Question, target: Target) -> Sequence[Any]:
    """What is tried, the default first."""
    if isinstance(asked, Block):
        return get_args(How)
    found, more = heuristics.neighbours(asked, target), persistent.tiles(asked, target)
    if more:
        from ..gpu import blocks  # imports Triton

        found += more if blocks.gluon() is not None else []
    return found


def contest(
    name: str, candidates: Sequence[Any], trial: Any, timer: Timer, say: Say,
    why_not: Callable[[Any], str] = lambda candidate: "",
) -> Any:  # fmt: skip
    """The fastest of the candidates that are right; None if none is. The first is the default: it
    stays unless another saves GAIN of its time. If it raised, "reference" does not count. `why_not`
    says, before a candidate runs, why it must not."""
    default = candidates[0]
    seconds: dict[Any, float] = {}
    raised: list[Any] = []
    for candidate in candidates:
        try:
            why = why_not(candidate)
            if not why:
                run = trial.prepare(candidate)
                why = trial.wrong(run())
            if not why:
                seconds[candidate] = timer(run)
        except Exception as error:  # whatever a compiler, a driver or a kernel raises
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raised.append(candidate)
        if why:
            say(f"{name}: dropped {words_of(candidate)}: {why}")
    if default in raised and seconds.pop("reference", None) is not None:
        say(f"{name}: dropped reference: the default raised, which does not prove it slower")
    if not seconds:
        because = f" ({', '.join(map(words_of, raised))} raised)" if raised else ""
        say(f"{name}: no kernel is right{because}; nothing stored")
        return None
    best = min(seconds, key=seconds.__getitem__)
    if default in seconds and seconds[best] > (1 - GAIN) * seconds[default]:
        best = default
    for candidate, time in seconds.items():
        if candidate != best:
            say(f"{name}: dropped {words_of(candidate)}: {1e6 * time:.1f} us")
    which = "the default, " if best == default else ""
    say(f"{name}: kept {which}{words_of(best)}: {1e6 * seconds[best]:.1f} us")
    return best


def words_of(candidate: Any) -> str:
    """A candidate for people: one of How, or a tile."""
    if isinstance(candidate, str):
        return candidate
    tile = candidate
    size = f"{tile.rows}x{tile.columns}x{tile.depth}"
    return f"{size}, split {tile.split}, {tile.warps} warps, {tile.stages} stages, by {tile.engine}"


def name_of(asked: Question) -> str:
    """A question for people."""
    g, dtype = asked.geometry, str(asked.dtype).removeprefix("torch.")
    if isinstance(asked, Task):
        what, rest = asked.op, [asked.prologue, asked.epilogue]
    else:
        what = "block conv_transposed" if asked.transposed else "block conv"
        rest = ["norm"] if asked.norm else []
    rest += [f"{asked.groups} groups"] if asked.groups > 1 else []
    sides = f"{g.N} {g.P}x{g.Q}x{g.CS} and {g.H}x{g.W}x{g.CL}"
    return f"{what} of {sides}, {' '.join([dtype, *rest])}"


def questions(model: nn.Module, *inputs: Any) -> list[Question]:
    """The kernels' tiles, then the blocks, that are asked for by a forward and a backward pass of
    the model, however the blocks run. Runs a copy, and none of its kernels: the model stays as it
    is, and defaults that do not run here are still questions."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    every: dict[Question, None] = {}
    hows: tuple[How, ...] = ("hybrid", "materialised", "prologue")
    for how in hows:
        twin = copy.deepcopy(model).requires_grad_()
        kept, unlaunched = choose.recording(), launch.recording()
        with choose.override(how), kept as asked, unlaunched, torch.enable_grad():
            outs = tree_leaves(twin(*tree_map(leaf, inputs)))
            tensors = [out for out in outs if isinstance(out, torch.Tensor) and out.requires_grad]
            if tensors:
                torch.stack([out.float().sum() for out in tensors]).sum().backward()
        every |= asked
    return sorted(every, key=lambda one: isinstance(one, Block))


def tune(
    model: nn.Module, *inputs: Any, again: bool = False, say: Say = _say,
    timer: Timer | None = None,
) -> dict[Question, Answer]:  # fmt: skip
    """Measure how the fused blocks of a model run best on this GPU, and store it.

    Measured are the tiles of every kernel that a forward and a backward pass ask for, then the
    implementation of every block. Tune before torch.compile, which takes choices for constants;
    under torch.autocast, if the model runs under it; and a discriminator under `stat_groups(2)`,
    too, if it sees two batches at once. A batch counts as the next power of two.

    Args:
        model: that `fuse` or ConvBlock made blocks of, on the GPU.
        inputs: as the model is called with.
        again: measure also what has been measured before. Default False.
        say: takes each line of the report. Default: to the standard error.
        timer: seconds of a function. Default: the median of replays of a CUDA graph.

    Returns:
        What was found: Task to Tile, and Block to one of How.

    Raises:
        ValueError: no block of the model runs by kernels on these inputs.
    """
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
    asked = questions(model, *inputs)
    if not asked:
        device = tensors[0].device if tensors else "?"
        raise ValueError(
            f"no block of this model runs by kernels on {device}: fuse(model) and move it to a GPU"
        )
    return tune_questions(asked, tensors[0].device, again=again, say=say, timer=timer)


def tune_questions(
    asked: Iterable[Question], device: torch.device, *, again: bool = False, say: Say = _say,
    timer: Timer | None = None, candidates: Callable[[Question, Target],
    Sequence[Any]] = candidates_for, trial_of: Callable[[Question, torch.device],
    Any] | None = None, tried: Any = None,
) -> dict[Question, Answer]:  # fmt: skip
    """As `tune`, for questions as `choose` is asked them; each answer is stored as it is found.
    tried: where candidates that may hang run first; by default `trying.Tried`."""
    from . import trials, trying  # import Triton

    target = target_of(device)
    if target is None:
        raise ValueError(f"no kernels run on {device}: give a GPU that Triton knows")
    timer = timer or functools.partial(trials.device_time, say=say)
    tried = tried or trying.Tried(device)
    found: dict[Question, Answer] = {}
    asked = list(asked)
    new = [one for one in asked if again or measured.stored(one, target.device) is None]
    for one in asked:
        if one not in new:
            say(f"{name_of(one)}: measured before")
    for question in new:
        name = name_of(question)
        try:
            trial = (trial_of or trials.trial_of)(question, device)
        except Exception as error:  # out of memory, say
            say(f"{name}: not measured: {type(error).__name__}: {error}")
            continue
        why_not = functools.partial(tried.why_not, question)
        answer = contest(name, candidates(question, target), trial, timer, say, why_not)
        if answer is None:
            continue
        found[question] = answer
        try:
            measured.store({question: answer}, target.device)
        except (OSError, RuntimeError) as error:
            say(f"{name}: in use, but not stored: {type(error).__name__}: {error}")
    tried.close()
    return found
