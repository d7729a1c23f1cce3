"""How a module's own forward calls its convolutions, norms and activations: read once with
torch.fx, from a twin without values, so that the module and the random generators stay as they
were. Not here: how the runs that are found are run (block.py).

A later call may go another way, if an option that the forward looks at has changed. So what it
looked at is noted (watching.py) and compared before each call.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from .block import FUSED, Fused, Run, activation_of, is_block, is_norm_of
from .twins import CopyTensors, twin_of, without_values
from .watching import Place, TooLarge, Watch, at, known, undisturbed


@dataclass(eq=False)
class Reading:
    """A module's forward, as it was read.

    `runs` and `arguments`: its blocks, and the names of its arguments without a default, with which
    it was read. `takes`: the child that alone takes its argument; `gives`: the one whose result it
    returns, if only one; `edges`: children whose result another alone takes, and which; all by
    name, a run by its convolution's. `seen`: what the forward looked at, as it was; `forward`: its
    function, None for one that was loaded from a file.
    """

    runs: list[Run]
    arguments: list[str]
    takes: str = ""
    gives: list[str] = field(default_factory=list)
    edges: dict[str, str] = field(default_factory=dict)
    seen: dict[Place, Any] = field(default_factory=dict)
    forward: Any = None

    def changed(self, module: nn.Module) -> str:
        """The first of what the forward looked at that is another now; "" for none."""
        if self.forward not in (None, forward_of(module)):
            return "forward"
        for place, value in self.seen.items():
            try:
                same = known(at(module, place)) == value
            except TooLarge:
                same = False
            if not same:
                return place.name
        return ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Reading:
        return replace(self, runs=copy.deepcopy(self.runs, memo))

    def __getstate__(self) -> dict[str, Any]:
        seen = {p: v for p, v in self.seen.items() if p.can_be_pickled()}
        return {**vars(self), "seen": seen, "forward": None}


def read(module: nn.Module, own: dict[str, nn.Module]) -> Reading:
    """The runs that a module's forward calls both in training and in evaluation, given just the
    arguments that have no default.

    Args:
        own: the modules that it may call, by name.

    Raises:
        Exception: whatever a forward may raise that is given proxies; or why it is not read.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise TypeError("*args, **kwargs and keyword-only arguments are not read")
    asked = [p.name for p in parameters if p.default is p.empty]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    every: list[Reading] = []
    for training, grad in itertools.product((True, False), repeat=2):
        twin = twin_of(module, without_values).train(training)
        tracer = _Tracer()
        with (
            undisturbed() as generators, torch.set_grad_enabled(grad), Watch(module, twin) as watch,
            CopyTensors(without_values), torch.device("meta"), _Dice(),
        ):  # fmt: skip
            outside = _mode()
            graph = tracer.trace(twin, concrete_args=copy.deepcopy(defaults))
            held = tracer.held()
        if generators.moved:
            raise ValueError("it draws random numbers outside PyTorch, and may go by them")
        found = _follow(own, graph, held, outside)
        every.append(replace(found, arguments=asked, seen=watch.seen))
    return replace(functools.reduce(_both, every), forward=forward_of(module))


def _both(one: Reading, other: Reading) -> Reading:
    """What is so in both."""
    runs = []
    for run in one.runs:
        for same in other.runs:
            if run.modules == same.modules:
                runs.append(replace(run, leaves=run.leaves or same.leaves))
    return Reading(
        runs,
        one.arguments,
        one.takes if one.takes == other.takes else "",
        [name for name in one.gives if name in other.gives],
        dict(one.edges.items() & other.edges.items()),
        one.seen | other.seen,
    )


def forward_of(module: nn.Module) -> Any:
    """The function that runs when a module is called."""
    return vars(module).get("forward", type(module).forward)


class _Dice(TorchFunctionMode):
    """Inside, random numbers have no values: who asks for one cannot be read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn, torch.randint, torch.randperm):
            kwargs.pop("generator", None)
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


# --- The order of calls ---------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Takes every module as a whole, and notes in which mode of PyTorch's it is called."""

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []
        self._arguments: list[fx.Proxy] = []  # which may hold others

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self._proxies.append((node, weakref.ref(made)))
        if node.op == "placeholder":
            self._arguments.append(made)
        return made

    def held(self) -> set[fx.Node]:
        """After the trace: those whose results an attribute, an argument, or a list elsewhere still
        holds."""
        inner = {n for n, proxy in self._proxies if proxy() is not None and n.op != "placeholder"}
        self._arguments.clear()
        return inner | {n for n, proxy in self._proxies if proxy() is not None}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        proxy = super().call_module(m, forward, args, kwargs)
        if isinstance(proxy, fx.Proxy):
            proxy.node.meta["mode"] = _mode(), m.training
        return proxy


def _mode() -> tuple[Any, ...]:
    """Of differentiation, autocast, who keeps tensors for the way back, and the checkpoint or
    autograd.Function that is running. A block runs in one."""
    kinds = ("cpu", "cuda")
    casts = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts, hooks, _region()


def _region() -> int:
    """Which call of a checkpoint or an autograd.Function this is inside; 0 for none."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(("utils/checkpoint.py", "autograd/function.py")):
            return id(frame)
        frame = frame.f_back
    return 0


def _is_stock(module: nn.Module | None) -> bool:
    """Whether a module is of a class that `fuse` may change: PyTorch's own, or one that a
    parametrisation derived from it."""
    kind = type(module)
    if isinstance(module, nn.Module) and is_parametrized(module):
        kind = kind.__bases__[0]
    return kind in FUSED or issubclass(kind, Fused)


def _follow(
    own: dict[str, nn.Module], graph: fx.Graph, held: set[fx.Node], outside: Any
) -> Reading:
    """The runs in a graph, and who hands what on to whom.

    Args:
        held: nodes whose results others may look at later.
        outside: the mode in which the forward was called. What a checkpoint in it recomputes is
            called without the forward around it, so it is left as it is.
    """
    calls = {node: own.get(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = list(calls.values())

    def follower(node: fx.Node) -> fx.Node | None:
        """The module call that alone takes this node's result, takes nothing else, and is made in
        the same mode."""
        users = list(node.users)
        alone = len(users) == 1 and users[0] in calls and users[0].args == (node,)
        alone = (
            alone
            and node not in held
            and not users[0].kwargs
            and users[0].meta.get("mode") == node.meta["mode"]
        )
        return users[0] if alone else None

    def kind(node: fx.Node | None) -> Any:
        """The module, where it is one of PyTorch's own classes; else None."""
        found = None if node is None else calls[node]
        return found if _is_stock(found) else None

    def is_touched(node: fx.Node | None) -> bool:
        """Whether the forward itself looks at a parameter of this module, or changes it."""
        return node is not None and any(t.startswith(f"{node.target}.") for t in touched)

    touched = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    runs = []
    ends = {node: node for node in calls}  # of each run, or child, the last node: the first
    for node in calls:
        conv: Any = kind(node)
        if conv is None or uses.count(conv) != 1 or not is_block(conv, None, None):
            continue
        if is_touched(node):
            continue
        if len(node.args) != 1 or node.kwargs or node.meta["mode"][0][-2:] != outside[-2:]:
            continue
        nodes, modules = [node], [conv]
        after = follower(node)
        norm = kind(after)
        once = norm is not None and uses.count(norm) == 1 and not is_touched(after)
        if after and once and is_norm_of(norm, conv) and is_block(conv, norm, None):
            nodes.append(after)
            modules.append(norm)
            after = follower(after)
        activation = kind(after)
        if after and activation_of(activation) and is_block(conv, None, activation):
            nodes.append(after)
            modules.append(activation)
        run = Run([str(node.target) for node in nodes], modules)
        run.leaves = nodes[-1] in held or _changed_in_place(nodes[-1], calls)
        runs.append(run)
        for inner in nodes:
            del ends[inner]
        ends[nodes[-1]] = node
    firsts = {first: str(first.target) for first in ends.values() if uses.count(calls[first]) == 1}
    found = Reading(runs, [])
    for last, first in ends.items():
        name, after = firsts.get(first), follower(last)
        if name and after in firsts:
            found.edges[name] = firsts[after]
        if (
            name
            and last not in held
            and [(n.op, n.args) for n in last.users] == [("output", (last,))]
        ):
            found.gives.append(name)
    given = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(given) == 1 and len(given[0].users) == 1 and given[0] not in held:
        (first,) = given[0].users
        if first in firsts and first.args == (given[0],) and not first.kwargs:
            found.takes = firsts[first]
    return found


_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ipow", "setitem"}  # x += 1 and its like


def _changed_in_place(node: fx.Node, calls: dict[fx.Node, nn.Module | None]) -> bool:
    """Whether something may write over this node's result, in this forward or after it."""
    for user in node.users:
        if user.op == "output":
            return True
        name = user.target if isinstance(user.target, str) else user.target.__name__
        in_place = user.kwargs.get("inplace") or getattr(calls.get(user), "inplace", False)
        if in_place or name in _OPERATORS or (name.endswith("_") and not name.endswith("__")):
            return True
    return False
