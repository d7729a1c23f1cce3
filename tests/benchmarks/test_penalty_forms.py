"""`python -m benchmarks.penalty_forms` on the discriminator of a tiny run."""

import re

import pytest

from benchmarks import penalty_forms
from fastdcgan.training import TrainConfig, train
from fastdcgan.training.regularisers import STEP


def test_a_short_difference_is_the_exact_penalty_and_all_ways_are_timed(
    tiny_data, tmp_path, monkeypatch, capsys
):
    sizes = {"image_size": 32, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8, "steps": 3}
    run = train(TrainConfig(str(tiny_data), norm_d="none", out=tmp_path / "run", **sizes)).out
    capsys.readouterr()
    monkeypatch.setattr(penalty_forms, "LENGTHS", (STEP, 0.01))
    given = [str(run), "--data", str(tiny_data), "--batch", "2", "--width", "4", "--rounds", "1"]
    assert penalty_forms.main([*given, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "penalty_forms.md").read_text()
    assert text in capsys.readouterr().out
    (mean,) = re.findall(rf"\| {STEP:g} \(the default\) \| ([0-9.]+) ", text)
    assert float(mean) == pytest.approx(1, abs=0.15)
    found = dict(re.findall(r"^\| (.+) \| [0-9.]+ \| ([0-9.]+) \|$", text, re.MULTILINE))
    assert found["no penalty"] == "1.00"
    assert {"exact", "difference", "exact, every 4 steps"} < found.keys()
