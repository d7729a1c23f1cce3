"""`python -m benchmarks.penalty_forms RUN`: R1 by differences beside the exact penalty, on the
discriminator of a run: its value and spread for several lengths of the difference, and the time of
a training step with R1 and R2 in either form, and in none. Not for: which trains better
(benchmarks/recipes.py).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

COMMAND = "python -m benchmarks.penalty_forms"
LENGTHS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.1)
IMAGES, DRAWS = 64, 200


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="R1 by differences beside the exact penalty: value, spread and time.",
        epilog=f"Example: {COMMAND} runs/000-blue-marble-dcgan64 --out benchmarks/results",
    )
    parser.add_argument("run", type=Path, help="folder of a run whose D has no BatchNorm")
    parser.add_argument("--data", default="blue-marble", help="its images; default blue-marble")
    parser.add_argument("--batch", type=int, default=16, help="of the timed steps; default 16")
    parser.add_argument("--width", type=int, default=32, help="of the timed nets; default 32")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing; default 15")
    parser.add_argument("--out", type=Path, help="folder for penalty_forms.md")
    given = parser.parse_args(arguments)
    lines = [
        "# R1 and R2 by differences",
        "",
        *values(given.run, given.data),
        "",
        *times(given.batch, given.width, given.rounds),
        "",
        "```",
        f"{COMMAND} {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        "```",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        (given.out / "penalty_forms.md").write_text(text, encoding="utf-8")
    return 0


def values(run: Path, data: str) -> list[str]:
    """A table: by length of the difference, the mean over draws beside the exact value."""
    import torch

    from fastdcgan.data import prepare
    from fastdcgan.latent.draw import load_discriminator
    from fastdcgan.metrics.features import chunks
    from fastdcgan.training import regularisers

    netD = load_discriminator(run).requires_grad_(False)
    packed = prepare(data, size=netD.size, channels=netD.channels)
    rows = torch.randperm(packed.n, generator=torch.Generator().manual_seed(0)).numpy()
    pixels = next(chunks(packed, rows, IMAGES))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    gradients = regularisers.image_gradients(netD, images).detach()
    exact = float(regularisers.zero_centred(gradients, 2.0))
    lines = []
    for length in LENGTHS:
        with torch.no_grad():
            found = [
                float(regularisers.difference(netD, images, 2.0, step=length)) for _ in range(DRAWS)
            ]
        mean, spread = statistics.mean(found), statistics.stdev(found)
        sure = spread / DRAWS**0.5
        name = f"{length:g} (the default)" if length == regularisers.STEP else f"{length:g}"
        lines.append(f"| {name} | {mean / exact:.3f} ± {sure / exact:.3f} | {spread / exact:.2f} |")
    return [
        f"E[|grad D(x)|^2] at {IMAGES} images of {data}, D of a run: exactly {exact:.4g}. By "
        f"differences, {DRAWS} draws of the noise, float32:",
        "",
        "| length s | mean / exact | spread of one draw / exact |",
        "|---|---|---|",
        *lines,
    ]


def times(batch: int, width: int, rounds: int) -> list[str]:
    """A table: milliseconds of a step with no penalty, and with R1 and R2 in both forms."""
    import torch

    from benchmarks import ours
    from benchmarks.recipes import machine

    common = {"ngf": width, "ndf": width, "loss": "relativistic", "norm_d": "none"}
    both = {**common, "r1": 1.0, "r2": 1.0}
    ways = {
        "no penalty": common,
        "exact": both,
        "difference": {**both, "penalty_form": "difference"},
        "exact, every 4 steps": {**both, "penalty_every": 4},
        "difference, every 4 steps": {**both, "penalty_form": "difference", "penalty_every": 4},
    }
    steps = {
        name: ours.step(torch.device("cpu"), batch, **flags).run for name, flags in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(4):
                step()
            if turn:
                seconds[name].append((time.perf_counter() - start) / 4)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    rows = [
        f"| {name} | {1000 * value:.1f} | {value / found['no penalty']:.2f} |"
        for name, value in found.items()
    ]
    return [
        f"{machine()}, {torch.get_num_threads()} threads; a step of {batch} images, ngf and ndf "
        f"{width}, float32, eager, medians of {rounds} rounds in turn:",
        "",
        "| R1 and R2 | ms | beside no penalty |",
        "|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    sys.exit(main())
