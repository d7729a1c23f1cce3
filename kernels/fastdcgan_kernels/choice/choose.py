"""Which implementation and which tile. Policy: no kernels here, and no Triton.

A choice is one of
    hybrid        our GEMM on activated tensors, or as prologue where it reads each value once; the
                  gradient's GEMM undoes the activation as it stores, and the gradient through the
                  norm is a pass of its own
    materialised  our GEMM; activations, their gradients and those of the norm are passes
    prologue      our GEMM, which normalises and activates its operands as it loads them
    vendor        PyTorch's convolution, with our statistics, normalise, activate and backward
    reference     plain PyTorch
The defaults are predictions: a GPU timed them, but not beside the others (benchmarks/results/gpu).
The tuner measures on the user's device, and what it stored (measured.py) is taken before them.

By count (benchmarks/cost_model.py) a step of 128 images of the standard DCGAN moves

    materialised  1.72 GB in 92 launches
    hybrid        1.49 GB in 78
    prologue      1.26 GB in 60

That counts no instructions. An epilogue touches each value once, and is nearly free beside the pass
that it replaces. A prologue transforms each value once for every tap and column tile that reads it:
by docs/inspect.md a sm_90 program with one has some 100 instructions for each matrix instruction in
its loop, some 30 without. A multiprocessor starts 4 warps' instructions a cycle and multiplies 2048
pairs of bf16, so 8 warps with a 128x64x64 step need 97 * 4 * 8 / 4 = 780 cycles for 256 of products
with a prologue, and with a 128x128x64 step 134 * 8 / 4 = 270 for 512 without. For D's third layer
at batch 128 that is about 40 us more, and the pass over its input that it saves takes about 11. So
the default is hybrid on every target, and where memory is slow beside arithmetic the tuner will say
otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar, get_args

import torch

from . import measured
from .geometry import Geometry, Tile, bucket
from .heuristics import default_tile
from .targets import pushed
from .types import Block, Choice, How, Question, Target, Task

_overrides: list[Mapping[Block, How] | How] = []
_recorders: list[dict[Question, None]] = []
Asked = TypeVar("Asked", Block, Task)
DEFAULT: How = get_args(How)[0]


def override(how: How | Mapping[Block, How]) -> AbstractContextManager[object]:
    """Inside, every block runs like this, or these blocks, bucketed, like that."""
    if isinstance(how, str) and how not in get_args(How):
        raise ValueError(f"how={how!r} was given; give one of {', '.join(get_args(How))}")
    return pushed(_overrides, how)


def recording() -> AbstractContextManager[dict[Question, None]]:
    """What `choose` and `tile_for` are asked inside, bucketed, each once, in order."""
    return pushed(_recorders, {})


def _recorded(asked: Asked) -> Asked:
    """The question as decisions know it: with a batch of the next power of two, and with as many
    groups where each image is one."""
    images = bucket(asked.geometry.N)
    groups = images if asked.groups == asked.geometry.N else asked.groups
    asked = replace(asked, geometry=replace(asked.geometry, N=images), groups=groups)
    if _recorders:
        _recorders[-1][asked] = None
    return asked


def choose(block: Block, target: Target) -> Choice:
    """How this block runs here: as overridden, else as measured, else by DEFAULT, which was not
    timed: it keeps loads free of arithmetic that 16 taps would repeat."""
    block = _recorded(block)
    if _overrides:
        given = _overrides[-1]
        if isinstance(given, str):
            return Choice(given)
        if block in given:
            return Choice(given[block])
    g = block.geometry
    numbers = (g.N, g.P, g.Q, g.CS, g.H, g.W, g.CL, g.stride, g.pad, g.kernel, g.skew)
    sizes = tuple([operator.index(n) for n in numbers])  # torch.compile may have symbols there
    groups = operator.index(block.groups)
    stored = _stored(target.device, block.transposed, sizes, block.dtype, block.norm, groups)
    return Choice(stored, measured=True) if stored else Choice(DEFAULT)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stored(
    device: str, transposed: bool, sizes: tuple[int, ...], dtype: torch.dtype, norm: bool,
    groups: int,
) -> How | None:  # fmt: skip
    """What the tuner stored. torch.compile takes it for a constant, and does not look into the
    reading of a file; for that the arguments are plain."""
    block = Block(transposed, Geometry(*sizes), dtype, norm, groups)
    how: How | None = measured.stored(block, device)
    return how


def tile_for(task: Task, target: Target) -> Tile:
    """The tile of this task: a measured one, else the default."""
    task = _recorded(task)
    tile: Tile | None = measured.stored(task, target.device)
    return tile or default_tile(task, target)
