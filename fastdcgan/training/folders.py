"""Where a run lives: which folder a new one gets, which one --resume means, and that only one
process at a time writes there."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fastdcgan.errors import InputError
from fastdcgan.training.checkpoints import Checkpoints

RUNS = Path("runs")


def resolve_resume(resume: str, out: Path | None) -> Path | None:
    """The run folder or checkpoint file that `--resume` means; None where auto finds none.

    Raises:
        InputError: the path does not exist or holds no checkpoint.
    """
    if resume == "auto":
        if out is not None:
            return out if Checkpoints(out / "checkpoints").paths() else None
        return _newest_run()
    path = Path(resume)
    if path.is_dir() and not Checkpoints(path / "checkpoints").paths():
        raise InputError(f"--resume {resume}: no checkpoint in {path / 'checkpoints'}")
    if not path.exists():
        raise InputError(f"--resume {resume}: there is no such run or checkpoint")
    return path


def run_folder(target: Path) -> Path:
    """The folder of the run to which a resume target (a run folder or checkpoint file) belongs."""
    return target if target.is_dir() else target.resolve().parent.parent


def claim(out: Path | None, target: Path | None, name: str) -> Path:
    """Finds or makes the folder that this process will write to.

    Args:
        out: where the user wants it; None leaves it to `target` and `name`.
        target: what is resumed; its folder is used again.
        name: a new folder is called runs/NNN-name.

    Raises:
        InputError: there is a run in `out` and it is not resumed, or is further on than `target`,
            or nothing can be written there.
    """
    if out is None and target is not None:
        out = run_folder(target)
    try:
        if out is None:
            return _next_folder(name)
        held = Checkpoints(out / "checkpoints").paths()
        if held and (target is None or run_folder(target).resolve() != out.resolve()):
            raise InputError(
                f"--out {out} holds a run already: --resume {out} goes on with it, another --out "
                "starts a new one"
            )
        if held and target is not None and target.is_file() and not target.samefile(held[-1]):
            raise InputError(
                f"--resume {target}: its run has gone on to {held[-1].name}: resume {out}, or "
                "branch off with another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"cannot write to {out or RUNS}: {error.strerror}") from None
    return out


def _next_folder(name: str) -> Path:
    """Makes runs/NNN-name, NNN being the next free number."""
    RUNS.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(m[1]) for p in RUNS.iterdir() if (m := re.match(r"(\d{3,})-", p.name))]
        folder = RUNS / f"{max(taken, default=-1) + 1:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run took the number in between
        return folder


def _newest_run() -> Path | None:
    """The folder in runs/ whose newest checkpoint is the newest of all."""
    dated = [
        (paths[-1].stat().st_mtime, run)
        for run in (RUNS.iterdir() if RUNS.is_dir() else ())
        if (paths := Checkpoints(run / "checkpoints").paths())
    ]
    return max(dated)[1] if dated else None


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back from a process that dies.

    Raises:
        InputError: another process has it.
    """
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is training in {out}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()
