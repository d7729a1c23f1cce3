"""Candidates that may hang are tried in a process of their own before they run in the tuner's:
`Tried`; and that process, `python -m fastdcgan_kernels.tuner.trying DEVICE`."""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..choice.geometry import Tile
from ..choice.types import Question
from ..gpu.launch import recording
from .child import Child, Lost, serve


def may_hang(candidate: Any) -> bool:
    """Whether warps wait for each other by what the kernel itself says."""
    return isinstance(candidate, Tile) and candidate.engine == "gluon"


class Tried:
    """Says why a candidate must not run here. child: that tries it; by default on this device."""

    def __init__(self, device: torch.device, child: Child | None = None) -> None:
        command = [sys.executable, "-m", "fastdcgan_kernels.tuner.trying", str(device)]
        self._child = child or Child(command)

    def why_not(self, asked: Question, candidate: Any) -> str:
        """In one line; "": it came back, and is right."""
        if not may_hang(candidate):
            return ""
        try:
            return self._child.ask(base64.b64encode(pickle.dumps((asked, candidate))).decode())
        except Lost as error:
            return str(error)

    def close(self) -> None:
        """Ends the process."""
        self._child.close()


def main(device: torch.device) -> None:
    """The process."""
    from . import trials

    known: dict[Any, Any] = {}  # the last question's experiment

    def start() -> None:
        one = torch.ones(64, 64, device=device)
        float((one @ one).sum())

    def answer(line: str, prepared: Callable[[], None]) -> str:
        asked, candidate = pickle.loads(base64.b64decode(line))
        if asked not in known:
            known.clear()
            known[asked] = trials.trial_of(asked, device)
        run = known[asked].prepare(candidate)
        with recording() as launches:
            run()
        if device.type == "cuda":
            for launch in launches:
                launch.compile()
        prepared()
        why: str = known[asked].wrong(run())
        return why

    serve(start, answer)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
