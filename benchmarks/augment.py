"""`python -m benchmarks.augment`: do synthetic images help a classifier that has few real ones? A
small CNN on Fashion-MNIST cut to some images a class, without augmentation, with the classic one,
and with the images of `python -m fastdcgan.augment`, whose commands the page repeats.
Not for: the quality of a generator (benchmarks/recipes.py).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parity import machine

COMMAND = "python -m benchmarks.augment"
DATA, SIZE = "fashion-mnist", 32
SHOWN = 8  # images of each class in a sheet
SHIFT = 2  # pixels, of the classic augmentation

WAYS = ["a generator per class=--steps 1000", "one of all classes=--classes --steps 5000"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Images:
    """Labelled images: pixels (N, 32, 32, 1) uint8, labels (N,)."""

    pixels: Array
    labels: Array

    def of_each_class(self, n: int, seed: int) -> "Images":
        """n of each class, drawn at random, class by class."""
        random = np.random.default_rng(seed)
        rows = [random.permutation(np.flatnonzero(self.labels == c))[:n] for c in range(10)]
        return Images(self.pixels[np.concatenate(rows)], self.labels[np.concatenate(rows)])


@dataclass(frozen=True)
class Arm:
    """One way to train the classifier."""

    name: str
    classic: bool = False
    way: str | None = None
    """Of the synthetic images that are half of each batch."""


def main(arguments: list[str] | None = None) -> int:
    """The command; ends with an error where one of its commands fails."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="A classifier of few images, with and without synthetic ones.",
        epilog=f"Example: {COMMAND} --runs runs/augment --out benchmarks/results/augment",
    )
    parser.add_argument("--cuts", type=int, nargs="+", default=[50, 200], help="images a class")
    parser.add_argument(
        "--ways",
        nargs="+",
        metavar="NAME=FLAGS",
        default=[
            "a generator per class=--steps 1000",
            "one of all classes=--classes --steps 10000",
        ],
        help="how the synthetic images are made: flags of fastdcgan.augment; default: a generator "
        "per class (1,000 steps each), and one of all classes (10,000 steps)",
    )
    parser.add_argument(
        "--flags",
        default="--ngf 16 --ndf 16 --batch-size 16 --lr 6e-4 --diffaugment color,translation",
        help="of fastdcgan.augment, for all; default: %(default)s",
    )
    parser.add_argument("--both", action="store_true", help="the classic one on top, too")
    parser.add_argument("--per-class", type=int, default=400, help="synthetic images; default 400")
    parser.add_argument("--steps", type=int, default=400, help="of the classifier; default 400")
    parser.add_argument("--batch", type=int, default=64, help="of the classifier; default 64")
    parser.add_argument("--seeds", type=int, default=5, help="classifiers of each arm; default 5")
    parser.add_argument("--test", type=int, default=10_000, help="test images; default all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its sheets")
    parser.add_argument("--runs", type=Path, required=True, help="folder of all else; kept")
    given = parser.parse_args(arguments)
    ways = dict(way.partition("=")[::2] for way in given.ways)
    arms = [Arm("real images only"), Arm("flip and shift", classic=True)]
    arms += [Arm(f"synthetic, {way}", way=way) for way in ways]
    if given.both:
        arms += [Arm(f"flip and shift, synthetic, {way}", classic=True, way=way) for way in ways]
    given.out.mkdir(parents=True, exist_ok=True)
    given.runs.mkdir(parents=True, exist_ok=True)
    train, test = _real("train"), _real("test")
    test = Images(test.pixels[: given.test], test.labels[: given.test])
    text = [*introduction(given)]
    for cut in given.cuts:
        real = train.of_each_class(cut, seed=0)
        np.savez_compressed(given.runs / f"cut-{cut}.npz", images=real.pixels, labels=real.labels)
        made = {way: make(cut, way, flags, given) for way, flags in ways.items()}
        found = {arm: accuracies(arm, cut, real, test, made, given) for arm in arms}
        write_sheet(given.out / f"samples-{cut}.png", real, [m.images for m in made.values()])
        text += [*section(cut, found, made, passes=given.steps * given.batch / len(real.labels))]
    (given.out / "page.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    return 0


def _real(split: str) -> Images:
    from fastdcgan.data import prepare
    from fastdcgan.data.labels import labels

    packed = prepare(DATA, size=SIZE, split=split)
    return Images(np.asarray(packed.images), labels(packed).numbers)


# ---- synthetic images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What one call of the command made."""

    command: str
    seconds: float
    """Of CPU, training included."""
    manifest: dict[str, Any]
    steps: list[int]
    """Of each generator."""
    images: Images


def make(cut: int, way: str, flags: str, given: argparse.Namespace) -> Made:
    """Calls `fastdcgan.augment`, unless its set is there."""
    name = f"cut-{cut}-{way.replace(' ', '-')}"
    out, told = given.runs / name, given.runs / f"{name}.json"
    words = [
        *("fastdcgan.augment", "--data", str(given.runs / f"cut-{cut}.npz")),
        *("--per-class", str(given.per_class), "--image-size", str(SIZE), "--to", "npz"),
        *shlex.split(f"{given.flags} {flags}"),
        *("--no-tensorboard", "--sample-every", "1000", "--out", str(out)),
    ]
    command = "python -m " + shlex.join(words)
    if not out.is_dir():
        print(command, file=sys.stderr, flush=True)
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} failed")
        told.write_text(json.dumps([command, used.ru_utime + used.ru_stime]))
    command, seconds = json.loads(told.read_text())
    with np.load(out / "images.npz") as held:
        images = Images(held["images"], held["labels"])
    manifest = json.loads((out / "manifest.json").read_text())
    runs = dict.fromkeys(counts["generator"] for counts in manifest["counts"].values())
    lines = [(Path(run) / "metrics.jsonl").read_text().splitlines()[-1] for run in runs]
    return Made(command, seconds, manifest, [json.loads(line)["step"] for line in lines], images)


# ---- the classifier ------------------------------------------------------------------------------


def accuracies(
    arm: Arm, cut: int, real: Images, test: Images, made: dict[str, Made],
    given: argparse.Namespace,
) -> Array:  # fmt: skip
    """Of the test images, a number for each seed; those that are there are not made again."""
    path = given.runs / "accuracies.json"
    held: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    found = []
    for seed in range(given.seeds):
        key = f"{cut} {arm.name} {given.steps} {given.batch} {len(test.labels)} {seed}"
        if key not in held:
            synthetic = None if arm.way is None else made[arm.way].images
            held[key] = accuracy(real, synthetic, test, arm.classic, seed, given)
            path.write_text(json.dumps(held, indent=1))
            print(f"{key}: {held[key]:.4f}", file=sys.stderr, flush=True)
        found.append(held[key])
    return np.array(found)


def accuracy(
    real: Images, synthetic: Images | None, test: Images, classic: bool, seed: int,
    given: argparse.Namespace,
) -> float:  # fmt: skip
    """Of one classifier: three convolutions of 3x3, Adam at 1e-3. Half of each batch is synthetic,
    where there are such; the steps are as many in any case. The seed is that of weights, order and
    augmentation."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    random = np.random.default_rng(seed)
    n = given.batch if synthetic is None else given.batch // 2
    batches = [_batches(real, n, random)]
    if synthetic is not None:
        batches.append(_batches(synthetic, given.batch - n, random))
    for _ in range(given.steps):
        drawn = [next(some) for some in batches]
        pixels = np.concatenate([x for x, _ in drawn])
        if classic:
            pixels = flip_and_shift(pixels, random)
        loss = nn.functional.cross_entropy(
            net(_input(pixels)), torch.from_numpy(np.concatenate([y for _, y in drawn]))
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test.labels), 500):
            answers = net(_input(test.pixels[start : start + 500])).argmax(1).numpy()
            right += int((answers == test.labels[start : start + 500]).sum())
    return right / len(test.labels)


def _input(pixels: Array) -> Any:
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(images: Images, n: int, random: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Without end, each image once in each pass; a pass may end within a batch."""
    order = np.empty(0, np.int64)
    while True:
        while len(order) < n:
            order = np.concatenate([order, random.permutation(len(images.labels))])
        rows, order = order[:n], order[n:]
        yield images.pixels[rows], images.labels[rows]


def flip_and_shift(pixels: Array, random: np.random.Generator) -> Array:
    """Each image mirrored with probability 1/2, and moved by up to 2 pixels each way, on black."""
    wide = np.pad(pixels, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    corners = random.integers(0, 2 * SHIFT + 1, (len(pixels), 2))
    moved = np.stack(
        [image[y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(wide, corners, strict=True)]
    )
    mirrored = random.random(len(pixels)) < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    return moved


# ---- the page ------------------------------------------------------------------------------------


def interval(values: Array) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def verdict(apart: Array) -> str:
    """Of paired differences, in words."""
    if abs(apart.mean()) <= interval(apart):
        return "no difference is shown"
    return f"{'better' if apart.mean() > 0 else 'worse'} than real images alone"


def introduction(given: argparse.Namespace) -> Iterator[str]:
    yield "# Synthetic images for a classifier with few real ones"
    yield ""
    yield (
        f"{machine()}. Fashion-MNIST at {SIZE}x{SIZE}, cut to so many images a class; a CNN of "
        f"three convolutions (16, 32, 64), {given.steps} steps of Adam with {given.batch} images, "
        f"in all arms; with synthetic images ({given.per_class} a class) they are half of each "
        f"batch. Accuracy on {given.test:,} test images, mean of {given.seeds} seeds with the 95 % "
        "confidence interval by Student's t; differences from the first arm are paired by seed. "
        "The seeds are those of the classifier: of each cut and each set of synthetic images there "
        "is one."
    )
    yield ""
    yield f"Made by `{COMMAND} {shlex.join(given_words(given))}`."


def given_words(given: argparse.Namespace) -> list[str]:
    """The arguments of the command, written out."""
    return [
        *("--cuts", *map(str, given.cuts), "--ways", *given.ways, "--flags", given.flags),
        *(["--both"] if given.both else []),
        *("--per-class", str(given.per_class), "--steps", str(given.steps)),
        *("--batch", str(given.batch), "--seeds", str(given.seeds), "--test", str(given.test)),
        *("--runs", str(given.runs), "--out", str(given.out)),
    ]


def section(
    cut: int, found: dict[Arm, Array], made: dict[str, Made], passes: float
) -> Iterator[str]:
    """The table of one cut, what it shows, and how its images were made.

    Args:
        passes: of the first arm over its images.
    """
    (first, base), *others = found.items()
    yield from ("", f"## {cut} images a class", "")
    yield "| training images | test accuracy, % | difference, points |"
    yield "|---|---|---|"
    yield f"| {first.name} | {_with_interval(base, '.2f')} | |"
    for arm, values in others:
        apart = _with_interval(values - base, "+.2f")
        yield f"| {arm.name} | {_with_interval(values, '.2f')} | {apart} |"
    yield ""
    for arm, values in others:
        yield f"{arm.name[0].upper()}{arm.name[1:]}: {verdict(values - base)}."
    yield (
        f"The first arm passes over its images {passes:.0f} times; beside synthetic ones they are "
        "seen half as often."
    )
    for way, one in made.items():
        counts = one.manifest["counts"].values()
        total = {key: sum(c[key] for c in counts) for key in ("drawn", "copies", "rejected")}
        yield ""
        yield (
            f"Synthetic, {way}: {sum(one.steps):,} steps in all; the call that made the set took "
            f"{one.seconds:.0f} s of CPU, without what calls before it had trained; "
            f"{total['drawn']:,} images drawn, {total['copies']:,} of them copies of real ones, "
            f"{total['rejected']:,} rejected."
        )
        yield from ("", "```", one.command, "```")
    columns = ", ".join(["real", *(f"synthetic, {way}" for way in made)])
    yield from ("", f"![{columns}](samples-{cut}.png)", "")
    yield f"*Left to right: {columns}; a row a class.*"


def _with_interval(values: Array, form: str) -> str:
    """Mean and interval in percent."""
    return f"{100 * float(values.mean()):{form}} ± {100 * interval(values):.2f}"


def write_sheet(path: Path, real: Images, others: list[Images]) -> None:
    """A picture: a row a class, eight images of each set side by side."""
    from fastdcgan.data import grid, save_image

    def rows(images: Images) -> Array:
        chosen = [np.flatnonzero(images.labels == c)[:SHOWN] for c in range(10)]
        return grid(images.pixels[np.concatenate(chosen)], columns=min(map(len, chosen)))

    blocks = [rows(images) for images in (real, *others)]
    gap = np.full((len(blocks[0]), 8, 1), 255, np.uint8)
    joined = [part for block in blocks for part in (block, gap)][:-1]
    save_image(path, np.concatenate(joined, axis=1))


if __name__ == "__main__":
    sys.exit(main())
