"""What every command shares: a frozen dataclass becomes the command line, an error of the user's
becomes one line. No command's own logic is here."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, get_type_hints

from fastdcgan.errors import Collapsed, InputError, RunError

Options = TypeVar("Options")


def parse(
    options: type[Options],
    *,
    prog: str,
    description: str,
    args: Sequence[str],
    default: Options | None = None,
) -> Options:
    """The dataclass `options` filled from `args`: its fields are the flags, their docs the help.

    Args:
        options: a dataclass type whose fields are documented by a string under each of them.
        prog: the name that the help shows, e.g. "python -m fastdcgan.train".
        description: the help's first lines, with two worked examples.
        args: the command line without the program's name.
        default: an instance whose values stand for flags that are not given.

    Raises:
        SystemExit: on --help (status 0) or on flags that do not parse (status 2).
    """
    import tyro

    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=list(args),
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def without_flags(options: type[Any], fields: Collection[str], name: str, module: str) -> type[Any]:
    """A subclass of the dataclass `options` in which some fields have no flags: those that another
    command, which has `options` among its own, decides itself.

    Args:
        options: a frozen dataclass type.
        fields: names of its fields; their defaults stay.
        name, module: where the subclass is kept, by which pickle finds it.
    """
    import tyro

    hints = get_type_hints(options)
    hidden = [
        (f.name, Annotated[hints[f.name], tyro.conf.Suppress],
         dataclasses.field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(options) if f.name in fields
    ]  # fmt: skip
    return dataclasses.make_dataclass(
        name, hidden, bases=(options,), frozen=True, namespace={"__module__": module}
    )


def fields(args: Sequence[str]) -> set[str]:
    """The fields whose flags are on a command line, whatever follows them."""
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return {flag[2:].replace("-", "_") for flag in flags}


def take(args: list[str], flag: str) -> str | None:
    """Removes "flag value" or "flag=value" from `args`; the last one counts."""
    value = None
    for index in reversed(range(len(args))):
        name, equals, text = args[index].partition("=")
        if name == flag:
            if not equals and index + 1 == len(args):
                raise InputError(f"{flag} was given without a value")
            found = text if equals else args.pop(index + 1)
            args.pop(index)
            value = found if value is None else value
    return value


def run(command: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> int:
    """Runs `command(args)` and returns its exit status: 0, or 1 after one line on stderr (3:
    `Collapsed`).

    Args:
        command: takes the command line without the program's name.
        args: defaults to the process's own.
    """
    try:
        command(sys.argv[1:] if args is None else args)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Collapsed) else 1
    return 0


@contextmanager
def needs_extra(name: str, *modules: str) -> Iterator[None]:
    """Inside, importing one of these modules where it is not installed is an InputError that names
    the extra with it."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in modules:
            raise
        raise InputError(
            f"this needs {error.name}, which is not installed: pip install 'fastdcgan[{name}]'"
        ) from None
