"""fuse(model): finds convolution, BatchNorm, activation in a user's model and runs them as fused
blocks. Only the classes of modules change, so parameters, buffers, hooks, keys and isinstance stay
as they were, and deepcopy and pickle need no help. Not here: the blocks (modules.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, fx, nn

from fastdcgan_kernels import functional
from fastdcgan_kernels.functional import Deferred, Input
from fastdcgan_kernels.modules import (
    ConvBlock,
    Convolution,
    Norm,
    activation_of,
    is_hooked,
    run_block,
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


@dataclass(frozen=True)
class _Run:
    conv: Convolution
    norm: Norm | None
    activation: nn.Module | None

    @property
    def modules(self) -> list[nn.Module]:
        return [m for m in (self.conv, self.norm, self.activation) if m is not None]


def fuse(model: Model, *, verbose: bool = False) -> Model:
    """Run the model's convolution + BatchNorm + activation blocks as fused kernels.

    Found are nn.Conv2d and nn.ConvTranspose2d (4x4; stride 2 with padding 1, or stride 1 with
    padding 0), each alone or followed by nn.BatchNorm2d (nn.SyncBatchNorm), nn.ReLU, nn.LeakyReLU
    or nn.Tanh: in nn.Sequential at any depth, and as attributes that a module's own forward calls
    in order (read with torch.fx, in training and evaluation alike). Everything else runs as it did.
    In an nn.Sequential, a module that has hooks is called by itself, from the moment it has them;
    among attributes, one that has hooks now is left, and a hook added later to a fused
    convolution sees the whole block's output. `model.main[1] = other` is followed in an
    nn.Sequential; attributes that are replaced later want unfuse and fuse again.

    Args:
        model: any module; it is changed in place.
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
    for module in list(model.modules()):
        for run in _fuse_one(module, reasons):
            if run.conv not in fused:
                found.append(Finding(tuple(names[m] for m in run.modules), True))
            fused.update(run.modules)
    for module, name in names.items():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module not in fused:
            why = (
                why_not_conv(module)
                or ("it has hooks, or a forward of its own" if _is_special(module) else "")
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
        module.__dict__.pop("_fuse_findings", None)
        module.__dict__.pop("_fused_with", None)
        for plain, fused in _CLASSES.items():
            if type(module) is fused:
                module.__class__ = plain
    return model


def findings(model: nn.Module) -> tuple[Finding, ...]:
    """What `fuse` found in this model; () for a model that it has not seen."""
    found: tuple[Finding, ...] = model.__dict__.get("_fuse_findings", ())
    return found


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs the blocks among its children, and in nn.Sequentials in it, as
    fused blocks. They are looked for at each call."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential's."""
        x: Input = input
        children = list(_flat(self))
        at = 0
        while at < len(children):
            run = _run_at(children, at)
            if run is None:
                x = children[at](functional.materialise(x))
                at += 1
                continue
            if isinstance(x, Deferred) and not _defers(x, run.conv):
                x = functional.materialise(x)
            x = run_block(run.conv, run.norm, run.activation, x)
            at += len(run.modules)
        return functional.materialise(x)


class FusedConv2d(nn.Conv2d):
    """A convolution that runs the norm and the activation after it, too."""

    _fused_with: tuple[Norm | None, nn.Module | None]

    def forward(self, input: Tensor) -> Tensor:
        """The output of the whole block."""
        return functional.materialise(run_block(self, *self._fused_with, input))


class FusedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution that runs the norm and the activation after it, too."""

    _fused_with: tuple[Norm | None, nn.Module | None]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The output of the whole block."""
        if output_size is not None:
            raise ValueError("output_size was given to a fused block; unfuse(model) first")
        return functional.materialise(run_block(self, *self._fused_with, input))


class _Absorbed(nn.Module):
    """Its work is done by the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        """input"""
        return input


class AbsorbedBatchNorm2d(_Absorbed, nn.BatchNorm2d):
    """Run by the fused convolution before it."""


class AbsorbedSyncBatchNorm(_Absorbed, nn.SyncBatchNorm):
    """Run by the fused convolution before it."""


class AbsorbedReLU(_Absorbed, nn.ReLU):
    """Run by the fused convolution before it."""


class AbsorbedLeakyReLU(_Absorbed, nn.LeakyReLU):
    """Run by the fused convolution before it."""


class AbsorbedTanh(_Absorbed, nn.Tanh):
    """Run by the fused convolution before it."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: FusedSequential,
    nn.Conv2d: FusedConv2d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.BatchNorm2d: AbsorbedBatchNorm2d,
    nn.SyncBatchNorm: AbsorbedSyncBatchNorm,
    nn.ReLU: AbsorbedReLU,
    nn.LeakyReLU: AbsorbedLeakyReLU,
    nn.Tanh: AbsorbedTanh,
}


def _is_special(module: nn.Module) -> bool:
    """Whether calling this module may do more than its class says."""
    if is_hooked(module):
        return True
    forward = type(module).forward
    for kind in _CLASSES:
        if isinstance(module, kind):
            inner = getattr(type(module), "_conv_forward", None)
            changed = isinstance(module, nn.Conv2d) and inner is not nn.Conv2d._conv_forward
            return changed or forward is not kind.forward
    return True


def _is_conv(module: nn.Module) -> TypeGuard[Convolution]:
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return False
    return not _is_special(module) and not why_not_conv(module)


def _is_norm(module: nn.Module, conv: Convolution) -> TypeGuard[Norm]:
    if not isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return False
    return not _is_special(module) and module.num_features == conv.out_channels


def _is_activation(module: nn.Module) -> bool:
    return activation_of(module) is not None and not _is_special(module)


def _flat(sequential: nn.Module) -> Iterator[nn.Module]:
    """Children in order, those of nn.Sequentials that nobody watches in their place."""
    for child in sequential._modules.values():  # a module that is there twice, twice
        assert child is not None
        if type(child) in (nn.Sequential, FusedSequential) and not is_hooked(child):
            yield from _flat(child)
        else:
            yield child


def _run_at(modules: list[nn.Module], at: int) -> _Run | None:
    """The block that starts there, as long as it can be."""
    conv, *rest = modules[at : at + 3]
    if not _is_conv(conv):
        return None
    norm: Norm | None = None
    if rest and _is_norm(rest[0], conv):
        norm = rest[0]
        rest = rest[1:]
    activation = rest[0] if rest and _is_activation(rest[0]) else None
    return _Run(conv, norm, activation)


def _defers(x: Deferred, conv: Convolution) -> bool:
    up = isinstance(conv, nn.ConvTranspose2d)
    return functional.defers(x, conv.weight, conv.stride[0], int(conv.padding[0]), up)


def _fuse_one(module: nn.Module, reasons: dict[nn.Module, str]) -> Iterator[_Run]:
    """Fuse what this module itself calls; its children are fused by themselves."""
    if type(module) is nn.Sequential:
        children = list(_flat(module))
        runs = [run for at in range(len(children)) if (run := _run_at(children, at))]
        if runs:
            module.__class__ = FusedSequential
        yield from runs
        return
    if isinstance(module, ConvBlock):
        yield _Run(module.conv, module.norm, module.activation)
        return
    convs = [m for m in _called(module) if _is_conv(m)]
    if not convs:
        return
    try:
        runs = _traced(module)
    except Exception as error:  # whatever a user's forward may raise when it is given a proxy
        first = str(error).splitlines()[0] if str(error) else ""
        why = f"its forward cannot be read by torch.fx ({type(error).__name__}: {first})"
        reasons.update(dict.fromkeys(convs, why))
        return
    reasons.update(dict.fromkeys(convs, "its module's forward does not call it once, by itself"))
    for run in runs:
        run.conv.__class__ = _CLASSES[type(run.conv)]  # type: ignore[assignment]
        run.conv.__dict__["_fused_with"] = (run.norm, run.activation)
        for absorbed in run.modules[1:]:
            absorbed.__class__ = _CLASSES.get(type(absorbed), type(absorbed))
        yield run


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Children that the module's own forward may call: also those held in lists and dicts."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child)
        else:
            yield child


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module) -> list[_Run]:
    """Runs in a module's own forward that are the same in training and in evaluation."""
    training = module.training
    try:
        every = []
        for mode in (True, False):
            module.training = mode
            every.append(_runs_of(module, _Tracer().trace(module)))
    finally:
        module.training = training
    return [run for run in every[0] if run in every[1]]


def _runs_of(module: nn.Module, graph: fx.Graph) -> list[_Run]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    target = {node: module.get_submodule(str(node.target)) for node in calls}
    uses: dict[nn.Module, int] = {}
    for called in target.values():
        uses[called] = uses.get(called, 0) + 1

    def follower(node: fx.Node) -> fx.Node | None:
        """The module call that alone takes this node's result, and takes nothing else."""
        users = list(node.users)
        if len(users) == 1 and users[0] in target and users[0].args == (node,):
            return None if users[0].kwargs else users[0]
        return None

    chains: list[list[fx.Node]] = []
    for node in calls:
        conv: Any = target[node]
        plain = type(conv) in _CLASSES and len(node.args) == 1 and not node.kwargs
        if not (plain and _is_conv(conv) and uses[conv] == 1):
            continue
        chain = [node]
        after = follower(node)
        if after and _is_norm(target[after], conv) and uses[target[after]] == 1:
            chain.append(after)
            after = follower(after)
        if after and _is_activation(target[after]):
            chain.append(after)
        chains.append(chain)
    # A shared activation can be passed through only if every one of its calls is.
    last = [target[chain[-1]] for chain in chains if _is_activation(target[chain[-1]])]
    runs = []
    for chain in chains:
        found = [target[node] for node in chain]
        activation = found.pop() if _is_activation(found[-1]) else None
        if activation is not None and last.count(activation) != uses[activation]:
            activation = None
        norm: Any = found[1] if len(found) > 1 else None
        conv = found[0]
        runs.append(_Run(conv, norm, activation))
    return runs
