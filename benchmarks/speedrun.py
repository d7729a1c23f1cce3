"""`python -m benchmarks.speedrun`: how long it takes on this machine to train a generator of
Fashion-MNIST to a KID, all by the public interface. The target and the results so far stand in one
table, which the command reads, and extends with --record. Not for: images per second (pytest
benchmarks/), recipes for other data (benchmarks/recipes.py).
"""

import argparse
import datetime
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

COMMAND = "python -m benchmarks.speedrun"
TABLE = Path(__file__).parent / "results" / "speedrun.md"
FEATURES, N = "lite0", 2000
RECIPE: dict[str, Any] = {
    "data": "fashion-mnist", "image_size": 32, "batch_size": 32, "ngf": 32, "ndf": 32,
    "lr_g": 5e-4, "lr_d": 2e-4, "spectral_norm": True,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where the target was not reached in time."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train on Fashion-MNIST until the generator's KID is that of the table, and "
        "say how long that took.",
        epilog=f"Example: {COMMAND} --minutes 30 --record",
    )
    parser.add_argument("--minutes", type=float, default=30, help="give up after; default 30")
    parser.add_argument("--every", type=int, default=250, help="steps between looks; default 250")
    parser.add_argument("--batch-size", type=int, help=f"default {RECIPE['batch_size']}")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N; default auto")
    parser.add_argument("--no-amp", action="store_true", help="float32 throughout")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default {TABLE.name}")
    parser.add_argument("--record", action="store_true", help="add a row to the table")
    given = parser.parse_args(arguments)
    wanted = target(given.table.read_text(encoding="utf-8"))
    print(f"target: KID[{FEATURES}] {wanted:g} at n = {N:,}")
    row, name = run(given, wanted)
    if row is None:
        print(f"not reached in {given.minutes:g} minutes", file=sys.stderr)
        return 1
    print(
        f"KID {row['kid']:.4f} after {row['seconds']:.1f} s of training and {row['images']:,} "
        f"images ({row['step']:,} steps) on {name}; evaluations are not in the time"
    )
    if given.record:
        with given.table.open("a", encoding="utf-8") as table:
            words = " ".join(sys.argv[1:] if arguments is None else arguments)
            table.write(line(row, name, f"{COMMAND} {words}") + "\n")
    return 0


def target(table: str) -> float:
    """The KID that the table asks for.

    Raises:
        SystemExit: it names none.
    """
    found = re.search(r"^Target: KID\[lite0\] ([0-9.]+) at n = 2,000", table, re.MULTILINE)
    if found is None:
        raise SystemExit("the table has no line 'Target: KID[lite0] ... at n = 2,000'")
    return float(found[1])


def run(given: argparse.Namespace, wanted: float) -> tuple[dict[str, Any] | None, str]:
    """The first evaluation that reaches the target, None: there was none in time; and the
    machine's name."""
    from fastdcgan.hardware import pick_device
    from fastdcgan.training import TrainConfig, train

    device = pick_device(given.device)
    reached: list[dict[str, Any]] = []

    def look(row: dict[str, Any]) -> bool:
        if row["kid"] <= wanted:
            reached.append(row)
        return bool(reached)

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **RECIPE, seed=given.seed, device=str(device), amp=not given.no_amp,
            compile=not given.no_compile, epochs=10**6, max_minutes=given.minutes,
            eval_every=given.every, eval_n=N, eval_features=FEATURES, best_by="kid",
            sample_every=10**9, tensorboard=False, out=Path(folder) / "run",
        )  # fmt: skip
        if given.batch_size is not None:
            config = replace(config, batch_size=given.batch_size)
        train(config, on_evaluation=look)
    return (reached[0] if reached else None), name_of(device)


def name_of(device: Any) -> str:
    """The graphics card, or the processor and its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    brand = get_cpu_info().get("brand_raw", device.type)
    return f"{brand}, {torch.get_num_threads()} threads"


def line(row: dict[str, Any], name: str, words: str) -> str:
    """A row of the table."""
    import torch

    return (
        f"| {datetime.date.today()} | {name}, torch {torch.__version__} | {row['seconds']:.1f} "
        f"| {row['images']:,} | {row['step']:,} | {row['kid']:.4f} | `{words.strip()}` |"
    )


if __name__ == "__main__":
    sys.exit(main())
