"""What the machine can do: which device, which precision. Each question is answered by asking the
machine, never by a table of product names."""

import os
import platform
from pathlib import Path

import torch

from fastdcgan.errors import InputError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is CUDA (this process's own), else MPS, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"--device {name} was given; known are auto, cpu, cuda, cuda:N, mps"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise InputError(
                f"--device {name} was given; torch {torch.__version__} sees {count} CUDA devices"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name} was given; torch {torch.__version__} sees no MPS device")
    if device.type not in ("cpu", "mps"):
        raise InputError(f"--device {name} was given; known are auto, cpu, cuda, cuda:N, mps")
    return device


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which matrix products should run: bfloat16 where the device computes it
    natively, float16 on older CUDA devices (the gradients then need scaling), None (stay in
    float32) elsewhere: emulated bf16 on a CPU is many times slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return None


def _cpu_has_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        # torch.cpu has these without a public name up to 2.14; oneDNN's own answer counts AVX-512
        # without bf16 instructions as support.
        asked = (
            getattr(torch.cpu, name, None)
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return any(supported() for supported in asked if supported is not None)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_allowed_threads(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Lowers torch's threads to the processors that a container may use, unless OMP_NUM_THREADS
    says how many: torch counts the machine's, and threads that take turns wait for each other.

    Args:
        cpu_max: Linux's file of the limit (cgroup v2): "QUOTA PERIOD" in microseconds, or "max".

    Returns:
        The threads that are used now.
    """
    try:
        quota, period = cpu_max.read_text().split()
        allowed = max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such limit
        allowed = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)
    return torch.get_num_threads()
