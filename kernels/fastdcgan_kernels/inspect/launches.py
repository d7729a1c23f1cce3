"""The launches of the standard DCGAN's layers and of the rest of a training step, recorded on meta
tensors instead of run. Not here: how they are compiled (compiling.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import dcgan, functional
from ..adam import Adam, Average
from ..choice import persistent
from ..choice.choose import override
from ..choice.geometry import gradient_dtype
from ..choice.spec import BlockSpec, Buffers, Inputs, Need, Saved
from ..choice.targets import TARGETS, assume, implementation
from ..choice.types import How, Task
from ..gpu import batchnorm, blocks, crop
from ..gpu.launch import Launch, recording
from ..gpu.partials import merge
from ..gpu.tile import Epilogue, Operand
from ..modules.copies import WorkingCopies

BATCH = 128
# Layers of other nets: of TensorFlow's DCGAN (T), SNGAN's critic (S), pix2pix's critic (P),
# CycleGAN's generator (C).
OTHERS = (
    dcgan.Layer("T2", True, 1, 256, 128, 7, True, "leaky_relu", "leaky_relu", 5, (2, 2, 2, 2)),
    dcgan.Layer("T3", True, 2, 128, 64, 7, True, "leaky_relu", "leaky_relu", 5, (1, 1, 2, 2)),
    dcgan.Layer("T4", True, 2, 64, 1, 14, False, "leaky_relu", "tanh", 5, (1, 1, 2, 2)),
    dcgan.Layer("T5", False, 2, 1, 64, 28, False, "none", "leaky_relu", 5, (1, 1, 2, 2)),
    dcgan.Layer("T6", False, 2, 64, 128, 14, False, "none", "leaky_relu", 5, (1, 1, 2, 2)),
    dcgan.Layer("S1", False, 1, 3, 64, 32, False, "none", "leaky_relu", 3, (1, 1, 1, 1)),
    dcgan.Layer("S3", False, 1, 128, 128, 16, False, "none", "leaky_relu", 3, (1, 1, 1, 1)),
    dcgan.Layer("P4", False, 1, 256, 512, 32, True, "leaky_relu", "leaky_relu", 4, (1, 1, 1, 1)),
    dcgan.Layer("C2", False, 2, 64, 128, 64, True, "relu", "relu", 3, (1, 1, 1, 1)),
    dcgan.Layer("C6", True, 2, 128, 64, 32, True, "relu", "relu", 3, (1, 1, 0, 0)),
    dcgan.Layer("C8", False, 1, 64, 3, 70, False, "relu", "tanh", 7, (0, 0, 0, 0)),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launches(arch: str, dtype: str, batch: int = BATCH) -> Iterator[tuple[str, Launch]]:
    """(layer and pass, launch) of every layer of the 64-pixel DCGAN, as the blocks make them for
    this target, each way that may be chosen; of the default way of OTHERS; and of the rest of a
    step."""
    hows: tuple[How, ...] = ("hybrid", "materialised", "prologue", "vendor")
    for how in hows:
        for layer in (*dcgan.layers(), *(OTHERS if how == hows[0] else ())):
            if how == "vendor" and layer.name != "G2":
                continue  # one layer shows its kernels: they are the same everywhere
            with assume(TARGETS[arch]), override(how):
                passes = _of_layer(layer, how, batch, DTYPES[dtype])
            for when, recorded in zip(("forward", "backward"), passes, strict=True):
                yield from ((f"{layer.name} {when}, {how}", launch) for launch in recorded)
    with assume(TARGETS[arch]):
        rest = _of_step(DTYPES[dtype], batch)
    yield from (("step, all", launch) for launch in rest)


def gluon_launches(arch: str, dtype: str, batch: int = BATCH) -> Iterator[tuple[str, Launch]]:
    """(layer and pass, launch) of what the kernel in Gluon takes of the 64-pixel DCGAN: every tile
    that the tuner tries with it, with every epilogue."""
    target = TARGETS[arch]
    for layer in dcgan.layers():
        g = layer.geometry(batch)
        for forward, kind in ((True, "statistics"), (False, "store"), (False, "gradient")):
            transposed = layer.transposed == forward
            op = "conv_transposed" if transposed else "conv"
            task = Task(op, g, DTYPES[dtype], "none", kind, 1)
            small = _image(batch, g.CS, g.P, task.dtype)
            large = _image(batch, g.CL, g.H, task.dtype)
            source, out = (small, large) if transposed else (large, small)
            weight = _image(g.CS, g.CL, 4, task.dtype)
            epilogue = Epilogue(kind, activation="leaky_relu", slope=0.2)
            if kind == "gradient":
                epilogue = replace(epilogue, aux=out, coef=_few(3, 1, out.shape[1]))
            elif forward:
                epilogue = Epilogue(kind, bias=_few(out.shape[1]))
            for tile in persistent.tiles(task, target):
                with assume(target), recording() as recorded:
                    blocks.convolve(
                        Operand(source), weight, g, transposed=transposed, epilogue=epilogue,
                        tile=tile,
                    )  # fmt: skip
                name = f"{layer.name} {'forward' if forward else 'backward'}, {kind}"
                yield from ((name, launch) for launch in recorded)


def _image(n: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    shape, order = (n, channels, side, side), torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def _few(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _of_layer(
    layer: dcgan.Layer, how: How, batch: int, dtype: torch.dtype
) -> tuple[list[Launch], list[Launch]]:
    """Those of its forward and of its backward pass."""
    g, name, deferred = layer.geometry(batch), layer.name, how in ("hybrid", "prologue")
    undoes = "leaky_relu" if deferred and name == "D2" else layer.before
    spec = BlockSpec(
        layer.transposed, layer.stride, layer.sides, layer.after, 0.2, eps=1e-5,
        momentum=0.1, x_activation=undoes, x_slope=0.2,
    )  # fmt: skip
    x, weight = _image(batch, layer.ci, layer.side, dtype), _few(g.CS, g.CL, g.kernel, g.kernel)
    coef = _few(5, 1, layer.ci) if deferred and layer.before != "none" else None
    given: dict[str, Any] = {"x": x, "weight": weight, "x_coef": coef}
    if how == "hybrid" and coef is not None and not g.reads_once(layer.transposed):
        given["x_activated"] = x
    if not layer.norm:
        undone = deferred and name in ("D1", "S1", "T5")  # the next block undoes its activation
        with recording() as forward:
            y = blocks.conv_act(Inputs(**given), spec)
        if undone:
            spec = replace(spec, activation="none")
        with recording() as backward:
            need = Need(x=True, weight=True, bias=name == "D1")
            blocks.conv_act_backward(y, Saved(**given, out=y), spec, need)
        return forward, backward
    gamma, mean, var = (_few(layer.co) for _ in range(3))
    buffers = Buffers(mean, var, batches=_few(dtype=torch.int64))
    with recording() as forward:
        y, own = blocks.conv_bn(Inputs(**given, gamma=gamma, beta=gamma), buffers, spec)
        if how != "prologue":
            blocks.activate(y, own, spec)
    with recording() as backward:
        if not deferred:
            blocks.activate_backward(y, y, own, spec)
        blocks.conv_bn_backward(y, own, Saved(**given, y=y), spec, Need(x=True, weight=True))
    return forward, backward


def _of_step(dtype: torch.dtype, batch: int) -> list[Launch]:
    """Of what a step has besides its nets."""
    logits, rows = _image(batch, 1, 1, dtype).flatten(), _few(batch, dtype=torch.int64)
    pictures = _few(batch, 128, 128, 3, dtype=torch.uint8)
    with implementation("triton"), recording() as rest:
        functional.bce(logits, _few(2), scale=_few())
        crop.squares(pictures, rows, 64, dtype, corner=(rows, rows), flipped=rows)
        merged = batchnorm.merged_statistics(_few(64), 1, 64, _few(64), _few(64), 1e-5)
        merge(_few(2, 1, 8, 64), _few(1, 8), merged)  # of 8 processes
        for whole in (True, False):  # with all that may follow an update, and without
            conv = nn.ConvTranspose2d(64, 64, 4, 2, 1, bias=False, device="meta")
            net = nn.Sequential(conv, nn.BatchNorm2d(64, device="meta"))
            optimiser = Adam(net.parameters(), betas=(0.5, 0.999))
            if whole:
                tensors = list(net.state_dict(keep_vars=True).values())
                optimiser.average = Average(map(torch.empty_like, tensors), tensors, 0.999)
                narrow = torch.bfloat16 if dtype == torch.float32 else dtype
                optimiser.copies = WorkingCopies(net, narrow, narrow=True)
                for name in ("grad_scale", "found_inf"):  # as GradScaler gives them
                    setattr(optimiser, name, _few())
            for p in net.parameters():
                p.grad = torch.empty_like(p, dtype=gradient_dtype(p))
            optimiser.step()
    return rest
