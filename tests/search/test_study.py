"""Searches with a training that takes no time: what is drawn, what is kept, what happens after a
kill, in parallel, to trials that fail and to trials that are hopeless."""

import contextlib
import dataclasses
import math
import os
import sqlite3
import statistics
import time
from pathlib import Path

import optuna
import pytest

from fastdcgan.errors import InputError, RunError
from fastdcgan.search import SearchConfig, search
from fastdcgan.search.config import Base
from fastdcgan.training import TrainConfig, TrainResult
from tests.search import quick
from tests.search.quick import BASE, trained

SPACE = """
lr_g = { low = 1e-5, high = 1e-2, log = true }
lr_d = { low = 1e-5, high = 1e-2, log = true }
beta1 = [0.0, 0.5]
"""
GRID = "ngf = [8, 16, 64]\nema_decay = { low = 0.9, high = 0.98, step = 0.04 }\n"


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Runs a search in tmp_path/s: searched(SPACE, trials=4, ...) -> what was found."""

    def run(space=SPACE, *, train=quick.train, heartbeat=20, **fields):
        path = tmp_path / "space.toml"
        path.write_text(space)
        given = {"space": str(path), "base": BASE, "out": tmp_path / "s", "pruner": "none"}
        return search(SearchConfig(**{**given, **fields}), train=train, heartbeat=heartbeat)

    monkeypatch.setattr("fastdcgan.search.report._draw", lambda *args: [])  # plots take longest
    return run


def points(out, *names):
    return [tuple(getattr(c, name) for name in names) for c in trained(out).values()]


def test_a_grid_trains_each_point_once_beside_the_reference(searched, tmp_path, capsys):
    found = searched(GRID, sampler="grid", trials=5)
    assert found.finished == 5
    searched(GRID, sampler="grid")
    grid = points(tmp_path / "s", "ngf", "ema_decay")
    assert grid[0] == (64, 0.999), "the reference, which is no point of it"
    wanted = {(ngf, decay) for ngf in (8, 16, 64) for decay in (0.9, 0.94, 0.98)}
    rounded = [(ngf, round(decay, 9)) for ngf, decay in grid[1:]]
    assert sorted(rounded) == sorted(wanted)
    before = capsys.readouterr().out
    assert before.count("\ntrial ") == 10
    found = searched(GRID, sampler="grid")
    assert found.finished == 10
    assert "\ntrial " not in capsys.readouterr().out, "all is done: it only reports"


def test_a_grid_that_holds_the_reference_does_not_train_it_twice(searched, tmp_path):
    space = "image_size = [28, 64]\nnet = ['dcgan', 'tf28']\nngf = [8, 64]"
    found = searched(space, sampler="grid")
    trained = points(tmp_path / "s", "net", "image_size", "ngf")
    assert trained[0] == ("dcgan", 64, 64)
    possible = {("dcgan", 64, 8), ("tf28", 28, 8), ("tf28", 28, 64)}
    assert set(trained[1:]) == possible, "28 pixels are for tf28 only"
    assert found.finished == len(trained) == 4


def test_random_fills_the_space_and_goes_on_with_other_draws(searched, tmp_path):
    searched(sampler="random", trials=8)
    searched(sampler="random", trials=16)
    drawn = points(tmp_path / "s", "lr_g", "lr_d", "beta1")
    assert len(drawn) == len(set(drawn)) == 16
    assert drawn[0] == (None, None, 0.5), "the reference as it is"
    logs = [math.log10(value) for lr_g, lr_d, _ in drawn[1:] for value in (lr_g, lr_d)]
    assert all(-5 <= x <= -2 for x in logs)
    thirds = [sum(low <= x < low + 1 for x in logs) for low in (-5, -4, -3)]
    assert min(thirds) >= 4, f"about 10 each by the logarithm: {thirds}"
    assert {beta1 for *_, beta1 in drawn} == {0.0, 0.5}


def test_the_same_seed_draws_the_same(searched, tmp_path):
    first = searched(sampler="random", trials=3)
    again = searched(sampler="random", trials=3, out=tmp_path / "again")
    other = dataclasses.replace(BASE, seed=1)
    searched(sampler="random", trials=3, out=tmp_path / "other", base=other)
    drawn = [points(tmp_path / name, "lr_g", "lr_d") for name in ("s", "again", "other")]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0][1:]) & set(drawn[2][1:])
    assert first.best.value == again.best.value


def test_tpe_learns_where_it_is_good(searched, tmp_path):
    found = searched("".join(SPACE.splitlines(True)[:3]), sampler="tpe", trials=16)
    scores = [quick.score(config) for config in trained(tmp_path / "s").values()]
    assert statistics.median(scores[8:]) < 0.6 * statistics.median(scores[1:6])
    assert found.best.value == min(scores)
    assert found.best.value < found.reference.value == pytest.approx(scores[0])


def test_failed_trials_are_recorded_and_the_search_goes_on(searched, tmp_path, capsys):
    def train(config, on_evaluation):
        result = quick.train(config, on_evaluation)
        match config.ngf:
            case 1:
                raise RunError("the losses of step 7 are not finite | really")
            case 2:
                raise MemoryError("no room")
            case 3:
                return dataclasses.replace(result, best={**result.best, "kid": math.nan})
            case 4:
                return dataclasses.replace(result, best=None)
        return result

    found = searched("ngf = [1, 2, 3, 4, 8]", sampler="grid", train=train)
    assert found.finished == 6
    said = capsys.readouterr().out
    reasons = ["the losses of step 7", "MemoryError('no room')", "the best kid is nan",
               "no evaluation: lower --eval-every"]  # fmt: skip
    for reason in reasons:
        assert f"failed: {reason}" in said or reason in said
    report = (tmp_path / "s" / "report.md").read_text()
    assert "2 completed, 4 failed" in report
    assert all(reason in report for reason in reasons)
    assert "not finite \\| really" in report, "a bar does not end a cell"
    assert found.best.params.get("ngf", 64) in (8, 64)


def test_what_is_wrong_with_the_reference_is_wrong_with_all(searched):
    def train(config, on_evaluation):
        raise InputError("there is no such data")

    with pytest.raises(InputError, match="no such data"):
        searched(trials=3, train=train)
    found = searched(trials=3)
    assert found.reference is not None, "when it is mended, the same search goes on"
    assert found.finished == 3


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_hopeless_trials_are_ended_early(searched, tmp_path, pruner):
    long = dataclasses.replace(BASE, eval_every=10)
    ends = {}

    def train(config, on_evaluation):
        result = quick.train(config, on_evaluation)
        ends[int(config.out.name)] = result.steps
        return result

    values = [0.01, 0.008, *(3e-4 * 1.1**i for i in range(6)), 1e-6]
    space = f"lr_g = {values}"
    found = searched(space, sampler="grid", pruner=pruner, base=long, train=train)
    assert found.finished == 10
    scores = {i: quick.score(config) for i, config in trained(tmp_path / "s").items()}
    pruned = {i for i, end in ends.items() if end < 100}
    assert pruned, "some are hopeless"
    assert 0 not in pruned, "the reference is trained to its end"
    assert found.best.number not in pruned
    whole = [scores[i] for i in ends if i not in pruned]
    assert statistics.mean(scores[i] for i in pruned) > statistics.median(whole)
    assert f"{len(pruned)} pruned" in (tmp_path / "s" / "report.md").read_text()


def test_the_reference_is_trained_to_its_end_whatever_the_pruner_says(searched, monkeypatch):
    """Here one that says at once that any trial is hopeless."""
    merciless = optuna.pruners.ThresholdPruner(upper=-1.0)
    monkeypatch.setattr("fastdcgan.search.study._pruner", lambda name: merciless)
    ends = {}

    def train(config, on_evaluation):
        result = quick.train(config, on_evaluation)
        ends[int(config.out.name)] = result.steps
        return result

    found = searched(sampler="random", trials=3, train=train)
    assert ends == {0: 100, 1: 50, 2: 50}
    assert found.best.number == found.reference.number == 0


def test_tenths_of_the_budget_are_of_steps_or_of_minutes(searched):
    reported = []

    def train(config, on_evaluation):
        assert config.max_minutes == 0.02
        assert config.steps is None
        start = time.monotonic()
        for step in (1, 2, 3):
            time.sleep(0.3)
            reported.append((step, int(10 * (time.monotonic() - start) / 1.2)))
            on_evaluation({"step": step, "kid": 1.0 / step, "fid": 1.0})
        best = {"step": 3, "kid": 1.0 / 3, "fid": 1.0}
        return TrainResult(3, 1.0, config.out, 1.0, 1.0, interrupted=False, best=best)

    found = searched(trials=1, minutes=0.02, base=Base(eval_every=1), train=train)
    steps = list(found.best.intermediate_values)
    assert len(steps) == 3
    for (_, expected), tenth in zip(reported, steps, strict=True):
        assert abs(expected - tenth) <= 1


def test_a_search_for_something_else_is_refused(searched):
    searched(trials=1)
    for said, changed in {
        "--lr 0.0002 -> 0.001": {"base": dataclasses.replace(BASE, lr=1e-3)},
        "--steps 100 -> 200": {"base": dataclasses.replace(BASE, steps=200)},
        "--best-by kid -> fid": {"objective": "fid"},
        "the space, which is now": {"space": "lr_g = [1e-4]"},
    }.items():
        with pytest.raises(InputError, match="is a search for something else") as raised:
            searched(trials=2, **changed)
        assert said in str(raised.value)
    searched(trials=1, base=dataclasses.replace(BASE, log_every=5), sampler="random")


def test_fid_is_an_objective_too(searched, tmp_path):
    found = searched(trials=2, objective="fid")
    assert found.reference.value == pytest.approx(1000 * quick.score(TrainConfig()))
    assert trained(tmp_path / "s")[0].best_by == "fid"


def test_an_interrupt_ends_the_search_and_the_same_call_goes_on(searched, tmp_path):
    def train(config, on_evaluation):
        result = quick.train(config, on_evaluation)
        return dataclasses.replace(result, interrupted=config.out.name == "0002")

    with pytest.raises(RunError, match="stopped after 2 of 5 trials; the same command goes on"):
        searched(sampler="random", trials=5, train=train)
    assert "1 cut off" in (tmp_path / "s" / "report.md").read_text()
    found = searched(sampler="random", trials=5)
    assert found.finished == 5
    drawn = points(tmp_path / "s", "lr_g", "lr_d", "beta1")
    assert len(drawn) == 6
    assert drawn[2] == drawn[3], "what was cut off is trained again, first"
    assert len(set(drawn)) == 5


@pytest.mark.parametrize(("sampler", "workers"), [("grid", 2), ("tpe", 1)])
def test_a_killed_search_goes_on(searched, tmp_path, start, sampler, workers):
    """SIGKILL while two trials of a grid, or one of TPE, are under way."""
    out, space = tmp_path / "s", tmp_path / "space.toml"
    space.write_text(GRID if sampler == "grid" else SPACE)
    process = start("tests.search.quick", out, space, sampler, workers, cwd=tmp_path)
    running = [out / "trials" / f"{number:04d}" / "process" for number in (3, 4)][:workers]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in running):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # into the sleep, so that both have been reported
    process.kill()
    process.wait()
    workers_were = {int(path.read_text().split()[0]) for path in running}
    assert len(workers_were) == workers
    for pid in workers_were - {process.pid}:
        gone = time.monotonic() + 10
        while _alive(pid):
            assert time.monotonic() < gone, "a killed command leaves no workers"
            time.sleep(0.1)
    found = searched(space.read_text(), sampler=sampler, trials=8, heartbeat=1)
    assert found.finished == 8
    configs = trained(out)
    assert len(configs) == 8 + workers, "what ran when it was killed, once more"
    names = ("ngf", "ema_decay", "lr_g", "lr_d", "beta1")
    drawn = points(out, *names)
    assert len(set(drawn)) == 8
    cut = {drawn[number] for number in (3, 4)[:workers]}
    assert {point for point in drawn if drawn.count(point) == 2} == cut
    report = (out / "report.md").read_text()
    assert f"8 completed, {workers} cut off" in report


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return " Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_workers_share_one_search(searched, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = searched("ngf = [8, 16, 32]", sampler="grid", workers=2, train=quick.train_together)
    assert found.finished == 4
    out = tmp_path / "s"
    assert sorted(ngf for (ngf,) in points(out, "ngf")) == [8, 16, 32, 64], "none twice"
    noted = [path.read_text().split() for path in sorted(out.glob("trials/*/process"))]
    assert len({pid for pid, _ in noted}) == 2, "the first two trained at once"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {int(threads) for _, threads in noted} <= set(range(1, share + 1))
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_others_take_over_from_a_worker_that_dies(searched, tmp_path):
    found = searched("ngf = [8, 16]", sampler="grid", workers=2, train=quick.die_once, heartbeat=1)
    assert found.finished == 3
    assert sorted(ngf for (ngf,) in points(tmp_path / "s", "ngf")) == [8, 16, 64]
    assert "3 completed, 1 cut off" in (tmp_path / "s" / "report.md").read_text()


def test_a_trial_shows_life_before_it_trains(searched, tmp_path, monkeypatch):
    """Also where Optuna's own thread comes too late: else a death at once would never be seen."""
    late = "optuna.storages._heartbeat.HeartbeatThread._record_heartbeat"
    monkeypatch.setattr(late, staticmethod(lambda *args: None))
    signs = []

    def train(config, on_evaluation):
        with contextlib.closing(sqlite3.connect(tmp_path / "s" / "study.db")) as held:
            signs.append(held.execute("SELECT COUNT(*) FROM trial_heartbeats").fetchone()[0])
        return quick.train(config, on_evaluation)

    searched("ngf = [8]", sampler="grid", train=train)
    assert signs == [1, 2]


def test_two_machines_share_a_storage(searched, tmp_path):
    shared = {"storage": f"sqlite:///{tmp_path}/shared.db", "study": "ours", "sampler": "random"}
    searched(trials=3, **shared)
    found = searched(trials=5, out=tmp_path / "elsewhere", **shared)
    assert found.finished == 5
    assert len(trained(tmp_path / "s")) == 3
    assert sorted(trained(tmp_path / "elsewhere")) == [3, 4]
    assert "5 completed" in (tmp_path / "elsewhere" / "report.md").read_text()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"trials": 0}, "--trials 0 was given"),
        ({"workers": 0}, "--workers 0 was given"),
        ({"minutes": -1.0}, "--minutes -1.0 was given"),
        ({"minutes": math.inf}, "--minutes inf was given"),
        ({"base": Base(eval_every=1)}, "give --minutes or --steps"),
        ({"base": Base(), "minutes": 1.0}, "no --eval-every"),
        ({"base": Base(steps=10, lr=-1.0)}, "--lr -1.0 was given"),
        ({"storage": "nonsense"}, "cannot open the storage nonsense"),
        ({"storage": "sqlite:////nonexistent/a.db"}, "cannot open the storage"),
    ],
)
def test_what_cannot_work_is_one_line(searched, fields, said):
    with pytest.raises(InputError) as raised:
        searched(**fields)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_one_command_searches_in_a_folder(searched):
    def train(config, on_evaluation):
        with pytest.raises(InputError, match="another process"):
            searched(trials=1)
        return quick.train(config, on_evaluation)

    searched(trials=1, train=train)


def test_a_trial_has_what_the_search_decides(searched, tmp_path):
    searched("lr_g = [1e-4]\nema_decay = 0.9", sampler="grid")
    reference, other = trained(tmp_path / "s").values()
    assert (reference.ema_decay, reference.lr_g) == (0.999, None)
    assert (other.ema_decay, other.lr_g) == (0.9, 1e-4)
    assert other.out == tmp_path / "s" / "trials" / "0001"
    assert (other.keep, other.tensorboard, other.best_by) == (1, False, "kid")
    assert (other.steps, other.eval_every, other.max_minutes) == (100, 50, None)
