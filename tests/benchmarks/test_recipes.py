"""`python -m benchmarks.recipes`: the real command on tiny nets, and its page."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.plots import draw_curves
from benchmarks.recipes import RESULTS, commands, main, page

ROOT = Path(__file__).parents[2]
TINY = "--nz 6 --ngf 4 --ndf 4 --batch-size 8 --steps 4 --no-tensorboard"


def test_recipes_are_trained_scored_and_added_to_what_was_there(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    common = ["--data", str(tiny_data), "--n", "12", "--out", "page", "--runs", "runs"]
    assert main([f"one={TINY}", f"two={TINY} --loss hinge --n-critic 2", *common]) == 0
    scored = f"one={TINY} --eval-every 2 --eval-n 12"
    assert main([scored, *common, "--seed", "3"]) == 0
    rows = [json.loads(line) for line in Path("page", RESULTS).read_text().splitlines()]
    assert [(r["recipe"], r["seed"], r["steps"]) for r in rows] == [
        ("one", 0, 4), ("two", 0, 4), ("one", 3, 4),
    ]  # fmt: skip
    assert [r["images"] for r in rows] == [32, 64, 32]
    assert all(r["cpu_seconds"] > 0 and r["scores"]["n"] == 12 for r in rows)
    for row in rows:
        run = Path(row["commands"][1].split("--fake ")[1].split()[0])
        last = max((run / "samples").glob("step-*.png"))
        with Image.open(Path("page", row["sheet"])) as sheet, Image.open(last) as samples:
            half = samples.crop((0, 0, samples.width, samples.height // 2))
            assert sheet.tobytes() == half.tobytes()
    text = Path("page", "page.md").read_text()
    kids = sorted(r["scores"]["kid"] for r in rows if r["recipe"] == "one")
    middle = f"{sum(kids) / 2:.4g} ({kids[0]:.3g} to {kids[1]:.3g})"
    assert f"| 5 | 1 | one | 2 | 32 | {middle} |" in text
    assert [len(r["curve"]) for r in rows] == [0, 0, 2]
    assert all(0 < minutes < 5 and kid > 0 for minutes, kid in rows[2]["curve"])
    with Image.open(Path("page", f"kid-{tiny_data.stem}.png")) as plot:
        assert plot.size[0] > 400
    # The page's own command trains again.
    command = rows[0]["commands"][0].split()
    command[command.index("--out") + 1] = "again"
    assert subprocess.run([sys.executable, *command[1:]], check=False).returncode == 0
    assert Path("again", "netG_ema.safetensors").is_file()


def test_recipes_that_were_not_scored_on_their_way_need_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves([{"data": "d", "curve": []}], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_modes_are_asked_of_evaluate():
    asked = {"data": "stacked-mnist", "image_size": 32, "minutes": 10.0, "seed": 1, "n": 70}
    asked |= {"runs": Path("runs")}
    _, scoring = commands("r3", "--preset r3", Namespace(**asked, modes=True))
    run = str(Path("runs", "stacked-mnist-r3-10-1"))
    assert scoring == [
        *("fastdcgan.evaluate", "--real", "stacked-mnist", "--fake", run),
        *("--n", "70", "--modes", "--json"),
    ]
    _, scoring = commands("r3", "--preset r3", Namespace(**asked, modes=False))
    assert "--modes" not in scoring


def test_a_recipe_that_fails_ends_the_command(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    with pytest.raises(SystemExit, match="failed"):
        main(["bad=--ngf none", "--data", str(tiny_data), "--out", "page"])


def test_the_page_has_the_median_of_seeds_and_a_dash_for_what_is_not_known():
    scores = {"kid": 0.5, "fid": 9, "precision": 0.1, "recall": 0.2, "coverage": 0.3, "peak": None}
    scores |= {"spectrum_db": 1.0, "kid_floor": 0.0, "fid_floor": 4.0, "features": "f", "n": 7}
    row = {"recipe": "a", "data": "d", "image_size": 32, "minutes": 5.0, "cores": 2, "seed": 0}
    row |= {"images": 1000, "cpu_seconds": 60, "sheet": "a.png", "machine": "m", "commands": ["x"]}
    row["curve"] = []
    rows = [
        {**row, "scores": {**scores, "kid": kid, "fid": fid}}
        for kid, fid in ((0.4, 998.7), (0.1, 1234.5), (0.25, 10499.6))
    ]
    text = "\n".join(page(rows))
    kid = "0.25 (0.1 to 0.4)"
    every = "1234 (999 to 10500)"
    every += " | 0.1 (0.1 to 0.1) | 0.2 (0.2 to 0.2) | 0.3 (0.3 to 0.3) | 1 (1 to 1) | -"
    assert f"| 5 | 2 | a | 3 | 1,000 | {kid} | {every} |" in text
    assert "Samples after 5 minutes of 2 cores:\n\n| seed | a |\n|---|---|\n" in text
    assert "| 0 | ![samples of a](a.png) |" in text
    assert "floor (real against real): KID 0.0000, FID 4.0" in text
    assert "modes" not in text
    assert "kid-d.png" not in text


def test_sheets_stand_in_a_column_for_each_recipe_and_a_line_for_each_seed():
    scores = dict.fromkeys(["kid", "fid", "precision", "recall", "coverage", "peak"], 0.5)
    scores |= {"spectrum_db": 1.0, "kid_floor": 0.0, "fid_floor": 4.0, "features": "f", "n": 7}
    row = {"data": "d", "image_size": 32, "cores": 1, "images": 1000, "cpu_seconds": 60}
    row |= {"machine": "m", "commands": ["x"], "curve": [], "scores": scores}
    runs = [("a", 1, 5.0), ("b", 0, 5.0), ("a", 0, 5.0), ("a", 0, 15.0)]
    rows = [
        {**row, "recipe": name, "seed": seed, "minutes": minutes, "sheet": f"{i}.png"}
        for i, (name, seed, minutes) in enumerate(runs)
    ]
    text = "\n".join(page(rows))
    five, fifteen = text.split("Samples after ")[1:]
    lines = [line for line in five.splitlines() if ".png" in line]
    assert lines == [
        "| 0 | ![samples of a](2.png) | ![samples of b](1.png) |",
        "| 1 | ![samples of a](0.png) |  |",
    ]
    assert fifteen.startswith("15 minutes of 1 core:\n\n| seed | a |\n")


def test_the_page_has_a_column_of_modes_and_a_picture_of_kid_where_there_are_any():
    scores = dict.fromkeys(["kid", "fid", "precision", "recall", "coverage", "peak"], 0.5)
    scores |= {"spectrum_db": 1.0, "kid_floor": 0.0, "fid_floor": 4.0, "features": "f", "n": 7}
    row = {"recipe": "a", "data": "d", "image_size": 32, "minutes": 5.0, "cores": 2, "seed": 0}
    row |= {"images": 1000, "cpu_seconds": 60, "sheet": "a.png", "machine": "m", "commands": ["x"]}
    row |= {"curve": [(1.0, 0.9), (5.0, 0.4)], "scores": {**scores, "modes": 917, "modes_kl": 0.25}}
    text = "\n".join(page([row, {**row, "data": "e", "curve": [], "scores": scores}]))
    assert "| peak | modes | KL |\n" in text
    assert "| 0.5 | 917 | 0.25 |" in text
    assert "![KID over minutes of training](kid-d.png)" in text
    assert "kid-e.png" not in text
