"""Checks in processes of their own: what could take this one down, needs its own environment, or
would keep the user waiting runs beside the others. Each compiles something that no cache has, so
that a broken compiler is not hidden by what it made while it worked.

Two of them are functions here, `compiled` and `interpreted`; the third is
`python -m fastdcgan_kernels.inspect`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from fastdcgan.diagnosis.rows import Row, first_line

PATIENCE = 300  # seconds; on two free cores the longest of them took 18
PRINT = "import json; from fastdcgan.diagnosis import apart; print(json.dumps(apart.{}))"
COMPILER = (
    "install a C++ compiler (Debian: apt install g++) or point CXX to one; until then train "
    "without --compile"
)
LAYER, ARCH = "G2 forward, hybrid", "sm_90"


class Apart:
    """A check in another process, begun at once; `rows` waits for it.

    Args:
        name: of the row.
        arguments: of `python`.
        judge: makes the verdict of what was printed; called with the exit status and stdout.
        advice: for whoever sees it fail.
        environment: on top of this process's own.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        judge: Callable[[int, str], Row],
        *,
        advice: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self._judge, self._advice = name, judge, advice
        own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        own |= {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=own | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rows(self) -> Iterable[Row]:
        """The row of this check."""
        try:
            out, err = self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.stop()
            yield Row(self.name, "failed", f"no answer in {PATIENCE} s", self._advice)
            return
        try:
            yield self._judge(self._process.returncode, out)
        except (ValueError, KeyError, IndexError, TypeError):  # it printed something else
            said = [line for line in err.splitlines() if line.strip()]
            why = said[-1].strip() if said else f"ended with status {self._process.returncode}"
            yield Row(self.name, "failed", why, self._advice)

    def stop(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def begin(device: torch.device) -> list[Apart]:
    """Those for this device. A GPU runs the kernels themselves (blocks.py), and may be set to take
    one process only. A Triton that cannot be imported is said elsewhere (machine.py)."""
    if device.type == "cuda":
        return []
    found = [torch_compile(str(device))]
    with suppress(ImportError):
        import_module("triton")
        found += [interpreter(), compiler()]
    return found


def torch_compile(device: str) -> Apart:
    """`compiled` in a process with one thread: it has no pool of compilers to start and to end."""
    return Apart(
        "torch.compile",
        ["-c", PRINT.format(f"compiled({device!r})")],
        lambda status, out: compiled_row(json.loads(out)),
        advice=COMPILER,
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )


def compiled_row(found: dict[str, Any]) -> Row:
    """What `compiled` found, as a row."""
    if found["wrong"]:
        return Row("torch.compile", "failed", found["wrong"], COMPILER)
    detail = f"a loss and its gradient, in {found['seconds']:.1f} s, are those of eager PyTorch"
    return Row("torch.compile", "ok", detail, values=found)


def interpreter() -> Apart:
    """Every Triton kernel in Triton's interpreter on small shapes, against float64."""
    advice = "reinstall triton (pip install --force-reinstall triton), or report this"

    def judge(status: int, out: str) -> Row:
        found = json.loads(out)
        if found["wrong"] and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
            detail = "Triton's interpreter before 3.7 does not know numpy 2.4; GPUs do not need it"
            return Row("Triton kernels", "not possible here", detail, "update triton", found)
        if found["wrong"]:
            detail = f"{len(found['wrong'])} of {found['runs']} small runs; {found['wrong'][0]}"
            return Row("Triton kernels", "failed", detail, advice, found)
        return Row(
            "Triton kernels",
            "ok",
            f"{len(found['kernels'])} kernels, interpreted in {found['runs']} small runs, are "
            "right in float32",
            values=found,
        )

    environment = {"TRITON_INTERPRET": "1", "FASTDCGAN_IMPL": "triton", "OMP_NUM_THREADS": "1"}
    return Apart(
        "Triton kernels",
        ["-c", PRINT.format("interpreted()")],
        judge,
        advice=advice,
        environment=environment,
    )


def compiler() -> Apart:
    """One layer's kernels, compiled ahead of time down to the machine code of one target."""
    advice = "reinstall triton (pip install --force-reinstall triton), or report this"

    def judge(status: int, out: str) -> Row:
        rows = json.loads(out)
        kernels = ", ".join(row["kernel"] for row in rows)
        matrix = sum(row["matrix_instructions"] for row in rows)
        wrong = status != 0  # compiled, and a figure is not as it should be
        return Row(
            "Triton compiler",
            "warning" if wrong else "ok",
            f"{LAYER.split()[0]}'s {len(rows)} forward kernels for {ARCH} ({kernels}): {matrix} "
            "matrix instructions" + ("; spills, or too much shared memory" if wrong else ""),
            "update triton: a kernel comes out worse than it should" if wrong else "",
            {"arch": ARCH, "kernels": len(rows)},
        )

    arguments = ["-m", "fastdcgan_kernels.inspect", "--layer", LAYER, "--arch", ARCH]
    return Apart(
        "Triton compiler",
        [*arguments, "--json", "--jobs", "1"],
        judge,
        advice=advice,
        environment={"TRITON_ALWAYS_COMPILE": "1"},
    )


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def compiled(name: str) -> dict[str, Any]:
    """torch.compile of a loss and its gradient on this device, by whatever compiler it finds:
    {"wrong", "seconds"}."""
    import random
    import time

    slope = random.uniform(0.1, 0.3)  # a constant of the code that is made

    def loss(logits: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.leaky_relu(logits, slope)
        return torch.nn.functional.softplus(-logits).mean()  # the loss on "real"

    start, wrong = time.perf_counter(), ""
    try:
        device = torch.device(name)
        logits = torch.linspace(-3, 3, 64, device=device).requires_grad_()
        found = loss(logits), *torch.autograd.grad(loss(logits), logits)
        value = torch.compile(loss, fullgraph=True)(logits)
        ours = value, *torch.autograd.grad(value, logits)
        for mine, eager in zip(ours, found, strict=True):
            torch.testing.assert_close(mine, eager)
    except Exception as error:  # whatever a compiler raises
        wrong = first_line(error)
    return {"wrong": wrong, "seconds": time.perf_counter() - start}


def interpreted() -> dict[str, Any]:
    """Every kernel on small shapes: {"kernels", "runs", "wrong"}."""
    from fastdcgan_kernels.gpu import launch
    from fastdcgan_kernels.tuner import trials

    cpu, runs, wrong = torch.device("cpu"), 0, []
    kernels: set[str] = set()
    for name, asked, candidate in _questions():
        try:
            trial: Any = trials.trial_of(asked, cpu)
            run = trial.prepare(candidate)
            with launch.recording() as launches:
                run()
            kernels |= {launch.kernel.fn.__name__ for launch in launches}
            why = trial.wrong(run())
        except Exception as error:  # whatever an interpreter raises
            why = first_line(error)
        runs += 1
        if why:
            wrong.append(f"{name}: {why}")
    return {"kernels": sorted(kernels), "runs": runs, "wrong": wrong}


def _questions() -> Iterable[tuple[str, Any, Any]]:
    """(name, question, candidate): small ones that launch every kernel there is."""
    from fastdcgan_kernels.choice.geometry import Geometry, Tile
    from fastdcgan_kernels.choice.types import Block, Task

    every, plain = ("hybrid", "materialised", "prologue", "vendor"), ("hybrid",)
    for name, transposed, geometry, norm, ways in (
        ("project", True, Geometry(2, 1, 1, 16, 4, 4, 8, 1, 0), True, plain),
        ("transposed", True, Geometry(2, 2, 2, 16, 4, 4, 8, 2, 1), True, every),
        ("to an image", True, Geometry(2, 4, 4, 8, 8, 8, 3, 2, 1), False, every[:3]),
        ("from an image", False, Geometry(2, 4, 4, 8, 8, 8, 3, 2, 1), False, plain),
        ("convolution", False, Geometry(2, 2, 2, 16, 4, 4, 8, 2, 1), True, every),
        ("collapse", False, Geometry(2, 1, 1, 1, 4, 4, 16, 1, 0), False, every[:3]),
    ):
        for how in ways:
            yield f"{name}, {how}", Block(transposed, geometry, torch.float32, norm, 1), how
    geometry, tile = Geometry(2, 4, 4, 16, 8, 8, 16, 2, 1), Tile(32, 16, 16, warps=1, stages=1)
    for op, epilogue, more in (
        ("conv", "statistics", {"split": 2}),
        ("conv_transposed", "store", {"engine": "descriptors"}),
        ("weight_gradient", "store", {"engine": "descriptors"}),
    ):
        task = Task(op, geometry, torch.float32, "none", epilogue, 1)
        yield f"{op}, {', '.join(more)}", task, replace(tile, **more)
