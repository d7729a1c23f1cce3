"""Other tiles for the products that lose most of a step's time, by phase `profile`: the tuner's
contest over six tiles each, compiled beforehand. What wins is in tuned-CARD.json, which
FASTDCGAN_CACHE can hold for every later run."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.compiling import compile_all
from benchmarks.gpu.launches import task_facts, task_of
from benchmarks.gpu.phase import Items, Setting, line_of
from fastdcgan_kernels.choice import heuristics, targets
from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.choice.types import Target, Task
from fastdcgan_kernels.gpu.launch import recording
from fastdcgan_kernels.tuner import trials, tuning

CANDIDATES = 6
MOST = 12
"""Tasks."""
COMPILE_SHARE = 0.4
"""Of the time that is left when a task's tiles are compiled."""


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    os.environ["FASTDCGAN_CACHE"] = str(setting.out)
    start, device = time.monotonic(), setting.device
    target = targets.target_of(device)
    assert target is not None
    for task in _worst(setting)[: 1 if setting.rehearsal else MOST]:
        name = tuning.name_of(task)
        if not to.wants(name):
            continue
        with to.item(name) as facts:
            tiles = heuristics.neighbours(task, target)[: 2 if setting.rehearsal else CANDIDATES]
            trial = Watched(trials.trial_of(task, device))
            facts |= {"task": task_facts(task), "name": name}
            if not setting.rehearsal:
                left = setting.limit - (time.monotonic() - start)
                facts["compiled"] = _compile(trial, tiles, target, COMPILE_SHARE * left)
            found = tuning.tune_questions(
                [task],
                device,
                again=True,
                say=lambda line: None,
                timer=trial.timed,
                candidates=lambda asked, target, tiles=tiles: tiles,
                trial_of=lambda asked, device, trial=trial: trial,
            )
            facts |= trial.facts(tiles, found.get(task))


class Watched:
    """A trial, and what came of each of its candidates."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.now: Tile | None = None
        self.seconds: dict[Tile, float] = {}
        self.why: dict[Tile, str] = {}

    def prepare(self, tile: Tile) -> Callable[[], Any]:
        """As the trial."""
        self.now = tile
        with self._noticing():
            run = self.trial.prepare(tile)

        def noticed() -> Any:
            with self._noticing():
                return run()

        return noticed

    def wrong(self, raw: Any) -> str:
        """As the trial."""
        why: str = self.trial.wrong(raw)
        if why and self.now is not None:
            self.why[self.now] = why
        return why

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """What is raised inside is why the candidate is dropped."""
        try:
            yield
        except Exception as error:
            if self.now is not None:
                self.why[self.now] = line_of(error)
            raise

    def timed(self, run: Any) -> float:
        """Seconds of a run."""
        seconds = _seconds(run)
        if self.now is not None:
            self.seconds[self.now] = seconds
        return seconds

    def facts(self, tiles: list[Tile], kept: Tile | None) -> dict[str, Any]:
        """The contest as plain data."""
        default, winner = self.seconds.get(tiles[0]), self.seconds.get(kept) if kept else None
        return {
            "candidates": [
                {
                    "tile": tuning.words_of(tile),
                    "seconds": self.seconds.get(tile),
                    "why": self.why.get(tile),
                }
                for tile in tiles
            ],
            "kept": None if kept is None else tuning.words_of(kept),
            "gain": default / winner if default and winner else None,
        }


def _seconds(run: Any) -> float:
    if torch.cuda.is_available():
        return trials.device_time(run, lambda line: None)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _compile(trial: Watched, tiles: list[Tile], target: Target, seconds: float) -> Any:
    with recording() as launches:
        for tile in tiles:
            trial.prepare(tile)()
    return compile_all(launches, target, seconds)


def _worst(setting: Setting) -> list[Task]:
    """The tasks of products, those that lose most time beyond their floors first."""
    lost: dict[Task, float] = defaultdict(float)
    for facts in setting.measured("profile").values():
        for row in facts.get("rows", ()):
            if row["task"] is not None:
                lost[task_of(row["task"])] += row["seconds"] - row["floor_seconds"]
    return sorted(lost, key=lambda task: -lost[task])
