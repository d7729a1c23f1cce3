"""The search itself: trials of one budget, drawn by Optuna from a space, trained, judged by their
evaluations, ended early where hopeless, kept in a storage from which a search that was killed, or
another machine, goes on.

One way for every trial that did not end by itself (killed, Ctrl-C, a dead machine): it is FAIL in
the storage without a reason, and the next claim queues its point again. A trial that failed by
itself (diverged, out of memory) has a reason, and counts.
"""

import contextlib
import dataclasses
import io
import math
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock

from fastdcgan.errors import InputError, RunError
from fastdcgan.search.config import DEFAULT_TRIALS, SearchConfig
from fastdcgan.search.space import Choices, Range, Space, load_space, possible, text
from fastdcgan.training.config import TrainConfig, TrainResult

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

Train: TypeAlias = Callable[[TrainConfig, Callable[[dict[str, Any]], bool | None]], TrainResult]

TENTHS = 10
"""Parts of a trial's budget, by which pruners compare trials that are of different speed."""
ATTEMPTS = 3
"""A trial that was cut off so many times (it may be what kills the process) is not tried again."""
POLL_SECONDS = 1.0
HOPELESS = 2
"""Exit status of a worker that found what is wrong with all trials."""
MAY_DIFFER = ("cache", "device", "log_every", "sample_every")
"""Fields of the base configuration that are a machine's own matter."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has come to."""

    best: "FrozenTrial | None"
    """The trial of the least value; None where none was completed."""
    reference: "FrozenTrial | None"
    """Trial 0; None where it was not completed."""
    finished: int
    """Trials that ended by themselves: complete, pruned or failed."""
    report: Path
    """report.md; report.html and the plots are beside it."""


class _Failed(Exception):
    """A trial failed, and its reason is recorded."""


def search(config: SearchConfig, *, train: Train | None = None, heartbeat: int = 20) -> Found:
    """Searches as `config` says, from where an earlier search in `config.out` ended.

    Writes to `config.out`: study.db (unless `storage` says otherwise), a folder for each trial in
    trials/, and report.md, report.html and plots at the end.

    Args:
        config: what to search, how, for how long.
        train: what trains a trial; by default `fastdcgan.training.train`. With several workers it
            must be importable by name.
        heartbeat: seconds between two signs of life of a trial; after three times as long without
            one, a trial counts as dead and its point is queued again.

    Raises:
        InputError: the configuration or the space cannot work, or `config.out` holds another
            search.
        RunError: the search was stopped, or a worker died; the same call goes on.
    """
    config.validate()
    base = config.reference()
    space = load_space(config.space, base)
    _check_optuna()
    from fastdcgan.search.report import write_report
    from fastdcgan.training.folders import only_writer

    try:
        (config.out / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {config.out}: {error.strerror}") from None
    with only_writer(config.out):
        study = _open(config, heartbeat)
        _same_search(study, config, base, space)
        if train is None:
            _try_reference(base)
        wanted = _fill_queue(study, config, base, space)
        _say(f"{study.study_name}: {_begun(study.trials)} of {wanted} trials begun; {config.out}")
        task = _Task(config, base, space, wanted, heartbeat, train)
        stopped = _one_worker(task) if config.workers == 1 else _many_workers(task)
        path = write_report(study, config, base, space)
        found = summary(study, path)
        _say(f"report: {path.with_suffix('.html')}")
        if stopped is not None and found.finished < wanted:
            raise RunError(
                f"{stopped} after {found.finished} of {wanted} trials; the same command goes on"
            )
        return found


def summary(study: "Study", report: Path) -> Found:
    """What the trials of `study` have come to."""
    trials = study.trials
    done = [t for t in trials if t.state.name == "COMPLETE"]
    return Found(
        best=min(done, key=lambda t: (t.value, t.number), default=None),
        reference=next((t for t in done if "reference" in t.user_attrs), None),
        finished=sum(map(ended_by_itself, trials)),
        report=report,
    )


def ended_by_itself(trial: "FrozenTrial") -> bool:
    """Whether a trial is complete, pruned, or failed for a reason of its own."""
    return trial.state.is_finished() and not _cut_off(trial)


def trial_config(trial: "FrozenTrial | Trial", base: TrainConfig, space: Space) -> TrainConfig:
    """The configuration that a trial trains (or trained), but for its folder."""
    if "reference" in trial.user_attrs:
        return base
    return space.at(base, trial.params)


def _try_reference(base: TrainConfig) -> None:
    """What is wrong with all trials (the data, a missing extra) is said before the first."""
    from fastdcgan.training.loop import train

    with contextlib.redirect_stdout(io.StringIO()):
        train(dataclasses.replace(base, dry_run=True))


def _check_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise InputError("a search needs Optuna: pip install 'fastdcgan[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the lines of this file say more
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _say(line: str) -> None:
    print(line, flush=True)


# --- the storage and what is in it ---------------------------------------------------------------


def _open(config: SearchConfig, heartbeat: int) -> "Study":
    """The study in its storage; made where it is not there yet."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    url = config.storage or f"sqlite:///{(config.out / 'study.db').resolve()}"
    # SQLite lets one process write at a time: the others wait for as long as this.
    patience = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(
            url, engine_kwargs=patience, heartbeat_interval=heartbeat, grace_period=3 * heartbeat
        )
        return optuna.create_study(
            storage=storage,
            study_name=config.study or config.out.resolve().name,
            direction="minimize",
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot open the storage {url}: {first}") from None


def _same_search(study: "Study", config: SearchConfig, base: TrainConfig, space: Space) -> None:
    """Records what is searched, or refuses to go on with a search for something else."""
    now = {"base": base.to_json(), "space": space.to_json(), "objective": config.objective}
    if "base" not in study.user_attrs:
        for name, value in reversed(now.items()):  # "base", which says that all is there, last
            study.set_user_attr(name, value)
        return
    before = TrainConfig.from_json(study.user_attrs["base"])
    changed = [
        f"--{f.name.replace('_', '-')} {getattr(before, f.name)} -> {getattr(base, f.name)}"
        for f in dataclasses.fields(TrainConfig)
        if f.name not in MAY_DIFFER and getattr(before, f.name) != getattr(base, f.name)
    ]
    if study.user_attrs["space"] != now["space"]:
        changed.append(f"the space, which is now {space.name}")
    if changed:
        raise InputError(
            f"{study.study_name} is a search for something else ({'; '.join(changed)}): leave "
            "these as they were, or start another with --out (and --study, in a shared storage)"
        )


def _fill_queue(study: "Study", config: SearchConfig, base: TrainConfig, space: Space) -> int:
    """Queues the reference, and the points of a grid that are not there yet.

    Returns:
        How many trials are wanted in all.
    """
    trials = study.trials
    if not trials:
        study.enqueue_trial(space.point(base) or {}, user_attrs={"reference": True})
        trials = study.trials
    if config.sampler != "grid":
        return DEFAULT_TRIALS if config.trials is None else config.trials
    there = {_key(_values(trial)) for trial in trials}
    most = None if config.trials is None else config.trials - 1
    points = space.grid(config.base.seed, most) if most != 0 else []
    new = [p for p in points if _key(p) not in there and possible(space.at(base, p))]
    for point in new:
        study.enqueue_trial(point, user_attrs={"grid": True})
    there_now = sum("retry" not in t.user_attrs for t in trials) + len(new)
    return there_now if config.trials is None else min(there_now, config.trials)


def _values(trial: "FrozenTrial") -> dict[str, Any]:
    """The point of a trial, be it drawn or queued."""
    queued: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return {**queued, **trial.params}


def _key(point: dict[str, Any]) -> tuple[str, ...]:
    """The same for two points that differ by rounding."""
    return tuple(
        f"{k}={v:.9g}" if isinstance(v, float) else f"{k}={v}" for k, v in sorted(point.items())
    )


def _cut_off(trial: "FrozenTrial") -> bool:
    """Whether a trial ended by a kill, an interrupt or a dead machine, and is to be tried again."""
    return (
        trial.state.name == "FAIL"
        and "failed" not in trial.user_attrs
        and ("reference" in trial.user_attrs or trial.user_attrs.get("attempt", 1) < ATTEMPTS)
    )


def _begun(trials: "list[FrozenTrial]") -> int:
    """Trials that run or have ended, those left out that are or will be tried again."""
    return sum(t.state.name != "WAITING" and not _cut_off(t) for t in trials)


def _queue_again(study: "Study") -> None:
    """Queues the points of trials that were cut off, each once."""
    import optuna

    optuna.storages.fail_stale_trials(study)
    trials = study.trials
    retried = {t.user_attrs.get("retry") for t in trials}
    for trial in trials:
        if _cut_off(trial) and trial.number not in retried:
            kept = {k: v for k, v in trial.user_attrs.items() if k in ("reference", "grid")}
            attempt = trial.user_attrs.get("attempt", 1) + 1
            study.enqueue_trial(
                _values(trial),
                user_attrs={**kept, "retry": trial.number, "attempt": attempt},
            )


# --- the workers ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a worker needs to know."""

    config: SearchConfig
    base: TrainConfig
    space: Space
    wanted: int
    heartbeat: int
    train: Train | None


def _one_worker(task: _Task) -> str | None:
    """Works in this process; returns why the search is not done, or None."""
    try:
        _work(task, 0)
    except KeyboardInterrupt:
        return "stopped"
    return None


def _many_workers(task: _Task) -> str | None:
    """Works in processes that share this machine's threads; returns as `_one_worker`."""
    from fastdcgan.hardware import use_allowed_threads

    share = max(1, use_allowed_threads() // task.config.workers)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(task, index)) for index in range(task.config.workers)
    ]
    with _environment("OMP_NUM_THREADS", str(share)):
        for worker in workers:
            worker.start()
    stopped = None
    while alive := [worker for worker in workers if worker.is_alive()]:
        try:
            wait([worker.sentinel for worker in alive])
        except KeyboardInterrupt:  # the workers got it, too, and end their steps
            stopped = "stopped"
        if any(worker.exitcode == HOPELESS for worker in workers):
            for worker in alive:
                worker.terminate()
    codes = [worker.exitcode for worker in workers]
    if stopped is None and any(codes):
        died = [code for code in codes if code]
        stopped = f"{len(died)} of {len(codes)} workers died (status {died[0]})"
    return stopped


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _worker(task: _Task, index: int) -> None:
    """The main function of a worker's process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _check_optuna()
    try:
        _work(task, index)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(HOPELESS)


def _die_with(parent: int) -> None:
    """A command that was killed leaves no workers behind."""
    wait([parent])
    os._exit(1)


def _work(task: _Task, index: int) -> None:
    """Trains trials until there are no more to train."""
    config = task.config
    study = _open(config, task.heartbeat)
    study.pruner = _pruner(config.pruner)
    objective = _Objective(task, _device(task.base, index))
    told = False
    claim = FileLock(config.out / ".claim.lock")  # one at a time, so that none too many is begun
    while True:
        with claim:
            _queue_again(study)
            trials = study.trials
            begun = _begun(trials)
            queued = any(t.state.name == "WAITING" for t in trials)
            if begun < task.wanted and (queued or config.sampler != "grid"):
                study.sampler = _sampler(config, task.wanted, begun)
                study.optimize(
                    partial(objective, drawn=claim.release),
                    n_trials=1,
                    catch=(_Failed,),
                    gc_after_trial=True,
                )
                continue
        running = [str(t.number) for t in trials if t.state.name == "RUNNING"]
        if not running:
            return
        if index == 0 and not told:
            _say(f"waiting for trial {', '.join(running)}: it runs elsewhere, or was killed")
            told = True
        time.sleep(POLL_SECONDS)  # one that was killed will be queued again


def _device(base: TrainConfig, index: int) -> str:
    """Workers take turns at the CUDA devices."""
    if base.device != "auto":
        return base.device
    import torch

    return f"cuda:{index % torch.cuda.device_count()}" if torch.cuda.is_available() else "auto"


def _sampler(config: SearchConfig, wanted: int, begun: int) -> "BaseSampler":
    """The seed is another for every trial, or a search that goes on would draw what it has."""
    from optuna import samplers

    seed = random.Random(f"{config.base.seed} {begun}").getrandbits(32)
    if config.sampler == "tpe":
        return samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # the reference need not be a point of the space
            constant_liar=True,
            n_startup_trials=min(10, max(2, wanted // 3)),
        )
    return samplers.RandomSampler(seed=seed)


def _pruner(name: str) -> "BasePruner":
    """Pruners count in tenths of a trial's budget."""
    from optuna import pruners

    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3, n_min_trials=3)
    if name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=2, max_resource=TENTHS, reduction_factor=2)
    return pruners.NopPruner()


# --- one trial -----------------------------------------------------------------------------------


class _Objective:
    """Trains a trial and returns its score.

    Args:
        task: of the worker.
        device: that it trains on.
    """

    def __init__(self, task: _Task, device: str) -> None:
        self.task, self.device, self.score = task, device, task.config.objective

    def __call__(self, trial: "Trial", drawn: Callable[[], None]) -> float:
        import optuna

        # Optuna's own thread may come too late for a process that dies at once, and a trial without
        # any sign of life is never taken for dead.
        storage: Any = trial.storage  # one with heartbeats: `_open`
        storage.record_heartbeat(trial._trial_id)
        task = self.task
        reference = "reference" in trial.user_attrs
        if not reference or task.space.point(task.base) is not None:
            for name, dimension in task.space.varied.items():
                suggest(trial, name, dimension)
        drawn()
        start = time.monotonic()
        try:
            if task.config.sampler == "grid" and not {"reference", "grid"} & set(trial.user_attrs):
                raise RunError("another machine took the last point of the grid")
            value = self._train(trial, start)
        except (KeyboardInterrupt, optuna.TrialPruned) as ended:
            if isinstance(ended, KeyboardInterrupt):
                self._tell(trial, "stopped; it will be tried again")
            else:
                self._tell(trial, str(ended))
            raise
        except Exception as error:
            # Whatever is wrong with a point, other points may be good; what is wrong with the
            # reference, but that it diverges, is wrong with all.
            if reference and not isinstance(error, RunError):
                raise
            reason = str(error) if isinstance(error, InputError | RunError) else repr(error)
            trial.set_user_attr("failed", reason)
            self._tell(trial, f"failed: {reason}")
            raise _Failed(reason) from error
        self._tell(trial, f"{self.score} {value:.4g}", value)
        return value

    def _train(self, trial: "Trial", start: float) -> float:
        import optuna

        config = self._config(trial)
        pruned = ""

        def evaluated(row: dict[str, Any]) -> bool:
            nonlocal pruned
            tenth = self._tenth(config, row["step"], start)
            if tenth not in reported and math.isfinite(row[self.score]):
                reported.add(tenth)
                trial.report(row[self.score], tenth)
                if "reference" not in trial.user_attrs and trial.should_prune():
                    pruned = f"pruned at {tenth}/{TENTHS}, {self.score} {row[self.score]:.4g}"
            return bool(pruned)

        reported: set[int] = set()
        out = config.out
        assert out is not None
        if out.exists():  # of a search whose storage is gone
            raise InputError(f"{out} is there already: move it away, or choose another --out")
        out.mkdir(parents=True)
        with (
            (out / "log.txt").open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                result = self._trainer()(config, evaluated)
            finally:
                shutil.rmtree(out / "checkpoints", ignore_errors=True)  # large, and done with
                if config.compile:
                    import torch

                    torch.compiler.reset()  # its cache of shapes is bounded
        trial.set_user_attr("minutes", (time.monotonic() - start) / 60)
        trial.set_user_attr("steps", result.steps)
        if result.best is not None:
            trial.set_user_attr("evaluation", result.best)
        if pruned:
            raise optuna.TrialPruned(pruned)
        if result.interrupted:
            raise KeyboardInterrupt
        if result.best is None:
            raise RunError(
                f"{result.steps} steps, and no evaluation: lower --eval-every, or give a trial "
                "more --minutes or --steps"
            )
        value = float(result.best[self.score])
        if not math.isfinite(value):
            raise RunError(f"the best {self.score} is {value}")
        return value

    def _trainer(self) -> Train:
        if self.task.train is not None:
            return self.task.train
        from fastdcgan.training.loop import train

        return train

    def _config(self, trial: "Trial") -> TrainConfig:
        return dataclasses.replace(
            trial_config(trial, self.task.base, self.task.space),
            out=self.task.config.out / "trials" / f"{trial.number:04d}",
            device=self.device,
            keep=1,
            tensorboard=False,
        )

    def _tenth(self, config: TrainConfig, step: int, start: float) -> int:
        """How much of its budget a trial has used, in tenths."""
        by_steps = 0.0 if config.steps is None else step / config.steps
        minutes = config.max_minutes
        by_clock = 0.0 if minutes is None else (time.monotonic() - start) / 60 / minutes
        return min(TENTHS, int(TENTHS * max(by_steps, by_clock)))

    def _tell(self, trial: "Trial", what: str, value: float = math.inf) -> None:
        """The trial's line: number, outcome, values, and the best so far."""
        done = [t for t in trial.study.trials if t.state.name == "COMPLETE"]
        values = {t.number: t.value for t in done if t.value is not None} | {trial.number: value}
        best = min(values, key=lambda number: values[number])
        named = " ".join(f"{k}={text(v)}" for k, v in trial.params.items())
        if "reference" in trial.user_attrs:
            named = "the reference recipe"
        so_far = f"; best {values[best]:.4g}, trial {best}" if math.isfinite(values[best]) else ""
        _say(f"trial {trial.number}: {what}  [{named}]{so_far}")


def suggest(trial: "Trial", name: str, dimension: Choices | Range) -> None:
    """Draws a value of `dimension` for `trial`, as its parameter `name`."""
    if isinstance(dimension, Choices):
        trial.suggest_categorical(name, dimension.values)
    elif dimension.whole:
        trial.suggest_int(
            name,
            int(dimension.low),
            int(dimension.high),
            log=dimension.log,
            step=int(dimension.step or 1),
        )
    else:
        trial.suggest_float(
            name, dimension.low, dimension.high, log=dimension.log, step=dimension.step
        )
