"""Measures on the user's own GPU how blocks run best: `tune`, or
`python -m fastdcgan_kernels.tuner`. Each candidate is first checked against plain PyTorch on random
data, and then timed; what is wrong or slower is dropped, and said; the rest is stored.

A candidate that raises (out of memory, a compiler, a driver) has proved nothing. So "reference",
plain PyTorch, is stored only if it beat the default's time, or if the default gave wrong numbers,
and no kernel did better. If the default raised, another right kernel is stored, because it runs
where the default does not; if there is none, nothing is, and a later run asks again.

Not here: the experiments (trials.py), which tiles are tried (plan.py), the file (measured.py).
Imports torch only when it is used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from fastdcgan_kernels import measured

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastdcgan_kernels.measured import Answer, Question
    from fastdcgan_kernels.plan import Pair

GAIN = 0.02  # share of the default's time that a candidate must save; less is noise


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def candidates_for(asked: Question | Pair, target: Any) -> Sequence[Any]:
    """What is tried, the default first."""
    from fastdcgan_kernels import plan

    if isinstance(asked, plan.Pair):
        return plan.ways(asked, target)
    if isinstance(asked, plan.Task):
        return plan.neighbours(asked, target)
    return get_args(plan.How)


def contest(
    name: str,
    candidates: Sequence[Any],
    trial: Any,
    timer: Callable[[Callable[[], Any]], float],
    say: Callable[[str], None],
) -> Any:
    """The fastest of the candidates that are right; None if none is. The first is the default: it
    stays unless another saves GAIN of its time. If it raised, "reference" does not count."""
    default = candidates[0]
    seconds: dict[Any, float] = {}
    raised: list[Any] = []
    for candidate in candidates:
        try:
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
    best = min(seconds, key=lambda one: seconds[one])
    if default in seconds and seconds[best] > (1 - GAIN) * seconds[default]:
        best = default
    for candidate, time in seconds.items():
        if candidate != best:
            say(f"{name}: dropped {words_of(candidate)}: {1e6 * time:.1f} us")
    which = "the default, " if best == default else ""
    say(f"{name}: kept {which}{words_of(best)}: {1e6 * seconds[best]:.1f} us")
    return best


def words_of(candidate: Any) -> str:
    """A candidate for people: one of plan.How, two of them, or a tile."""
    if isinstance(candidate, str):
        return candidate
    if isinstance(candidate, tuple):
        return " and ".join(candidate)
    tile = asdict(candidate)
    size = "x".join(str(tile[name]) for name in ("rows", "columns", "depth"))
    loads = " by descriptors" if candidate.descriptors else ""
    return f"{size}, split {tile['split']}, {tile['warps']} warps, {tile['stages']} stages{loads}"


def name_of(asked: Question | Pair) -> str:
    """A question for people."""
    from fastdcgan_kernels import plan

    if isinstance(asked, plan.Pair):
        return f"{name_of(asked.first)}, then {name_of(asked.second)}"
    g, given = asked.geometry, asdict(asked)
    what = given.get("op") or f"block {given['kind']}"
    small, large = f"{g.P}x{g.Q}x{g.CS}", f"{g.H}x{g.W}x{g.CL}"
    rest = [str(asked.dtype).removeprefix("torch.")]
    rest += [given["prologue"], given["epilogue"]] if "op" in given else []
    rest += ["norm"] if given.get("norm") else []
    rest += [f"{asked.groups} groups"] if asked.groups > 1 else []
    return f"{what} of {g.N} {small} and {large}, {' '.join(rest)}"


def questions(model: nn.Module, *inputs: Any) -> list[Question]:
    """The kernels' tiles, then the blocks, that the plan is asked for by a forward and a backward
    pass of the model, however the blocks run. Runs a copy, and none of its kernels: the model stays
    as it is, and defaults that do not run here are still questions."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    from fastdcgan_kernels import launch, plan

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    every: dict[Any, None] = {}
    for how in ("materialised", "prologue"):
        twin = copy.deepcopy(model).requires_grad_()
        with (
            plan.override(how),
            plan.recording() as asked,
            launch.recording(),
            torch.enable_grad(),
        ):
            outs = tree_leaves(twin(*tree_map(leaf, inputs)))
            total = [
                out.float().sum()
                for out in outs
                if isinstance(out, torch.Tensor) and out.requires_grad
            ]
            if total:
                torch.stack(total).sum().backward()
        every |= asked
    return sorted(every, key=lambda one: isinstance(one, plan.Block))


def tune(
    model: nn.Module,
    *inputs: Any,
    again: bool = False,
    say: Callable[[str], None] = _say,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[Question, Answer]:
    """Measure how the fused blocks of a model run best on this GPU, and store it.

    Measured are the tiles of every kernel that a forward and a backward pass ask for, then the
    implementation of every block, then of those that may share a launch (`plan.pairs`). Tune before
    torch.compile, which takes choices for constants; under torch.autocast, if the model runs under
    it; and a discriminator under `stat_groups(2)`, too, if it sees two batches at once. A batch
    counts as the next power of two.

    Args:
        model: that `fuse` or ConvBlock made blocks of, on the GPU.
        inputs: as the model is called with.
        again: measure also what has been measured before. Default False.
        say: takes each line of the report. Default: to the standard error.
        timer: seconds of a function. Default: the median of replays of a CUDA graph.

    Returns:
        What was found: plan.Task to Tile, and plan.Block to one of plan.How.

    Raises:
        ValueError: no block of the model runs by kernels on these inputs.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
    asked = questions(model, *inputs)
    if not asked:
        device = tensors[0].device if tensors else "?"
        raise ValueError(
            f"no block of this model runs by kernels on {device}: fuse(model) and move it to a GPU"
        )
    return tune_questions(asked, tensors[0].device, again=again, say=say, timer=timer)


def tune_questions(
    asked: Iterable[Question],
    device: torch.device,
    *,
    again: bool = False,
    say: Callable[[str], None] = _say,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    candidates: Callable[[Question | Pair, Any], Sequence[Any]] = candidates_for,
    trial_of: Callable[[Question | Pair, torch.device], Any] | None = None,
) -> dict[Question, Answer]:
    """As `tune`, for questions as plan.py is asked them; each answer is stored as it is found."""
    from fastdcgan_kernels import plan, trials

    target: plan.Target | None = plan.target_of(device)
    if target is None:
        raise ValueError(f"no kernels run on {device}: give a GPU that Triton knows")
    timer = timer or functools.partial(trials.device_time, say=say)
    found: dict[Question, Answer] = {}
    known: list[Question] = []
    new: list[Question] = []
    for one in asked:
        (known if measured.known(one, target.device) and not again else new).append(one)
    for one in known:
        say(f"{name_of(one)}: measured before")
    # A pair is new where one of its layers is: its answer is in theirs.
    both = [pair for pair in plan.pairs([*known, *new]) if {pair.first, pair.second} & {*new}]
    for experiment in [*new, *both]:
        try:
            trial = (trial_of or trials.trial_of)(experiment, device)
        except Exception as error:  # out of memory, say
            say(f"{name_of(experiment)}: not measured: {type(error).__name__}: {error}")
            continue
        answer = contest(name_of(experiment), candidates(experiment, target), trial, timer, say)
        if answer is None:
            continue
        answers: dict[Question, Answer] = {}
        if isinstance(experiment, plan.Pair):  # what changes for each layer
            for block, how in zip((experiment.first, experiment.second), answer, strict=True):
                if plan.choose(block, target).how != how:
                    answers[block] = how
            if not answers:
                continue
        else:
            answers[experiment] = answer
        found |= answers
        try:
            measured.store(answers, target.device)
        except (OSError, RuntimeError) as error:
            say(f"{name_of(experiment)}: in use, but not stored: {type(error).__name__}: {error}")
    return found


def dcgan(size: int, channels: int = 3) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of the standard DCGAN for images of this size (nz 100, ngf and
    ndf 64), untrained."""
    from torch import nn

    widths = [64 * 2**step for step in range(size.bit_length() - 4, -1, -1)]
    up: list[nn.Module] = [nn.ConvTranspose2d(100, widths[0], 4, 1, 0, bias=False)]
    down: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 4, 2, 1, bias=False)]
    for wide, narrow in pairwise(widths):
        up += [nn.BatchNorm2d(wide), nn.ReLU()]
        up += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
    for wide, narrow in reversed(list(pairwise(widths))):
        down += [nn.LeakyReLU(0.2), nn.Conv2d(narrow, wide, 4, 2, 1, bias=False)]
        down += [nn.BatchNorm2d(wide)]
    up += [nn.BatchNorm2d(widths[-1]), nn.ReLU()]
    up += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False), nn.Tanh()]
    down += [nn.LeakyReLU(0.2), nn.Conv2d(widths[0], 1, 4, 1, 0, bias=False)]
    return nn.Sequential(*up), nn.Sequential(*down)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    nets = {"dcgan32": 32, "dcgan64": 64, "dcgan128": 128}
    parser = argparse.ArgumentParser(
        prog="python -m fastdcgan_kernels.tuner",
        description="Measure on this GPU which kernels, tiles and implementations are right and "
        "fastest for the layers of a DCGAN, and store it for every later run.",
        epilog="Example: python -m fastdcgan_kernels.tuner --batch 256 --dtype bf16",
    )
    parser.add_argument("--net", default="dcgan64", choices=nets, help="default dcgan64")
    parser.add_argument(
        "--batch",
        type=int,
        default=128,
        help="images, counted as a power of two; default 128",
    )
    parser.add_argument(
        "--dtype",
        default="bf16",
        choices=("bf16", "fp16", "fp32"),
        help="of autocast; default bf16",
    )
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    given = parser.parse_args(arguments)
    if given.batch < 1:
        parser.error(f"--batch {given.batch} was given; give 1 or more")

    import torch

    from fastdcgan_kernels import fuse, plan
    from fastdcgan_kernels.modules import stat_groups

    if not torch.cuda.is_available() or plan.target_of(torch.device("cuda")) is None:
        print("nothing to tune: PyTorch sees no GPU that the kernels run on", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]
    generator, discriminator = (fuse(net.to(device)) for net in dcgan(nets[given.net]))
    size = nets[given.net]
    images = torch.randn(given.batch, 3, size, size, device=device)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        tune(generator, torch.randn(given.batch, 100, 1, 1, device=device), again=given.again)
        tune(discriminator, images, again=given.again)
        with stat_groups(2):  # in its own step: real and generated images in one pass
            tune(discriminator, torch.cat([images, images]), again=given.again)
    print(f"stored in {measured.cache_file(torch.cuda.get_device_name(device))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
