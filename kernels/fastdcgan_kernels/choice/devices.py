"""Cards and their peaks, for the model that chooses tiles (model.py) and for
benchmarks.cost_model. Where they come from stands with each; `python -m benchmarks.gpu` measures a
card's, in its phase `machine`."""

from __future__ import annotations

from dataclasses import dataclass

# Seconds that a launch adds. ASSUMED, not measured: a kernel in a replayed CUDA graph starts about
# a microsecond after the one before it.
REPLAYED = 1e-6

# Bytes a clock that the L2 gives each multiprocessor. ASSUMED, not measured: 5.5 to 7 TB/s are
# expected of an H100, which is 23 to 29 of them; every other device is taken to give as many.
L2_A_CLOCK = 26


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU. flops16, flops32: of dense matrix products with float32 sums, of 16-bit
    floats and of float32 in TF32, as convolutions are by default (by its vector units where it has
    no TF32); bytes: of memory, a second; l2: bytes a second from the L2 to all multiprocessors, by
    default L2_A_CLOCK at `clock` Hz, which is the one that the peaks of the source are for."""

    name: str
    target: str
    multiprocessors: int
    clock: float
    flops16: float
    flops32: float
    bytes: float
    source: str
    l2: float = 0.0
    l2_source: str = f"assumed, {L2_A_CLOCK} bytes a clock for each multiprocessor"

    def __post_init__(self) -> None:
        if not self.l2:
            object.__setattr__(self, "l2", self.multiprocessors * self.clock * L2_A_CLOCK)


DEVICES = {
    "h100": Device("H100 SXM", "sm_90", 132, 1.83e9, 798e12, 494.7e12, 3.0e12,
                   "16 bit and memory: as measured on one; TF32: NVIDIA H100 data sheet"),
    "h200": Device("H200", "sm_90", 132, 1.83e9, 989.4e12, 494.7e12, 4.8e12,
                   "NVIDIA H200 data sheet"),
    "b200": Device("B200", "sm_100", 148, 1.86e9, 2250e12, 1125e12, 7.7e12,
                   "NVIDIA HGX B200 data sheet"),
    "a100": Device("A100 SXM 80 GB", "sm_80", 108, 1.41e9, 312e12, 156e12, 2.039e12,
                   "NVIDIA A100 data sheet"),
    "l4": Device("L4", "sm_89", 58, 2.04e9, 121e12, 60e12, 0.3e12, "NVIDIA L4 data sheet"),
    "l40s": Device("L40S", "sm_89", 142, 2.52e9, 362e12, 183e12, 0.864e12,
                   "NVIDIA L40S data sheet"),
    "rtx4090": Device("RTX 4090", "sm_89", 128, 2.52e9, 165.2e12, 82.6e12, 1.008e12,
                      "NVIDIA Ada GPU architecture whitepaper"),
    "rtx5090": Device("RTX 5090", "sm_120", 170, 2.407e9, 209.5e12, 104.8e12, 1.792e12,
                      "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    "mi300x": Device("MI300X", "gfx942", 304, 2.1e9, 1307.4e12, 653.7e12, 5.3e12,
                     "AMD Instinct MI300X data sheet"),
    "mi355x": Device("MI355X", "gfx950", 256, 2.4e9, 2516.6e12, 157.3e12, 8.0e12,
                     "AMD Instinct MI355X data sheet"),
}  # fmt: skip
