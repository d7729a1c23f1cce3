"""The nets' layers on this CPU in float32: milliseconds and GFLOP/s of the kernels of
fastdcgan_kernels.cpu and of PyTorch's convolutions (oneDNN, channels_last), in turns.

    python -m benchmarks.cpu_layers [batch]

"Effective" counts a direct convolution's arithmetic, "real" what the kernel multiplies; see
docs/cpu.md.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from fastdcgan_kernels.choice.geometry import Geometry, empty
from fastdcgan_kernels.cpu import convolution

ROUNDS = 11
# Names of the layers that share a shape (conv of D, transposed conv of G): pixels, CS, CL.
LAYERS = {"D1, G5": (32, 64, 3), "D2, G4": (16, 128, 64), "D3, G3": (8, 256, 128),
          "D4, G2": (4, 512, 256)}  # fmt: skip


def medians(*functions: Callable[[], object]) -> list[float]:
    """Seconds of each, taken in turns after two that do not count."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(ROUNDS + 2):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ >= 2:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def peak() -> float:
    """GFLOP/s of the largest matrix product that the layers have, by PyTorch."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 512)
    return 2 * 4096 * 4096 * 512 / medians(lambda: a @ b)[0] / 1e9


def share(g: Geometry, task: str) -> float:
    """Multiplications of the kernel for one of a direct convolution."""
    runs = convolution.has_winograd if task == "weight gradient" else convolution.pays
    if not runs(g):
        return 1.0
    large = g.P % 4 == 0 and g.Q % 4 == 0 and g.CS * g.CL <= 128 * 256  # as winograd.cpp chooses
    return 25 / 64 if large else 9 / 16


def main(batch: int) -> None:
    """Print the table."""
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"matrix product of PyTorch: {peak():.0f} GFLOP/s\n")  # fmt: skip
    print("| layer | | ms | effective GFLOP/s | real | oneDNN ms | GFLOP/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (side, cs, cl) in LAYERS.items():
        g = Geometry(batch, side, side, cs, 2 * side, 2 * side, cl, 2, 1)
        like = torch.empty(0)
        small, large, weight = (
            empty(*shape, like).normal_()
            for shape in ((batch, cs, side, side), (batch, cl, g.H, g.W), (cs, cl, 4, 4))
        )

        def gradients(*mask: bool, g=g, small=small, large=large, weight=weight):  # type: ignore[no-untyped-def]
            return torch.ops.aten.convolution_backward(
                small, large, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask
            )

        tasks: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "down": (
                lambda g=g, x=large, w=weight: convolution.convolve(x, w, g, False),
                lambda x=large, w=weight: torch.conv2d(x, w, None, 2, 1),
            ),
            "up": (
                lambda g=g, x=small, w=weight: convolution.convolve(x, w, g, True),
                lambda run=gradients: run(True, False, False),
            ),
            "weight gradient": (
                lambda g=g, y=small, x=large: convolution.weight_gradient(y, x, g),
                lambda run=gradients: run(False, True, False),
            ),
        }
        flops = 2 * batch * side * side * cs * cl * 16 / 1e9
        for task, functions in tasks.items():
            if cl <= 4 and task != "up":
                continue  # PyTorch's own
            own, other = medians(*functions)
            print(
                f"| {name} | {task} | {own * 1e3:.1f} | {flops / own:.0f} | "
                f"{flops * share(g, task) / own:.0f} | {other * 1e3:.1f} | {flops / other:.0f} | "
                f"{other / own:.2f} |"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
