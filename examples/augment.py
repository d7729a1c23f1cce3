"""Fifty more images of each class of a labelled folder, from Python:

    python examples/augment.py photos synthetic

The command for the same is `python -m fastdcgan.augment --data photos --per-class 50 --to npz
--out synthetic`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.synthetic_data.config import AugmentConfig, Training
from fastdcgan.synthetic_data.making import augment


def main(data: str, out: Path, **training: Any) -> None:
    """Trains a generator for each class and draws from it; `training` are fields of TrainConfig."""
    config = AugmentConfig(50, out, to="npz", training=Training(data=data, **training))
    print(*augment(config).lines(), sep="\n")
    with np.load(out / "images.npz") as held:
        print(held["images"].shape, "of", *held["classes"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), batch_size=16, diffaugment="color,translation")
