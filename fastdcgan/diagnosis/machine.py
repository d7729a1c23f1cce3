"""What is in this machine and what is installed on it, one row each. Nothing here computes anything
on the device."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdcgan.diagnosis.rows import Row, first_line, guarded
from fastdcgan.hardware import amp_dtype
from fastdcgan_kernels.choice import targets

GIB = 2**30
INSTALL = "install a build of PyTorch for this GPU: https://pytorch.org/get-started/locally"


def dtypes(device: torch.device) -> list[torch.dtype]:
    """In which the device multiplies natively, float32 first."""
    found = [torch.float32]
    if device.type == "cuda":
        found.append(torch.float16)
    native = amp_dtype(device)
    if native is not None and native not in found:
        found.append(native)
    return found


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def facts(device: torch.device) -> list[Row]:
    """Hardware and software, as asked of each."""
    parts = {
        "GPU": lambda: _gpus(device),
        "GPU driver": _driver,
        "PyTorch": _torch,
        "Triton": _triton,
        "Python": _python,
        "C++ compiler": _cpp,
        "ptxas": _ptxas,
        "CPU": _cpu,
        "number formats": lambda: _formats(device),
        "memory": _memory,
    }
    return [row for name, part in parts.items() for row in guarded(name, part)]


def _gpus(device: torch.device) -> Iterable[Row]:
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        arch = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
        target = targets.target_of(torch.device("cuda", index))
        yield Row(
            f"cuda:{index}",
            "ok" if target else "warning",
            f"{found.name}, {found.total_memory / GIB:.0f} GiB, {found.multi_processor_count} "
            f"multiprocessors, {arch}"
            + (f"; kernels as for {target.name}" if target else "; no fused kernels for it"),
            ""
            if target
            else "blocks run as plain PyTorch; kernels need Triton and one of "
            + ", ".join(targets.TARGETS),
            {"name": found.name, "arch": arch, "memory_bytes": found.total_memory},
        )
    if device.type != "cuda":
        yield Row(
            "device", "warning", f"{device} is examined, and there is a GPU", "leave --device away"
        )


def _no_gpu() -> Row:
    """Why PyTorch sees no GPU; a warning where the machine has one."""
    found = _nvml()
    if found is None:
        if Path("/dev/kfd").exists() and not torch.version.hip:
            return Row("GPU", "warning", "an AMD GPU, and a PyTorch without ROCm", INSTALL)
        return Row("GPU", "not possible here", "none that PyTorch or a driver sees")
    why = "torch.cuda is not available"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
    advice = (
        INSTALL
        if torch.version.cuda is None
        else "update the driver, look at CUDA_VISIBLE_DEVICES and at `nvidia-smi`"
    )
    return Row("GPU", "warning", f"{found['count']} by the driver, none by PyTorch: {why}", advice)


def _nvml() -> dict[str, Any] | None:
    """NVIDIA's driver by its management library; None where there is none."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "count": nvml.nvmlDeviceGetCount(),
        }
    finally:
        nvml.nvmlShutdown()


def _driver() -> Iterable[Row]:
    found = _nvml()
    amd = Path("/sys/module/amdgpu/version")
    if found is not None:
        detail = f"NVIDIA {found['driver']}, for CUDA up to {found['cuda']}"
        yield Row("GPU driver", "ok", detail, values=found)
    elif amd.is_file():
        yield Row("GPU driver", "ok", f"amdgpu {amd.read_text().strip()}")
    elif torch.cuda.is_available():
        yield Row("GPU driver", "ok", "there; it does not tell its version")
    else:
        yield Row("GPU driver", "not possible here", "none")


def _torch() -> Iterable[Row]:
    built = "for the CPU alone"
    if torch.version.hip:
        built = f"with ROCm {torch.version.hip}"
    elif torch.version.cuda:
        built = f"with CUDA {torch.version.cuda}"
    yield Row(
        "PyTorch",
        "ok",
        f"{torch.__version__}, built {built}",
        values={
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
    )


def _triton() -> Iterable[Row]:
    try:
        import triton
    except ImportError as error:
        yield Row(
            "Triton",
            "warning" if find_spec("triton") is None else "failed",
            first_line(error),
            "pip install triton (Linux): without it blocks run as plain PyTorch",
        )
        return
    yield Row("Triton", "ok", triton.__version__, values={"triton": triton.__version__})


def _python() -> Iterable[Row]:
    from fastdcgan import __version__

    found = {"python": platform.python_version(), "fastdcgan": __version__}
    for name in ("numpy", "pillow", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            yield Row(name, "failed", "not installed", f"pip install {name}")
    words = ", ".join(f"{name} {number}" for name, number in list(found.items())[1:])
    where = f"{platform.system()} {platform.machine()}"
    yield Row("Python", "ok", f"{found['python']} on {where}; {words}", values=found)


def _cpp() -> Iterable[Row]:
    """The compiler that torch.compile calls: $CXX, else g++ (clang++ on macOS)."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name)
    if path is None:
        yield Row(
            "C++ compiler",
            "warning",
            f"{name} was not found",
            "install g++ or point CXX to a compiler: --compile needs one on a CPU",
        )
        return
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    line = next(iter(said.stdout.splitlines()), "says nothing")
    yield Row("C++ compiler", "ok" if said.returncode == 0 else "warning", f"{line} ({path})")
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
        release = re.search(r"release (\S+?),", said.stdout)
        yield Row("nvcc", "ok", f"{release[1] if release else '?'} ({nvcc}); nothing here needs it")


def _ptxas() -> Iterable[Row]:
    """The assembler that Triton brings (or $TRITON_PTXAS_PATH) for NVIDIA's GPUs."""
    try:
        import triton
    except ImportError:
        return
    tool = triton.knobs.nvidia.ptxas
    yield Row("ptxas", "ok", f"{tool.version} ({tool.path})", values={"ptxas": tool.version})


def _cpu() -> Iterable[Row]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    few = bool(usable and threads * 2 < usable and "OMP_NUM_THREADS" in os.environ)
    yield Row(
        "CPU",
        "warning" if few else "ok",
        f"{_cpu_model()}, {usable} of {os.cpu_count()} logical cores for this process, "
        f"{threads} PyTorch threads",
        "more threads would be faster: unset OMP_NUM_THREADS" if few else "",
        {"model": _cpu_model(), "cores": usable, "threads": threads},
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _formats(device: torch.device) -> Iterable[Row]:
    found = [short(dtype) for dtype in dtypes(device)]
    if device.type == "cuda" and torch.cuda.is_tf32_supported():
        found.insert(1, "tf32")
    amp = amp_dtype(device)
    yield Row(
        "number formats",
        "ok",
        f"{device.type} multiplies natively in {', '.join(found)}; --amp is "
        + (short(amp) if amp else "float32, as without it"),
        values={"native": found, "amp": amp and short(amp)},
    )
    # torch.cpu has the finer questions without public names up to 2.14 (see hardware.py).
    sets = {
        "AVX-512": "_is_avx512_supported",
        "AVX-512 bf16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
        "AMX fp16": "_is_amx_fp16_supported",
    }
    has = {name: bool(getattr(torch.cpu, asked, bool)()) for name, asked in sets.items()}
    words = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    yield Row(
        "CPU instructions",
        "ok",
        f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}; {words}",
        values=has,
    )


def _memory() -> Iterable[Row]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        yield Row("memory", "not possible here", "this system does not say how much there is")
        return
    with suppress(OSError, ValueError):  # a container's own limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    small = total < 4 * GIB
    yield Row(
        "memory",
        "warning" if small else "ok",
        f"{total / GIB:.1f} GiB",
        "training the standard nets wants 4 GiB or more: give smaller batches" if small else "",
        {"memory_bytes": total},
    )
