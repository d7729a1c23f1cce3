"""`python -m benchmarks.recipes`: training recipes side by side for equal time on this machine, by
FID and KID. They run at once, with as many cores each, by the commands that a user types, which the
page repeats.
Not for: speed (pytest benchmarks/), search (`python -m fastdcgan.tune`).
"""

import argparse
import json
import os
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

    recipe: str
    commands: tuple[list[str], list[str]]
    """Of training and of evaluation, without the interpreter."""
    steps: int
    cpu_seconds: float
    """Of training, compilation and samples included."""
    report: dict[str, Any]
    """What `fastdcgan.evaluate --json` printed."""
    grid: Path
    """Its last sheet of samples."""


def main(arguments: list[str] | None = None) -> int:
    """The command; ends with an error where one of its commands fails."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train recipes side by side for equal time, and compare FID and KID.",
        epilog=f"Example: {COMMAND} dcgan= small='--ngf 32 --ndf 32' --data fashion-mnist "
        "--image-size 32 --minutes 15 --runs runs --out benchmarks/results/recipes",
    )
    parser.add_argument(
        "recipes", nargs="+", metavar="NAME=FLAGS", help="what to train; the first is the baseline"
    )
    parser.add_argument("--data", default="fashion-mnist", help="source; default fashion-mnist")
    parser.add_argument("--image-size", type=int, default=32, help="pixels; default 32")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each; default 15")
    parser.add_argument("--n", type=int, default=5000, help="images that are scored; default 5000")
    parser.add_argument("--name", help="of the page; default that of the data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its sheets")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; kept")
    given = parser.parse_args(arguments)
    recipes = dict(recipe.partition("=")[::2] for recipe in given.recipes)
    words = [commands(name, flags, given) for name, flags in recipes.items()]
    seconds = train([training for training, _ in words])
    found = [score(*each) for each in zip(recipes, words, seconds, strict=True)]
    name = given.name or Path(given.data).stem
    given.out.mkdir(parents=True, exist_ok=True)
    for one in found:
        (given.out / f"{name}-{one.recipe}.png").write_bytes(one.grid.read_bytes())
    text = page(name, found, given.minutes)
    (given.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def commands(recipe: str, flags: str, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Of training and of scoring a recipe, without the interpreter."""
    run = given.runs / f"{Path(given.data).stem}-{recipe}"
    training = [
        *("fastdcgan.train", "--data", given.data, "--image-size", str(given.image_size)),
        *(*shlex.split(flags), "--epochs", "100000", "--max-minutes", f"{given.minutes:g}"),
        *("--out", str(run)),
    ]
    scoring = ["fastdcgan.evaluate", "--real", given.data, "--fake", str(run)]
    return training, [*scoring, "--n", str(given.n), "--json"]


def train(trainings: list[list[str]]) -> list[float]:
    """Runs all at once, each with its share of the cores; returns the CPU seconds of each."""
    threads = str(max((os.cpu_count() or 1) // len(trainings), 1))
    started = []
    for words in trainings:
        print("python -m " + shlex.join(words), file=sys.stderr, flush=True)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdout=subprocess.DEVNULL,
            )
        )
    seconds = []
    for process in started:
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{shlex.join(process.args)} failed")
        seconds.append(used.ru_utime + used.ru_stime)
    return seconds


def score(recipe: str, words: tuple[list[str], list[str]], cpu_seconds: float) -> Trained:
    """The averaged generator of a recipe that has been trained."""
    training, scoring = words
    done = subprocess.run(
        [sys.executable, "-m", *scoring], check=True, stdout=subprocess.PIPE, text=True
    )
    run = Path(training[training.index("--out") + 1])
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return Trained(
        recipe,
        words,
        steps=json.loads(last)["step"],
        cpu_seconds=cpu_seconds,
        report=json.loads(done.stdout),
        grid=max((run / "samples").glob("step-*.png")),
    )


def page(name: str, found: list[Trained], minutes: float) -> str:
    """The table, the sheets and the commands in Markdown."""
    first, report = found[0], found[0].report
    lines = [
        f"# {name}: {minutes:g} minutes each",
        "",
        f"{machine()} in all, shared by the runs, which went side by side. KID and FID by "
        f"{report['features']}, n = {report['n']:,}; floor (real against real): "
        f"KID {report['kid_floor']:.4f}, FID {report['fid_floor']:.1f}.",
        "",
        "| recipe | steps | CPU s | " + " | ".join(SCORES) + " | KID of the first |",
        "|---" * (4 + len(SCORES)) + "|",
    ]
    for one in found:
        scores = " | ".join(f"{one.report[key]:.4g}" for key in SCORES)
        ratio = one.report["kid"] / first.report["kid"]
        lines.append(
            f"| {one.recipe} | {one.steps:,} | {one.cpu_seconds:.0f} | {scores} "
            f"| {100 * ratio:.0f} % |"
        )
    for one in found:
        commands = "\n".join(f"python -m {shlex.join(words)}" for words in one.commands)
        lines += ["", f"## {one.recipe}", "", "```", commands, "```", ""]
        lines.append(f"![samples of {one.recipe}]({name}-{one.recipe}.png)")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
