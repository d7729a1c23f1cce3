"""What training would run here, before anything runs: the engine for each flag, and the plan of
each layer. Not here: whether it computes right (blocks.py) and how fast it is (timings.py)."""

import warnings
from collections.abc import Iterable
from typing import Any, get_args

import torch

from fastdcgan.diagnosis.layers import CHANNELS, batch_for, layers, way_of
from fastdcgan.diagnosis.machine import short
from fastdcgan.diagnosis.rows import Row
from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import choose_engine, describe
from fastdcgan_kernels.choice import choose, measured, targets
from fastdcgan_kernels.choice.spec import BlockSpec, Buffers, Inputs
from fastdcgan_kernels.choice.types import Block, How, Target, Task
from fastdcgan_kernels.cpu import build


def engine_rows(device: torch.device) -> Iterable[Row]:
    """What flags of training come to, in the words that training itself says (training/plan.py)."""
    wishes: dict[str, tuple[str, dict[str, Any]]] = {
        "--amp": ("precision", {"amp": True}),
        "--compile": ("compile", {"compile": True}),
        "--impl auto": ("blocks", {}),
        "--impl triton": ("blocks", {"impl": "triton"}),
        "--cuda-graph on": ("compile", {"cuda_graph": "on"}),
        "memory": ("memory", {}),
    }
    for name, (line, options) in wishes.items():
        config = TrainConfig(channels=CHANNELS, batch_size=batch_for(device), **options)
        try:
            engine = choose_engine(config, Ranks(), device)
        except InputError as error:
            yield Row(name, "not possible here", str(error))
            continue
        if engine.notes:
            yield Row(name, "not possible here", "; ".join(engine.notes))
            continue
        said = describe(config, engine, Ranks(), source="", epoch_images=None, images="")
        yield Row(name, "ok", dict(text.split(maxsplit=1) for text in said)[line])


def cpu_rows(device: torch.device) -> Iterable[Row]:
    """The library of the CPU's own kernels, compiled if need be."""
    if device.type != "cpu":
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = build.library()
    if found is None:
        yield Row("CPU kernels", "warning", "; ".join(str(one.message) for one in said))
        return
    folder = measured.cache_file("cpu").parent
    yield Row("CPU kernels", "ok", f"compiled by {' '.join(build.compiler())}, kept in {folder}")


def plan_title(device: torch.device) -> str:
    """What all rows of the plan have in common."""
    return f"Plan of each layer at --batch-size {batch_for(device)}, {short(_dtype(device))}"


def plan_rows(device: torch.device) -> Iterable[Row]:
    """How each layer runs, and on a GPU its forward tile."""
    default = False
    for name, block in layers(batch_for(device), _dtype(device)).items():
        g = block.geometry
        sides = f"{g.P}x{g.Q}x{g.CS}", f"{g.H}x{g.W}x{g.CL}"
        shape = " to ".join(sides if block.transposed else sides[::-1])
        how, target, tile, tuned = way_of(block, device), targets.target_of(device), "", False
        if target is not None and how in get_args(How):
            tile, tuned = _plan(block, target)
            default |= not tuned
        words = [f"{shape}: {how}", tile, "measured" if tuned else ""]
        yield Row(
            name,
            "ok",
            ", ".join(word for word in words if word),
            values={"how": how, "tile": tile, "measured": tuned, "batch": g.N},
        )
    if default:
        yield Row(
            "tuner",
            "ok",
            "what is not called measured is a default, and a prediction",
            "python -m fastdcgan_kernels.tuner measures, once, what is fastest on this GPU",
        )


def _dtype(device: torch.device) -> torch.dtype:
    """What one would train in: --amp on a GPU, and no flags on a CPU."""
    return (amp_dtype(device) if device.type == "cuda" else None) or torch.float32


def _plan(block: Block, target: Target) -> tuple[str, bool]:
    """(the forward GEMM's tile, whether the tuner measured it and how the block runs)."""
    from fastdcgan_kernels.gpu import blocks, launch

    choice, g = choose.choose(block, target), block.geometry
    if choice.how in ("vendor", "reference"):
        return "", choice.measured
    small, large = (g.N, g.CS, g.P, g.Q), (g.N, g.CL, g.H, g.W)
    before, after = (small, large) if block.transposed else (large, small)
    with torch.device("meta"):
        x = torch.empty(before, dtype=block.dtype)
        weight, channels = torch.empty(g.CS, g.CL, g.kernel, g.kernel), torch.empty(after[1])
        coef = torch.empty(3, block.groups, before[1]) if choice.how == "prologue" else None
    spec = BlockSpec(
        block.transposed, g.stride, g.sides(block.transposed), eps=1e-5, groups=block.groups,
        x_activation="relu",
    )  # fmt: skip
    inputs = Inputs(x, weight, coef, gamma=channels, beta=channels)
    with (
        targets.assume(target),
        choose.override(choice.how),
        choose.recording() as asked,
        launch.recording(),
    ):
        if block.norm:
            blocks.conv_bn(inputs, Buffers(), spec)
        else:
            blocks.conv_act(inputs, spec)
    task = next(one for one in asked if isinstance(one, Task))
    tile = choose.tile_for(task, target)
    words = f"tile {tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, by {tile.engine}"
    return words, choice.measured and bool(measured.stored(task, target.device))
