"""Launches as orders to the compiler, and what Triton compiles for a target. Not here: what stands
in the compiled code (assembly.py)."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..choice.targets import TARGETS
from ..choice.types import Target
from ..gpu.launch import Launch
from .assembly import describe_amdgcn, describe_cubin, unordered

# What a multiprocessor holds: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": warps, blocks, bytes of shared memory (1 KB of it is the system's, each block).
RESIDENT = {
    "sm_80": (64, 32, 167_936), "sm_89": (48, 24, 102_400), "sm_90": (64, 32, 233_472),
    "sm_100": (64, 32, 233_472), "sm_120": (48, 24, 102_400),
}  # fmt: skip
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.uint8: "u8", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Order:
    """One compilation as plain data, so that another process can do it. An argument's place is its
    position; in a tuple of arguments, the tuple's and its own in it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]  # of a tuple of arguments: one of its class
    constants: tuple[tuple[tuple[int, ...], Any], ...]  # by place
    aligned: tuple[tuple[int, ...], ...]  # places of what is divisible by 16
    options: tuple[tuple[str, Any], ...]


def order_of(launch: Launch) -> Order:
    """What the just-in-time compiler would be asked for: pointers and integers divisible by 16 are
    told to be so, an integer of 1 is a constant."""
    constants: list[tuple[tuple[int, ...], Any]] = []
    aligned: list[tuple[int, ...]] = []

    def kind_of(value: Any, special: bool, *place: int) -> Any:
        if isinstance(value, tuple):
            kinds = [kind_of(each, special, *place, at) for at, each in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            aligned.append(place)
            return "*" + NAMES[value.dtype]
        if not isinstance(value, int):  # a tensor descriptor
            inner = f"{NAMES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]"
            layout = getattr(value, "layout", None)  # Gluon's have one
            return f"tensordesc<{inner}>" if layout is None else f"tensordesc<{inner},{layout!r}>"
        if special and value == 1:
            constants.append((place, value))
            return "constexpr"
        if special and value % 16 == 0:
            aligned.append(place)
        return "i32"

    signature = []
    for at, parameter in enumerate(launch.kernel.params):
        value, kind = launch.arguments[parameter.name], "constexpr"
        if parameter.is_constexpr:
            constants.append(((at,), value))
        else:
            kind = kind_of(value, not parameter.do_not_specialize, at)
        signature.append((parameter.name, kind))
    return Order(
        launch.kernel.fn.__module__, launch.kernel.fn.__name__, tuple(signature), tuple(constants),
        tuple(aligned), tuple(launch.options.items()),
    )  # fmt: skip


def kernel_of(order: Order) -> Any:
    """The triton.jit or gluon.jit function."""
    return getattr(importlib.import_module(order.module), order.kernel)


def build(order: Order, arch: str) -> Any:
    """What Triton compiles for this target."""
    target = TARGETS[arch]
    kernel, kind = kernel_of(order), ASTSource
    if kernel.is_gluon():
        kind = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = kind(
        kernel,
        dict(order.signature),
        dict(order.constants),
        {place: [["tt.divisibility", 16]] for place in order.aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=dict(order.options),
    )


def compile_order(order: Order, arch: str) -> dict[str, Any]:
    """Compile, and describe what came out; an NVIDIA binary's `code` for its `machine` ("sm_90a")
    is left to `describe_codes`."""
    target, built = TARGETS[arch], build(order, arch)
    if target.backend == "cuda":
        found = describe_cubin(built.asm["cubin"])
        found["machine"] = re.findall(r"^\.target (sm_\w+)", built.asm["ptx"], re.MULTILINE)[0]
        if kernel_of(order).is_gluon():
            ptx = built.asm["ptx"]
            found["unordered"] = unordered(ptx)
            found["setmaxnreg"] = sorted(
                {int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}
            )
    else:
        found = describe_amdgcn(built.asm["amdgcn"])
    found["shared_bytes"] = built.metadata.shared
    found["shared_limit"] = target.shared_bytes
    # A kernel in Gluon has more warps than it is launched with.
    found["resident_blocks"] = resident(found, built.metadata.num_warps, target)
    return found


def resident(found: dict[str, Any], warps: int, target: Target) -> int:
    """Blocks that a multiprocessor can hold at a time, by registers, shared memory and slots."""
    registers, shared = max(found["registers"], 1), found["shared_bytes"]
    if target.backend == "hip":  # a CU: 4 SIMDs of 512 registers a lane and 8 waves (CDNA3 ISA)
        waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
        return int(min(waves // warps, target.shared_bytes // max(shared, 1)))
    slots, blocks, memory = RESIDENT[target.name]
    a_warp = -(-registers * 32 // 256) * 256
    return int(min(blocks, slots // warps, 65_536 // (a_warp * warps), memory // (shared + 1024)))
