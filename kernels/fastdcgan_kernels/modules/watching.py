"""What a forward looks at while it is read: attributes of its modules, globals and closures of the
user's functions that it runs. Not here: how it is read (reading.py).

Values are compared as `known` has them: numbers, strings, arrays and what is made of them, in
containers and in plain objects; functions and classes by identity. Tensors and modules are not
compared: a forward that asks a tensor which way to go cannot be read.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import enum
import functools
import io
import logging
import os
import random
import sys
import sysconfig
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

LARGEST = 2000  # values; comparing more before each call would take too long
NONE = object()
"""What cannot be compared, or is not there."""

_INTERNAL = {*vars(nn.Module()), "forward"}  # `Reading.forward`; a child's says nothing here
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
        is_nan = isinstance(value, float | np.floating) and value != value
        return "NaN" if is_nan else value  # which is not equal to itself
    value = getattr(value, "__func__", value)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | property):
        return Same(value)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return functools.partial, [_known(part, left, inside) for part in parts]
    if isinstance(value, type):
        return Same(value), _of_class(value)
    if isinstance(value, random.Random | np.random.Generator | torch.Generator):
        return repr(_state_of(value))
    if isinstance(value, np.ndarray) and value.size <= LARGEST and value.dtype != object:
        return np.ndarray, str(value.dtype), value.shape, value.tobytes()
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
    state = [(name, _known(v, left, inside)) for name, v in own.items()]
    return type(value), state, _of_class(type(value))


def _of_class(kind: type) -> list[tuple[str, Any]]:
    """The options that a user's class holds."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    if not _is_the_users(file):
        return []
    return [(n, v) for n, v in vars(kind).items() if isinstance(v, _PLAIN) and n[:2] != "__"]


class Same:
    """A function or a class, which is equal to itself; a pickled one, to any."""

    def __init__(self, value: object = NONE) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same):
            return False
        return self._value is other._value or NONE in (self._value, other._value)

    def __reduce__(self) -> tuple[type[Same], tuple[()]]:
        return Same, ()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return hash(generator.getstate())
    if isinstance(generator, torch.Generator):
        return hash(generator.get_state().numpy().tobytes())
    return generator.bit_generator.state


def _is_result(value: object) -> bool:
    return isinstance(value, Tensor | fx.Proxy)


def _is_opaque(value: object) -> bool:
    return (
        value is NONE
        or _is_result(value)
        or isinstance(value, nn.Module | types.ModuleType | logging.Logger | np.ndarray)
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
    """Inside, the forward of a module's twin is called; afterwards globals, closures and caches are
    as they were, and `seen` is what the forward looks at.

    Which functions it may call, and what they may look at, is read from their code: by name, so
    rather more than less.

    Raises:
        ValueError: at the end, for a forward that changes what it looks at.
    """

    def __init__(self, module: nn.Module, twin: nn.Module) -> None:
        self.seen: dict[Place, Any] = {}
        self._module, self._twin = module, twin
        self._undo: list[Callable[[], object]] = []
        self._saved: set[int] = set()

    def __enter__(self) -> Watch:
        for function in _functions_of(self._module):
            if not _is_the_users(_file_of(function)):
                continue
            names, strings = _names_in(function.__code__)
            self._look_at_globals(function, names)
            for cell_name, cell in _cells_of(function).items():
                self._note(Place(cell, "cell", (cell_name,)), cell.contents, names)
            for of, m in self._module.named_modules():
                for name in names | strings:
                    internal = name in _INTERNAL and not (name == "training" and of)
                    if not internal and not name.startswith("__"):
                        self._note(Place(of, "submodule", (name,)), _attribute(m, name), set())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now = {place: _try(known, at(self._twin, place)) for place in self.seen}
        for undo in reversed(self._undo):
            undo()
        for place, value in now.items() if kind is None else ():
            if value is NONE:  # it holds tensors, which do not say which way to go
                del self.seen[place]
            elif value != self.seen[place]:
                raise ValueError(f"its forward changes {place.name}, and looks at it")

    def _look_at_globals(self, function: types.FunctionType, names: set[str]) -> None:
        home, held = str(function.__globals__.get("__name__")), function.__globals__
        if "len" in names and "len" not in held:
            held["len"] = _length  # until the end
            self._undo.append(lambda: held.pop("len", None))
        for name in names - {"len"} & {*held}:
            self._binding(held, name)
            self._note(Place(home, "module", (name,)), held[name], names)
        if names & {"environ", "getenv"}:
            self._note(Place("os", "module", ("environ",)), os.environ, set())
        for value in (function.__defaults__, function.__kwdefaults__, function.__dict__):
            self._save(value)

    def _note(self, place: Place, value: Any, names: set[str]) -> None:
        if isinstance(value, type | types.ModuleType) and place.of != "submodule":
            file = getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", "")
            if not _is_the_users(getattr(value, "__file__", file) or ""):
                return
            for name in names & {*vars(value)}:
                self._binding(value, name)
                deeper = Place(place.root, place.of, (*place.path, name))
                self._note(deeper, vars(value)[name], names)
            return
        self._save(value)
        if place.path == ("training",):  # as the module's, in either mode
            self.seen[place] = True
            return
        state = known(value)
        if state is not NONE:
            if known(at(self._module, place)) != state:
                raise ValueError(f"it looks at {place.name}, which cannot be followed")
            self.seen.setdefault(place, state)

    def _binding(self, holder: Any, name: str) -> None:
        """A name will be bound to what it is bound to now."""
        value = holder[name] if isinstance(holder, dict) else vars(holder)[name]

        def undo() -> None:
            if isinstance(holder, dict):
                holder[name] = value
            elif vars(holder).get(name) is not value:
                setattr(holder, name, value)

        self._undo.append(undo)

    def _save(self, value: Any) -> None:
        """What is in a container, a plain object, a generator or a cache will be what it is now."""
        if id(value) in self._saved or len(self._saved) > LARGEST:
            return
        self._saved.add(id(value))
        if callable(getattr(value, "cache_clear", None)):
            misses = value.cache_info().misses
            self._undo.append(lambda: value.cache_info().misses == misses or value.cache_clear())
        undo = _undoing(value)
        if undo is not None:
            self._undo.append(undo)
        if isinstance(value, types.FunctionType | type | nn.Module | types.ModuleType | Tensor):
            return
        inner: Any = value if isinstance(value, list | tuple | set | deque) else ()
        inner = value.values() if isinstance(value, dict) else inner
        for item in (*inner, getattr(value, "__dict__", None)):
            self._save(item)


def _undoing(value: Any) -> Callable[[], object] | None:
    """Puts back what a value is now; None for what has no state, or none that is known."""
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        state = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", state)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_leaf:
        version, saved = value._version, value.detach().clone()
        return lambda: value._version == version or value.detach().copy_(saved)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return functools.partial(np.copyto, value, value.copy())
    if isinstance(value, list | set | dict | deque):
        items = copy.copy(value)
        more: Any = value.update if isinstance(value, set | dict) else value.extend
        return lambda: (value.clear(), more(items))
    return None


def _length(value: Any) -> Any:
    """len, which torch.fx has no way to record."""
    return value.size(0) if isinstance(value, fx.Proxy) else len(value)


def _try(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except TooLarge:
        return NONE


# --- Code -----------------------------------------------------------------------------------------


def _is_the_users(file: str) -> bool:
    """Whether code is neither PyTorch's, NumPy's, Python's nor of this package."""
    standard = file.startswith(_STANDARD) and "-packages" not in file
    return not (standard or file.startswith(_LIBRARIES) or file.startswith("<frozen"))


def _file_of(function: types.FunctionType) -> str:
    file = function.__code__.co_filename
    return str(function.__globals__.get("__file__", "")) if file.startswith("<") else file


def _names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that code loads, and the strings in it; with the code inside it."""
    names: set[str] = set()
    strings: set[str] = set()
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if isinstance(value, str):
            load = instruction.opname.startswith("LOAD") and instruction.opname != "LOAD_CONST"
            (names if load else strings).add(value)
        elif isinstance(value, types.CodeType):
            inner = _names_in(value)
            names, strings = names | inner[0], strings | inner[1]
    stored = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("STORE")}
    return names, strings - stored


def _cells_of(function: types.FunctionType) -> dict[str, Cell]:
    cells = map(Cell, function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _functions_of(module: nn.Module) -> list[types.FunctionType]:
    """The functions that a module's forward may call, by their names: of the classes of the module
    and its children, global ones, and those of closures."""
    found: dict[types.FunctionType, None] = {}
    modules = [*module.modules()]
    kinds = {kind for m in modules for kind in type(m).__mro__}
    left: list[Any] = [vars(module).get("forward", type(module).forward)]
    while left:
        value = left.pop()
        for name in ("__func__", "fget", "func", "__wrapped__"):
            inner = getattr(value, name, None)
            if inner is not None:
                left.append(inner)
        if not isinstance(value, types.FunctionType) or value in found:
            continue
        found[value] = None
        left += [cell.contents for cell in _cells_of(value).values()]
        if not _is_the_users(_file_of(value)):
            continue
        names, strings = _names_in(value.__code__)
        for name in names | strings:
            own = value.__globals__.get(name)
            if isinstance(own, type):
                left += [v for n, v in vars(own).items() if n in names or n in _IMPLICIT]
            else:
                left.append(own)
            left += [vars(kind)[name] for kind in kinds if name in vars(kind)]
            left += [vars(m)[name] for m in modules if name in vars(m)]
    return [*found]


_IMPLICIT = {"__init__", "__call__", "__getattr__", "__getitem__"}


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
