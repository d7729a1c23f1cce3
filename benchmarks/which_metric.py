"""The table of docs/metrics.md: what every score says of images that are good, or bad in a known
way. `python benchmarks/which_metric.py [RUN ...] [--n 2000] [--picture FILE.png]` prints it as
Markdown, and draws ten images of each row beside its scores.

The real images are Fashion-MNIST's train split at 32 pixels; those in the fakes' place are made of
its test split.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fastdcgan.data import prepare
from fastdcgan.data.labels import labels
from fastdcgan.metrics import Scores, evaluate

REAL, SIZE = "fashion-mnist", 32


def blurred(images: np.ndarray) -> np.ndarray:
    taps = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * 0.7**2))
    taps = (taps / taps.sum()).reshape(1, 1, 1, 7)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), taps)
    x = F.conv2d(x, taps.transpose(2, 3))
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def noisy(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 5, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def shuffled(images: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(0)
    n, side, _, channels = images.shape
    cell = side // 4
    patches = images.reshape(n, 4, cell, 4, cell, channels).swapaxes(2, 3)
    patches = patches.reshape(n, 16, cell, cell, channels)
    mixed = np.stack([image[random.permutation(16)] for image in patches])
    return mixed.reshape(n, 4, 4, cell, cell, channels).swapaxes(2, 3).reshape(images.shape)


def sets(n: int) -> Iterator[tuple[str, np.ndarray]]:
    train, test = (prepare(REAL, size=SIZE, split=x, progress=False) for x in ("train", "test"))
    order = np.random.default_rng(1).permutation(test.n)
    images = np.ascontiguousarray(test.images[order[:n]])
    yield "real: the test split", images
    yield "blurred by 0.7 pixels", blurred(images)
    yield "noise of sigma 5 (of 255)", noisy(images)
    yield "16 patches shuffled", shuffled(images)
    yield "5 of 10 classes", test.images[order[labels(test).numbers[order] < 5][:n]]
    yield "10 images repeated", images[np.arange(n) % 10]
    yield "copies of training images", train.images[:n]


def row(title: str, scores: Scores) -> str:
    return f"| {title} | " + " | ".join(f"{value:.3g}" for value in asdict(scores).values()) + " |"


def draw(rows: list[tuple[str, np.ndarray, Scores]], path: Path) -> None:
    """A strip of images (n, H, W, 1) for each row, with its scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 * len(rows)), layout="constrained")
    for axis, (title, images, scores) in zip(
        figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True
    ):
        strip = np.concatenate([np.pad(image[..., 0], 1) for image in images], axis=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        text = f"FID {scores.fid:.0f}, KID {scores.kid:.3f}, recall {scores.recall:.2f}"
        axis.text(-0.02, 0.5, f"{title}\n{text}", transform=axis.transAxes, ha="right", va="center")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="runs on Fashion-MNIST at 32 pixels")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--picture", type=Path, help="a PNG to draw the rows to")
    options = parser.parse_args()
    drawn = []
    print("| in the fakes' place | FID | KID | IS | precision | recall | density | coverage |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"n": options.n, "cache": Path(folder), "progress": False}
        for index, (title, images) in enumerate(sets(options.n)):
            path = Path(folder, f"{index}.npz")
            np.savez(path, images=images)
            found = evaluate(REAL, str(path), **settings).comparison
            if title.startswith("real"):
                print(row("floor: other training images", found.floor))
            print(row(title, found.scores), flush=True)
            drawn.append((title, images[:12], found.scores))
        for run in options.runs:
            found = evaluate(REAL, run, **settings).comparison
            print(row(f"run {Path(run).name}", found.scores))
    if options.picture is not None:
        draw(drawn, options.picture)
    print(f"\nn = {found.n:,}, features by {found.features}")


if __name__ == "__main__":
    main()
