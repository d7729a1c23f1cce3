"""What training would run here, before anything runs: the engine for each flag, and the plan of
each layer. Not here: whether it computes right (blocks.py) and how fast it is (timings.py)."""

from collections.abc import Iterable

import torch

from fastdcgan.diagnosis.layers import layers
from fastdcgan.diagnosis.machine import short
from fastdcgan.diagnosis.rows import Row
from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import choose_engine, describe
from fastdcgan_kernels import plan

BATCH = {"cuda": 128}
CPU_BATCH = 16


def engine_rows(device: torch.device) -> Iterable[Row]:
    """What each flag of training comes to, in training's own words (training/plan.py)."""
    for flag, line, options in (
        ("--amp", "precision", {"amp": True}),
        ("--compile", "compile", {"compile": True}),
        ("--impl auto", "blocks", {}),
        ("--impl triton", "blocks", {"impl": "triton"}),
        ("--cuda-graph on", "compile", {"cuda_graph": "on"}),
    ):
        config = TrainConfig(channels=3, batch_size=BATCH.get(device.type, CPU_BATCH), **options)
        try:
            engine = choose_engine(config, Ranks(), device)
        except InputError as error:
            yield Row(flag, "not possible here", str(error))
            continue
        lines = describe(config, engine, Ranks(), source="", epoch_images=None, images="")
        said = dict(line.split(maxsplit=1) for line in lines)
        if engine.notes:
            yield Row(flag, "not possible here", "; ".join(engine.notes))
        else:
            yield Row(flag, "ok", said[line])
    yield Row("memory", "ok", f"{said['memory']}, at batch {config.batch_size}")


def plan_rows(device: torch.device) -> Iterable[Row]:
    """A row for each layer at the batch that such a device trains with."""
    target, dtype = plan.target_of(device), amp_dtype(device) or torch.float32
    batch = BATCH.get(device.type, CPU_BATCH)
    default = False
    for name, block in layers(batch, dtype).items():
        g = block.geometry
        sides = f"{g.P}x{g.Q}x{g.CS}", f"{g.H}x{g.W}x{g.CL}"
        shape = " to ".join(sides if block.kind == "up" else sides[::-1])
        how, tile, measured = "plain PyTorch", "", False
        if target is not None and plan.mode() != "reference":
            how, tile, measured = _plan(block, target)
            default |= not measured
        words = [f"{g.N} x {shape}, {short(dtype)}: {how}", tile]
        if target is not None:
            words.append("measured by the tuner" if measured else "default")
        yield Row(
            name, "ok", ", ".join(word for word in words if word),
            values={"how": how, "tile": tile, "measured": measured, "batch": g.N},
        )  # fmt: skip
    if default:
        yield Row(
            "tuner", "ok", "defaults are predictions",
            "python -m fastdcgan_kernels.tuner measures what is fastest on this GPU, once",
        )  # fmt: skip


def _plan(block: plan.Block, target: plan.Target) -> tuple[str, str, bool]:
    """(how, the forward GEMM's tile, whether both were measured)."""
    from fastdcgan_kernels import blocks, launch, measured

    choice, g = plan.choose(block, target), block.geometry
    if choice.how in ("vendor", "reference"):
        return choice.how, "", choice.measured
    up = block.kind == "up"
    ci, co = (g.CS, g.CL) if up else (g.CL, g.CS)
    with torch.device("meta"):
        x = torch.empty(g.N, ci, *((g.P, g.Q) if up else (g.H, g.W)), dtype=block.dtype)
        weight, channels = torch.empty(g.CS, g.CL, 4, 4), torch.empty(co)
        coef = torch.empty(3, block.groups, ci) if choice.how == "prologue" else None
    with (
        plan.assume(target),
        plan.override(choice.how),
        plan.recording() as asked,
        launch.recording(),
    ):
        if block.norm:
            blocks.conv_bn(
                x, coef, weight, None, channels, channels, up, g.stride, block.groups, 1e-5,
                "relu", 0.0, "",
            )  # fmt: skip
        else:
            blocks.conv_act(x, coef, weight, None, up, g.stride, "relu", 0.0, "none", 0.0)
    task = next(one for one in asked if isinstance(one, plan.Task))
    tile = plan.tile_for(task, target)
    words = f"tile {tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps"
    words += " by descriptors" if tile.descriptors else ""
    return choice.how, words, choice.measured and measured.known(task, target.device)
