"""What a run tells while it goes on: a progress bar or plain lines, metrics.jsonl, TensorBoard
events, sample grids, evaluations, and the plot at the end. Nothing here touches the training."""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastdcgan.data.picture import atomic_write, save_image

SCORES = {
    "fid": "FID[{}], n = {:,}",
    "kid": "KID[{}], n = {:,}",
    "spectrum_db": "distance of the spectra, dB",
    "peak": "peak of a grid / the data's",
}
"""Those that are drawn, and their titles, given the network's name and n."""
PLAIN_LINE_SECONDS = 10.0
"""Without a terminal a line is printed no more often than this, and at the end of an epoch."""


class Journal:
    """Writes a run's progress to its folder `out` and to the terminal.

    Args:
        out: the run's folder.
        total: steps at which the run ends.
        steps_per_epoch: for the lines that people read.
        start: the step at which this process starts; later rows of an earlier process, written
            after the checkpoint that is resumed, are dropped.
        tensorboard: whether to write events.
    """

    def __init__(
        self, out: Path, *, total: int, steps_per_epoch: int, start: int, tensorboard: bool
    ) -> None:
        self.out = out
        self.total = total
        self.steps_per_epoch = steps_per_epoch
        (out / "samples").mkdir(exist_ok=True)
        self._tensorboard = tensorboard
        self._open(start)
        rows = [*read_metrics(out), *read_evaluations(out)]
        self.seconds: float = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        """Of training, before this process."""
        self._bar: Any = None
        self._last_line = -math.inf
        self._first: tuple[int, float] | None = None

    def _open(self, start: int) -> None:
        """Drops the rows after `start` and goes on behind it."""
        for path in (self.out / "metrics.jsonl", self.out / "evaluations.jsonl"):
            if path.exists():
                kept = [row for row in _rows(path) if row["step"] <= start]
                text = "".join(json.dumps(row) + "\n" for row in kept).encode()
                atomic_write(path, partial(_write, text))
        self._file = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self._events: Any = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.out / "tensorboard"), purge_step=start + 1)
        self.start = start

    def _close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Journal":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Eta

            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                Eta(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("first step ...", total=self.total)
            self._bar.update(self._task, completed=self.start)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._close()

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: rows and events behind it are dropped."""
        self._close()
        self._open(step)
        self._first = None
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def event(self, row: dict[str, Any]) -> None:
        """An alarm or a rollback: to watch.jsonl, which is only ever added to."""
        with (self.out / "watch.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, line: str) -> None:
        """One line for people."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def record(self, row: dict[str, Any]) -> None:
        """One row of metrics: to metrics.jsonl, to TensorBoard, and to the terminal."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if name not in ("step", "epoch", "seconds"):
                    self._events.add_scalar(name, value, row["step"])
        text = (
            f"Loss_D: {row['loss_d']:.4f} Loss_G: {row['loss_g']:.4f} D(x): {row['d_real']:.4f} "
            f"D(G(z)): {row['d_fake']:.4f} / {row['d_fake_g']:.4f} "
            f"{row['images_per_second']:.1f} img/s"
        )
        step = row["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        ends = step == self.total or step % self.steps_per_epoch == 0
        if ends or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            epochs = -(-self.total // self.steps_per_epoch)
            within = (step - 1) % self.steps_per_epoch + 1
            # Counted from the first row on: what came before it was mostly compilation.
            first_step, first_time = self._first = self._first or (step, now)
            left = (now - first_time) / max(step - first_step, 1) * (self.total - step)
            eta = f" ETA {int(left) // 60}:{int(left) % 60:02d}" if step > first_step else ""
            self.say(f"[{row['epoch']}/{epochs}][{within}/{self.steps_per_epoch}] {text}{eta}")

    def evaluated(self, row: dict[str, Any], *, best: bool) -> None:
        """One row of scores: to evaluations.jsonl, to TensorBoard, and to the terminal."""
        with (self.out / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            for name in row:
                if f"{name.removesuffix('_floor')}_floor" in row and row[name] is not None:
                    self._events.add_scalar(f"quality/{name}", row[name], row["step"])
        scores = (
            f"{name.upper()}[{row['features']}] {row[name]:.4g} (floor {row[name + '_floor']:.3g})"
            for name in ("fid", "kid")
        )
        self.say(
            f"step {row['step']}: {', '.join(scores)}, coverage {row['coverage']:.3f}"
            f"{_texture(row)}; n = {row['n']:,}, {row['evaluation_seconds']:.1f} s"
            + ("; the best so far" if best else "")
        )

    def grid(self, step: int, picture: npt.NDArray[np.uint8]) -> None:
        """A sheet of samples, (H, W, C): to samples/ and to TensorBoard."""
        save_image(self.out / "samples" / f"step-{step:08d}.png", picture)
        if self._events is not None:
            rgb = picture[..., :3] if picture.shape[-1] > 2 else picture[..., :1]
            self._events.add_image("samples", rgb, step, dataformats="HWC")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order; a last line cut short by a kill is left out."""
    return _rows(out / "metrics.jsonl")


def read_evaluations(out: Path) -> list[dict[str, Any]]:
    """The rows of evaluations.jsonl, likewise."""
    return _rows(out / "evaluations.jsonl")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot(out: Path) -> Path:
    """Draws what `figure` does into plot.png."""
    path = out / "plot.png"
    atomic_write(path, lambda file: figure(out).savefig(file, format="png", dpi=110))
    return path


def figure(out: Path, *, brief: bool = False) -> Any:
    """Draws losses, D's answers, throughput and what is watched (docs/collapse.md) over steps from
    metrics.jsonl, and `SCORES` with their floors from evaluations.jsonl where there are any;
    alarms and rollbacks of watch.jsonl are lines across. Returns matplotlib's figure.

    Args:
        out: the run's folder.
        brief: losses, FID and KID only.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    rows = read_metrics(out)
    evaluations = read_evaluations(out)
    scores = [name for name in SCORES if evaluations and evaluations[-1].get(name) is not None]
    if brief:
        scores = [name for name in scores if name in ("fid", "kid")]
    panels = {
        "loss": {"loss_d": "discriminator", "loss_g": "generator"},
        "D's answer (bce: probability of being real)": {"d_real": "D(x)", "d_fake": "D(G(z))"},
        "images per second": {"images_per_second": "training, without samples and checkpoints"},
        "samples' distance / the data's": {"diversity": "of any two", "nearest": "of the nearest"},
        "D is right on": {"accuracy_real": "real images", "accuracy_fake": "generated images"},
        "gradient norm": {"gradient_d": "discriminator", "gradient_g": "generator"},
    }
    if brief:
        panels = {"loss": panels["loss"]}
    width, height = 6 if brief else 9, 2.4 * (len(panels) + len(scores))
    drawn = Figure(figsize=(width, height))
    # In inches; a layout of matplotlib's own draws all of it once more to measure it.
    left, right, below, above = 0.7 / width, 0.15 / width, 0.5 / height, 0.3 / height
    drawn.subplots_adjust(left, below, 1 - right, 1 - above, hspace=0.2)
    alarms = [row for row in _rows(out / "watch.jsonl") if row.get("began", True)]
    axes = list(drawn.subplots(len(panels) + len(scores), 1, sharex=True, squeeze=False)[:, 0])
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, label in lines.items():
            found = [(row["step"], row[name]) for row in rows if name in row]
            marker = "o" if len(found) == 1 else ""  # a line through one point cannot be seen
            steps, values = ([pair[i] for pair in found] for i in (0, 1))
            axis.plot(steps, values, label=label, marker=marker, markersize=4)
        _head(axis, title)
        if title == "gradient norm":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        for row in alarms:
            colour = "tab:green" if row["kind"] == "rollback" else "tab:red"
            axis.axvline(row["step"], color=colour, linestyle="--", linewidth=1)
    for axis, name in zip(axes[len(panels) :], scores, strict=True):
        # Scores by other networks or of other numbers of images are no points of one line.
        kind = [evaluations[-1][k] for k in ("features", "n")]
        alike = [row for row in evaluations if [row["features"], row["n"]] == kind]
        alike = [row for row in alike if row.get(name) is not None]
        found = [row[name] for row in alike]
        axis.plot([row["step"] for row in alike], found, "o-", label="generator", markersize=4)
        floor = alike[-1][f"{name}_floor"]
        axis.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor: real images")
        _head(axis, SCORES[name].format(*kind))
    axes[-1].set_xlabel("step")
    return drawn


def _texture(row: dict[str, Any]) -> str:
    """What a row says of the spectrum; "" for small images, and for rows of older versions."""
    if row.get("peak") is None:
        return ""
    return f", spectrum {row['spectrum_db']:.1f} dB off, peak {row['peak']:.1f}"


def _head(axis: Any, title: str) -> None:
    """The panel's name and, beside it, what its lines are: above them, where they hide nothing."""
    axis.set_title(title, loc="left", fontsize="medium")
    axis.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1,
        fontsize="medium",
    )  # fmt: skip
    axis.grid(alpha=0.3)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)
