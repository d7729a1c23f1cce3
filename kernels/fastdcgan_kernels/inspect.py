"""Compiles every kernel of the standard DCGAN ahead of time, without a GPU, and says what came out:
`python -m fastdcgan_kernels.inspect [--arch sm_90,gfx942] [--dtype bf16] [--json]`.

The launches are those that blocks.py makes, recorded on meta tensors instead of run. Not here: any
measure of speed.
"""

from __future__ import annotations

import argparse
import bisect
import concurrent.futures
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdcgan_kernels.launch import Launch
    from fastdcgan_kernels.plan import Target

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
DTYPES = ("bf16", "fp16", "fp32")
BATCH = 128
COMMAND = "python -m fastdcgan_kernels.inspect"
GEMMS = ("gather", "weight_gradient", "image")  # how the names of kernels with tl.dot begin

# What a multiprocessor holds: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": warps, blocks, bytes of shared memory (1 KB of it is the system's, each block).
RESIDENT = {
    "sm_80": (64, 32, 167_936),
    "sm_89": (48, 24, 102_400),
    "sm_90": (64, 32, 233_472),
    "sm_100": (64, 32, 233_472),
    "sm_120": (48, 24, 102_400),
}
PROLOGUES = ("PROLOGUE", "SMALL_PROLOGUE", "LARGE_PROLOGUE")
MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # else HMMA; v_mfma on AMD


@dataclass(frozen=True)
class Order:
    """One compilation as plain data, so that another process can do it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]  # of a tuple of arguments: a tuple
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[int, ...], ...]  # positions of the arguments divisible by 16
    warps: int
    stages: int


def order_of(launch: Launch) -> Order:
    """What the just-in-time compiler would be asked for: pointers and integers divisible by 16 are
    told to be so, an integer of 1 is a constant."""
    import torch

    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
        torch.uint8: "u8", torch.int32: "i32",
    }  # fmt: skip
    kernel, signature, constants = launch.kernel, [], []
    aligned: list[tuple[int, ...]] = []
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        plain = parameter.do_not_specialize
        kind: Any
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not plain):
            kind = "constexpr"
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            kind = "*" + names[value.dtype]
            aligned.append((position,))
        elif isinstance(value, tuple):  # of tensors
            kind = tuple("*" + names[each.dtype] for each in value)
            aligned += [(position, at) for at in range(len(value))]
        elif isinstance(value, int):
            kind = "i32"
            if value % 16 == 0 and not plain:
                aligned.append((position,))
        elif isinstance(value, float):
            kind = "fp32"
        else:  # a tensor descriptor
            block = ",".join(map(str, value.block_shape))
            kind = f"tensordesc<{names[value.base.dtype]}[{block}]>"
        signature.append((name, kind))
    return Order(
        kernel.fn.__module__, kernel.fn.__name__, tuple(signature), tuple(constants),
        tuple(aligned), launch.warps, launch.stages,
    )  # fmt: skip


def build(order: Order, arch: str) -> Any:
    """What Triton compiles for this target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdcgan_kernels.launch import OPTIONS
    from fastdcgan_kernels.plan import TARGETS

    target = TARGETS[arch]
    source = ASTSource(
        getattr(importlib.import_module(order.module), order.kernel),
        dict(order.signature),
        dict(order.constants),
        {position: [["tt.divisibility", 16]] for position in order.aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": order.warps, "num_stages": order.stages, **OPTIONS},
    )


def compile_order(order: Order, arch: str) -> dict[str, Any]:
    """Compile, and describe what came out; an NVIDIA binary's `code` for its `machine` ("sm_90a")
    is left to `describe_codes`."""
    from fastdcgan_kernels.plan import TARGETS

    target, built = TARGETS[arch], build(order, arch)
    if target.backend == "cuda":
        found = describe_cubin(built.asm["cubin"])
        found["machine"] = re.findall(r"^\.target (sm_\w+)", built.asm["ptx"], re.MULTILINE)[0]
    else:
        found = describe_amdgcn(built.asm["amdgcn"])
    found["shared_bytes"] = built.metadata.shared
    found["shared_limit"] = target.shared_bytes
    found["resident_blocks"] = resident(found, order.warps, target)
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


def _run_tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that Triton brings prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def describe_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and the code, still in binary, of an NVIDIA binary of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spill_bytes": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "code": code_of(cubin),
    }


def code_of(cubin: bytes) -> bytes:
    """The kernel's instructions: the section .text.KERNEL of the ELF file, which is laid out as the
    System V ABI says ("Object Files": header, section header table)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)  # e_shoff
    # e_shentsize, e_shnum, e_shstrndx
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * at) for at in range(count)]
    names = sections[of_names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def describe_codes(machine: str, codes: list[bytes]) -> list[dict[str, Any]]:
    """Describes each kernel's code (see `describe_sass`). The disassembler that Triton brings takes
    a second to start, so it reads all of them in one go, as if they were one program."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = _run_tool("nvdisasm", "--binary", machine.replace("sm_", "SM"), file.name)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    instructions = [(int(address, 16), words) for address, words in lines]
    addresses = [address for address, _ in instructions]
    starts = itertools.accumulate(map(len, codes), initial=0)
    cuts = [bisect.bisect_left(addresses, start) for start in starts]
    matrix = MATRIX.get(machine.rstrip("af"), "HMMA")
    return [
        describe_sass(instructions[start:end], matrix) for start, end in itertools.pairwise(cuts)
    ]


def describe_sass(code: list[tuple[int, str]], matrix: str) -> dict[str, Any]:
    """Matrix instructions, 128-bit accesses and the main loop of (address, instruction) pairs."""
    jumps = {}
    for at, text in code:
        branch = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?`?\(?(0x[0-9a-f]+)", text)
        if branch:
            jumps[at] = int(branch[1], 16)
    before = {after: at for (at, _), (after, _) in itertools.pairwise(code)}
    loops = []
    for at, to in jumps.items():
        # A wait that is set apart goes back behind the branch that went there: that is no loop.
        apart = to < jumps.get(before.get(to, -1), -1) <= at
        if to < at and not apart:
            loops.append([t for a, t in code if to <= a <= at])
    texts = [text for _, text in code]
    return {
        "matrix_instruction": matrix if _count(texts, rf"\b{matrix}\b") else "",
        "matrix_instructions": _count(texts, rf"\b{matrix}\b"),
        "wide_accesses": _count(texts, r"\b(LDG|STG|LDGSTS)\S*\.128"),
        "local_accesses": _count(texts, r"\b(LDL|STL)\b"),
        "main_loop": main_loop(
            loops, rf"\b{matrix}\b", {"TMA": r"\bUTMALDG", "cp.async": r"\bLDGSTS"}
        ),
    }


def describe_amdgcn(text: str) -> dict[str, Any]:
    """The same of AMD assembly; a spill is what the compiler counts, or any scratch memory."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {
        line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.LBB\S*:", line)
    }
    loops = []
    for at, line in enumerate(lines):
        branch = re.match(r"s_c?branch\S*\s+(\.LBB\S+)", line)
        if branch and labels.get(branch[1], at) < at:
            loops.append([t for t in lines[labels[branch[1]] : at + 1] if re.match(r"[a-z]+_", t)])

    def figure(name: str) -> int:
        found = re.findall(rf"\.{name}:\s+(\d+)", text)
        return int(found[-1]) if found else 0

    count = _count(lines, r"^v_mfma")
    return {
        "registers": figure("vgpr_count"),
        "spill_bytes": figure("private_segment_fixed_size") + 4 * figure("vgpr_spill_count"),
        "matrix_instruction": "v_mfma" if count else "",
        "matrix_instructions": count,
        "wide_accesses": _count(lines, r"^(global|buffer)_(load|store)\S*(dwordx4|b128)"),
        "local_accesses": _count(lines, r"^scratch_"),
        "main_loop": main_loop(
            loops,
            r"^v_mfma",
            {
                "to LDS": r"_load_lds_|_load_dword\S* .*\blds\b",
                "registers": r"^(global|buffer)_load",
            },
        ),
    }


def main_loop(loops: list[list[str]], matrix: str, copies: dict[str, str]) -> dict[str, Any] | None:
    """The loop with the fewest instructions per matrix instruction: its instructions, those
    per matrix instruction, and how memory is read in it: the first kind of `copies` that occurs.
    `registers` is a load into registers, stored to shared memory a step later. None: no such loop.
    """
    with_matrix = [loop for loop in loops if _count(loop, matrix)]
    if not with_matrix:
        return None
    loop = min(with_matrix, key=lambda loop: len(loop) / _count(loop, matrix))
    kinds = {kind: _count(loop, pattern) for kind, pattern in copies.items()}
    kind = next((kind for kind, count in kinds.items() if count), "")
    count = _count(loop, matrix)
    return {
        "instructions": len(loop),
        "matrix_instructions": count,
        "per_matrix_instruction": round(len(loop) / count, 1),
        "copies": kind,
        "copy_instructions": kinds.get(kind, 0),
    }


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def launches(arch: str, dtype: str, batch: int = BATCH) -> Iterator[tuple[str, Launch]]:
    """(layer and pass, launch) of every layer of the 64-pixel DCGAN (nz 100, ngf and ndf 64), as
    the blocks make them for this target, each way that a plan may choose; and of the rest of a
    step."""
    import torch

    from fastdcgan_kernels import blocks, plan, step
    from fastdcgan_kernels.adam import Adam, Average
    from fastdcgan_kernels.geometry import gradient_dtype
    from fastdcgan_kernels.launch import recording
    from fastdcgan_kernels.modules import WorkingCopies
    from fastdcgan_kernels.normalisation import Running

    of = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]

    def image(channels: int, side: int) -> Any:
        shape = (batch, channels, side, side)
        return torch.empty(shape, dtype=of, device="meta", memory_format=torch.channels_last)

    def few(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    counter = torch.empty((), dtype=torch.int64, device="meta")
    # name, up, stride, channels in and out, side of the input, norm, activations before and after
    nets: list[tuple[str, bool, int, int, int, int, bool, str, str]] = [
        ("G1", True, 1, 100, 512, 1, True, "none", "relu"),
        ("G2", True, 2, 512, 256, 4, True, "relu", "relu"),
        ("G3", True, 2, 256, 128, 8, True, "relu", "relu"),
        ("G4", True, 2, 128, 64, 16, True, "relu", "relu"),
        ("G5", True, 2, 64, 3, 32, False, "relu", "tanh"),
        ("D1", False, 2, 3, 64, 64, False, "none", "leaky_relu"),
        ("D2", False, 2, 64, 128, 32, True, "none", "leaky_relu"),
        ("D3", False, 2, 128, 256, 16, True, "leaky_relu", "leaky_relu"),
        ("D4", False, 2, 256, 512, 8, True, "leaky_relu", "leaky_relu"),
        ("D5", False, 1, 512, 1, 4, False, "leaky_relu", "none"),
    ]
    for how in ("materialised", "prologue", "vendor"):
        for name, up, stride, ci, co, side, norm, before, after in nets:
            if how == "vendor" and name != "G2":
                continue  # one layer shows its kernels: they are the same everywhere
            weight = few(*((ci, co, 4, 4) if up else (co, ci, 4, 4)))
            coef = few(5, 1, ci) if how == "prologue" and before != "none" else None
            x, first = image(ci, side), name == "D1"
            with plan.assume(plan.TARGETS[arch]), plan.override(how), recording() as forward:
                if norm:
                    gamma = few(co)
                    running = Running(few(co), few(co), 0.1, counter)
                    y, own = blocks.conv_bn(
                        x, coef, weight, None, gamma, gamma, up, stride, 1, 1e-5, before, 0.2, "",
                        None, running,
                    )  # fmt: skip
                    if how != "prologue":
                        blocks.activate(y, own, after, 0.2)
                else:
                    bits = None
                    if how == "prologue" and first:
                        bits = torch.empty((batch, side // 2, side // 2, co // 8),
                                           dtype=torch.uint8, device="meta")  # fmt: skip
                    y = blocks.conv_act(
                        x, coef, weight, None, up, stride, before, 0.2, after, 0.2, None, bits
                    )
            with plan.assume(plan.TARGETS[arch]), plan.override(how), recording() as backward:
                if norm:
                    if how != "prologue":
                        blocks.activate_backward(y, y, own, after, 0.2)
                    blocks.conv_bn_backward(
                        y, own, x, coef, weight, None, y, up, stride, 1, before, 0.2, "", True,
                        True, False,
                    )  # fmt: skip
                    if how == "prologue" and name == "D4":  # behind it D5, see below
                        blocks.conv_bn_backward(
                            y, None, x, coef, weight, None, y, up, stride, 1, before, 0.2, "",
                            True, True, False,
                        )  # fmt: skip
                    if how == "prologue" and name == "D2":  # with D1, in D's step and in G's
                        picture, signs = image(3, 2 * side), image(ci // 8, side).byte()
                        for need in ((False, True, False), (True, False, False)):
                            blocks.conv_bn_of_image_backward(
                                y, own, picture, few(ci, 3, 4, 4), None, signs, x, weight, None, y,
                                1, "leaky_relu", 0.2, "", *need,
                            )  # fmt: skip
                else:
                    blocks.conv_act_backward(
                        y, y, x, coef, weight, None, up, stride, before, 0.2, after, 0.2, True,
                        True, first,
                    )  # fmt: skip
                    if coef is not None and name == "D5":
                        blocks.logit_backward(y, x, coef, weight, None, before, 0.2)
            for when, recorded in (("forward", forward), ("backward", backward)):
                for launch in recorded:
                    yield f"{name} {when}, {how}", launch
    few_logits, rows = image(1, 1).flatten(), torch.empty(batch, dtype=torch.int64, device="meta")
    pictures = torch.empty((batch, 128, 128, 3), dtype=torch.uint8, device="meta")
    with plan.implementation("triton"), recording() as rest:
        step.bce(few_logits, few(2), scale=few())
        step.crop(pictures, rows, 64, of, corner=(rows, rows), flipped=rows)
        for whole in (True, False):  # with all that may follow an update, and without
            net = torch.nn.Sequential(
                torch.nn.ConvTranspose2d(64, 64, 4, 2, 1, bias=False, device="meta"),
                torch.nn.BatchNorm2d(64, device="meta"),
            )
            optimiser = Adam(net.parameters(), betas=(0.5, 0.999))
            if whole:
                tensors = list(net.state_dict(keep_vars=True).values())
                optimiser.average = Average(map(torch.empty_like, tensors), tensors, 0.999)
                narrow = torch.bfloat16 if dtype == "fp32" else of
                optimiser.copies = WorkingCopies(net, narrow, narrow=True)
                for name in ("grad_scale", "found_inf"):  # as GradScaler gives them
                    setattr(optimiser, name, few())
            for p in net.parameters():
                p.grad = torch.empty_like(p, dtype=gradient_dtype(p))
            optimiser.step()
    for launch in rest:
        yield "step, all", launch


def report(
    archs: list[str], dtype: str, layer: str = "", jobs: int | None = None
) -> list[dict[str, Any]]:
    """One row for every kernel that a layer launches on a target; equal compilations are one."""
    wanted: dict[tuple[Order, str], list[str]] = {}
    tiles: dict[Order, str] = {}
    for arch in archs:
        for name, launch in launches(arch, dtype):
            if layer in name:
                order = order_of(launch)
                names = wanted.setdefault((order, arch), [])
                if name not in names:
                    names.append(name)
                tiles[order] = tile_of(launch)
    jobs = jobs or os.cpu_count() or 1
    rows = []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        results = []
        for found in pool.map(compile_order, *zip(*wanted, strict=True), chunksize=4):
            results.append(found)
            if sys.stderr.isatty():
                print(f"\r{len(results)} of {len(wanted)} compiled", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        binaries: dict[str, list[dict[str, Any]]] = {}
        for found in results:
            if "code" in found:
                binaries.setdefault(found.pop("machine"), []).append(found)
        codes = [[found.pop("code") for found in own] for own in binaries.values()]
        described = pool.map(describe_codes, binaries, codes)
        for own, descriptions in zip(binaries.values(), described, strict=True):
            for found, description in zip(own, descriptions, strict=True):
                found.update(description)
    for (order, arch), found in zip(wanted, results, strict=True):
        for name in wanted[order, arch]:
            row = {"kernel": order.kernel, "layer": name, "arch": arch, "dtype": dtype}
            words = dict(order.constants)
            used = any(words.get(name, "none") != "none" for name in PROLOGUES)
            rows.append({**row, "tile": tiles[order], "prologue": used, **found})
    return rows


def tile_of(launch: Launch) -> str:
    """The tile, and what is done on the way in and out, in words."""
    given = launch.arguments
    sizes = [str(given[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in given]
    roles = [given.get(name, "none") for name in (*PROLOGUES, "EPILOGUE")]
    words = [word for word in roles if word not in ("none", "store")]
    return " ".join(["x".join(sizes) or "-", f"{launch.warps}w{launch.stages}s", *words])


def document(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown: what made it, and a table with one line for each compilation."""
    import triton

    head = (
        "arch", "kernel", "tile, warps and stages, prologue, epilogue", "first layer", "registers",
        "spill", "shared / limit", "blocks", "matrix", "128-bit", "main loop",
    )  # fmt: skip
    lines = [
        "# What every kernel compiles to",
        "",
        f"By Triton {triton.__version__}, in {rows[0]['dtype']}, for the layers of the 64-pixel "
        f"DCGAN at batch {BATCH}. No GPU was used: these are the compiler's figures, and nothing "
        "here says how fast a kernel is. `blocks`: resident blocks that a multiprocessor has room "
        "for; `128-bit`: loads and stores of 16 bytes; `main loop`: instructions for each matrix "
        "instruction, and how it reads memory.",
        "",
        f"Made by `{COMMAND}`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    seen = set()
    for row in rows:
        key = tuple(str(value) for name, value in row.items() if name != "layer")
        if key in seen:
            continue
        seen.add(key)
        loop = row["main_loop"]
        cells = (
            row["arch"], row["kernel"], row["tile"], row["layer"], row["registers"],
            row["spill_bytes"], f"{row['shared_bytes']} / {row['shared_limit']}",
            row["resident_blocks"],
            f"{row['matrix_instructions']} {row['matrix_instruction']}".replace("0 ", "-"),
            row["wide_accesses"],
            "-" if loop is None else f"{loop['per_matrix_instruction']} a matrix instruction, "
            f"{loop['copy_instructions']} {loop['copies']}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be: a spill, too much shared memory, a GEMM without the target's matrix
    instruction, a main loop that waits for its loads.

    fp32 products in full precision have no matrix instruction. On AMD loads may go into registers
    a step ahead: gfx942 has no wide copy into LDS, and a prologue works on registers. D5's gradient
    has one channel, an element a pixel, and no target copies 2 bytes asynchronously."""
    found = []
    for row in rows:
        what = f"{row['arch']} {row['kernel']} {row['tile']} ({row['layer']})"
        if row["spill_bytes"] or row["local_accesses"]:
            found.append(f"{what}: spills {row['spill_bytes']} bytes")
        if row["shared_bytes"] > row["shared_limit"]:
            found.append(f"{what}: {row['shared_bytes']} bytes of shared memory")
        if row["kernel"].startswith(GEMMS) and row["dtype"] != "fp32":
            if not row["matrix_instruction"]:
                found.append(f"{what}: no matrix instruction of this target")
            ways = ["TMA", "cp.async", "to LDS"]
            if row["arch"] == "gfx942" or (row["arch"] == "gfx950" and row["prologue"]):
                ways.append("registers")
            loop = row["main_loop"]
            if loop and loop["copies"] not in ways and not row["layer"].startswith("D5 backward"):
                found.append(f"{what}: no asynchronous copies in the main loop")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Compile every kernel of the standard DCGAN ahead of time and report "
        "registers, spills, shared memory and instructions. Needs no GPU; measures no speed.",
        epilog="Example: python -m fastdcgan_kernels.inspect --arch sm_90,gfx942 --json",
    )
    parser.add_argument(
        "--arch", default=",".join(ARCHS), help=f"targets, with commas; default {','.join(ARCHS)}"
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="default bf16")
    parser.add_argument("--layer", default="", help='only layers with this in their name: "G2"')
    parser.add_argument("--jobs", type=int, help="processes; default: as many as cores")
    parser.add_argument("--json", action="store_true", help="a list of objects, not a table")
    given = parser.parse_args(arguments)
    archs = [arch for arch in given.arch.split(",") if arch]
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown or not archs:
        parser.error(f"--arch {given.arch} was given; give some of {', '.join(ARCHS)}")
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is left aside: nothing compiles with it", file=sys.stderr)
    rows = report(archs, given.dtype, given.layer, given.jobs)
    if not rows:
        parser.error(f"--layer {given.layer} was given; layers are G1 to G5 and D1 to D5")
    print(json.dumps(rows, indent=1) if given.json else document(rows))
    wrong = complaints(rows)
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
