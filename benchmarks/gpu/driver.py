"""Runs the phases one after the other, each as a process with a time limit, and writes down each
item as it comes. A phase that raises, hangs, or is killed costs itself and nothing else. Not here:
what is measured (phases/), and how it is told (page.py). Imports no torch."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastdcgan.errors import InputError

ROOT = Path(__file__).parents[2]
MINUTES = 8.0
LOG_LINES = 30
COLD_SECONDS = 60.0
"""What a machine's first import of torch may take: the first phase's limit is longer by it."""
REHEARSAL_TIMES = 5.0
"""How many times as long a rehearsal may take: its kernels run in Triton's interpreter."""
KILLED_SECONDS = 15.0
"""How long to wait for a process that was killed: one that hangs in the driver may never end."""


@dataclass(frozen=True)
class Phase:
    """name: as --only takes it; module: has `measure(to, setting)`; limit: seconds, of a run of
    MINUTES; interpreted: in a rehearsal its kernels run in Triton's interpreter."""

    name: str
    module: str
    limit: float
    interpreted: bool = True


def _phase(name: str, limit: float, interpreted: bool = True) -> Phase:
    return Phase(name, f"benchmarks.gpu.phases.{name}", limit, interpreted)


# What is most worth knowing comes first: a run out of time loses the last ones.
PHASES = (
    _phase("machine", 20),
    _phase("compile", 60, interpreted=False),
    _phase("proof", 60),
    _phase("engines", 120),
    _phase("steps", 120, interpreted=False),
    _phase("profile", 40),
    _phase("tests", 120),
    _phase("ways", 60),
    _phase("tiles", 90),
    _phase("counters", 60),
)


@dataclass
class State:
    """How a phase ended. state: "done", "failed", "timed out", "killed" (by a signal) or "not
    reached", and "started" meanwhile; why: in one line; log: the last lines of its process."""

    state: str
    seconds: float = 0.0
    why: str | None = None
    log: str | None = None


class Record:
    """What a folder knows of a run: items.jsonl, read at the start and added to.

    A disk that is full costs no measurement: what cannot be written is kept here and said once.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self.items: dict[str, dict[str, dict[str, Any]]] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.problem = ""
        """Why something could not be written; "" if everything was."""
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # torn, by a crash
                    self._take(json.loads(line))

    @property
    def path(self) -> Path:
        """The log of items and states."""
        return self.folder / "items.jsonl"

    def put(self, row: dict[str, Any]) -> None:
        """Takes a line and writes it at once."""
        row |= {"at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        self._take(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.fail(self.path, error)

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder."""
        try:
            (self.folder / name).write_text(text, "utf-8")
        except OSError as error:
            self.fail(self.folder / name, error)

    def fail(self, path: Path, error: OSError) -> None:
        """Takes notice of a file that could not be written, and says so the first time."""
        if not self.problem:
            self.problem = f"cannot write {path}: {error.strerror}"
            self._say(f"{self.problem}; measuring goes on")

    def _take(self, row: dict[str, Any]) -> None:
        row = dict(row)
        phase = row.pop("phase")
        if "state" in row:
            self.states[phase] = row
            if row.get("anew"):
                self.items.pop(phase, None)
        else:
            self.items.setdefault(phase, {})[row.pop("item")] = row


def run(
    out: Path,
    *,
    minutes: float = MINUTES,
    only: Sequence[str] = (),
    rehearse: bool = False,
    phases: Sequence[Phase] = PHASES,
    made_by: str = "python -m benchmarks.gpu",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the phases that `out` does not have yet, and writes its summary. In what it writes,
    files of the checkout are named from its root: results are passed on.

    Args:
        out: the run's folder; what it holds of an earlier call is kept, and goes on.
        minutes: for everything; the phases' limits are those of MINUTES, and longer with more.
        only: names of phases, which are then run whether or not `out` has them.
        rehearse: on the CPU, everything tiny: shows that the phases run, and measures nothing.
        phases: all that there are.
        made_by: the command, for the summary.
        say: is called with a line for people.

    Returns:
        The summary: {"made_by", "when", "commit", "rehearsal", "phases", "items", "problem"}.

    Raises:
        InputError: `only` names a phase that does not exist; the folder holds another kind of run.
        KeyboardInterrupt: after the summary was written.
    """
    unknown = set(only) - {phase.name for phase in phases}
    if unknown:
        names = ", ".join(phase.name for phase in phases)
        raise InputError(f"--only {','.join(only)} was given; phases are {names}")
    times = REHEARSAL_TIMES if rehearse else 1.0
    deadline = time.monotonic() + 60 * minutes * times
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} was given: {error.strerror}") from None
    record = Record(out, say)
    _expect_kind(record, rehearse)
    interrupted, cold = False, COLD_SECONDS
    for phase in phases:
        done = record.states.get(phase.name, {}).get("state") == "done"
        if only and phase.name not in only:
            continue
        if done and not only:
            say(f"{phase.name}: measured before")
            continue
        left = deadline - time.monotonic()
        limit = min(phase.limit * times * max(1.0, minutes / MINUTES) + cold, left)
        if interrupted or limit < 1:
            state = State("not reached", why="Ctrl-C" if interrupted else "out of time")
        else:
            say(f"{phase.name}: at most {limit:.0f} s")
            cold = 0.0
            kind = {"phase": phase.name, "rehearsal": rehearse}
            record.put({**kind, "state": "started", "anew": done})
            try:
                state = _run_phase(phase, record, limit, rehearse)
            except KeyboardInterrupt:
                interrupted, state = True, State("killed", why="Ctrl-C")
        record.put({"phase": phase.name, "rehearsal": rehearse, **asdict(state)})
        why = f": {state.why}" if state.why else ""
        say(f"{phase.name}: {state.state} after {state.seconds:.1f} s{why}")
    summary = {
        "made_by": made_by,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "rehearsal": rehearse,
        "phases": record.states,
        "items": record.items,
    }
    record.write("summary.json", json.dumps(summary, indent=1) + "\n")
    if interrupted:
        raise KeyboardInterrupt
    return {**summary, "problem": record.problem}


def _expect_kind(record: Record, rehearse: bool) -> None:
    """A rehearsal's numbers are a CPU's: one folder never holds both."""
    kinds = {bool(state.get("rehearsal")) for state in record.states.values()}
    if kinds - {rehearse}:
        held = "a rehearsal" if not rehearse else "a card's run"
        raise InputError(f"--out {record.folder} was given; it holds {held}: give another folder")


def _run_phase(phase: Phase, record: Record, limit: float, rehearse: bool) -> State:
    """One phase in a process group of its own."""
    own = record.items.get(phase.name, {})
    have = [name for name, facts in own.items() if "error" not in facts]
    read, write = os.pipe()
    start = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks.gpu.phase", phase.module,
            "--out", str(record.folder), "--limit", f"{limit:.1f}", "--have", json.dumps(have),
            "--to", str(write), *["--rehearse"] * rehearse,
        ],
        cwd=ROOT, env=_environment(phase, rehearse), pass_fds=[write], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    os.close(write)
    log: deque[str] = deque(maxlen=LOG_LINES)
    readers = [
        _reader(os.fdopen(read, encoding="utf-8"), lambda line: _item(phase, line, record, log)),
        _reader(_text(process.stdout), log.append),
    ]
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        state = State("timed out", why=f"its limit was {limit:.0f} s")
    else:
        state = _ending(status, log)
    finally:
        _kill(process)
        for reader in readers:
            reader.join(timeout=5)
    state.seconds = round(time.monotonic() - start, 1)
    if state.state == "failed":
        state.why = next((line for line in reversed(log) if line.strip()), state.why)
    if state.state != "done":
        state.log = "\n".join(log) or None
    return state


def _environment(phase: Phase, rehearse: bool) -> dict[str, str]:
    """Of the phase's process: finds the packages from a bare checkout, and in a rehearsal no GPU
    and nothing to compile with torch.compile."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if rehearse:
        own |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        own |= {"TRITON_INTERPRET": "1"} if phase.interpreted else {}
    return own


def _ending(status: int, log: Iterable[str]) -> State:
    if status == 0:
        return State("done")
    if status < 0:
        return State("killed", why=signal.Signals(-status).name)
    return State("failed", why=f"exit status {status}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of the process and of all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_SECONDS)


def _item(phase: Phase, line: str, record: Record, log: "deque[str]") -> None:
    try:
        record.put({"phase": phase.name, **json.loads(line)})
    except ValueError:
        log.append(line)


def _text(stream: Any) -> Iterable[str]:
    return (line.decode("utf-8", "replace") for line in stream)


def _reader(lines: Iterable[str], take: Callable[[str], object]) -> threading.Thread:
    def read() -> None:
        for line in lines:
            take(line.rstrip("\n").replace(f"{ROOT}{os.sep}", ""))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _commit() -> str | None:
    """The checkout's, marked where it was changed since; None where there is no Git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + "+" * bool(changes.stdout.strip()) if not head.returncode else None
