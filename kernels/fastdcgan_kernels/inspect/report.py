"""The report: one row for every kernel that a layer launches on a target, the table of them, and
what must not be. Not here: how a row's figures are found (compiling.py, assembly.py)."""

from __future__ import annotations

import concurrent.futures
import sys
from typing import Any

import triton

from ..gpu.launch import Launch
from .assembly import describe_codes
from .compiling import Order, compile_order, order_of
from .launches import BATCH, gluon_launches, launches

GEMMS = ("gather", "weight_gradient", "image")  # how the names of kernels with tl.dot begin
PROLOGUES = ("PROLOGUE", "SMALL_PROLOGUE", "LARGE_PROLOGUE")


def report(
    archs: list[str], dtype: str, layer: str = "", jobs: int | None = None,
    gluon: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for every kernel that a layer launches on a target, or those in Gluon; equal
    compilations are one."""
    wanted: dict[tuple[Order, str], dict[str, None]] = {}
    said: dict[Order, dict[str, Any]] = {}
    for arch in archs:
        for name, launch in (gluon_launches if gluon else launches)(arch, dtype):
            if layer in name:
                order = order_of(launch)
                wanted.setdefault((order, arch), {})[name] = None
                words = [launch.arguments.get(name, "none") for name in PROLOGUES]
                said[order] = {
                    "tile": tile_of(launch), "prologue": {*words} != {"none"},
                    "narrow": is_narrow(launch),
                }  # fmt: skip
    results: list[dict[str, Any]] = []
    seen = sys.stderr.isatty()
    with concurrent.futures.ProcessPoolExecutor(jobs or None) as pool:
        for found in pool.map(compile_order, *zip(*wanted, strict=True), chunksize=4):
            results.append(found)
            if seen:
                print(f"\r{len(results)} of {len(wanted)} compiled", end="", file=sys.stderr)
        if seen:
            print(file=sys.stderr)
        binaries: dict[str, list[dict[str, Any]]] = {}
        for found in results:
            if "code" in found:
                binaries.setdefault(found.pop("machine"), []).append(found)
        codes = [[found.pop("code") for found in own] for own in binaries.values()]
        described = pool.map(describe_codes, binaries, codes)
        for own, more in zip(binaries.values(), described, strict=True):
            for found, description in zip(own, more, strict=True):
                found |= description | found  # what a kernel in Gluon has said itself
    rows = []
    for ((order, arch), names), found in zip(wanted.items(), results, strict=True):
        for name in names:
            row = {"kernel": order.kernel, "layer": name, "arch": arch, "dtype": dtype}
            rows.append(row | said[order] | found)
    return rows


def is_narrow(launch: Launch) -> bool:
    """Whether it loads values of 16 bits that may begin anywhere: of a side with an odd number of
    channels. No target copies 2 bytes asynchronously. (A DCGAN's windows begin at even ones.)"""
    given = launch.named
    odd = given.get("CS", 0) % 2 or given.get("CL", 0) % 2
    return bool(odd) and not given.get("STANDARD", False)


def tile_of(launch: Launch) -> str:
    """The tile, and what is done on the way in and out, in words."""
    given = launch.named
    sizes = [str(given[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in given]
    roles = [given.get(name, "none") for name in (*PROLOGUES, "EPILOGUE")]
    words = [word for word in roles if word not in ("none", "store")]
    return " ".join(["x".join(sizes) or "-", f"{launch.warps}w{launch.stages}s", *words])


def document(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown: what made it, and a table with one line for each compilation."""
    head = (
        "arch", "kernel", "tile, warps and stages, prologue, epilogue", "first layer", "registers",
        "spill", "shared / limit", "blocks", "matrix", "128-bit", "main loop",
    )  # fmt: skip
    lines = [
        "# What every kernel compiles to",
        "",
        f"By Triton {triton.__version__}, in {rows[0]['dtype']}, for the layers of the 64-pixel "
        f"DCGAN at batch {BATCH}, and some of other nets (T: the TensorFlow tutorial's, S: SNGAN's "
        "critic, P: PatchGAN, C: CycleGAN). No GPU was used: these are the compiler's figures, and "
        "nothing here says how fast a kernel is. `blocks`: resident blocks that a multiprocessor "
        "has room for; `128-bit`: loads and stores of 16 bytes; `main loop`: instructions for each "
        "matrix instruction, how it reads memory, and loads of operands from shared memory into "
        "registers.",
        "",
        "Made by `python -m fastdcgan_kernels.inspect`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    first: dict[str, dict[str, Any]] = {}  # of each compilation
    for row in rows:
        first.setdefault(str(row | {"layer": ""}), row)
    for row in first.values():
        loop = row["main_loop"]
        cells = (
            row["arch"], row["kernel"], row["tile"], row["layer"], row["registers"],
            row["spill_bytes"], f"{row['shared_bytes']} / {row['shared_limit']}",
            row["resident_blocks"],
            f"{row['matrix_instructions']} {row['matrix_instruction']}".replace("0 ", "-"),
            row["wide_accesses"],
            "-" if loop is None else f"{loop['per_matrix_instruction']} a matrix instruction, "
            f"{loop['copy_instructions']} {loop['copies'] or 'in it'}, "
            f"{loop['through_registers']} operands loaded",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be: a spill, too much shared memory, a GEMM without the target's matrix
    instruction, a main loop that waits for its loads.

    fp32 products in full precision have no matrix instruction. On AMD loads may go into registers
    a step ahead: gfx942 has no wide copy into LDS, and a prologue works on registers. What is
    `narrow` cannot be copied asynchronously."""
    found = []
    for row in rows:
        what = f"{row['arch']} {row['kernel']} {row['tile']} ({row['layer']})"
        if row["spill_bytes"] or row["local_accesses"]:
            found.append(f"{what}: spills {row['spill_bytes']} bytes")
        found += [f"{what}: {problem}" for problem in row.get("unordered", ())]
        if row["shared_bytes"] > row["shared_limit"]:
            found.append(f"{what}: {row['shared_bytes']} bytes of shared memory")
        if row["kernel"].startswith(GEMMS) and row["dtype"] != "fp32":
            if not row["matrix_instruction"]:
                found.append(f"{what}: no matrix instruction of this target")
            ways = ["TMA", "cp.async", "to LDS"]
            if row["arch"] == "gfx942" or (row["arch"] == "gfx950" and row["prologue"]):
                ways.append("registers")
            loop = row["main_loop"]
            alone = "unordered" not in row  # in Gluon another warp asks for the copies
            if loop and alone and loop["copies"] not in ways and not row.get("narrow"):
                found.append(f"{what}: no asynchronous copies in the main loop")
    return found
