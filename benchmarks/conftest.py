"""How the benchmarks are run: a group's workloads, as many as pytest selected, are measured
together, once, in turn; each test then hands its own rounds to pytest-benchmark, which makes the
table and saves them at the end. Until then they are kept in a file of their own, for a run that
does not come to its end.

    pytest benchmarks/ --benchmark-only --benchmark-autosave
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from benchmarks.nvml import Gpu
from benchmarks.ours import DEVICE
from benchmarks.timing import Measured, Unavailable, Workload, measure
from fastdcgan.data.picture import atomic_write
from fastdcgan.hardware import use_allowed_threads


class Playback:
    """A clock for rounds that were measured before: it stands still but for `play`, which moves it
    on by the next of them. pytest-benchmark reads it before and after, and so sees that round."""

    __name__ = "rounds timed in turn"

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def rewind(self) -> None:
        self.now = 0.0  # a difference from 0 is exact

    def play(self) -> None:
        self.now += next(self.rounds)


PLAYBACK = Playback()


def pytest_configure(config: pytest.Config) -> None:
    # As training has them; the baselines have the good of both. The example asks for the second.
    use_allowed_threads()
    torch.backends.cudnn.benchmark = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "together" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=PLAYBACK))
    # The variants of a group one after the other, so that all that was measured is soon recorded.
    places: dict[object, int] = {}
    items.sort(key=lambda item: places.setdefault(_group(item), len(places)))


def _group(item: pytest.Item) -> tuple[object, ...]:
    """What the variants of a group have in common: their function and their other parameters."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    others = (f"{name}={value}" for name, value in parameters.items() if name != "variant")
    return (item.nodeid.split("[")[0], *others)


@pytest.fixture(scope="session")
def groups() -> dict[str, dict[str, Measured]]:
    """What was measured so far, by group and variant."""
    return {}


@pytest.fixture
def together(
    benchmark: Any,
    groups: dict[str, dict[str, Measured]],
    keep: Callable[[], None],
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """together(family, makers, variant, rounds=..., batch=..., ...): the rounds of `variant`, from
    a group that is measured as one when the first of its variants is asked for. Of the makers only
    those run whose variants pytest selected."""

    def record(
        family: str,
        makers: Mapping[str, Callable[[], Workload]],
        variant: str,
        *,
        rounds: int,
        warm_up: int = 2,
        flush: bool = False,
        **facts: Any,
    ) -> None:
        """Args beyond `measure`'s: `facts` tell the groups of a family apart ("batch", "block",
        "mode"); they are in the group's name and in what is saved."""
        group = " ".join([family, *(str(v) for name, v in facts.items() if name != "batch")])
        if "batch" in facts:
            group += f", batch {facts['batch']}"
        if group not in groups:
            own = _group(request.node)
            wanted = [i.callspec.params["variant"] for i in request.session.items
                      if _group(i) == own]  # fmt: skip
            groups[group] = measure(
                {name: make for name, make in makers.items() if name in wanted},
                DEVICE,
                rounds=1 if benchmark.disabled else rounds,
                warm_up=0 if benchmark.disabled else warm_up,
                flush=flush,
            )
        measured = groups[group][variant]
        if isinstance(measured.error, Unavailable):
            benchmark.skipped = True
            pytest.skip(str(measured.error))
        if measured.error is not None:
            raise measured.error
        PLAYBACK.rounds = iter(measured.seconds)
        benchmark.group = group
        benchmark.pedantic(PLAYBACK.play, setup=PLAYBACK.rewind, rounds=len(measured.seconds))
        benchmark.extra_info |= {
            "family": family,
            "variant": variant,
            "ours": variant.startswith("fastdcgan"),
            **facts,
            **measured.facts,
        }
        if measured.images is not None and benchmark.enabled:
            rate = measured.images / benchmark.stats.stats.median
            benchmark.extra_info["images_per_second"] = round(rate, 1)
        keep()

    return record


def _partial(config: pytest.Config) -> Path | None:
    """Where the run is kept until it is saved; None where it is not to be."""
    session = config._benchmarksession  # type: ignore[attr-defined]
    if not (session.save or session.autosave or session.json):
        return None
    return Path(session.storage.path) / "partial" / f"{os.getpid()}.json"


@pytest.fixture(scope="session")
def keep(pytestconfig: pytest.Config) -> Callable[[], None]:
    """keep(): writes what was measured so far, as pytest-benchmark saves it in the end."""
    path, hook = _partial(pytestconfig), pytestconfig.hook
    session = pytestconfig._benchmarksession  # type: ignore[attr-defined]
    about: dict[str, Any] = {}

    def write() -> None:
        if path is None:
            return
        if not about:
            commit = hook.pytest_benchmark_generate_commit_info(config=pytestconfig)
            about.update(machine_info=session.get_machine_info(), commit_info=commit)
        run = hook.pytest_benchmark_generate_json(
            config=pytestconfig, benchmarks=session.benchmarks, include_data=False, **about
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(safe_dumps(run, indent=4).encode()))

    return write


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Called after pytest-benchmark has saved the run, also one that was interrupted."""
    path = _partial(session.config)
    if path is not None:
        path.unlink(missing_ok=True)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """What else makes two runs comparable or not."""
    machine_info["torch"] = torch.__version__
    machine_info["device"] = "cpu"
    machine_info["threads"] = torch.get_num_threads()
    if DEVICE.type == "cuda":
        gpu = Gpu.of(DEVICE)
        machine_info["device"] = torch.cuda.get_device_name(DEVICE)
        machine_info["power_limit_watts"] = gpu.limit_watts()
        machine_info["driver"] = gpu.driver()


@pytest.fixture(scope="session")
def bare_environment() -> dict[str, str]:
    """Environment of a process that finds the packages from a bare checkout too."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.path.join(root, "kernels")])}
