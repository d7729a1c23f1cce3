"""`pytest -m gpu` over processes. Each outcome counts as soon as it is there, and the junit XML is
written even when the time is up. (A rehearsal has no GPU: each test says so and is skipped.)"""

import importlib.util
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.phase import Items, Setting

SPARE_SECONDS = 15.0
"""For pytest to end and write its XML, after its interrupt."""
EACH_SECONDS = 100
PROCESSES = 12
DESELECTED = ("tests/gpu/test_doctor.py",)  # it times the whole machine, on which others run here
LONGEST = 200


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    listener = Listener(to)
    options = ["-q", "-p", "no:cacheprovider", "tests/gpu", f"--junitxml={setting.out / 'gpu.xml'}"]
    options += [f"--deselect={path}" for path in DESELECTED]
    if not setting.rehearsal:
        options += ["-m", "gpu"]
        if importlib.util.find_spec("xdist"):
            processes = max(1, min(PROCESSES, len(os.sched_getaffinity(0)) - 2))
            options += ["-n", str(processes)]
    if importlib.util.find_spec("pytest_timeout"):
        options.append(f"--timeout={EACH_SECONDS}")
    timer = threading.Timer(
        max(1.0, setting.limit - SPARE_SECONDS), lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    timer.daemon = True
    timer.start()
    status = pytest.main(options, plugins=[listener])
    timer.cancel()
    _make_public(setting.out / "gpu.xml")
    listener.hand_on(ended=str(pytest.ExitCode(status).name.lower()))


def _make_public(xml: Path) -> None:
    """Takes the machine's name and the checkout's place out of the XML: results are passed on."""
    with suppress(FileNotFoundError):
        text = re.sub(r' hostname="[^"]*"', "", xml.read_text("utf-8"))
        xml.write_text(text.replace(f"{os.getcwd()}{os.sep}", ""), "utf-8")


class Listener:
    """A plugin of pytest's that counts outcomes and hands the counts on with each."""

    def __init__(self, to: Items) -> None:
        self._to, self._start = to, time.monotonic()
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for the set-up, the call and the end of each test."""
        if report.when != "call" and report.outcome == "passed":
            return
        if report.when == "teardown" and report.outcome == "skipped":
            return
        self._counts[report.outcome] += 1
        if report.failed:
            why = " ".join(str(report.longrepr).split())[-LONGEST:]
            self._failures.append({"name": report.nodeid, "why": why})
        self.hand_on()

    def hand_on(self, **more: Any) -> None:
        """The counts so far."""
        seconds = round(time.monotonic() - self._start, 1)
        self._to.put("pytest", **self._counts, failures=self._failures, seconds=seconds, **more)
