"""One block as data, from functional.py to a launch: what it is (`BlockSpec`), its tensors by name,
and how both become the flat arguments of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .geometry import Geometry, Sides, geometry_of

Size = int  # a symbol where torch.compile takes any batch
KINDS = {"Tensor | None": "Tensor?", "Sides": "int[]", "Size": "SymInt"}  # as torch.library's


@dataclass(frozen=True)
class BlockSpec:
    """Convolution, [norm], activation. The kernel's size is the weight's; `padding`: its
    `sides_of`."""

    transposed: bool = False
    stride: int = 1
    padding: Sides = (0, 0, 0, 0)
    activation: str = "none"
    slope: float = 0.0  # of leaky_relu; the alpha of elu
    eps: float = 0.0
    groups: Size = 1  # equal batches in a row, each with its own statistics
    sync: str = ""  # name of the process group whose batches are normalised as one
    momentum: float = 0.0  # share of the batch in the running buffers, unless there are momenta
    correction: int = 1  # of the running variance, by which its count is less: Keras has 0
    # That of the block before, which this one undoes on the way back: x is its raw output, with
    # coefficients, or its result.
    x_activation: str = "none"
    x_slope: float = 0.0
    undone: bool = False  # the next block does so with this one's result; for one without a norm

    def geometry(self, x: Tensor, weight: Tensor) -> Geometry:
        """Of this block on x."""
        return geometry_of(x, weight, self.transposed, self.stride, self.padding)


@dataclass
class Inputs:
    """Tensors of a block. Its x may be the raw output of a block before it, with the coefficients
    x_coef [5, groups, C], and with x_activated where that is normalised and activated already.
    `working`: a weight as the kernels take it."""

    x: Tensor
    weight: Tensor
    x_coef: Tensor | None = None
    x_activated: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    working: Tensor | None = None


@dataclass
class Buffers:
    """What a norm moves in place: its running statistics and the count of batches they have seen.
    `momenta` [groups]: the momentum of each group."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None
    momenta: Tensor | None = None


@dataclass
class Saved(Inputs):
    """What is kept for the way back: inputs, the convolution's raw output y, the block's output
    where its activation's derivative needs it, and on the CPU stats [3, groups, C]."""

    y: Tensor | None = None
    out: Tensor | None = None
    stats: Tensor | None = None


@dataclass(frozen=True)
class Need:
    """Which gradients are wanted. That of x stands for x and x_coef."""

    x: bool = False
    weight: bool = False
    bias: bool = False


class Signature:
    """The flat arguments of an operator: tensors of its own, then fields of these dataclasses.

    Args:
        own: names of those tensors, with a "?" behind one that may be None.
        parts: dataclasses with the names of the fields that the operator reads, "": all; with a
            "!" behind one that may be None elsewhere, and not here.
    """

    def __init__(self, own: str, *parts: tuple[type[Any], str]) -> None:
        self.kinds = {n.rstrip("?"): "Tensor?" if "?" in n else "Tensor" for n in own.split()}
        self.own = list(self.kinds)
        self.parts: list[tuple[type[Any], list[str]]] = []
        for part, names in parts:
            every = {f.name: KINDS.get(str(f.type), str(f.type)) for f in fields(part)}
            read = names.split() or list(every)
            self.parts.append((part, [name.rstrip("!") for name in read]))
            every |= {f"{name}!": "Tensor" for name in every}
            prefix = "need_" if part is Need else ""
            self.kinds |= {prefix + name.rstrip("!"): every[name] for name in read}

    def schema(self, returns: int, changed: Sequence[str] = ()) -> str:
        """As torch.library writes it. returns: how many tensors; changed: the arguments that are
        changed in place."""
        marks = {name: f"Tensor(a{at}!)" for at, name in enumerate(changed)}
        given = (
            f"{kind.replace('Tensor', marks.get(name, 'Tensor'))} {name}"
            for name, kind in self.kinds.items()
        )
        result = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
        return f"({', '.join(given)}) -> {result}"

    def flatten(self, *values: Any) -> list[Any]:
        """The operator's own tensors, then the parts, as its arguments."""
        own, parts = values[: len(self.own)], values[len(self.own) :]
        flat = list(own)
        for part, (_, names) in zip(parts, self.parts, strict=True):
            flat += [getattr(part, name) for name in names]
        return flat

    def restore(self, flat: Sequence[Any]) -> list[Any]:
        """What `flatten` was given; fields that the operator does not read have their defaults."""
        rest = iter(flat)
        own = [next(rest) for _ in self.own]
        return own + [part(**{name: next(rest) for name in names}) for part, names in self.parts]

    def named(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Anything that there is one of for each argument, by their names."""
        return dict(zip(self.kinds, flat, strict=True))
