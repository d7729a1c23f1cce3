"""The fused block as a module of real children (`ConvBlock`), how modules are run as one block
(`run_block`), and the classes that `fuse` gives to modules that run so. Not here: how blocks are
found in a user's model (fusion.py)."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from .. import functional
from ..choice.spec import BlockSpec, Buffers
from ..functional import Deferred, Input

_stat_groups: list[int] = [1]

Convolution = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm2d | nn.SyncBatchNorm


@contextlib.contextmanager
def stat_groups(groups: int) -> Iterator[None]:
    """Inside, a fused nn.Sequential takes its input as this many equal batches, one after the
    other: convolutions run on all of them at once, each is normalised by its own statistics, and
    the running buffers see them in order. The result is that of one call for each batch. Modules
    in it that are in no fused block are called once for each batch.

    Not for a ConvBlock or a fused attribute beside modules that take statistics of their own.
    """
    _stat_groups.append(groups)
    try:
        yield
    finally:
        _stat_groups.pop()


def groups_now() -> int:
    """Batches in the input, as the innermost `stat_groups` says; 1 outside."""
    return _stat_groups[-1]


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and activation as one block.

    The parts stay what they are, so the state_dict has their keys: conv.weight, norm.weight, ...
    As `nn.Sequential(conv, norm, activation)` in every respect, nn.BatchNorm2d's momentum=None,
    affine=False, track_running_stats=False and evaluation included. Evaluation folds the norm into
    the weight, anew at every call. While a part has hooks, the parts are called one by one.

    Args:
        conv: nn.Conv2d or nn.ConvTranspose2d, 4x4 with stride 2 and padding 1, or stride 1 and
            padding 0. Input and output are (N, C, H, W), the output channels_last.
        norm: nn.BatchNorm2d or nn.SyncBatchNorm of conv's output channels. Default None.
        activation: nn.ReLU, nn.LeakyReLU, nn.Tanh. Default None.

    Raises:
        ValueError: for a part that no fused block has.
    """

    def __init__(
        self, conv: Convolution, norm: Norm | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        why = why_not_conv(conv)
        if not why and norm is not None and norm.num_features != conv.out_channels:
            why = f"the norm has {norm.num_features} features"
        if not why and activation is not None and activation_of(activation) is None:
            why = f"{type(activation).__name__} is not ReLU, LeakyReLU or Tanh"
        if why:
            raise ValueError(f"no fused block of {conv}: {why}; use nn.Sequential")
        self.conv = conv
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (N, C, P, Q) channels_last."""
        if is_block(self.conv, self.norm, self.activation) and isinstance(x, Tensor):
            result: Tensor = run_block(self.conv, self.norm, self.activation, x, False)
            return result
        for part in (self.conv, self.norm, self.activation):
            x = x if part is None else part(x)
        return x


def run_block(
    conv: Convolution, norm: Norm | None, activation: nn.Module | None, x: Input, defer: bool
) -> Any:
    """What the modules compute one after the other; with `defer`, `Deferred` or `Activated` where
    the block left something to the one that takes the result."""
    found = activation_of(activation)
    assert found is not None
    spec = replace(spec_of(conv), activation=found[0], slope=found[1])
    inputs = functional.inputs_of(x, conv.weight, conv.bias, getattr(conv, "_working", None))
    if norm is None:
        return functional.without_norm(x, inputs, spec, defer)
    # As nn.BatchNorm2d.forward; the count stays on its device.
    groups = groups_now()
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    batches = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    if batches is not None and norm.momentum is None:  # of each group in turn
        batches.add_(groups)
        counts = [batches - left for left in reversed(range(groups))]
        momentum, batches = 1.0 / torch.stack(counts).float(), None
    spec = replace(spec, eps=norm.eps, groups=groups, sync=_process_group(norm))
    inputs = replace(inputs, gamma=norm.weight, beta=norm.bias)
    moving = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if moving else (None, None)
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    buffers = Buffers(mean, var, batches)
    return functional.with_norm(x, inputs, buffers, spec, training, momentum, defer)


def spec_of(conv: Convolution) -> BlockSpec:
    """Of the convolution alone."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    return BlockSpec(transposed, conv.stride[0], int(conv.padding[0]))


def _process_group(norm: Norm) -> str:
    """Name of the processes whose batches are normalised as one; "" for this one alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    assert group is not None
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


def is_block(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> bool:
    """Whether calling these one after the other is, as they are now, what `run_block` computes."""
    if not is_convolution(conv) or is_special(conv):
        return False
    if norm is not None and (not is_norm_of(norm, conv) or is_special(norm)):
        return False
    return activation is None or (activation_of(activation) is not None
                                  and not is_special(activation))  # fmt: skip


def is_convolution(module: nn.Module) -> bool:
    """Whether blocks have this convolution."""
    return isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not why_not_conv(module)


def is_norm_of(module: nn.Module, conv: nn.Module) -> bool:
    """Whether this is a BatchNorm of the convolution's output."""
    if not isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return False
    return bool(module.num_features == conv.out_channels)


def activation_of(module: nn.Module | None) -> tuple[Any, float] | None:
    """(name, slope) of an activation that blocks have; None for any other module."""
    if module is None:
        return "none", 0.0
    if isinstance(module, nn.ReLU):
        return "relu", 0.0
    if isinstance(module, nn.LeakyReLU) and module.negative_slope >= 0:
        return "leaky_relu", float(module.negative_slope)
    return ("tanh", 0.0) if isinstance(module, nn.Tanh) else None


def why_not_conv(conv: Convolution) -> str:
    """Why no fused block has this convolution; "" if one has."""
    if tuple(conv.kernel_size) != (4, 4):
        return f"its kernel is {'x'.join(map(str, conv.kernel_size))}, blocks have 4x4"
    if (tuple(conv.stride), conv.padding) not in (((2, 2), (1, 1)), ((1, 1), (0, 0))):
        return f"stride {conv.stride} with padding {conv.padding}; blocks have 2 with 1, 1 with 0"
    if tuple(conv.dilation) != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
        return "dilation, groups and padding modes are not in any block"
    if isinstance(conv, nn.ConvTranspose2d) and tuple(conv.output_padding) != (0, 0):
        return f"output_padding {conv.output_padding} is not in any block"
    return ""


# Whose forward, as their class has it, blocks stand for.
KINDS: tuple[type[nn.Module], ...] = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.LeakyReLU, nn.Tanh,
)  # fmt: skip
METHODS = ("__call__", "forward", "_conv_forward", "_output_padding", "_check_input_dim")


def is_special(module: nn.Module) -> bool:
    """Whether calling this module may do more than PyTorch's class does: hooks, or code of its own.
    Classes of this package that stand in for PyTorch's have their `plain`."""
    if is_hooked(module):
        return True
    own: Any = getattr(type(module), "plain", type(module))
    for kind in KINDS:
        if issubclass(own, kind):
            changed = (getattr(own, name, None) is not getattr(kind, name, None)
                       for name in METHODS)  # fmt: skip
            return any(changed)
    return True


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches this module being called, or changed how it is called."""
    own = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
    everywhere = torch.nn.modules.module
    return bool(
        own
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


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
        children = list(flat(self))
        at = 0
        while at < len(children):
            block = block_at(children, at)
            if not block:
                x = _for_each_group(children[at], functional.materialise(x))
                at += 1
                continue
            conv, norm, activation = _parts(block)
            if isinstance(x, Deferred) and not _defers(x, conv, norm):
                x = functional.materialise(x)
            at += len(block)
            another = at < len(children) and len(block_at(children, at)) > 0
            x = run_block(conv, norm, activation, x, another)
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


def flat(sequential: nn.Module) -> Iterator[nn.Module]:
    """Children in order, those of nn.Sequentials without hooks in their place."""
    for child in sequential._modules.values():  # a module that is there twice, twice
        assert child is not None
        if type(child) in (nn.Sequential, FusedSequential) and not is_hooked(child):
            yield from flat(child)
        else:
            yield child


def block_at(modules: list[nn.Module], at: int) -> list[nn.Module]:
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
    spec = replace(spec_of(conv), groups=x.coef.shape[1])
    return functional.defers(x, conv.weight, spec, norm is not None)


# --- Attributes: the first module runs the block, the others let its result pass ------------------


@dataclass
class Run:
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
        return vars(Run(self.names, self.modules))


@dataclass
class Reading:
    """What a module's forward was read with: `arguments` without a default, by name, and
    attributes that its code may look at."""

    runs: list[Run]
    arguments: list[str]
    attributes: dict[str, Any]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module's forward: whether it will run as it was read."""
    reading: Reading = module._fuse_reading  # type: ignore[assignment]
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


def after(module: nn.Module, args: Any, result: Any) -> None:
    """After it: a block's result that not everybody passed on would be a wrong number."""
    reading: Reading = module._fuse_reading  # type: ignore[assignment]
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
    result: Tensor = run_block(whole, norm, activation, input, False)
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


class Absorbed(nn.Module):
    """Its work is done by the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        """input, if it is the result of a block that this module is in; else as its class's."""
        runs: list[Run] = self._fuse_run  # type: ignore[assignment]
        for run in runs:
            if run.waiting and input is run.result and run.waiting[0] is self:
                run.waiting = run.waiting[1:]
                return input
        forward: Any = super().forward
        result: Tensor = forward(input)
        return result


class AbsorbedBatchNorm2d(Absorbed, nn.BatchNorm2d):
    """Run by the fused convolution before it."""

    plain = nn.BatchNorm2d


class AbsorbedSyncBatchNorm(Absorbed, nn.SyncBatchNorm):
    """Run by the fused convolution before it."""

    plain = nn.SyncBatchNorm


class AbsorbedReLU(Absorbed, nn.ReLU):
    """Run by the fused convolution before it."""

    plain = nn.ReLU


class AbsorbedLeakyReLU(Absorbed, nn.LeakyReLU):
    """Run by the fused convolution before it."""

    plain = nn.LeakyReLU


class AbsorbedTanh(Absorbed, nn.Tanh):
    """Run by the fused convolution before it."""

    plain = nn.Tanh


FUSED: dict[type[nn.Module], Any] = {
    one.plain: one
    for one in (
        FusedConv2d, FusedConvTranspose2d, AbsorbedBatchNorm2d, AbsorbedSyncBatchNorm, AbsorbedReLU,
        AbsorbedLeakyReLU, AbsorbedTanh,
    )
}  # fmt: skip
