"""How the sections are shown: tables as they come, or one JSON object at the end."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastdcgan import __version__
from fastdcgan.diagnosis.rows import Section, Verdict

STYLES: dict[Verdict, str] = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "not possible here": "dim",
}


def print_tables(sections: Iterable[Section]) -> list[Section]:
    """Prints each section as soon as it is there, at the terminal's width, and returns them all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, shown = Console(), []
    for section in sections:
        shown.append(section)
        table = Table(
            title=section.title, title_justify="left", title_style="bold", show_header=False,
            box=None, padding=(0, 2, 0, 0), pad_edge=False,
        )  # fmt: skip
        table.add_column(width=16)
        table.add_column(width=17 if console.width >= 100 else 12)
        table.add_column(overflow="fold")
        for row in section.rows:
            text = Text(row.detail)
            if row.advice:
                text.append(f"\n-> {row.advice}", style="bold")
            table.add_row(Text(row.name), Text(row.verdict, STYLES[row.verdict]), text)
        console.print(table)
        console.print()
    console.print(Text(summary(shown)))
    return shown


def to_json(sections: Iterable[Section], *, device: str, seconds: float) -> str:
    """All sections as one JSON object."""
    every = list(sections)
    found: dict[str, Any] = {
        "fastdcgan": __version__,
        "device": device,
        "failed": failures(every),
        "seconds": round(seconds, 1),
        "sections": [
            {"title": section.title, "rows": [vars(row) for row in section.rows]}
            for section in every
        ],
    }
    return json.dumps(_plain(found), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """As JSON has it: nan and inf, which it lacks, are null."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def failures(sections: Iterable[Section]) -> list[str]:
    """Names of the rows that failed."""
    return [row.name for section in sections for row in section.rows if row.verdict == "failed"]


def summary(sections: Iterable[Section]) -> str:
    """How many rows have each verdict, in words."""
    counted = Counter(row.verdict for section in sections for row in section.rows)
    return ", ".join(f"{counted[verdict]} {verdict}" for verdict in STYLES if counted[verdict])
