"""What stands in compiled code: registers, spills, matrix instructions, the main loop; of NVIDIA's
binaries by the tools that Triton brings, of AMD's by their assembly."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # else HMMA; v_mfma on AMD


def run_tool(name: str, *options: str, on: bytes) -> str:
    """What one of the CUDA tools that Triton brings prints about this binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(on)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def describe_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and the code, still in binary, of an NVIDIA binary of one kernel."""
    usage = run_tool("cuobjdump", "--dump-resource-usage", on=cubin)
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
    text = run_tool("nvdisasm", "--binary", machine.replace("sm_", "SM"), on=b"".join(codes))
    instructions = instructions_of(text)
    addresses = [address for address, _ in instructions]
    starts = itertools.accumulate(map(len, codes), initial=0)
    cuts = [bisect.bisect_left(addresses, start) for start in starts]
    matrix = MATRIX.get(machine.rstrip("af"), "HMMA")
    return [describe_sass(instructions[a:b], matrix) for a, b in itertools.pairwise(cuts)]


def instructions_of(text: str) -> list[tuple[int, str]]:
    """(address, instruction) pairs of a disassembly."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    return [(int(address, 16), words) for address, words in lines]


def describe_sass(code: list[tuple[int, str]], matrix: str) -> dict[str, Any]:
    """Matrix instructions, 128-bit accesses and the main loop, of (address, instruction) pairs."""
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
    texts, wide = [text for _, text in code], r"\b(LDG|STG|LDGSTS)\S*\.128"
    copies = {"TMA": r"\bUTMALDG", "cp.async": r"\bLDGSTS"}
    return _described(texts, loops, matrix, rf"\b{matrix}\b", wide, r"\b(LDL|STL)\b", copies)


# What a warp-specialised kernel does in an order that its source leaves to the compiler.
EVENTS = {
    "sync": r"bar(rier)?\.sync.*\b(128|256);",  # of all warps of a consumer
    "product": r"wgmma\.mma_async",
    "wait": r"wgmma\.wait_group",
    "arrive": r"@\S+ mbarrier\.arrive\.(release\.cta\.)?shared",  # of one thread
    "write": r"stmatrix",
    "read": r"ldmatrix",
    "fence": r"fence\.proxy\.async",
    "store": r"@\S+ cp\.async\.bulk\.tensor\.\dd\.global\.shared",
}
# What is before each, going back, one after the other; and what is not met on the way to all that.
ORDERS = {
    "arrive": (("sync", "wait", "product"), ()),  # all warps have waited before a stage is free
    "store": (("sync", "fence", "write"), ("store",)),  # all have written, and TMA sees it
    "write": (("sync",), ("read", "store")),  # all have read, and TMA has, what was there
}


def unordered(ptx: str) -> list[str]:
    """What lacks its order in the PTX of a kernel in Gluon: one thread's arrivals at a barrier and
    its stores by TMA stand for all warps of a consumer, and a buffer is written more than once."""
    lines = [line.strip() for line in ptx.splitlines()]
    events = [
        (at, name) for at, line in enumerate(lines) for name, words in EVENTS.items()
        if re.match(words, line)
    ]  # fmt: skip
    problems = []
    for place, (at, name) in enumerate(events):
        before = [event for _, event in reversed(events[:place])]
        if name == "write" and before[:1] == ["write"]:
            continue
        order, stops = ORDERS.get(name, ((), ()))
        wanted = list(order)
        for event in before:
            if not wanted or event in wanted[1:] or event in stops:
                break
            if event == wanted[0]:
                wanted.pop(0)
        if wanted:
            problems.append(f"line {at + 1} of its PTX: {name} without {wanted[0]} before it")
    return problems


def describe_amdgcn(text: str) -> dict[str, Any]:
    """The same of AMD assembly; a spill is what the compiler counts, or any scratch memory."""
    lines = [line.strip() for line in text.splitlines()]
    labels, loops = {}, []
    for at, line in enumerate(lines):  # a loop's branch is behind its label
        if re.match(r"\.LBB\S*:", line):
            labels[line.split(":")[0]] = at
        branch = re.match(r"s_c?branch\S*\s+(\.LBB\S+)", line)
        if branch and branch[1] in labels:
            loops.append([t for t in lines[labels[branch[1]] : at + 1] if re.match(r"[a-z]+_", t)])

    def figure(name: str) -> int:
        return int((re.findall(rf"\.{name}:\s+(\d+)", text) or [0])[-1])

    wide = r"^(global|buffer)_(load|store)\S*(dwordx4|b128)"
    copies = {
        "to LDS": r"_load_lds_|_load_dword\S* .*\blds\b", "registers": r"^(global|buffer)_load",
    }  # fmt: skip
    return {
        "registers": figure("vgpr_count"),
        "spill_bytes": figure("private_segment_fixed_size") + 4 * figure("vgpr_spill_count"),
        **_described(lines, loops, "v_mfma", r"^v_mfma", wide, r"^scratch_", copies),
    }


def _described(
    lines: list[str], loops: Iterable[list[str]], name: str, matrix: str, wide: str, local: str,
    copies: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Counts of instructions by the patterns given."""
    count = _count(lines, matrix)
    return {
        "matrix_instruction": name if count else "",
        "matrix_instructions": count,
        "wide_accesses": _count(lines, wide),
        "local_accesses": _count(lines, local),
        "main_loop": main_loop(loops, matrix, copies),
    }


def main_loop(
    loops: Iterable[list[str]], matrix: str, copies: dict[str, str]
) -> dict[str, Any] | None:
    """The loop with the fewest instructions per matrix instruction: its instructions, those
    per matrix instruction, and how memory is read in it: the first kind of `copies` that occurs.
    `registers` is a load into registers, stored to shared memory a step later. `through_registers`:
    loads of operands from shared memory, which HGMMA and UTCHMMA need not; `fences`: what starts
    HGMMAs and waits for them. None: no such loop."""
    counted = [(_count(loop, matrix), loop) for loop in loops]
    every = [(len(loop) / count, count, loop) for count, loop in counted if count]
    if not every:
        return None
    each, count, loop = min(every, key=lambda one: one[0])
    kinds = {kind: _count(loop, pattern) for kind, pattern in copies.items()}
    kind = next((kind for kind, count in kinds.items() if count), "")
    return {
        "instructions": len(loop),
        "matrix_instructions": count,
        "per_matrix_instruction": round(each, 1),
        "copies": kind,
        "copy_instructions": kinds.get(kind, 0),
        "through_registers": _count(loop, r"\bLDSM\b|^ds_read"),
        "fences": _count(loop, r"\bWARPGROUP\b"),
    }


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)
