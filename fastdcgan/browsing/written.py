"""What a run has written so far, for the page to show while it trains. Nothing is written to the
run's folder."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fastdcgan.data.picture import Pixels
from fastdcgan.training import journal


def newest_samples(folder: Path) -> tuple[int, Pixels] | None:
    """The latest step that has a sheet, and the sheet, (H, W, C)."""
    newest = max((folder / "samples").glob("step-*.png"), default=None)
    if newest is None:
        return None
    with Image.open(newest) as picture:
        sheet = np.asarray(picture)
    return int(newest.stem.removeprefix("step-")), sheet.reshape(*sheet.shape[:2], -1)


def curves(folder: Path) -> Pixels | None:
    """Losses, and FID and KID where they are measured, (H, W, 3); None before the first row."""
    if not journal.read_metrics(folder):
        return None
    file = BytesIO()
    journal.figure(folder, brief=True).savefig(file, format="png", dpi=110)
    return np.asarray(Image.open(file).convert("RGB"))


def stamp(folder: Path) -> tuple[int, ...]:
    """Changes when there is something new to show."""
    files = (folder / "metrics.jsonl", folder / "evaluations.jsonl", folder / "samples")
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in files)
