"""The sheet of nearest neighbours: what stands where."""

import numpy as np
import torch

from fastdcgan.data import prepare
from fastdcgan.metrics.neighbours import GAP, neighbour_sheet


def test_each_sample_stands_beside_its_nearest_images(tmp_path):
    """Grey images of 64 pixels and of one value each, which is also their only feature."""
    values = np.arange(0, 200, 10, dtype=np.uint8)
    np.save(tmp_path / "a.npy", np.broadcast_to(values[:, None, None], (20, 64, 64)))
    packed = prepare(str(tmp_path / "a.npy"), size=64, progress=False)
    rows = np.random.default_rng(0).permutation(20)
    samples = np.array([52, 199], np.uint8)
    sheet = neighbour_sheet(
        np.broadcast_to(samples[:, None, None, None], (2, 64, 64, 1)),
        torch.from_numpy(samples).float()[:, None],
        torch.from_numpy(values[rows]).float()[:, None],
        rows,
        packed,
    )
    assert sheet.shape == (2 + 2 * 66, 68 + GAP + 2 + 6 * 66, 3)
    middles = [34, *(68 + GAP + 34 + 66 * column for column in range(6))]
    shown = sheet[34::66][:, middles].max(-1)
    assert shown.tolist() == [
        [52, 50, 60, 40, 70, 30, 80],
        [199, 190, 180, 170, 160, 150, 140],
    ]
