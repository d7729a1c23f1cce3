"""The launches of a training step, as numbers: each with its layer, its pass, its tile, and what it
asks of the GPU. Not here: how long each takes (phases/profile.py)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counting import Work, work_of_launch
from fastdcgan.training.state import TrainState
from fastdcgan_kernels.choice import choose
from fastdcgan_kernels.choice.geometry import Geometry
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu.launch import Launch, watching
from fastdcgan_kernels.inspect.report import tile_of
from fastdcgan_kernels.modules.block import is_convolution

FORWARD, DATA, WEIGHT = "forward", "data gradient", "weight gradient"
OF_STEP = {"adam": "update", "crop": "data", "bce_rows": "loss"}
# Launches of a layer that are no product; those of the way back come before their layer's products.
OF_LAYER = {
    "partial_statistics": "norm",
    "merge_rows": "norm",
    "prologue_sums": "norm",
    "apply_prologue": "activation",
    "activation_gradient": "activation",
}


@dataclass(frozen=True)
class Seen:
    """One launch. layer: "G1" to "D5", or "step"; task: what the plan was asked for its tile."""

    kernel: str
    layer: str
    of: str
    """Its pass, or what it does for the layer or the step."""
    tile: str
    images: int | None
    """Of a product; D takes its real and its generated images in one."""
    grid: tuple[int, ...]
    work: Work
    task: Task | None


@contextmanager
def seeing(state: TrainState) -> Iterator[list[Seen]]:
    """The launches of the steps inside, in their order. Holds no tensor of theirs. A step of this
    state was made before, so that its working copies of weights exist."""
    places = _Places(state)
    seen: list[Seen] = []
    with choose.recording() as asked:

        def see(launch: Launch) -> None:
            tasks = [one for one in asked if isinstance(one, Task)]
            asked.clear()  # so that the next launch sees its own questions alone
            given = launch.named
            images = given.get("images")
            name = launch.kernel.fn.__name__
            layer, of = places.of(name, given, seen)
            seen.append(
                Seen(
                    name, layer, of, tile_of(launch),
                    given["groups"] * images if isinstance(images, int) else None,
                    launch.grid, work_of_launch(launch), tasks[-1] if tasks else None,
                )
            )  # fmt: skip

        with watching(see):
            yield seen
    # What has no layer yet is of the way back, ahead of its layer's product.
    behind = ""
    for place, one in reversed(list(enumerate(seen))):
        if one.layer:
            behind = one.layer.replace("step", "")
        else:
            seen[place] = replace(one, layer=behind)


class _Places:
    """Finds the layer and the pass of a launch: by the weight that it reads; where it reads none,
    by the launches before it, and for a weight's gradient by its shape."""

    def __init__(self, state: TrainState) -> None:
        copies: dict[Tensor, Tensor] = {}
        for optimiser in (state.optD, state.optG):
            copies |= {} if optimiser.copies is None else optimiser.copies.of
        self._weights: dict[int, str] = {}
        self._transposed: dict[str, bool] = {}
        self._sizes: dict[tuple[str, int, int], str] = {}
        for net, module in (("G", state.netG), ("D", state.netD)):
            for place, conv in enumerate(filter(is_convolution, module.modules()), 1):
                weight: Any = conv.weight
                layer = f"{net}{place}"
                self._transposed[layer] = isinstance(conv, nn.ConvTranspose2d)
                self._sizes[net, weight.shape[0], weight.shape[1]] = layer
                for tensor in (weight, copies.get(weight)):  # the kernels read the copy
                    if tensor is not None:
                        self._weights[_memory(tensor)] = layer

    def of(self, name: str, given: dict[str, Any], seen: Sequence[Seen]) -> tuple[str, str]:
        """(layer, pass) of a launch of this kernel after those seen; "": a layer to come."""
        if name in OF_STEP:
            return "step", OF_STEP[name]
        last = seen[-1] if seen else None
        if name == "merge_rows" and last and last.of == DATA:  # undid the layer's before it
            return f"{last.layer[0]}{int(last.layer[1:]) - 1}", OF_LAYER[name]
        if name in OF_LAYER:
            forward = name in ("merge_rows", "partial_statistics") or (
                name == "apply_prologue" and given["PROLOGUE"] in ("activate", "none")
            )
            known = forward and last is not None and last.layer != "step"
            return (last.layer if known and last else ""), OF_LAYER[name]
        if name == "reduce_splits":  # of the product before it
            return (last.layer, last.of) if last else ("", FORWARD)
        if "w" not in given:
            net = next((one.layer[0] for one in reversed(seen) if one.layer[1:].isdigit()), "")
            return self._sizes.get((net, given["CS"], given["CL"]), ""), WEIGHT
        layer = self._weights.get(_memory(given["w"]), "")
        transposed = given.get("TRANSPOSED")
        forward = transposed == self._transposed.get(layer) and "gradient" not in name
        return layer, FORWARD if forward else DATA


def task_facts(task: Task) -> dict[str, Any]:
    """A task as JSON has it."""
    return asdict(task) | {"dtype": str(task.dtype).removeprefix("torch.")}


def task_of(facts: dict[str, Any]) -> Task:
    """The inverse."""
    given = facts | {
        "geometry": Geometry(**facts["geometry"]), "dtype": getattr(torch, facts["dtype"])
    }  # fmt: skip
    return Task(**given)


def _memory(value: Any) -> int:
    """Of a tensor, or of what a tensor descriptor describes."""
    tensor: Tensor = value if isinstance(value, Tensor) else value.base
    return tensor.untyped_storage()._cdata
