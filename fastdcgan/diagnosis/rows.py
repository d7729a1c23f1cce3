"""What every check returns: rows of a name, a verdict, the detail and what to do about it. Not
here: any check (the files beside this one), and how rows are shown (report.py)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warning", "failed", "not possible here"]


@dataclass(frozen=True)
class Row:
    """One line of the table. `advice`: what to do, where there is something to do; `values`: the
    figures of the detail, for programs."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Rows that belong together."""

    title: str
    rows: list[Row]


def guarded(name: str, check: Callable[[], Iterable[Row]]) -> list[Row]:
    """The check's rows. One that raises is a failed row of this name, after those it had given."""
    rows: list[Row] = []
    try:
        for row in check():
            rows.append(row)
    except Exception as error:  # whatever a driver, a compiler or a kernel raises
        rows.append(Row(name, "failed", first_line(error)))
    return rows


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of its text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0]}" if lines else kind
