"""The process of one phase: `python -m benchmarks.gpu.phase MODULE`, which the driver starts. It
says what is measured on which device (`Setting`) and where the items go (`Items`).

By hand it prints its items: `python -m benchmarks.gpu.phase benchmarks.gpu.phases.machine`."""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

LONGEST = 300
"""Characters of an error in one line."""


@dataclass(frozen=True)
class Size:
    """How large the measurements are."""

    image: int
    """Pixels of a side."""
    width: int
    """ngf and ndf."""
    nz: int
    amp: bool
    batches: tuple[int, ...]
    """What is most worth knowing first."""
    main: tuple[int, ...]
    """Those of them that the baselines, the profile and the ways are measured at, too."""
    warm_up: int
    rounds: int
    """Timed, after those of the warm-up."""
    repeat: int
    """Steps in a round."""
    product: int
    """Side of the square matrices that are multiplied."""
    copied: int
    """Bytes."""


CARD = Size(64, 64, 100, True, (128, 1024, 64, 256), (128, 1024), 2, 15, 10, 8192, 2**30)
# As small as it can be: Triton's interpreter takes a tenth of a second for a launch.
REHEARSAL = Size(32, 8, 12, False, (2,), (2,), 0, 1, 1, 64, 2**16)


@dataclass(frozen=True)
class Setting:
    """Where a phase runs."""

    rehearsal: bool
    out: Path
    """The folder of the run; an absolute path."""
    limit: float
    """Seconds after which the driver ends this process."""

    @property
    def size(self) -> Size:
        """A card's, or a rehearsal's."""
        return REHEARSAL if self.rehearsal else CARD

    @property
    def device(self) -> "torch.device":
        """What is measured."""
        import torch

        return torch.device("cpu") if self.rehearsal else torch.device("cuda", 0)

    def measured(self, phase: str) -> dict[str, dict[str, Any]]:
        """The items of a phase before this one, as far as they could be written."""
        found: dict[str, dict[str, Any]] = {}
        with suppress(OSError):
            for line in (self.out / "items.jsonl").read_text("utf-8").splitlines():
                with suppress(ValueError):  # torn, by a crash
                    row = json.loads(line)
                    if row["phase"] == phase and "item" in row:
                        found[row["item"]] = row
        return found


class Items:
    """Where a phase's items go, each as soon as it is measured.

    Args:
        file: gets a line of JSON for each.
        have: items of an earlier call that need not be measured again.
    """

    def __init__(self, file: TextIO, have: Sequence[str] = ()) -> None:
        self._file, self._have = file, frozenset(have)

    def wants(self, item: str) -> bool:
        """Whether it is still to be measured."""
        return item not in self._have

    def put(self, item: str, **facts: Any) -> None:
        """Hands an item on. A value that JSON does not have becomes its text."""
        line = json.dumps({"item": item, **facts}, default=str)
        print(line, file=self._file, flush=True)

    @contextmanager
    def item(self, name: str) -> Iterator[dict[str, Any]]:
        """Gives a dict for the facts of an item and hands it on at the end. What is raised inside
        becomes the item's "error", and goes no further.

        Raises:
            RuntimeError: afterwards, where the GPU is of no use to this process any more.
        """
        facts: dict[str, Any] = {}
        try:
            yield facts
        except Exception as error:
            self.put(name, error=line_of(error))
        else:
            self.put(name, **facts)
        raise_if_poisoned()


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def raise_if_poisoned() -> None:
    """RuntimeError where an illegal access, say, has ended this process's use of the GPU: nothing
    that it would measure from now on says anything."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.phase", description=__doc__)
    parser.add_argument("module", help="has measure(to, setting)")
    parser.add_argument("--out", type=Path, default=Path(".benchmarks/gpu"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--have", default="[]", help="a JSON list of items that are measured")
    parser.add_argument("--to", type=int, default=1, help="file descriptor for the items")
    given = parser.parse_args(arguments)
    module = importlib.import_module(given.module)
    limit = given.limit - (time.monotonic() - started)
    with os.fdopen(given.to, "w", encoding="utf-8", closefd=given.to > 2) as file:
        to = Items(file, json.loads(given.have))
        module.measure(to, Setting(given.rehearse, given.out.resolve(), limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
