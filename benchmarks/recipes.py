"""`python -m benchmarks.recipes`: training recipes side by side at equal time on this machine, by
FID and KID. Each runs alone, through the same commands that a user types, which the page repeats.
Not for: speed (pytest benchmarks/), search (`python -m fastdcgan.tune`).
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.parity import machine

COMMAND = "python -m benchmarks.recipes"
SCORES = ("kid", "fid", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Trained:
    """One recipe after its time."""

    preset: str
    commands: tuple[list[str], ...]
    """Of training and of evaluation, without the interpreter."""
    steps: int
    images_per_second: float
    report: dict[str, Any]
    """What `fastdcgan.evaluate --json` printed."""
    grid: Path
    """Its last sheet of samples."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where one of its commands fails."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train recipes for equal time, one after another, and compare FID and KID.",
        epilog=f"Example: {COMMAND} --data fashion-mnist --image-size 32 --minutes 15 "
        "dcgan small-data --out benchmarks/results/recipes",
    )
    parser.add_argument("presets", nargs="+", help="names of presets; the first is the baseline")
    parser.add_argument("--data", default="fashion-mnist", help="source; default fashion-mnist")
    parser.add_argument("--image-size", type=int, default=32, help="pixels; default 32")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each; default 15")
    parser.add_argument("--n", type=int, default=5000, help="images that are scored; default 5000")
    parser.add_argument("--name", help="of the page; default that of the data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its sheets")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; kept")
    given = parser.parse_args(arguments)
    try:
        found = [
            train(preset, given.data, given.image_size, given.minutes, given.n, given.runs)
            for preset in given.presets
        ]
    except subprocess.CalledProcessError as error:
        print(f"{shlex.join(error.cmd)} failed:\n{error.stderr}", file=sys.stderr)
        return 1
    name = given.name or Path(given.data).stem
    given.out.mkdir(parents=True, exist_ok=True)
    for one in found:
        (given.out / f"{name}-{one.preset}.png").write_bytes(one.grid.read_bytes())
    text = page(name, found, given.minutes)
    (given.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def train(preset: str, data: str, size: int, minutes: float, n: int, runs: Path) -> Trained:
    """Trains one recipe in a process of its own and scores its averaged generator."""
    run = runs / f"{Path(data).stem}-{preset}"
    training = [
        *("fastdcgan.train", "--preset", preset, "--data", data, "--image-size", str(size)),
        *("--epochs", "100000", "--max-minutes", f"{minutes:g}", "--out", str(run)),
    ]
    scoring = ["fastdcgan.evaluate", "--real", data, "--fake", str(run), "--n", str(n), "--json"]
    _run(training)
    report = json.loads(_run(scoring))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(row["images_per_second"] for row in rows[1:] or rows)
    return Trained(
        preset,
        (training, scoring),
        steps=rows[-1]["step"],
        images_per_second=speeds[len(speeds) // 2],
        report=report,
        grid=max((run / "samples").glob("step-*.png")),
    )


def _run(words: list[str]) -> str:
    print("python -m " + shlex.join(words), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], check=True, capture_output=True, text=True
    )
    return done.stdout


def page(name: str, found: list[Trained], minutes: float) -> str:
    """The table, the sheets and the commands in Markdown."""
    first, report = found[0], found[0].report
    lines = [
        f"# {name}: {minutes:g} minutes each",
        "",
        f"{machine()}, one run after another. KID and FID by {report['features']}, "
        f"n = {report['n']:,}; floor (real against real): KID {report['kid_floor']:.4f}, "
        f"FID {report['fid_floor']:.1f}.",
        "",
        "| recipe | steps | images/s | " + " | ".join(SCORES) + " | KID of the first |",
        "|---" * (4 + len(SCORES)) + "|",
    ]
    for one in found:
        scores = " | ".join(f"{one.report[key]:.4g}" for key in SCORES)
        ratio = one.report["kid"] / first.report["kid"]
        lines.append(
            f"| {one.preset} | {one.steps:,} | {one.images_per_second:.0f} | {scores} "
            f"| {100 * ratio:.0f} % |"
        )
    for one in found:
        commands = "\n".join(f"python -m {shlex.join(words)}" for words in one.commands)
        lines += ["", f"## {one.preset}", "", "```", commands, "```", ""]
        lines.append(f"![samples of {one.preset}]({name}-{one.preset}.png)")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
