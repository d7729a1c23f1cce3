"""What a forward looks at while it is read: attributes of its modules, globals and closures of the
user's functions that it runs. Not here: how it is read (reading.py).

Values are compared as `known` has them: numbers, strings and what is made of them, in containers
and in plain objects. Tensors, modules and functions are not compared; a forward that asks a tensor
which way to go cannot be read.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import io
import logging
import random
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

LARGEST = 2000  # values; comparing more before each call would take too long
NONE = object()
"""What cannot be compared, or is not there."""

_INTERNAL = {*vars(nn.Module())}
_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, range, slice, enum.Enum,
          torch.dtype, torch.device, torch.memory_format, np.generic, Path)  # fmt: skip
_LIBRARIES = tuple(
    str(Path(found).parent) + "/" for found in (torch.__file__, np.__file__, Path(__file__).parent)
)
_STANDARD = sysconfig.get_path("stdlib") + "/"


class TooLarge(ValueError):
    """More than `LARGEST` values."""


def known(value: Any) -> Any:
    """A copy to compare with later; NONE for what cannot be compared."""
    left = [LARGEST]
    return _known(value, left, {})


def _known(value: Any, left: list[int], inside: dict[int, Any]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise TooLarge(f"its forward looks at more than {LARGEST} values")
    if isinstance(value, _PLAIN):
        return value
    if id(value) in inside or _is_opaque(value):
        return NONE
    inside = {**inside, id(value): value}
    if isinstance(value, dict):
        if any(map(_is_result, value.values())):
            return NONE
        return dict, [(_known(k, left, inside), _known(v, left, inside)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        if any(map(_is_result, value)):
            return NONE
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return type(value), [_known(item, left, inside) for item in items]
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    own = {**getattr(value, "__dict__", {}), **{n: getattr(value, n, NONE) for n in slots}}
    return type(value), [(name, _known(v, left, inside)) for name, v in own.items()]


def _is_result(value: object) -> bool:
    return isinstance(value, Tensor | fx.Proxy | np.ndarray)


def _is_opaque(value: object) -> bool:
    return (
        value is NONE
        or _is_result(value)
        or callable(value)
        or isinstance(value, nn.Module | types.ModuleType)
    )


# --- Where it is ----------------------------------------------------------------------------------


class Cell:
    """One variable of a closure; the same as another of the same variable."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    @property
    def contents(self) -> Any:
        """Its value; NONE if it has none yet."""
        try:
            return self._cell.cell_contents
        except ValueError:
            return NONE

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self._cell is other._cell

    def __hash__(self) -> int:
        return id(self._cell)


@dataclass(frozen=True)
class Place:
    """Attributes to go along, from a submodule of the module (its name), a module of Python's
    (`sys.modules`), or a cell of a closure."""

    root: str | Cell
    of: str  # "submodule", "module" or "cell"
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        root = self.root if self.of == "submodule" and self.root else ""
        return ".".join(filter(None, (str(root), *self.path)))

    def can_be_pickled(self) -> bool:
        """Whether another process finds it."""
        return self.of != "cell"


def at(module: nn.Module, place: Place) -> Any:
    """What is there; NONE if nothing is."""
    path = place.path
    if place.of == "submodule":
        value: Any = module
        for part in filter(None, str(place.root).split(".")):
            value = value._modules.get(part) if isinstance(value, nn.Module) else None
        if value is not None and path == ("training",):
            return value.training == module.training
    elif place.of == "module":
        value = sys.modules.get(str(place.root))
    else:
        assert isinstance(place.root, Cell)
        value, path = place.root.contents, path[1:]
    for name in path:
        value = _attribute(value, name)
    return value


def _attribute(value: Any, name: str) -> Any:
    """Without calling anything of the user's."""
    own = getattr(value, "__dict__", {})
    if name in own:
        return own[name]
    for kind in type(value).__mro__:
        if name in vars(kind):
            return vars(kind)[name]
    return NONE


# --- Looking on -----------------------------------------------------------------------------------


class Watch:
    """Inside, notes what the forward of `twin` looks at; afterwards globals and closures are as
    they were, and `seen` says what was looked at in `module`.

    Raises:
        ValueError: at the end, for a forward that changes what it looks at.
    """

    def __init__(self, module: nn.Module, twin: nn.Module) -> None:
        self._module, self._twin = module, twin
        self._looked: set[Place] = set()
        self._before: dict[Place, Any] = {}
        self._saved: list[tuple[Any, Any]] = []
        self._caches: list[tuple[Any, int]] = []
        self._codes: set[types.CodeType] = set()
        self._functions = _functions_of(twin)
        for name, own in [*twin.named_modules()]:
            own.__class__ = _watched(type(own), name, self._looked)

    def seen(self) -> dict[Place, Any]:
        """What was looked at, as it was."""
        return self._before

    def __enter__(self) -> Watch:
        self._profile = sys.getprofile()
        sys.setprofile(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sys.setprofile(self._profile)
        outside = {place: known(at(self._twin, place)) for place in self._before}
        for container, copied in reversed(self._saved):
            _restore(container, copied)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # of results without values
        if kind is not None:
            return
        for place, now in outside.items():
            self._compare(place, self._before[place], now)
        for place in self._looked:
            before, now = known(at(self._module, place)), known(at(self._twin, place))
            self._before[place] = before
            self._compare(place, before, now)

    def _compare(self, place: Place, before: Any, now: Any) -> None:
        """What holds tensors, or will, does not say which way to go; else it must stay."""
        if before is NONE or now is NONE:
            del self._before[place]
        elif before != now:
            raise ValueError(f"its forward changes {place.name}, and looks at it")

    def _called(self, frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in self._codes:
            return
        self._codes.add(code)
        made = code.co_filename.startswith("<")  # in memory, by a dataclass, say
        if not _is_the_users(frame.f_globals.get("__file__", "") if made else code.co_filename):
            return
        home = str(frame.f_globals.get("__name__"))
        if "len" in code.co_names and "len" not in frame.f_globals:
            frame.f_globals["len"] = _length  # until the end
            self._saved.append(((frame.f_globals, "len"), NONE))
        for name in code.co_names:
            if name in frame.f_globals and name != "len":
                self._save(frame.f_globals, name, frame.f_globals[name])
                self._note(Place(home, "module", (name,)), frame.f_globals[name], code.co_names)
        for kind in {kind for m in self._twin.modules() for kind in type(m).__mro__}:
            for name in code.co_names:
                if hasattr(vars(kind).get(name), "cache_clear"):
                    self._save(kind, name, vars(kind)[name])
        for name in code.co_freevars:
            cell = self._functions.get(code, {}).get(name)
            if cell is not None:
                self._note(Place(cell, "cell", (name,)), cell.contents, code.co_names)
            elif known(frame.f_locals.get(name, NONE)) is not NONE:
                raise ValueError(f"{code.co_name} looks at {name}, which cannot be followed")

    def _note(self, place: Place, value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, type | types.ModuleType):
            file = getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", "")
            file = getattr(value, "__file__", file)
            if file and not _is_the_users(file):
                return
            for name in names:
                if name in vars(value):
                    names_of: Any = value if isinstance(value, type) else vars(value)
                    self._save(names_of, name, vars(value)[name])
                    deeper = Place(place.root, place.of, (*place.path, name))
                    self._note(deeper, vars(value)[name], names)
            return
        self._save_containers(value, set())
        state = known(value)
        if state is not NONE:
            if at(self._twin, place) is not value:
                raise ValueError(f"it looks at {place.name}, which cannot be followed")
            self._before.setdefault(place, state)

    def _save(self, names: dict[str, Any] | type, name: str, value: Any) -> None:
        self._saved.append(((names, name), value))
        if hasattr(value, "cache_info") and hasattr(value, "cache_clear"):  # functools.cache
            self._caches.append((value, value.cache_info().misses))

    def _save_containers(self, value: Any, inside: set[int]) -> None:
        if id(value) in inside or _is_opaque(value) or len(inside) > LARGEST:
            return
        inside.add(id(value))
        held = value if isinstance(value, dict | list | set) else getattr(value, "__dict__", None)
        if held is None:
            return
        self._saved.append((held, copy.copy(held)))
        for item in held.values() if isinstance(held, dict) else held:
            self._save_containers(item, inside)


def _length(value: Any) -> Any:
    """len, which torch.fx has no way to record."""
    return value.size(0) if isinstance(value, fx.Proxy) else len(value)


def _restore(container: Any, copied: Any) -> None:
    if isinstance(container, tuple):
        names, name = container
        if isinstance(names, type):
            if vars(names).get(name) is not copied:
                setattr(names, name, copied)
        elif copied is NONE:
            names.pop(name, None)
        elif names.get(name) is not copied:
            names[name] = copied
    elif isinstance(container, list):
        container[:] = copied
    else:
        container.clear()
        container.update(copied)


def _is_the_users(file: str) -> bool:
    """Whether code is neither PyTorch's, NumPy's, Python's nor of this package."""
    standard = file.startswith(_STANDARD) and "-packages" not in file
    return not (standard or file.startswith(_LIBRARIES) or file.startswith("<frozen"))


def _watched(kind: type, name: str, looked: set[Place]) -> type:
    """The class of a module of this name, which notes what is asked of it."""
    found: Any = kind.__getattribute__

    def __getattribute__(self: Any, attribute: str) -> Any:
        internal = attribute in _INTERNAL and not (attribute == "training" and name)
        if not internal and not attribute.startswith("__"):
            looked.add(Place(name, "submodule", (attribute,)))
        return found(self, attribute)

    body = {"__getattribute__": __getattribute__, "__module__": kind.__module__}
    return type(kind)(kind.__name__, (kind,), body)


def _functions_of(module: nn.Module) -> dict[types.CodeType, dict[str, Cell]]:
    """The closures of the functions that the classes of a module and its children have, and of
    those that they wrap."""
    found: dict[types.CodeType, dict[str, Cell]] = {}
    kinds = {kind for m in module.modules() for kind in type(m).__mro__}
    left: list[Any] = [value for kind in kinds for value in vars(kind).values()]
    left += [value for m in module.modules() for value in vars(m).values()]
    while left:
        value = left.pop()
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if not isinstance(value, types.FunctionType) or value.__code__ in found:
            continue
        cells = map(Cell, value.__closure__ or ())
        own = found[value.__code__] = dict(zip(value.__code__.co_freevars, cells, strict=True))
        left += [value.__globals__.get(name) for name in value.__code__.co_names]
        left += [cell.contents for cell in own.values()]
    return found


@contextlib.contextmanager
def undisturbed() -> Iterator[Random]:
    """Inside, nothing that is printed or logged is seen; afterwards the random generators are as
    they were."""
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    generators, disabled = Random(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            torch.random.fork_rng(devices),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield generators
    finally:
        logging.disable(disabled)
        generators.put_back()


class Random:
    """Python's and NumPy's random generators, as they were; `moved` after `put_back`: whether
    something was drawn."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (users draw from it)
        self.moved = False

    def put_back(self) -> None:
        """Sets both to the states that they had."""
        now, numpy = Random(), self._numpy["state"]
        at, key = now._numpy["state"]["pos"], now._numpy["state"]["key"]
        same = at == numpy["pos"] and bool((key == numpy["key"]).all())
        self.moved = not same or now._python != self._python
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
