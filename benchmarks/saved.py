"""Runs that pytest-benchmark saved (`--benchmark-autosave`), read back, and two of them compared.
Not here: tables and plots (report.py, plots.py). Loads neither torch nor matplotlib."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdcgan.errors import InputError

FEW_ROUNDS = 3
"""With fewer, the spread of the rounds says nothing of noise."""


@dataclass(frozen=True)
class Entry:
    """One variant of one group. Times in seconds per call."""

    group: str
    variant: str
    ours: bool
    median: float
    q1: float
    q3: float
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)
    """All that the benchmark saved beside its rounds: family, batch, images_per_second, ..."""

    @property
    def throttled(self) -> bool:
        """Whether the GPU was held down meanwhile, so that the times say nothing of the code."""
        return bool(self.facts.get("throttled"))

    def __str__(self) -> str:
        return f"{self.group}, {self.variant}"


@dataclass(frozen=True)
class Run:
    """One saved run."""

    path: Path
    when: str
    commit: str
    dirty: bool
    hardware: dict[str, Any]
    software: dict[str, Any]
    entries: dict[str, Entry]
    """By the test's full name."""

    @property
    def label(self) -> str:
        """The commit, short; marked where the tree was changed since."""
        return self.commit[:7] + ("+" if self.dirty else "")


def load(path: Path) -> Run:
    """Reads one file of pytest-benchmark's.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        machine, commit = data["machine_info"], data["commit_info"]
        cpu = machine.get("cpu", {})
        return Run(
            path,
            data["datetime"],
            commit["id"],
            bool(commit.get("dirty")),
            {
                "CPU": cpu.get("brand_raw"),
                "cores": cpu.get("count"),
                "device": machine.get("device"),
                "threads": machine.get("threads"),
                "power limit (W)": machine.get("power_limit_watts"),
            },
            {
                "Python": machine.get("python_version"),
                "torch": machine.get("torch"),
                "driver": machine.get("driver"),
            },
            {entry["fullname"]: _entry(entry) for entry in data["benchmarks"]},
        )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no run saved by pytest-benchmark ({type(error).__name__}: {error}): "
            "delete it, or name another file"
        ) from None


def _entry(data: dict[str, Any]) -> Entry:
    facts, stats = data["extra_info"], data["stats"]
    return Entry(
        data["group"] or data["name"],
        facts.get("variant", data["name"]),
        bool(facts.get("ours", True)),
        *(float(stats[name]) for name in ("median", "q1", "q3")),
        int(stats["rounds"]),
        facts,
    )


def load_all(storage: Path) -> list[Run]:
    """All runs under `storage`, the oldest first.

    Raises:
        InputError: there are none, or one of them cannot be read.
    """
    runs = [load(path) for path in storage.rglob("*.json")]
    if not runs:
        raise InputError(
            f"no saved runs under {storage}: make one with "
            "pytest benchmarks/ --benchmark-only --benchmark-autosave"
        )
    return sorted(runs, key=lambda run: run.when)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which facts differ, as "name: before -> now, ..."; "" where none does."""
    return ", ".join(
        f"{name}: {before.get(name)} -> {now[name]}"
        for name in now
        if before.get(name) != now[name]
    )


@dataclass(frozen=True)
class Change:
    """One entry of two runs on the same hardware.

    The rounds of a run are made within seconds, and say nothing of what the machine does from one
    run to the next. The baselines of the group do, because they were timed in turn with ours: so
    what happened to any of them is the machine's part, and only what goes beyond it is ours.
    """

    before: Entry
    now: Entry
    baselines: tuple[float, ...]
    """How much each of the group that is not ours changed meanwhile, relative to what it was."""

    @property
    def relative(self) -> float:
        """Of the median time: 0.1 is 10 % slower."""
        return self.now.median / self.before.median - 1

    @property
    def refused(self) -> str:
        """Why the two cannot be compared; "" if they can."""
        for entry, which in ((self.before, "the earlier run"), (self.now, "this run")):
            if entry.throttled:
                return f"{which} was throttled ({', '.join(entry.facts['throttle_reasons'])})"
            if entry.rounds < FEW_ROUNDS:
                return f"{which} has {entry.rounds} rounds, too few to know their noise"
        return ""

    @property
    def slower(self) -> bool:
        """Whether the middle half of the rounds lies above that of then, slowed as the machine
        slowed any baseline."""
        return self.now.q1 > self.before.q3 * (1 + max((0.0, *self.baselines)))

    @property
    def faster(self) -> bool:
        """The same, below."""
        return self.now.q3 < self.before.q1 * (1 + min((0.0, *self.baselines)))

    def regressed(self, limit: float) -> bool:
        """Slower by more than `limit` (0.1 is 10 %) beyond any baseline, and beyond noise."""
        machine = max((0.0, *self.baselines))
        beyond = (1 + self.relative) / (1 + machine) - 1
        return not self.refused and beyond > limit and self.slower

    def __str__(self) -> str:
        line = f"{self.now}: {duration(self.before.median)} -> {duration(self.now.median)}"
        return line + f" ({self.relative:+.1%}{'; ' if self.baselines else ''}{self.meanwhile})"

    @property
    def meanwhile(self) -> str:
        """What the baselines did, for people."""
        changes = ", ".join(f"{change:+.1%}" for change in self.baselines)
        return f"its baselines {changes}" if changes else ""


def compare(before: Run, now: Run) -> list[Change]:
    """What became of the entries of ours that both runs have."""
    common = [name for name in now.entries if name in before.entries]
    baselines: dict[str, list[float]] = {}
    for name in common:
        then, entry = before.entries[name], now.entries[name]
        if not (entry.ours or entry.throttled or then.throttled):
            baselines.setdefault(entry.group, []).append(entry.median / then.median - 1)
    return [
        Change(then, entry, tuple(baselines.get(entry.group, ())))
        for then, entry in ((before.entries[name], now.entries[name]) for name in common)
        if entry.ours
    ]


def previous(runs: Sequence[Run], now: Run) -> Run | None:
    """The newest run before `now` on the same hardware with something in common."""
    for run in reversed(runs):
        earlier = run.when < now.when and run.path.resolve() != now.path.resolve()
        if earlier and run.hardware == now.hardware and run.entries.keys() & now.entries.keys():
            return run
    return None


def duration(seconds: float) -> str:
    """For people: three figures, in the unit that fits."""
    unit, factor = next((u for u in (("s", 1.0), ("ms", 1e3)) if seconds * u[1] >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"
