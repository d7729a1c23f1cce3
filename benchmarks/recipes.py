"""`python -m benchmarks.recipes`: training recipes side by side for equal time on this machine, by
the commands that a user types. Each run adds its results to OUT/results.jsonl, and the page
OUT/page.md is made anew from all of them: recipes x data x minutes, the KID over time of those that
trained with --eval-every, and the sheets to look at.
Not for: speed (pytest benchmarks/), search (`python -m fastdcgan.tune`).
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots

COMMAND = "python -m benchmarks.recipes"
SCORES = {
    "kid": "KID",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "spectrum_db": "spectrum, dB",
    "peak": "peak",
}
MODES = {"modes": "modes", "modes_kl": "KL"}
"""Columns more where `--modes` counted."""
RESULTS = "results.jsonl"

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The command; ends with an error where one of its commands fails."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train recipes side by side for equal time, and compare FID, KID and spectra.",
        epilog=f"Example: {COMMAND} dcgan='--preset dcgan' r3='--preset r3' --data fashion-mnist "
        "--image-size 32 --minutes 5 --runs runs --out benchmarks/results/recipes",
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="NAME=FLAGS", help="what to train; none: only make the page"
    )
    parser.add_argument("--data", default="fashion-mnist", help="source; default fashion-mnist")
    parser.add_argument("--image-size", type=int, default=32, help="pixels; default 32")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each; default 5")
    parser.add_argument("--n", type=int, default=5000, help="images that are scored; default 5000")
    parser.add_argument("--modes", action="store_true", help="count those of stacked-mnist, too")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--cores", type=int, default=1, help="of each recipe; default 1")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its sheets")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; kept")
    given = parser.parse_args(arguments)
    recipes = dict(recipe.partition("=")[::2] for recipe in given.recipes)
    given.out.mkdir(parents=True, exist_ok=True)
    together = max((os.cpu_count() or 1) // given.cores, 1)
    todo = [commands(name, flags, given) for name, flags in recipes.items()]
    names = list(recipes)
    for start in range(0, len(todo), together):
        words = todo[start : start + together]
        seconds = train([training for training, _ in words], given.cores)
        for name, each, used in zip(names[start:], words, seconds, strict=False):
            row = score(name, each, used, given)
            with (given.out / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    lines = (given.out / RESULTS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    plots.draw_curves(rows, given.out)
    text = "\n".join(page(rows)) + "\n"
    (given.out / "page.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def commands(recipe: str, flags: str, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Of training and of scoring a recipe, without the interpreter."""
    run = given.runs / "-".join([stem(given.data), recipe, f"{given.minutes:g}", str(given.seed)])
    training = [
        *("fastdcgan.train", "--data", given.data, "--image-size", str(given.image_size)),
        *(*shlex.split(flags), "--epochs", "100000", "--max-minutes", f"{given.minutes:g}"),
        *("--seed", str(given.seed), "--out", str(run)),
    ]
    scoring = ["fastdcgan.evaluate", "--real", given.data, "--fake", str(run)]
    scoring += ["--n", str(given.n), *(["--modes"] if given.modes else []), "--json"]
    return training, scoring


def stem(data: str) -> str:
    return Path(data).stem


def train(trainings: list[list[str]], cores: int) -> list[float]:
    """Runs all at once, each on `cores` threads; returns the CPU seconds of each."""
    started = []
    for words in trainings:
        print("python -m " + shlex.join(words), file=sys.stderr, flush=True)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env={**os.environ, "OMP_NUM_THREADS": str(cores)},
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


def score(
    recipe: str, words: tuple[list[str], list[str]], cpu_seconds: float, given: argparse.Namespace
) -> Row:
    """The row of a recipe that has been trained; half of its last sheet goes beside the page."""
    from PIL import Image

    training, scoring = words
    done = subprocess.run(
        [sys.executable, "-m", *scoring], check=True, stdout=subprocess.PIPE, text=True
    )
    run = Path(training[training.index("--out") + 1])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    grid = max((run / "samples").glob("step-*.png"))
    sheet = f"{run.name}.png"
    with Image.open(grid) as all_rows:
        width, height = all_rows.size
        all_rows.crop((0, 0, width, height // 2)).save(given.out / sheet, optimize=True)
    return {
        **{"recipe": recipe, "data": stem(given.data), "image_size": given.image_size},
        **{"minutes": given.minutes, "cores": given.cores, "seed": given.seed},
        **{"steps": last["step"], "images": last["step"] * images_of_a_step(run)},
        **{"cpu_seconds": round(cpu_seconds), "sheet": sheet, "machine": machine()},
        "commands": [f"python -m {shlex.join(each)}" for each in words],
        "scores": json.loads(done.stdout),
        "curve": curve(run),
    }


def curve(run: Path) -> list[tuple[float, float]]:
    """Minutes and KID of each evaluation during training."""
    file = run / "evaluations.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.is_file() else []
    return [(row["seconds"] / 60, row["kid"]) for row in rows]


def images_of_a_step(run: Path) -> int:
    config = json.loads((run / "config.json").read_text())
    images: int = config["batch_size"] * config["n_critic"]
    return images


def machine() -> str:
    """Date, processor and version of torch."""
    import torch
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    brand = get_cpu_info().get("brand_raw", "a processor without a name")
    return f"{datetime.date.today()}, {brand}, torch {torch.__version__}"


def page(rows: list[Row]) -> Iterator[str]:
    """The tables, the sheets and the commands in Markdown."""
    yield "# Recipes for equal time"
    yield ""
    yield (
        "Minutes are of training, on the cores that are named, compilation included; recipes that "
        "ran side by side had their own cores of one machine. Of several seeds the median stands, "
        "with the lowest and the highest."
    )
    for data in dict.fromkeys(row["data"] for row in rows):
        yield from _of_data(data, [row for row in rows if row["data"] == data])
    yield ""
    yield "## What it ran"
    for row in rows:
        yield ""
        yield f"{row['machine']}, {row['cpu_seconds']:,} s of CPU:"
        yield ""
        yield "```"
        yield from row["commands"]
        yield "```"


def _of_data(data: str, rows: list[Row]) -> Iterator[str]:
    side, first = rows[0]["image_size"], rows[0]["scores"]
    yield ""
    yield f"## {data}, {side}x{side}"
    yield ""
    yield (
        f"Features by {first['features']}, n = {first['n']:,}; floor (real against real): KID "
        f"{first['kid_floor']:.4f}, FID {first['fid_floor']:.1f}."
    )
    yield ""
    columns = SCORES | (MODES if any("modes" in row["scores"] for row in rows) else {})
    yield "| minutes | cores | recipe | seeds | images | " + " | ".join(columns.values()) + " |"
    yield "|---" * (5 + len(columns)) + "|"
    kinds = sorted({(row["minutes"], row["cores"]) for row in rows})
    for minutes, cores in kinds:
        equal = [row for row in rows if (row["minutes"], row["cores"]) == (minutes, cores)]
        for recipe in dict.fromkeys(row["recipe"] for row in equal):
            of_it = [row for row in equal if row["recipe"] == recipe]
            images = statistics.median(row["images"] for row in of_it)
            spreads = (_spread([row["scores"].get(key) for row in of_it]) for key in columns)
            scores = " | ".join(spreads)
            yield f"| {minutes:g} | {cores} | {recipe} | {len(of_it)} | {images:,.0f} | {scores} |"
    if any(row["curve"] for row in rows):
        yield ""
        yield f"![KID over minutes of training]({plots.curve_name(data)})"
    for minutes, cores in kinds:
        yield ""
        yield f"Samples after {minutes:g} minutes of {cores} core{'s' * (cores > 1)}:"
        yield ""
        yield from _sheets([r for r in rows if (r["minutes"], r["cores"]) == (minutes, cores)])


def _sheets(rows: list[Row]) -> Iterator[str]:
    """A table of pictures: a column for each recipe, a line for each seed."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    yield f"| seed | {' | '.join(recipes)} |"
    yield "|---" * (1 + len(recipes)) + "|"
    for seed in sorted({row["seed"] for row in rows}):
        cells = {row["recipe"]: row["sheet"] for row in rows if row["seed"] == seed}
        pictures = [f"![samples of {r}]({cells[r]})" if r in cells else "" for r in recipes]
        yield f"| {seed} | {' | '.join(pictures)} |"


def _spread(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    middle, low, high = _plain(statistics.median(found), 4), min(found), max(found)
    return middle if len(found) == 1 else f"{middle} ({_plain(low, 3)} to {_plain(high, 3)})"


def _plain(value: float, digits: int) -> str:
    """Rounded to `digits` digits; a larger number stays whole and has no exponent."""
    return f"{value:.{digits}g}" if value < 10 ** (digits - 1) else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
