"""What this machine is, and its peaks: a copy in memory, reads that stay in the L2 cache, a product
of large bf16 matrices."""

import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.phase import Items, Setting
from benchmarks.nvml import Gpu
from benchmarks.timing import CudaClock, Workload, wall_clock

ROUNDS = 9
COPIES, PRODUCTS, READS = 10, 4, 8
PROGRAMS, BLOCK = 4, 4096
"""Of the reads: programs a multiprocessor, and float32 values that one takes at a time, 64 bytes a
thread."""
L2_SHARE = 4
"""The reads go over this part of the cache, so that nothing is evicted."""


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    device = setting.device
    with to.item("versions") as facts:
        facts |= _versions()
    with to.item("card") as facts:
        facts |= _card(device)
    if to.wants("copy"):
        with to.item("copy") as facts:
            facts["bytes_per_second"] = _copy(device, setting.size.copied)
    if to.wants("l2"):
        with to.item("l2") as facts:
            facts["bytes_per_second"] = _reads(device)
    if to.wants("product"):
        with to.item("product") as facts:
            side = setting.size.product
            facts |= {"size": side, "dtype": "bfloat16"}
            facts["flops_per_second"] = _product(device, side)


def _versions() -> dict[str, Any]:
    import numpy

    cudnn = torch.backends.cudnn
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if cudnn.is_available() else None,
    }


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "shared_bytes": getattr(properties, "shared_memory_per_block_optin", None),
    }
    gpu = Gpu.of(device)
    return facts | {
        "driver": gpu.driver(),
        "power_limit_watts": gpu.limit_watts(),
        "sm_mhz": gpu.sm_mhz(),
        "memory_mhz": gpu.memory_mhz(),
    }


def _seconds(device: torch.device, run: Callable[[], object], repeat: int) -> float:
    """Of one call, the median of rounds, after one that is not timed."""
    clock = CudaClock() if device.type == "cuda" else wall_clock
    workload = Workload(run, repeat=repeat)
    clock(workload)
    return statistics.median(clock(workload) for _ in range(ROUNDS))


def _copy(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(device, lambda: target.copy_(source), COPIES)


def _product(device: torch.device, side: int) -> float:
    """FLOPs a second of a product of square bf16 matrices of random values; zeros would be
    faster."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(device, lambda: torch.mm(a, b, out=out), PRODUCTS)


@triton.jit
def read_l2(
    x,  # [blocks * BLOCK] fp32, smaller than the L2 cache
    out,  # [programs, BLOCK] fp32: sums, so that the reads are needed
    blocks,
    reads,  # of a program; each is of another block than the one before
    BLOCK: tl.constexpr,
):
    """Every program reads blocks of x, past the L1 cache (.cg), from a place of its own on."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(reads):
        block = (program * 7 + step) % blocks
        total += tl.load(x + block * BLOCK + lane, cache_modifier=".cg")
    tl.store(out + program * BLOCK + lane, total)


def _reads(device: torch.device) -> float:
    """Bytes a second that all programs together read from the L2 cache."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        programs = PROGRAMS * properties.multi_processor_count
        blocks, reads = properties.L2_cache_size // L2_SHARE // (4 * BLOCK), 2048
    else:
        programs, blocks, reads = 2, 3, 4
    x = torch.randn(blocks * BLOCK, device=device)
    out = torch.empty(programs, BLOCK, device=device)

    def run() -> None:
        read_l2[(programs,)](x, out, blocks, reads, BLOCK=BLOCK, num_warps=8)

    seconds = _seconds(device, run, READS)
    at = (torch.arange(programs)[:, None] * 7 + torch.arange(reads)) % blocks
    expected = x.cpu().double().view(blocks, BLOCK)
    counts = torch.zeros(programs, blocks, dtype=torch.float64)
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.float64))
    torch.testing.assert_close(out.cpu().double(), counts @ expected, rtol=1e-3, atol=1e-2)
    return 4 * BLOCK * programs * reads / seconds
