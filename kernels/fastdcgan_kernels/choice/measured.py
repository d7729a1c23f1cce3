"""What was measured on this device, in a file that processes share: looked up at every forward
pass (choose.py), added to by the tuner.

It is JSON: {"format", "device", "entries": {versions of torch and Triton: {question: answer}}}
with a Task or Block as the question, and a Tile or one of How as the answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from .geometry import Engine, Geometry, Tile
from .types import Answer, Block, How, Question, Task

FORMAT = 3  # of the file: change it when kernels change so much that old measurements mislead
PATIENCE = 60  # seconds to wait for another process that stores
# What a file may raise that somebody else wrote, or half wrote; RuntimeError: nesting without end.
USELESS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def stored(asked: Question, device: str) -> Any:
    """The best answer for this question, bucketed, on the device of this name: one of How for a
    Block, a Tile for a Task; None: not measured."""
    return _table(device).get(asked)


def cache_file(device: str) -> Path:
    """Where measurements of this device are: in $FASTDCGAN_CACHE, else $XDG_CACHE_HOME/fastdcgan,
    else ~/.cache/fastdcgan."""
    own, shared = os.environ.get("FASTDCGAN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "fastdcgan"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return folder.expanduser().absolute() / f"tuned-{name}.json"


def store(found: Mapping[Question, Answer], device: str) -> None:
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
            _answers(entries.get(_versions(), {}))
        except USELESS:
            entries = {}
        rows = entries.setdefault(_versions(), {})
        for asked, answer in found.items():
            rows[_key(asked)] = answer if isinstance(answer, str) else asdict(answer)
        whole = {"format": FORMAT, "device": device, "entries": entries}
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


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
        if versions in every or not every:
            return _answers(every.get(versions, {}))
        why = f"are of {'; '.join(every)}, and not used with {versions}"
    except (OSError, *USELESS) as error:
        why = f"are ignored ({type(error).__name__}: {error})"
    warnings.warn(f"measurements in {where} {why}; tune again", stacklevel=2)
    return {}


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


def _versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _key(asked: Question) -> str:
    return json.dumps(asdict(asked) | {"dtype": str(asked.dtype).removeprefix("torch.")})


def _answers(rows: dict[str, Any]) -> dict[Question, Answer]:
    """Questions and answers of what stands in the file."""
    found: dict[Question, Answer] = {}
    for key, value in rows.items():
        given = json.loads(key)
        shapes = Geometry(**given["geometry"])
        given |= {"geometry": shapes, "dtype": getattr(torch, given["dtype"])}
        if "op" in given:
            tile = Tile(**value)
            *numbers, engine = asdict(tile).values()
            if not all(isinstance(n, int) for n in numbers) or engine not in get_args(Engine):
                raise ValueError(f"{value} is not a tile")
            found[Task(**given)] = tile
        elif value in get_args(How):
            found[Block(**given)] = value
        else:
            raise ValueError(f"{value!r} is not a choice")
    return found
