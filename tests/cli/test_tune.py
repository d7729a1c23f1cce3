"""`python -m fastdcgan.tune` as users run it."""

import os
import sqlite3
import time

import pytest

from fastdcgan.search.space import presets
from fastdcgan.tune import main, options

TINY = [
    *("--image-size", "32", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "8"),
    *("--steps", "8", "--eval-every", "4", "--eval-n", "16", "--device", "cpu"),
]  # fmt: skip


def test_help_answers_at_once_and_needs_neither_torch_nor_optuna(command, tmp_path):
    for name in ("torch", "optuna", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    path = os.pathsep.join([str(tmp_path), os.getcwd(), f"{os.getcwd()}/kernels"])
    start = time.perf_counter()
    done = command("fastdcgan.tune", "--help", env={"PYTHONPATH": path})
    assert time.perf_counter() - start < 2.5
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python -m fastdcgan.tune --") == 2
    for flag in ("--space", "--sampler", "--trials", "--minutes", "--objective", "--pruner",
                 "--workers", "--storage", "--lr-g", "--image-size"):  # fmt: skip
        assert f"{flag} " in done.stdout
    for name in presets():
        assert name in done.stdout
    for flag in ("--max-minutes", "--best-by", "--resume", "--dry-run"):
        assert flag not in done.stdout, "the search decides it"


def test_base_flags_are_those_of_training():
    config = options(["--data", "x.npy", "--lr-g", "3e-4", "--steps", "9", "--workers", "2"])
    assert (config.base.data, config.base.lr_g, config.base.batch_size) == ("x.npy", 3e-4, 64)
    assert (config.workers, config.reference().workers) == (2, None)
    assert config.reference().eval_every == 1
    assert options([]).base.batch_size == 16, "the recipe of the built-in data"
    assert options(["--preset", "tf28"]).base.net == "tf28"
    assert options(["--lr", "1e-3"]).base.lr_g is None, "the recipe's rate of G gives way"
    with_clock = options(["--minutes", "3", "--eval-every", "5", "--objective", "fid"]).reference()
    assert (with_clock.max_minutes, with_clock.best_by) == (3.0, "fid")
    assert with_clock.epochs == 1_000_000, "the clock ends it"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps", "5", "--space", "nowhere.toml"], "--space nowhere.toml: No such file"),
        ([], "give --minutes or --steps"),
        (["--preset", "vgg"], "unknown preset 'vgg'"),
        (["--steps", "5", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert main(["--steps", "5", "--out", str(tmp_path / "s")]) == 1
    assert "pip install 'fastdcgan[tune]'" in capsys.readouterr().err


def test_a_real_search_from_end_to_end(command, tiny_data, tmp_path, monkeypatch, capsys):
    """Nets of a few channels, scored by lite0; a diverging learning rate among the points."""
    (tmp_path / "my.toml").write_text("lr_g = [2e-4, 1e30]\nlr_d = [2e-4, 1e-3]\n")
    args = ["--data", tiny_data, "--space", "my.toml", "--sampler", "grid", "--out", "s", *TINY]
    done = command("fastdcgan.tune", *args, "--trials", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "s: 0 of 2 trials begun" in done.stdout
    monkeypatch.chdir(tmp_path)
    assert main([str(arg) for arg in args]) == 0
    said = capsys.readouterr()
    assert "s: 2 of 4 trials begun" in said.out
    assert said.out.count("\ntrial ") == 2
    assert said.err == ""
    out = tmp_path / "s"
    report = (out / "report.md").read_text()
    assert "2 completed, 2 failed" in report
    assert "not finite" in report
    assert "Samples of the winner" in report
    for name in ("report.html", "history.png", "slices.png"):
        assert (out / name).stat().st_size > 1000
    assert sorted(path.name for path in (out / "trials").iterdir()) == [
        f"{number:04d}" for number in range(4)
    ]
    assert not list(out.rglob("checkpoints"))
    assert "KID[lite0]" in (out / "trials" / "0000" / "log.txt").read_text()
    with sqlite3.connect(out / "study.db") as database:
        (count,) = database.execute("select count(*) from trials").fetchone()
    assert count == 4
