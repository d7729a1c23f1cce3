"""A bar on stderr for work that takes a while, where stderr is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A bar for as long as the `with` lasts; it is gone afterwards.

    Args:
        title: what is being done.
        total: how much of it there is.
        shown: False: no bar in any case.

    Yields:
        A call that is told how much more is done.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    shown = shown and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as own:
        task = own.add_task(title, total=total)
        yield lambda done: own.advance(task, done)
