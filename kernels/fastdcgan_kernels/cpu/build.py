"""The C++ of this folder as a loaded library: compiled on first use, and kept in the cache folder
under a name that says what of and what for. Not here: what it computes.

The compiler is $CXX, else c++, g++ or clang++. The library is not linked with an OpenMP runtime: it
finds the one that PyTorch has loaded, and so shares its threads (common.h).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from ..choice import measured

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADER = Path(__file__).with_name("common.h")
PATIENCE = 300  # seconds for a compilation that takes fourteen

pointer, integer, small, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
TENSOR = [pointer, small]  # and whether it is bfloat16
SHAPE = [integer] * 11  # sides, kernel and padding: convolution.py, _shape
ARGUMENTS = {
    "fastdcgan_down": [*TENSOR, pointer, pointer, *TENSOR, small, *SHAPE, number, small],
    "fastdcgan_up": [*TENSOR, pointer, pointer, *TENSOR, small, *SHAPE, number, small],
    "fastdcgan_image_up": [*TENSOR, *[pointer] * 3, *SHAPE, number, small],
    "fastdcgan_weight_gradient": [*TENSOR, *TENSOR, pointer, small, *SHAPE, small],
    "fastdcgan_dropout": [pointer] * 3 + [integer] * 2 + [number, small, small],
    "fastdcgan_norm": [*[pointer] * 5, *TENSOR, *[integer] * 3, number, number, small],
    "fastdcgan_norm_gradient": [*TENSOR, *[pointer] * 8, *[integer] * 3, number, number, small],
}


class Unavailable(Exception):
    """Why there is no library, in one line."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None, and one warning in a process, where it cannot be had."""
    try:
        return _load(_compiled())
    except Unavailable as why:
        warnings.warn(
            f"the fast CPU kernels are off ({why}): blocks run in plain PyTorch; install a C++ "
            "compiler, or name one in CXX",
            stacklevel=2,
        )
        return None


def compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        Unavailable: there is none.
    """
    given = os.environ.get("CXX")
    for command in [given] if given else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise Unavailable(f"no C++ compiler: {f'CXX={given}' if given else 'c++, g++, clang++'}")


def _compiled() -> Path:
    """The library's file, made if need be. Processes that meet here each compile and put the same
    file in the same place."""
    command = compiler()
    about = [_run([*command, "--version"]), _processor(), " ".join([*command, *FLAGS])]
    content = [path.read_text("utf-8") for path in (*SOURCES, HEADER)]
    key = hashlib.sha256("\0".join(about + content).encode()).hexdigest()[:16]
    folder = measured.cache_file("cpu").parent
    path = folder / f"cpu-{key}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".cpu-", dir=folder)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror}") from None
    try:
        made = Path(work) / path.name
        _run([*command, *FLAGS, "-o", str(made), *map(str, SOURCES)])
        os.replace(made, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        wrong = next((line for line in said if "error" in line), said[0] if said else "no reason")
        raise Unavailable(f"{command[0]} failed: {wrong}") from None
    return done.stdout


def _processor() -> str:
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    kept = dict.fromkeys(line for line in lines if line.split("\t")[0] in wanted)
    return "\n".join([platform.machine(), *kept])


def _load(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
        for name, arguments in ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} does not load: {error}") from None
    return found
