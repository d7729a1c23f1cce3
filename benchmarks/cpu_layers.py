"""The nets' layers on this CPU in float32: milliseconds and GFLOP/s of the kernels of
fastdcgan_kernels.cpu and of PyTorch's convolutions (oneDNN, channels_last), in turns.

    python -m benchmarks.cpu_layers [batch] [part of a layer's name]

"Effective" counts a direct convolution's arithmetic, "real" what the kernel multiplies; see
docs/cpu.md.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from fastdcgan_kernels import convolution as plain
from fastdcgan_kernels.choice.geometry import Geometry, cdiv, empty
from fastdcgan_kernels.cpu import convolution

ROUNDS = 11
# (pixels of the small side, of the large one, CS, CL, kernel, stride, padding above and left)
LAYERS = {
    # Conv of D, transposed conv of G.
    "D1, G5": (32, 64, 64, 3, 4, 2, 1),
    "D2, G4": (16, 32, 128, 64, 4, 2, 1),
    "D3, G3": (8, 16, 256, 128, 4, 2, 1),
    "D4, G2": (4, 8, 512, 256, 4, 2, 1),
    # Of TensorFlow's tutorial, padding "same": one more below and on the right with stride 2.
    "tutorial 1-64 channels, 5x5/2": (14, 28, 64, 1, 5, 2, 1),
    "tutorial 64-128, 5x5/2": (7, 14, 128, 64, 5, 2, 1),
    "tutorial 128-256, 5x5/1": (7, 7, 256, 128, 5, 1, 2),
    "64-128, 5x5/2, padding 2": (7, 14, 128, 64, 5, 2, 2),
    # Of SNGAN's critic.
    "critic 3-64, 3x3/1": (32, 32, 64, 3, 3, 1, 1),
    "critic 64-64, 3x3/1": (32, 32, 64, 64, 3, 1, 1),
    "critic 128-128, 3x3/1": (16, 16, 128, 128, 3, 1, 1),
    "critic 256-256, 3x3/1": (8, 8, 256, 256, 3, 1, 1),
    "critic 512-512, 3x3/1": (4, 4, 512, 512, 3, 1, 1),
}


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
    side = convolution.tile(g)
    tiles = cdiv(g.P, side) * cdiv(g.Q, side)
    return convolution.products(g, side) * tiles / (g.P * g.Q * g.kernel**2)


def main(batch: int, part: str) -> None:
    """Print the table."""
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"matrix product of PyTorch: {peak():.0f} GFLOP/s\n")  # fmt: skip
    print("| layer | | ms | effective GFLOP/s | real | oneDNN ms | GFLOP/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (p, h, cs, cl, kernel, stride, pad) in LAYERS.items():
        if part not in name:
            continue
        g = Geometry(batch, p, p, cs, h, h, cl, stride, pad, kernel)
        like = torch.empty(0)
        small, large, weight = (
            empty(*shape, like).normal_()
            for shape in ((batch, cs, p, p), (batch, cl, h, h), (cs, cl, kernel, kernel))
        )

        def gradients(need_x: bool, g=g, small=small, large=large, weight=weight):  # type: ignore[no-untyped-def]
            return plain.gradients(
                small, large, weight, g.stride, g.sides(False), False, need_x, not need_x
            )

        tasks: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "down": (
                lambda g=g, x=large, w=weight: convolution.convolve(x, w, g, False),
                lambda g=g, x=large, w=weight: plain.convolve(
                    x, w, None, g.stride, g.sides(False), False
                ),
            ),
            "up": (
                lambda g=g, x=small, w=weight: convolution.convolve(x, w, g, True),
                lambda run=gradients: run(True),
            ),
            "weight gradient": (
                lambda g=g, y=small, x=large: convolution.weight_gradient(y, x, g),
                lambda run=gradients: run(False),
            ),
        }
        flops = 2 * batch * p * p * cs * cl * kernel**2 / 1e9
        for task, functions in tasks.items():
            if cl <= 4 and task != "up":
                continue  # PyTorch's own
            own, other = medians(*functions)
            print(
                f"| {name} | {task} | {own * 1e3:.1f} | {flops / own:.0f} | "
                f"{flops * share(g, task) / own:.0f} | {other * 1e3:.1f} | {flops / other:.0f} | "
                f"{other / own:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64, "".join(sys.argv[2:3]))
