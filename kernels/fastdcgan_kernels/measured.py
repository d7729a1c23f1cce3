"""What was measured on this device, in a file that processes share: looked up at every forward
pass (plan.py), added to by the tuner (tuner.py). Imports torch only when it is used.

It is JSON: {"format", "device", "entries": {versions of torch and Triton: {question: answer}}}
with a plan.Task or plan.Block as the question, and a tile or one of plan.How as the answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

if TYPE_CHECKING:
    from fastdcgan_kernels.geometry import Tile
    from fastdcgan_kernels.plan import Block, How, Task

    Question: TypeAlias = Block | Task
    Answer: TypeAlias = How | Tile

FORMAT = 1  # of the file: change it when kernels change so much that old measurements mislead
PATIENCE = 60  # seconds to wait for another process that stores
# What a file may raise that somebody else wrote, or half wrote; RuntimeError: nesting without end.
USELESS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def stored_choice(block: Block, device: str) -> How | None:
    """How this block, bucketed, runs best on the device of this name; None: not measured."""
    found: Any = _table(device).get(block)
    return cast("How | None", found)


def stored_tile(task: Task, device: str) -> Tile | None:
    """The best tile of this task, bucketed, on the device of this name; None: not measured."""
    found: Any = _table(device).get(task)
    return cast("Tile | None", found)


def cache_file(device: str) -> Path:
    """Where measurements of this device are: in $FASTDCGAN_CACHE, else $XDG_CACHE_HOME/fastdcgan,
    else ~/.cache/fastdcgan."""
    own, shared = os.environ.get("FASTDCGAN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "fastdcgan"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return folder.expanduser().absolute() / f"tuned-{name}.json"


@functools.cache
def _table(device: str) -> dict[Question, Answer]:
    """What is stored for this device and these versions; read once in a process. A file that
    cannot be used is one warning and no error: measurements are a convenience."""
    if not device:
        return {}
    versions, where = _versions(), ""
    try:
        path = cache_file(device)
        where = str(path)
        every = _read(path)
        table = _answers(every.get(versions, {}))
    except (OSError, *USELESS) as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"measurements in {where} are ignored ({why}); tune again", stacklevel=2)
        return {}
    if every and versions not in every:
        others = "; ".join(every)
        warnings.warn(
            f"measurements in {where} are of {others}, and not used with {versions}; tune again",
            stacklevel=2,
        )
    return table


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """{versions: {question: answer}} as they stand in the file; {} where there is no file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    if found["format"] != FORMAT:
        raise ValueError(f"its format is {found['format']}, this version's is {FORMAT}")
    entries: dict[str, dict[str, Any]] = found["entries"]
    if not all(isinstance(rows, dict) for rows in entries.values()):
        raise ValueError("an entry is not an object")
    return entries


def known(asked: Question, device: str) -> bool:
    """Whether there is an answer."""
    return asked in _table(device)


def store(found: dict[Question, Answer], device: str) -> None:
    """Add measurements to the device's file, beside those that other processes stored meanwhile;
    they are in use at once.

    Raises:
        OSError: they cannot be written, or another process kept the file for PATIENCE seconds.
    """
    from filelock import FileLock

    _table(device).update(found)
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=PATIENCE):
        try:
            entries = _read(path)
            rows = entries.setdefault(_versions(), {})
            _answers(rows)
        except USELESS:
            rows = {}
            entries = {_versions(): rows}
        rows.update({_key(asked): _plain(answer) for asked, answer in found.items()})
        whole = {"format": FORMAT, "device": device, "entries": entries}
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _versions() -> str:
    import torch
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _key(asked: Question) -> str:
    return json.dumps(asdict(asked) | {"dtype": str(asked.dtype).removeprefix("torch.")})


def _question(key: str) -> Question:
    import torch

    from fastdcgan_kernels import plan
    from fastdcgan_kernels.geometry import Geometry

    given = json.loads(key)
    given["geometry"] = Geometry(**given["geometry"])
    given["dtype"] = getattr(torch, given["dtype"])
    return plan.Task(**given) if "op" in given else plan.Block(**given)


def _answers(rows: dict[str, Any]) -> dict[Question, Answer]:
    found: dict[Question, Answer] = {}
    for key, value in rows.items():
        asked = _question(key)
        found[asked] = _answer(asked, value)
    return found


def _plain(answer: Answer) -> str | dict[str, int]:
    return answer if isinstance(answer, str) else asdict(answer)


def _answer(asked: Question, value: Any) -> Answer:
    from fastdcgan_kernels import plan
    from fastdcgan_kernels.geometry import Tile

    if isinstance(asked, plan.Task):
        if not all(isinstance(number, int) for number in value.values()):
            raise ValueError(f"{value} is not a tile")
        return Tile(**value)
    if value not in get_args(plan.How):
        raise ValueError(f"{value!r} is not a choice")
    how: How = value
    return how
