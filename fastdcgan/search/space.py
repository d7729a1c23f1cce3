"""What a search varies: a small TOML or JSON file whose keys are fields of `TrainConfig`, read and
checked against them. Nothing here knows Optuna.

    ema_decay = 0.999                                     # fixed
    loss = ["bce", "hinge"]                               # choices
    lr_g = { low = 5e-5, high = 1e-3, log = true }        # a range
    ngf = { low = 16, high = 64, step = 16 }              # of whole numbers, where the field is
"""

import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastdcgan.errors import InputError
from fastdcgan.training.config import TrainConfig, giving_way

PRESETS = Path(__file__).parent / "spaces"

DECIDED = (
    *("out", "resume", "dry_run", "workers", "keep", "checkpoint_every", "milestone_every"),
    *("tensorboard", "best_by", "max_minutes"),
)
"""Fields of a trial's configuration that the search itself decides: neither flags nor varied."""

ALIKE = (
    *("data", "init_g", "init_d", "cache", "device", "steps", "epochs"),
    *("eval_every", "eval_n", "eval_features", "patience"),
)
"""Fields that all trials have in common, or their scores could not be compared."""

GRID_POINTS = 3
"""Points of a grid on a range that has no steps: its ends and its middle, unless `points` says."""

LARGEST_GRID = 1000


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return any(value == v and type(value) is type(v) for v in self.values)

    def points(self) -> tuple[Any, ...]:
        """The values of a grid."""
        return self.values

    def ends(self) -> tuple[Any, ...]:
        """Values that, if they are possible, all are."""
        return self.values

    def __str__(self) -> str:
        return ", ".join(map(text, self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where the field's are."""

    low: int | float
    high: int | float
    log: bool = False
    """Equally probable in the logarithm."""
    step: int | float | None = None
    """Only low, low + step, ..."""
    grid: int = GRID_POINTS
    """Points of a grid where there is no step."""

    @property
    def whole(self) -> bool:
        """Whether these are ints."""
        return isinstance(self.low, int)

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high or (self.whole and not isinstance(value, int)):
            return False
        return self.step is None or math.isclose(
            (value - self.low) / self.step, round((value - self.low) / self.step), abs_tol=1e-9
        )

    def points(self) -> tuple[Any, ...]:
        """The values of a grid."""
        low, high = self.low, self.high
        if self.step is not None:
            count = math.floor((high - low) / self.step + 1e-9) + 1
            return tuple(min(high, low + i * self.step) for i in range(count))
        parts = [i / (self.grid - 1) for i in range(self.grid)]
        if self.log:
            found = [low * (high / low) ** part for part in parts]
        else:
            found = [low + (high - low) * part for part in parts]
        found[0], found[-1] = low, high  # exactly
        return tuple(dict.fromkeys(round(x) for x in found)) if self.whole else tuple(found)

    def ends(self) -> tuple[Any, ...]:
        """Values that, if they are possible, all are."""
        return self.low, self.high

    def __str__(self) -> str:
        kind = " in the logarithm" if self.log else ""
        steps = "" if self.step is None else f" in steps of {text(self.step)}"
        return f"{text(self.low)} to {text(self.high)}{kind}{steps}"


@dataclass(frozen=True)
class Space:
    """What a search varies, and what it fixes."""

    name: str
    fixed: dict[str, Any]
    """Field -> value, in place of the base configuration's."""
    varied: dict[str, Choices | Range]
    """Field -> its values, in the file's order."""

    def base(self, config: TrainConfig) -> TrainConfig:
        """`config` with the fixed fields."""
        return _with(config, self.fixed)

    def at(self, config: TrainConfig, point: Mapping[str, Any]) -> TrainConfig:
        """`config` with the fixed fields and those of a point."""
        return _with(config, {**self.fixed, **point})

    def point(self, config: TrainConfig) -> dict[str, Any] | None:
        """The point of this space that `config` is; None where it is none."""
        found = {name: held(config, name) for name in self.varied}
        inside = all(value in self.varied[name] for name, value in found.items())
        by_lr = {"lr": config.lr} if "lr" in found else {}
        trains_so = _with(config, {**self.fixed, **by_lr}) == config
        return found if inside and trains_so else None

    def grid(self, seed: int, most: int | None = None) -> list[dict[str, Any]]:
        """The points of the grid, in an order drawn by `seed`: the first few are spread over it.

        Args:
            seed: of the order.
            most: how many are wanted at most; None: all.

        Raises:
            InputError: there are too many.
        """
        axes = {name: dimension.points() for name, dimension in self.varied.items()}
        count = math.prod(map(len, axes.values()))
        if min(count, most or count) > LARGEST_GRID or count > LARGEST_GRID**2:
            raise InputError(
                f"the grid of {self.name} has {count:,} points: give fewer --trials (at most "
                f"{LARGEST_GRID:,}), vary fewer fields, or use --sampler random or tpe"
            )
        order = list(range(count))
        random.Random(seed).shuffle(order)
        return [_point(axes, index) for index in order[:most]]

    def to_json(self) -> str:
        """All of it but the name: two spaces are the same search space where this is the same."""
        varied = {
            name: {"choices": d.values} if isinstance(d, Choices) else dataclasses.asdict(d)
            for name, d in self.varied.items()
        }
        return json.dumps({"fixed": self.fixed, "varied": varied}, sort_keys=True, default=str)


def _point(axes: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """Point `index` of a grid, counted as an odometer counts."""
    point = {}
    for name, values in axes.items():
        index, i = divmod(index, len(values))
        point[name] = values[i]
    return point


def _with(config: TrainConfig, fields: Mapping[str, Any]) -> TrainConfig:
    """`config` with other values, --lr's in place of --lr-g's and --lr-d's."""
    return dataclasses.replace(giving_way(config, {"lr"} & set(fields)), **fields)


def held(config: TrainConfig, name: str) -> Any:
    """The value by which `config` trains: --lr where --lr-g or --lr-d is not given."""
    value = getattr(config, name)
    return config.lr if value is None and name in ("lr_g", "lr_d") else value


def text(value: Any) -> str:
    """A value as short as people write it: 0.0002, 3.2e-05, hinge."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def presets() -> list[str]:
    """The spaces that the package brings."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_space(name: str, config: TrainConfig) -> Space:
    """Reads a preset or a file, .toml or .json.

    Args:
        name: of a preset, or the path of a file.
        config: the base configuration, in which every value must be possible.

    Raises:
        InputError: there is no such file, it is not TOML or JSON, or a line of it cannot be; the
            message names the file and the field.
    """
    path = Path(name)
    if not path.is_file() and name in presets():
        path = PRESETS / f"{name}.toml"
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise InputError(
            f"--space {name}: {why}; give a .toml or .json file, or one of {', '.join(presets())}"
        ) from None
    return parse_space(_read(content, path), config, name=name)


def _read(content: str, path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".json":
            values = json.loads(content, object_pairs_hook=_no_twins)
        else:
            values = _toml().loads(content)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InputError(f"--space {path}: not {kind}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--space {path}: not an object whose keys are the configuration's fields")
    return values


def _toml() -> Any:
    try:
        return import_module("tomllib")
    except ImportError:  # Python 3.10
        try:
            return import_module("tomli")
        except ImportError:
            raise InputError("a space in TOML needs tomli: pip install 'fastdcgan[tune]'") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice")
    return dict(pairs)


def parse_space(values: Mapping[str, Any], config: TrainConfig, *, name: str) -> Space:
    """The space that a file's content describes; see `load_space`."""
    hints = get_type_hints(TrainConfig)
    fixed: dict[str, Any] = {}
    varied: dict[str, Choices | Range] = {}
    for key, value in values.items():
        what = f"--space {name}: {key}"
        if key not in hints:
            raise InputError(f"{what} is no field of the configuration{_near(key, hints)}")
        if key in DECIDED or key in ALIKE:
            raise InputError(f"{what}: a search cannot vary it: all its trials have one in common")
        if isinstance(value, dict):
            varied[key] = _range(value, hints[key], what)
        elif isinstance(value, list):
            if not value:
                raise InputError(f"{what}: an empty list; give at least one value")
            choices = tuple(_typed(v, hints[key], what) for v in value)
            if any(v in Choices(choices[:i]) for i, v in enumerate(choices)):
                raise InputError(f"{what}: a value is there twice in {value}")
            varied[key] = Choices(choices)
        else:
            fixed[key] = _typed(value, hints[key], what)
    if not varied:
        raise InputError(f"--space {name}: nothing varies; give a field a list or a range")
    space = Space(name, fixed, varied)
    _try_values(space, config)
    return space


def _try_values(space: Space, config: TrainConfig) -> None:
    """Every value must be possible in some trial: where one is not, say so before the first."""
    rest = {name: dimension.points() for name, dimension in space.varied.items()}
    base = space.base(config)
    for name, dimension in space.varied.items():
        for value in dimension.ends():
            one = _with(base, {name: value})
            if not possible(one):
                _raise_if_never_possible(one, {k: v for k, v in rest.items() if k != name}, space)


def possible(config: TrainConfig) -> bool:
    """Whether `config` is one that can be trained."""
    try:
        config.validate()
    except InputError:
        return False
    return True


def _raise_if_never_possible(
    config: TrainConfig, others: Mapping[str, Sequence[Any]], space: Space
) -> None:
    """A value may need another field's (a weight that only one loss has): any one will do."""
    for name, values in others.items():
        if any(possible(_with(config, {name: v})) for v in values):
            return
    try:
        config.validate()
    except InputError as error:
        raise InputError(f"--space {space.name}: {error}") from None


def _range(value: dict[str, Any], hint: Any, what: str) -> Range:
    known = {"low", "high", "log", "step", "points"}
    unknown = value.keys() - known
    if unknown:
        raise InputError(
            f"{what}: a range has no {', '.join(sorted(unknown))}; it has low and high, and may "
            "have log, step, points"
        )
    if not {"low", "high"} <= value.keys():
        raise InputError(f"{what}: a range needs low and high")
    kinds = [kind for kind in _kinds(hint) if kind in (int, float)]
    if not kinds:
        raise InputError(f"{what} is no number: give a list of choices, not a range")
    low, high = (_typed(value[end], kinds[0], f"{what}, {end}") for end in ("low", "high"))
    log = _typed(value.get("log", False), bool, f"{what}, log")
    step = value.get("step")
    if step is not None:
        step = _typed(step, kinds[0], f"{what}, step")
        if step <= 0 or step > high - low:
            raise InputError(
                f"{what}: a step of {step} was given; it must be above 0 and fit in the range"
            )
        if log:
            raise InputError(f"{what}: log and step were given; a range has one or the other")
        high = min(high, low + math.floor((high - low) / step + 1e-9) * step)
    if low >= high:
        raise InputError(f"{what}: the range from {low} to {high} is empty; low must be below high")
    if log and low <= 0:
        raise InputError(f"{what}: low = {low} has no logarithm; it must be above 0")
    points = _typed(value.get("points", GRID_POINTS), int, f"{what}, points")
    if points < 2:
        raise InputError(f"{what}: points = {points} was given; it must be at least 2")
    return Range(low, high, log, step, points)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _typed(value: Any, hint: Any, what: str) -> Any:
    """`value` as the field's type has it; a whole number will do for a float, and "none", where it
    means nothing else, for None, which TOML lacks."""
    literals = [word for kind in _kinds(hint) for word in get_args(kind)]
    if value == "none" and NoneType in _kinds(hint) and value not in literals:
        return None
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            if value in get_args(kind) and isinstance(value, str):
                return value
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not math.isfinite(value):
                    raise InputError(f"{what}: {value} was given; it must be finite")
                return float(value)
        elif (kind is NoneType and value is None) or (kind is not NoneType and type(value) is kind):
            return value
    given = json.dumps(value, default=str)
    raise InputError(f"{what}: {given} was given; it must be {_named(hint)}")


def _named(hint: Any) -> str:
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text",
        NoneType: "none",
    }  # fmt: skip
    said = [
        "one of " + ", ".join(get_args(kind)) if get_origin(kind) is Literal else names[kind]
        for kind in _kinds(hint)
    ]
    return " or ".join(said)


def _near(key: str, known: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"; did you mean {near[0]}?" if near else " (fastdcgan.train --help lists them)"
