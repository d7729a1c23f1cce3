"""A search is one frozen `SearchConfig`: the command line of `python -m fastdcgan.tune`, and the
argument of `search()`. The configuration that is varied is a `TrainConfig` inside it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastdcgan.command import without_flags
from fastdcgan.errors import InputError
from fastdcgan.search.space import DECIDED
from fastdcgan.training.config import ENDLESS, TrainConfig

DEFAULT_TRIALS = 30
EVALUATIONS = 10
"""Evaluations of a trial of --steps, where --eval-every does not say."""

if TYPE_CHECKING:
    Base = TrainConfig
else:  # some of what the search decides are flags of its own
    Base = without_flags(TrainConfig, DECIDED, "Base", __name__)


@dataclass(frozen=True)
class SearchConfig:
    """What to search, how, and for how long."""

    space: str = "small-data"
    """What is varied: a .toml or .json file (docs/search.md), or a preset."""
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    """tpe: tree-structured Parzen estimators, which learn from the trials before. random. grid:
    each point once, in an order drawn by --seed."""
    trials: int | None = None
    """Trials in all, the reference recipe's among them; by default 30, or all points of a grid."""
    minutes: float | None = None
    """Minutes of training a trial, evaluations included (in place of --epochs; with --steps,
    whatever comes first)."""
    objective: Literal["kid", "fid"] = "kid"
    """The score of a trial is the best of its evaluations by this."""
    pruner: Literal["none", "median", "halving", "hyperband"] = "median"
    """Ends trials without a prospect at their evaluations. median: worse than half of the others
    were at that tenth of the budget; halving, hyperband: successive halving."""
    workers: int = 1
    """Trials at once: processes that share this machine's threads."""
    out: Path = Path("tune/search")
    """Folder of the search: study.db, trials/, report.md, report.html. The same command goes on
    with what is there."""
    storage: str | None = None
    """Optuna's storage by URL, for several machines that share one search, each with its --out
    (mysql://..., postgresql://..., sqlite:///...); by default study.db in --out."""
    study: str | None = None
    """The search's name in that storage; by default the last part of --out."""
    base: Annotated[Base, tyro.conf.OmitArgPrefixes] = field(default_factory=Base)
    """The reference recipe: trial 0, and what each trial has where the space says nothing."""

    def validate(self) -> None:
        """Raises InputError, naming the flag, where a value cannot be."""
        for name in ("trials", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} was given; it must be at least 1")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise InputError(f"--minutes {self.minutes} was given; it must be above 0")
        if self.minutes is None and self.base.steps is None:
            raise InputError("a search needs trials of one length: give --minutes or --steps")
        if self.minutes is not None and self.base.eval_every is None:
            raise InputError(
                "--minutes was given, and no --eval-every: give the steps between two evaluations "
                "(by which trials are judged and ended), about a tenth of what fits in a trial"
            )
        self.reference().validate()

    def reference(self) -> TrainConfig:
        """The configuration of trial 0, but for its folder."""
        given = {f.name: getattr(self.base, f.name) for f in dataclasses.fields(TrainConfig)}
        given["best_by"] = self.objective
        given["max_minutes"] = self.minutes
        if given["eval_every"] is None and given["steps"] is not None:
            given["eval_every"] = max(1, given["steps"] // EVALUATIONS)
        if self.minutes is not None and given["steps"] is None:
            given["epochs"] = ENDLESS
        return TrainConfig(**given)
