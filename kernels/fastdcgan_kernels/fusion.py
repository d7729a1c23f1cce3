"""fuse(model): finds convolution, BatchNorm, activation in a user's model and runs them as fused
blocks. Only the classes of modules change, so parameters, buffers, hooks, keys and isinstance stay
as they were, and deepcopy and pickle need no help. Not here: the blocks (modules.py).

In an nn.Sequential the blocks are looked for at every call. Among attributes the order of calls is
read with torch.fx, once; a convolution then runs its block only while the module's own forward runs
as it was read, and is itself whenever anybody else calls it.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fastdcgan_kernels import functional
from fastdcgan_kernels.functional import Deferred, Input
from fastdcgan_kernels.modules import (
    ConvBlock,
    activation_of,
    groups_now,
    is_block,
    is_convolution,
    is_hooked,
    is_norm_of,
    is_special,
    run_block,
    stat_groups,
    why_not_conv,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Finding:
    """A run of modules, by their names in the model, that is fused; or a convolution that is not,
    and why."""

    names: tuple[str, ...]
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{'fused' if self.fused else 'left '} {' + '.join(self.names)}" + (
            f": {self.reason}" if self.reason else ""
        )


def fuse(model: Model, *, verbose: bool = False) -> Model:
    """Run the model's convolution + BatchNorm + activation blocks as fused kernels.

    Found are nn.Conv2d and nn.ConvTranspose2d (4x4; stride 2 with padding 1, or stride 1 with
    padding 0), each alone or followed by nn.BatchNorm2d (nn.SyncBatchNorm), nn.ReLU, nn.LeakyReLU
    or nn.Tanh: in nn.Sequential at any depth, and as attributes that a module's own forward calls
    in order (read with torch.fx, in training and evaluation alike). Everything else runs as it did:
    so does a module that has hooks, whenever it got them, a module that is called by itself, and a
    forward that is given other arguments, or finds other attributes, than it was read with.

    Args:
        model: any module; it is changed in place. Classes change: `type(m) is nn.Sequential` does
            not hold afterwards, isinstance does.
        verbose: print what was fused, what was left, and why. Default False; `findings(model)`
            has the same as data.

    Returns:
        The model. Outputs are channels_last; gradients are those of `functional.conv_bn_act`.
    """
    unfuse(model)
    found: list[Finding] = []
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name or type(module).__name__)
    fused: set[nn.Module] = set()
    reasons: dict[nn.Module, str] = {}
    for module in names:
        for block in _fuse_one(module, reasons):
            if block[0] not in fused:
                found.append(Finding(tuple(names[m] for m in block), True))
            fused.update(block)
    for module, name in names.items():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module not in fused:
            why = (
                why_not_conv(module)
                or ("it has hooks, or a forward of its own" if is_special(module) else "")
                or reasons.get(module)
                or "it is called by a forward that fuse does not read"
            )
            found.append(Finding((name,), False, why))
    model.__dict__["_fuse_findings"] = tuple(found)
    if verbose:
        print(*found, sep="\n")
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`: every module gets its own class back. Returns the model."""
    for module in model.modules():
        plain = getattr(type(module), "plain", None)
        if plain is not None:
            module.__class__ = plain
        for name in ("_fuse_findings", "_fuse_run", "_fuse_reading"):
            module.__dict__.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_before, _after)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return model


def findings(model: nn.Module) -> tuple[Finding, ...]:
    """What `fuse` found in this model; () for a model that it has not seen."""
    found: tuple[Finding, ...] = model.__dict__.get("_fuse_findings", ())
    return found


# --- nn.Sequential: blocks are looked for at every call -------------------------------------------


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs the blocks among its children, and in nn.Sequentials in it, as
    fused blocks."""

    plain = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential's."""
        traced: Any = input
        if isinstance(traced, fx.Proxy):
            proxy: Tensor = super().forward(traced)
            return proxy
        x: Input = input
        children = list(_flat(self))
        at = 0
        while at < len(children):
            block = _block_at(children, at)
            if not block:
                x = _for_each_group(children[at], functional.materialise(x))
                at += 1
                continue
            conv, norm, activation = _parts(block)
            if isinstance(x, Deferred) and not _defers(x, conv, norm):
                x = functional.materialise(x)
            x = run_block(conv, norm, activation, x)
            at += len(block)
        return functional.materialise(x)


def _for_each_group(module: nn.Module, x: Tensor) -> Tensor:
    """A module that knows nothing of groups is called once for each."""
    groups = groups_now()
    if groups == 1:
        one: Tensor = module(x)
        return one
    with stat_groups(1):
        # Of its own each: a module may write over its input.
        return torch.cat([module(part.clone()) for part in x.chunk(groups)])


def _flat(sequential: nn.Module) -> Iterator[nn.Module]:
    """Children in order, those of nn.Sequentials that nobody watches in their place."""
    for child in sequential._modules.values():  # a module that is there twice, twice
        assert child is not None
        if type(child) in (nn.Sequential, FusedSequential) and not is_hooked(child):
            yield from _flat(child)
        else:
            yield child


def _block_at(modules: list[nn.Module], at: int) -> list[nn.Module]:
    """The block that starts there, as long as it can be; [] for none."""
    block = modules[at : at + 1]
    if not is_convolution(block[0]) or not is_block(block[0], None, None):
        return []
    rest = modules[at + 1 : at + 3]
    if rest and is_norm_of(rest[0], block[0]) and not is_special(rest[0]):
        block.append(rest.pop(0))
    if rest and activation_of(rest[0]) and not is_special(rest[0]):
        block.append(rest[0])
    return block


def _parts(block: list[nn.Module]) -> tuple[Any, Any, Any]:
    """(convolution, norm or None, activation or None)."""
    normed = len(block) > 1 and is_norm_of(block[1], block[0])
    norm = block[1] if normed else None
    activation = block[-1] if len(block) > 1 + normed else None
    return block[0], norm, activation


def _defers(x: Deferred, conv: Any, norm: nn.Module | None) -> bool:
    up, groups = isinstance(conv, nn.ConvTranspose2d), x.coef.shape[1]
    return functional.defers(
        x, conv.weight, conv.stride[0], int(conv.padding[0]), up, norm is not None, groups
    )


# --- Attributes: the first module runs the block, the others let its result pass ------------------


@dataclass
class _Run:
    """A block among a module's attributes. While the module's forward runs, in one thread at a
    time: `owner`: that thread; `active`: it has yet to call the convolution; `waiting`: whom it has
    yet to call with `result`, the block's."""

    names: list[str]
    modules: list[nn.Module]
    owner: int | None = None
    active: bool = False
    waiting: list[nn.Module] = field(default_factory=list)
    result: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(_Run(self.names, self.modules))


@dataclass
class _Reading:
    """What a module's forward was read with: `arguments` without a default, by name, and
    attributes that its code may look at."""

    runs: list[_Run]
    arguments: list[str]
    attributes: dict[str, Any]


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    own = nn.Module().__dict__
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, bool | int | float | str | None) and name not in own
    }


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module's forward: whether it will run as it was read."""
    reading: _Reading = module._fuse_reading  # type: ignore[assignment]
    asked = reading.arguments[len(args) :]
    same = len(args) <= len(reading.arguments) and sorted(kwargs) == sorted(asked)
    if same and any(getattr(module, n, None) != v for n, v in reading.attributes.items()):
        same = False
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"attributes of {type(module).__name__} changed after fuse(model): it runs as it "
                "did before; call fuse again",
                stacklevel=2,
            )
    for run in reading.runs:
        if run.owner not in (None, _thread()):
            continue  # this thread's calls run by themselves
        run.owner = _thread()
        here = (_submodule(module, name) for name in run.names)
        run.active = same and all(a is b for a, b in zip(here, run.modules, strict=True))
        run.waiting = []
        run.result = None


def _after(module: nn.Module, args: Any, result: Any) -> None:
    """After it: a block's result that not everybody passed on would be a wrong number."""
    reading: _Reading = module._fuse_reading  # type: ignore[assignment]
    for run in reading.runs:
        if run.owner != _thread():
            continue
        waiting, run.waiting = run.waiting, []
        run.active, run.result, run.owner = False, None, None
        if waiting and result is not None:
            raise RuntimeError(
                f"{type(module).__name__}.forward called {run.names[0]} and not {run.names[-1]} "
                "after it, as it did when fuse(model) read it; call fuse(model) again"
            )


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _convolve(conv: nn.Module, input: object) -> Tensor | None:
    """The result of the block that a convolution is the first of; None: it is to run by itself."""
    run: Any = conv._fuse_run
    if not run.active or run.owner != _thread() or run.modules[0] is not conv:
        return None
    run.active = False
    whole, norm, activation = _parts(run.modules)
    if not isinstance(input, Tensor) or not is_block(whole, norm, activation):
        return None
    run.waiting = run.modules[1:]
    result = functional.materialise(run_block(whole, norm, activation, input))
    run.result = result
    return result


class FusedConv2d(nn.Conv2d):
    """A convolution that runs the norm and the activation after it, too."""

    plain = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """The output of the whole block, or as nn.Conv2d's."""
        result = _convolve(self, input)
        return super().forward(input) if result is None else result


class FusedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution that runs the norm and the activation after it, too."""

    plain = nn.ConvTranspose2d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The output of the whole block, or as nn.ConvTranspose2d's."""
        result = _convolve(self, input) if output_size is None else None
        return super().forward(input, output_size) if result is None else result


class _Absorbed(nn.Module):
    """Its work is done by the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        """input, if it is the result of a block that this module is in; else as its class's."""
        runs: list[_Run] = self._fuse_run  # type: ignore[assignment]
        for run in runs:
            if run.waiting and input is run.result and run.waiting[0] is self:
                run.waiting = run.waiting[1:]
                return input
        forward: Any = super().forward
        result: Tensor = forward(input)
        return result


class AbsorbedBatchNorm2d(_Absorbed, nn.BatchNorm2d):
    """Run by the fused convolution before it."""

    plain = nn.BatchNorm2d


class AbsorbedSyncBatchNorm(_Absorbed, nn.SyncBatchNorm):
    """Run by the fused convolution before it."""

    plain = nn.SyncBatchNorm


class AbsorbedReLU(_Absorbed, nn.ReLU):
    """Run by the fused convolution before it."""

    plain = nn.ReLU


class AbsorbedLeakyReLU(_Absorbed, nn.LeakyReLU):
    """Run by the fused convolution before it."""

    plain = nn.LeakyReLU


class AbsorbedTanh(_Absorbed, nn.Tanh):
    """Run by the fused convolution before it."""

    plain = nn.Tanh


_FUSED: dict[type[nn.Module], Any] = {
    one.plain: one
    for one in (
        FusedConv2d, FusedConvTranspose2d, AbsorbedBatchNorm2d, AbsorbedSyncBatchNorm, AbsorbedReLU,
        AbsorbedLeakyReLU, AbsorbedTanh,
    )
}  # fmt: skip


def _fuse_one(module: nn.Module, reasons: dict[nn.Module, str]) -> list[list[nn.Module]]:
    """Fuse what this module itself calls; its children are fused by themselves."""
    if type(module) is nn.Sequential:
        children, blocks, at = list(_flat(module)), [], 0
        while at < len(children):
            blocks.append(_block_at(children, at))
            at += len(blocks[-1]) or 1
        if any(blocks):
            module.__class__ = FusedSequential
        return [block for block in blocks if block]
    if isinstance(module, ConvBlock):
        parts = (module.conv, module.norm, module.activation)
        return [[m for m in parts if m is not None]] if is_block(*parts) else []
    own = dict(_called(module))
    convs = [m for m in own.values() if is_convolution(m) and not is_special(m)]
    if not convs:
        return []
    try:
        arguments, runs = _read(module, own)
    except Exception as error:  # whatever a user's forward may raise when it is given a proxy
        first = str(error).splitlines()[0] if str(error) else ""
        why = f"its forward cannot be read by torch.fx ({type(error).__name__}: {first})"
        reasons.update(dict.fromkeys(convs, why))
        return []
    reasons.update(dict.fromkeys(convs, "its module's forward does not call it once, by itself"))
    if not runs:
        return []
    for run in runs:
        conv, *absorbed = run.modules
        conv.__class__ = _FUSED[type(conv)]
        conv.__dict__["_fuse_run"] = run
        for other in absorbed:
            other.__class__ = _FUSED.get(type(other), type(other))
            other.__dict__["_fuse_run"] = [*other.__dict__.get("_fuse_run", []), run]
    module.__dict__["_fuse_reading"] = _Reading(runs, arguments, _attributes_of(module))
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.register_forward_hook(_after, always_call=True)
    return [run.modules for run in runs]


def _called(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, child) that the module's own forward may call: also those in lists and dicts."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _read(module: nn.Module, own: dict[str, nn.Module]) -> tuple[list[str], list[_Run]]:
    """Names of the arguments of a module's own forward that have no default, and the runs that it
    calls alike in training and in evaluation, given just those."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise TypeError("*args, **kwargs and keyword-only arguments are not read")
    asked = [p.name for p in parameters if p.default is p.empty]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    training = module.training
    try:
        every = []
        for mode in (True, False):
            module.training = mode
            every.append(_runs_of(own, _Tracer().trace(module, concrete_args=defaults)))
    finally:
        module.training = training
    modules = [run.modules for run in every[1]]
    return asked, [run for run in every[0] if run.modules in modules]


def _runs_of(own: dict[str, nn.Module], graph: fx.Graph) -> list[_Run]:
    calls = {node: own.get(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = list(calls.values())

    def follower(node: fx.Node) -> fx.Node | None:
        """The module call that alone takes this node's result, and takes nothing else."""
        users = list(node.users)
        alone = len(users) == 1 and users[0] in calls and users[0].args == (node,)
        return users[0] if alone and not users[0].kwargs else None

    def kind(node: fx.Node | None) -> Any:
        """The module, where it is one of PyTorch's own classes; else None."""
        found = None if node is None else calls[node]
        return found if type(found) in _FUSED or isinstance(found, _Absorbed) else None

    runs = []
    for node in calls:
        conv: Any = calls[node]
        first = type(conv) in (nn.Conv2d, nn.ConvTranspose2d) and uses.count(conv) == 1
        if not first or len(node.args) != 1 or node.kwargs or not is_block(conv, None, None):
            continue
        nodes, modules = [node], [conv]
        after = follower(node)
        norm = kind(after)
        once = norm is not None and uses.count(norm) == 1
        if after and once and is_norm_of(norm, conv) and is_block(conv, norm, None):
            nodes.append(after)
            modules.append(norm)
            after = follower(after)
        activation = kind(after)
        if after and activation_of(activation) and is_block(conv, None, activation):
            nodes.append(after)
            modules.append(activation)
        runs.append(_Run([str(node.target) for node in nodes], modules))
    return runs
