"""A process for work that may never end, as a kernel with barriers of its own on a GPU that has not
run it: `Child`, who starts it, asks and kills it, and `serve`, what it does. Imports no torch. Not
here: which work (trying.py; benchmarks/gpu)."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

READY_SECONDS = 90.0  # for a cold import of torch and Triton, and a GPU's start
PREPARE_SECONDS = 90.0  # for what is compiled, and the launchers' C
HANG_SECONDS = 20.0  # for kernels that take milliseconds
KILLED_SECONDS = 15.0  # one that hangs in the driver may never end
MOST_HANGS = 2  # after them nothing more is asked

READY, PREPARED, ANSWER, ERROR = "ready", "prepared", "=", "!"  # how its lines begin


class Lost(Exception):
    """There is no answer; in one line why."""


class Child:
    """Started when it is first asked, and again after it was lost.

    Args:
        command: its program, which calls `serve`.
        look: is called with the process's id before one that hangs is killed.
        environment: what differs from this process's.
        ready, prepare, hang: seconds: for the start, until the work is prepared, and for the work.
    """

    def __init__(
        self, command: Sequence[str], *, look: Callable[[int], object] = lambda pid: None,
        environment: dict[str, str] | None = None, ready: float = READY_SECONDS,
        prepare: float = PREPARE_SECONDS, hang: float = HANG_SECONDS,
    ) -> None:  # fmt: skip
        self.hangs = 0
        self._command, self._look, self._environment = command, look, environment or {}
        self._ready, self._prepare, self._hang = ready, prepare, hang
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=20)

    def ask(self, question: str) -> str:
        """The answer to a line.

        Raises:
            Lost: the process hung and was killed, or ended, or MOST_HANGS have hung.
        """
        if self.hangs >= MOST_HANGS:
            raise Lost(f"not tried: {MOST_HANGS} hung before")
        if self._process is None:
            self._start()
            self._next(self._ready, "to start")
        try:
            self._write(question)
        except OSError:
            self._end()
            raise Lost("its process ended before it was asked") from None
        line = self._next(self._prepare, "to be prepared")
        if line == PREPARED:
            line = self._next(self._hang, "to run")
        if line.startswith(ERROR):  # after which a GPU may be of no use to it
            self._end()
            raise Lost(line.removeprefix(ERROR))
        return line.removeprefix(ANSWER)

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(
            self._command, env={**os.environ, "PYTHONPATH": path, **self._environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        # A queue of its own: a reader of a killed process may yet say something.
        lines: queue.Queue[str | None] = queue.Queue()
        said: deque[str] = deque(maxlen=20)
        self._process, self._lines, self._said = process, lines, said

        def read(stream: IO[str], take: Callable[[str], object], end: Callable[[], object]) -> None:
            for line in stream:
                take(line.rstrip("\n"))
            end()

        for stream, take, end in (
            (process.stdout, lines.put, lambda: lines.put(None)),
            (process.stderr, said.append, lambda: None),
        ):  # fmt: skip
            reader = threading.Thread(target=read, args=(stream, take, end), daemon=True)
            reader.start()
        self._listener = reader  # to what it says on stderr

    def _write(self, question: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()

    def _next(self, seconds: float, what: str) -> str:
        assert self._process is not None
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.hangs += 1
            with suppress(Exception):
                self._look(self._process.pid)
            self._end()
            raise Lost(f"hung: it had {seconds:.0f} s {what}") from None
        if line is None:
            status = self._end(kill=False)
            self._listener.join(KILLED_SECONDS)
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            last = next((said for said in reversed(self._said) if said.strip()), "")
            raise Lost(f"its process ended: {name}{', ' if last else ''}{last.strip()[:200]}")
        return line

    def _end(self, kill: bool = True) -> int:
        """Its status."""
        process, self._process = self._process, None
        assert process is not None
        if kill:
            process.kill()
        try:
            return process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return -signal.SIGKILL


def serve(start: Callable[[], object], answer: Callable[[str, Callable[[], None]], str]) -> None:
    """What the process does; it ends without the ways in which one that uses a GPU can hang.

    Args:
        start: is called once.
        answer: of a question and of what to call when only a hang can keep it from its answer.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed is no answer

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    start()
    say(READY)
    for line in sys.stdin:
        try:
            found = ANSWER + answer(line.rstrip("\n"), lambda: say(PREPARED))
        except Exception as error:
            found = ERROR + " ".join(f"{type(error).__name__}: {error}".split())[:200]
        say(found)
    os._exit(0)
