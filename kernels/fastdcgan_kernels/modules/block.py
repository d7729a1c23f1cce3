"""The fused block as a module of real children (`ConvBlock`), how modules are run as one block
(`run_block`), and the classes that `fuse` gives to modules that run so. Not here: how blocks are
found in a user's model (fusion.py)."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import functional, reference
from ..choice import plain
from ..choice.geometry import KERNEL, Sides, contiguous, is_channels_last, sides_of
from ..choice.spec import BlockSpec, Buffers
from ..convolution import convolve
from ..functional import Activated, Deferred, Input
from .keras import KerasBatchNorm2d

_stat_groups: list[int] = [1]
NOTHING: Sides = (0, 0, 0, 0)

Convolution = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d


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
    """Convolution, norm and activation as one block.

    The parts stay what they are, so the state_dict has their keys: conv.weight, norm.weight, ...
    As `nn.Sequential(conv, norm, activation)` in every respect, nn.BatchNorm2d's momentum=None,
    affine=False, track_running_stats=False and evaluation included. Evaluation folds the norm into
    the weight, anew at every call. While a part has hooks, the parts are called one by one.

    Args:
        conv: nn.Conv2d or nn.ConvTranspose2d with a square kernel of 1 to 7 pixels a side, stride 1
            or 2, any padding. Input and output are (N, C, H, W), the output channels_last.
        norm: nn.BatchNorm2d, nn.SyncBatchNorm or nn.InstanceNorm2d (without running statistics) of
            conv's output channels. Default None.
        activation: nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SiLU or nn.GELU (the
            exact one). Default None.

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
        if not why and norm is not None and not is_norm_of(norm, conv):
            why = f"blocks have no {norm}"
        if not why and activation is not None and activation_of(activation) is None:
            why = f"blocks have no {activation}"
        if why:
            raise ValueError(f"no fused block of {conv}: {why}; use nn.Sequential")
        self.conv = conv
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (N, C, P, Q) channels_last."""
        parts = self.conv, self.norm, self.activation
        if isinstance(x, Tensor) and is_block(*parts) and not plain.is_asked_for():
            result: Tensor = run_block(*parts, x, False, NOTHING, format_of(x))
            wide = result.dim() == 4
            return result.contiguous(memory_format=torch.channels_last) if wide else result
        for part in parts:
            x = x if part is None else part(x)
        return x


def run_block(
    conv: Convolution, norm: Norm | None, activation: nn.Module | None, x: Input, defer: bool,
    around: Sides = NOTHING, form: torch.memory_format = torch.channels_last,
) -> Any:  # fmt: skip
    """What the modules compute one after the other, with `around` the convolution as much padding
    more (of a transposed one, cut off). By kernels it is channels_last, and with `defer` it may be
    a `Deferred` or `Activated`, which leaves something to the one that takes it; where no kernel
    takes x, it is plain PyTorch's, in which x would have the format `form`."""
    found = activation_of(activation)
    assert found is not None
    spec = replace(spec_of(conv, around), activation=found[0], slope=found[1])
    weight, bias = conv.weight, conv.bias  # once: a parametrised weight may move with each access
    groups = groups_now()
    if isinstance(norm, nn.InstanceNorm2d):  # each image is a group
        groups = x.shape[0]
    if norm is not None:
        spec = replace(spec, eps=norm.eps, groups=groups, sync=_process_group(norm))
        spec = replace(spec, correction=0 if isinstance(norm, KerasBatchNorm2d) else 1)
    how = functional.runner_of(x, weight, spec, norm is not None)
    if how == "reference" or _is_refused(x, weight, spec, norm):
        x = functional.materialise(x)
        if form == torch.contiguous_format and format_of(x) != form:
            weight = _Contiguous.apply(weight)
        if x.dtype != weight.dtype and functional.runs_kernels(x.device):  # which take both
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = convolve(x, weight, bias, spec.stride, spec.padding, spec.transposed)
        y = y if norm is None else _for_each_group(norm, y)
        return y if activation is None else activation(y)
    inputs = functional.inputs_of(x, weight, bias, getattr(conv, "_working", None))
    if norm is None:
        return functional.without_norm(x, inputs, spec, defer, how)
    # As nn.BatchNorm2d.forward; the count stays on its device.
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    batches = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    if batches is not None and norm.momentum is None:  # of each group in turn
        batches.add_(groups)
        counts = [batches - left for left in reversed(range(groups))]
        momentum, batches = 1.0 / torch.stack(counts).float(), None
    inputs = replace(inputs, gamma=norm.weight, beta=norm.bias)
    moving = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if moving else (None, None)
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    buffers = Buffers(mean, var, batches)
    return functional.with_norm(x, inputs, buffers, spec, training, momentum, defer, how)


class _Contiguous(torch.autograd.Function):
    """A weight itself, whose gradient is contiguous whatever the format of the other operands."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return contiguous(gradient)


def _is_refused(x: Input, weight: Tensor, spec: BlockSpec, norm: Norm | None) -> bool:
    """Whether the norm raises an error, in its own words: an InstanceNorm of single pixels."""
    if not isinstance(norm, nn.InstanceNorm2d):
        return False
    *_, rows, columns = functional.output_shape(x, weight, spec)
    return rows * columns == 1


# --- Memory formats: kernels are channels_last, what leaves them is as plain PyTorch's ------------


def format_of(x: object) -> torch.memory_format:
    """channels_last for what PyTorch's convolutions take for that, else contiguous."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        return torch.contiguous_format
    unknown = plain.is_transformed() or plain.is_traced()
    wide = not unknown and is_channels_last(x)
    return torch.channels_last if wide else torch.contiguous_format


def format_after(
    form: torch.memory_format, conv: nn.Module, norm: nn.Module | None
) -> torch.memory_format:
    """Of what a convolution and a norm make of an input in this format: channels_last where either
    its input or its weight is; an InstanceNorm's is always contiguous."""
    if isinstance(norm, nn.InstanceNorm2d):
        return torch.contiguous_format
    if form == torch.channels_last:
        return form
    if not is_parametrized(conv):
        return format_of(conv.weight)
    own = map(format_of, conv.parameters())  # its weight may move with each access
    return torch.channels_last if torch.channels_last in own else torch.contiguous_format


def is_kept(norm: nn.Module | None, activation: nn.Module | None) -> bool:
    """Whether a block keeps its output for the way back where the plain activation keeps its input,
    so that others may write over the output."""
    keeps = isinstance(activation, nn.LeakyReLU | nn.ELU) and not activation.inplace
    return norm is None and keeps


def own(x: Tensor) -> Tensor:
    """A copy for others to write over, if there is a way back."""
    return x.clone() if x.requires_grad else x


def formatted(x: Any, form: torch.memory_format) -> Any:
    """A block's result as others may take it, in this format; anything else as it is."""
    if isinstance(x, Deferred | Activated):
        x = functional.materialise(x)
    if form == torch.contiguous_format and isinstance(x, Tensor) and format_of(x) != form:
        return contiguous(x)
    return x


def spec_of(conv: Convolution, around: Sides = NOTHING) -> BlockSpec:
    """Of the convolution alone, with so much padding more."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    if isinstance(conv, nn.ConvTranspose2d):
        sides = sides_of(_numbers(conv.padding), conv.output_padding)
    elif conv.padding == "same":  # of an even kernel more below and on the right
        k = conv.kernel_size[0] - 1
        sides = (k // 2, k // 2, k - k // 2, k - k // 2)
    else:
        sides = sides_of(0 if conv.padding == "valid" else _numbers(conv.padding))
    top, left, bottom, right = (n + more for n, more in zip(sides, around, strict=True))
    return BlockSpec(transposed, conv.stride[0], (top, left, bottom, right))


def _numbers(padding: Any) -> tuple[int, int]:
    return int(padding[0]), int(padding[1])


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
    """Whether this is a norm of the convolution's output that blocks have."""
    if not isinstance(module, Norm):
        return False
    if isinstance(module, nn.InstanceNorm2d) and module.track_running_stats:
        return False
    return bool(module.num_features == conv.out_channels)


def activation_of(module: nn.Module | None) -> tuple[Any, float] | None:
    """(name, slope) of an activation that blocks have; None for any other module."""
    if module is None:
        return "none", 0.0
    slope = 0.0
    if isinstance(module, nn.LeakyReLU):
        slope = float(module.negative_slope)
    elif isinstance(module, nn.ELU):
        slope = float(module.alpha)
    names = (name for kind, name in ACTIVATIONS.items() if isinstance(module, kind))
    name = next(names, None)
    left = slope < 0 or (name == "elu" and slope == 0)
    left = left or (isinstance(module, nn.GELU) and module.approximate != "none")
    return None if name is None or left else (name, slope)


def why_not_conv(conv: Convolution) -> str:
    """Why no fused block has this convolution; "" if one has."""
    rows, columns = conv.kernel_size
    if rows != columns or rows > KERNEL:
        return f"its kernel is {rows}x{columns}; blocks have square ones, 1x1 to 7x7"
    if tuple(conv.stride) not in ((1, 1), (2, 2)):
        return f"its stride is {conv.stride}; blocks have 1 and 2 along both axes"
    if tuple(conv.dilation) != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
        return "dilation, groups and padding modes are not in any block"
    if not isinstance(conv.padding, str) and min(conv.padding) < 0:
        return f"its padding is {conv.padding}"
    if isinstance(conv, nn.ConvTranspose2d) and not (
        0 <= min(conv.output_padding) <= max(conv.output_padding) < conv.stride[0]
    ):
        return f"its output_padding is {conv.output_padding}"
    return ""


ACTIVATIONS: dict[type[nn.Module], reference.Activation] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.ELU: "elu", nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip
METHODS = (
    "__call__", "forward", "_conv_forward", "_output_padding", "_check_input_dim",
    "_apply_instance_norm",
)  # fmt: skip


def is_special(module: nn.Module) -> bool:
    """Whether calling this module may do more than PyTorch's class does: hooks, or code of its own.
    The classes that `fuse` gives do not count."""
    if is_hooked(module):
        return True
    own = type(module)
    for kind, fused in {**FUSED, nn.ZeroPad2d: nn.ZeroPad2d}.items():
        if isinstance(module, kind):
            stock = [kind, fused]
            return any(
                getattr(own, name, None) not in [getattr(one, name, None) for one in stock]
                for name in METHODS
            )
    return True


def is_hooked(module: nn.Module) -> bool:
    """Whether anything runs beside a module's forward when it is called, or in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """The same, but for what `fuse` has added."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = (
        any(hook not in (before, after) for hook in hooks)
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
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

    def forward(self, input: Any) -> Any:
        """As nn.Sequential's: what is no tensor passes through."""
        if isinstance(input, fx.Proxy) or plain.is_traced():
            return super().forward(input)
        x, form = input, _taken(input)  # the format that plain PyTorch's would have
        children = list(flat(self))
        at, kept = 0, False  # kept: x is saved for the way back as it is
        while at < len(children):
            block = block_at(children, at) if _is_tensor(x) else []
            if block:
                conv, norm, activation = _parts(block)
                around = _around(block)
                if isinstance(x, Deferred) and not _defers(x, conv, norm, around):
                    x = functional.materialise(x)
                at += len(block)
                another = at < len(children) and len(block_at(children, at)) > 0
                x = run_block(conv, norm, activation, x, another, around, form)
                form, kept = format_after(form, conv, norm), is_kept(norm, activation)
                continue
            child, rest = children[at], children[at + 1 :]
            if hands_on(child) and groups_now() == 1:
                x, form = _through(self, child, rest, x, form)
            else:
                result = formatted(x, form)
                if kept and result is x and getattr(child, "inplace", False):
                    result = own(result)
                x = _for_each_group(child, result)
                form = format_of(x)
            at, kept = at + 1, False
        return _left(self, x, form, kept)

    def __prepare_scriptable__(self) -> nn.Sequential:
        """For torch.jit.script, which reads a class's code: the plain twin."""
        return plain_twin(self)


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor | Deferred | Activated)


def _for_each_group(module: nn.Module, x: Any) -> Any:
    """A module that knows nothing of groups is called once for each."""
    groups = groups_now()
    if groups == 1 or not isinstance(x, Tensor):
        return module(x)
    with stat_groups(1):
        # Of its own each: a module may write over its input.
        return torch.cat([module(part.clone()) for part in x.chunk(groups)])


def flat(sequential: nn.Module) -> Iterator[nn.Module]:
    """Children in order, those of nn.Sequentials and ConvBlocks without hooks in their place."""
    for child in sequential._modules.values():  # a module that is there twice, twice
        if child is not None and _is_chain(child):
            yield from flat(child)
        elif child is not None:
            yield child


def _is_chain(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other, and is not watched."""
    chain = type(module) in (nn.Sequential, FusedSequential, ConvBlock)
    return chain and not is_hooked(module)


def block_at(modules: list[nn.Module], at: int) -> list[nn.Module]:
    """The block that starts there, as long as it can be; [] for none. With zeros around the input
    of a convolution, or cut off from the output of a transposed one, if modules do that."""
    block, rest = modules[at : at + 1], modules[at + 1 : at + 5]
    if rest and isinstance(rest[0], nn.Conv2d) and _pads(block[0], 1):
        block.append(rest.pop(0))
    if not is_convolution(block[-1]) or not is_block(block[-1], None, None):
        return []
    conv = block[-1]
    if rest and isinstance(conv, nn.ConvTranspose2d) and _pads(rest[0], -1):
        block.append(rest.pop(0))
    if rest and is_norm_of(rest[0], conv) and not is_special(rest[0]):
        block.append(rest.pop(0))
    if rest and activation_of(rest[0]) and not is_special(rest[0]):
        block.append(rest[0])
    return block


def _pads(module: nn.Module, sign: int) -> bool:
    """Whether it adds zeros (1), or cuts off (-1), on some sides, and does nothing else."""
    if not isinstance(module, nn.ZeroPad2d) or is_special(module):
        return False
    return all(sign * n >= 0 for n in tuple(module.padding))


def _around(block: list[nn.Module]) -> Sides:
    """How much padding its convolution has from other modules, as `run_block` takes it."""
    found = [0, 0, 0, 0]
    for module in block:
        if isinstance(module, nn.ZeroPad2d):
            left, right, top, bottom = module.padding
            found = [abs(n) for n in (top, left, bottom, right)]
    top, left, bottom, right = found
    return top, left, bottom, right


def _parts(block: list[nn.Module]) -> tuple[Any, Any, Any]:
    """(convolution, norm or None, activation or None)."""
    block = [module for module in block if not isinstance(module, nn.ZeroPad2d)]
    normed = len(block) > 1 and is_norm_of(block[1], block[0])
    norm = block[1] if normed else None
    activation = block[-1] if len(block) > 1 + normed else None
    return block[0], norm, activation


def _defers(x: Deferred, conv: Any, norm: nn.Module | None, around: Sides) -> bool:
    spec = replace(spec_of(conv, around), groups=x.coef.shape[1])
    if is_parametrized(conv):  # its weight moves with each access
        sides = (conv.in_channels, conv.out_channels)
        sides = sides if spec.transposed else sides[::-1]
        weight = x.y.new_empty(()).expand(*sides, *conv.kernel_size)
    else:
        weight = conv.weight
    return functional.defers(x, weight, spec, norm is not None)


# --- Attributes: the first module runs the block, the others let its result pass ------------------


@dataclass(eq=False)
class Run:
    """A block among a module's attributes, by their names in it. `leaves`: others may write over
    its result."""

    names: list[str]
    modules: list[nn.Module]
    leaves: bool = False


@dataclass(eq=False)
class Begun:
    """A run whose convolution was called: what it returned, and the modules that have yet to be
    called with it."""

    run: Run
    result: Tensor
    rest: list[nn.Module]


@dataclass(eq=False)
class Call:
    """One call of a module's forward, at this depth of Python's stack.

    `expected`: the runs that it has yet to reach; `begun`: those that it is in. `onward`: of
    children, by their id, whether what they return goes to another fused one and nowhere else
    (True), or is what the module returns (False). `handed`: what went on like this in
    channels_last, with the format that plain PyTorch's would have.
    """

    module: nn.Module
    depth: int
    expected: list[Run] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    onward: dict[int, bool] = field(default_factory=dict)
    handed: list[tuple[Tensor, torch.memory_format]] = field(default_factory=list)


_calls: dict[int, list[Call]] = {}
"""Of each thread, the innermost last; 0 stands for what torch.compile compiles."""


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _here() -> list[Call]:
    """The calls that this one may be in, the innermost first."""
    keys = {0, _thread()}  # what is compiled may go on where it is not
    return [call for key in keys for call in reversed(_calls.get(key, ()))]


def _depth() -> int:
    if torch.compiler.is_compiling():
        return 0
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def _enter(module: nn.Module) -> Call:
    calls, call = _calls.setdefault(_thread(), []), Call(module, _depth())
    while call.depth and calls and calls[-1].depth >= call.depth:
        calls.pop()  # it was left by a KeyboardInterrupt, after which no hook is called
    calls.append(call)
    return call


def _leave() -> Call:
    calls = _calls[_thread()]
    call = calls.pop()
    if not calls:
        del _calls[_thread()]
    return call


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a module's forward: what it will call, if it runs as it was read."""
    reading: Any = module._fuse_reading
    call = _enter(module)
    given = (*args, *kwargs.values())
    if plain.is_asked_for() or any(isinstance(x, fx.Proxy) for x in given):
        return None
    asked = reading.arguments[len(args) :]
    as_read = len(args) <= len(reading.arguments) and sorted(kwargs) == sorted(asked)
    as_read = as_read and after in module._forward_hooks.values()  # which somebody may clear
    compiles = torch.compiler.is_compiling()
    changed = reading.changed(module) if as_read and not compiles else ""
    if changed:
        warnings.warn(
            f"attributes of {type(module).__name__} changed after fuse(model) ({changed}): it runs "
            "as the plain model does; call fuse again",
            stacklevel=2,
        )
    if changed or not as_read:
        return tuple(map(_given_back, args)), {n: _given_back(x) for n, x in kwargs.items()}
    call.expected = [run for run in reading.runs if _is_there(module, run)]
    for name in reading.gives:
        call.onward[id(_submodule(module, name))] = False
    for name, taker in reading.edges.items():
        if _takes(_submodule(module, taker), call):
            call.onward[id(_submodule(module, name))] = True
    return None


def after(module: nn.Module, args: Any, result: Any) -> None:
    """After it: a block's result that not everybody passed on would be a wrong number."""
    calls = _calls.get(_thread(), [])
    if not calls or calls[-1].module is not module:
        return  # somebody removed `before`
    left = [begun for begun in _leave().begun if begun.rest]
    failed = result is None and sys.exc_info()[0] is not None
    if left and not failed:
        names = left[0].run.names
        raise RuntimeError(
            f"{type(module).__name__}.forward called {names[0]} and not {names[-1]} after it, as "
            "it did when fuse(model) read it; call fuse(model) again, or unfuse(model)"
        )


def _is_there(module: nn.Module, run: Run) -> bool:
    """Whether the modules of a run are those that were read, and a block as they are now."""
    here = (_submodule(module, name) for name in run.names)
    same = all(a is b for a, b in zip(here, run.modules, strict=True))
    return same and is_block(*_parts(run.modules))


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _convolve(conv: nn.Module, input: object) -> Tensor | None:
    """The result of the block that a convolution is the first of; None: it is to run by itself."""
    run: Any = conv._fuse_run
    if run.modules[0] is not conv or not isinstance(input, Tensor):
        return None
    for call in _here():
        if run in call.expected:
            compiles = torch.compiler.is_compiling()
            if call.depth > _depth() or (compiles and _changed_since(id(call.module))):
                return None
            return _begin(call, run, input)
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _changed_since(address: int) -> str:
    """`Reading.changed`, once for each compilation of the forward, which PyTorch compiles anew when
    what it looks at has changed (and not with it the hooks before and after it, so it is asked
    here). The module, which is being traced, is found by its address: arguments are numbers."""
    module: nn.Module = ctypes.cast(address, ctypes.py_object).value
    reading: Any = module._fuse_reading
    found: str = reading.changed(module)
    return found


def _begin(call: Call, run: Run, input: Tensor) -> Tensor | None:
    call.expected.remove(run)
    whole, norm, activation = _parts(run.modules)
    if not is_block(whole, norm, activation):
        return None
    form = _taken(input)
    result = run_block(whole, norm, activation, input, False, NOTHING, form)
    form = format_after(form, whole, norm)
    result = _left(whole, result, form, run.leaves and is_kept(norm, activation))
    if len(run.modules) > 1:
        call.begun.append(Begun(run, result, run.modules[1:]))
    return result  # type: ignore[no-any-return]


def _passes(module: nn.Module, input: object) -> bool:
    """Whether this is the result of a block that goes through this module next."""
    for call in _here():
        for begun in call.begun:
            if input is begun.result and begun.rest[0] is module:
                begun.rest = begun.rest[1:]
                if not begun.rest:
                    call.begun.remove(begun)
                return True
    return False


# --- From one fused module to another, in channels_last -------------------------------------------


def hands_on(module: nn.Module) -> bool:
    """Whether a module can take and return channels_last in place of what plain PyTorch has."""
    ours = isinstance(module, FusedSequential) or "_fuse_reading" in module.__dict__
    return ours and not is_watched(module)


def _takes(module: nn.Module | None, call: Call | None = None) -> bool:
    """Whether a module's input goes to a fused convolution and nowhere else. `call`: of the module
    that it is a child of, in whose runs it may be."""
    if module is None:
        return False
    if call is not None and any(run.modules[0] is module for run in call.expected):
        return True
    if not hands_on(module):
        return False
    if isinstance(module, FusedSequential):
        return _take_first(list(flat(module)))
    reading: Any = module._fuse_reading
    runs = any(run.names[0] == reading.takes and _is_there(module, run) for run in reading.runs)
    return runs or (bool(reading.takes) and _takes(_submodule(module, reading.takes)))


def _take_first(children: list[nn.Module]) -> bool:
    return bool(children) and (bool(block_at(children, 0)) or _takes(children[0]))


def _through(
    parent: nn.Module, child: nn.Module, rest: list[nn.Module], x: Any, form: torch.memory_format
) -> tuple[Any, torch.memory_format]:
    """What a child of an nn.Sequential returns, and the format that plain PyTorch's would have."""
    call = _enter(parent)
    try:
        if not rest or _take_first(rest):
            call.onward[id(child)] = bool(rest)
        x = functional.materialise(x) if isinstance(x, Deferred | Activated) else x
        if _takes(child) and format_of(x) != form:
            call.handed.append((x, form))
        else:
            x = formatted(x, form)
        x = child(x)
        return x, _taken(x)
    finally:
        _leave()


def _taken(x: object) -> torch.memory_format:
    """The format that plain PyTorch would have x in, by who takes it."""
    for call in _here():
        for at, (tensor, form) in enumerate(call.handed):
            if tensor is x:
                del call.handed[at]
                return form
    return format_of(x)


def _given_back(x: Any) -> Any:
    """x in that format."""
    return formatted(x, _taken(x))


def _left(module: nn.Module, x: Any, form: torch.memory_format, kept: bool = False) -> Any:
    """What a module returns: in this format, but for another fused one as it is. `kept`: it is
    saved for the way back, and others may write over it."""
    if isinstance(x, Deferred | Activated):
        x = functional.materialise(x)
    if form == torch.contiguous_format and format_of(x) != form:
        keeper = _keeper(module)
        if keeper is not None:
            keeper.handed.append((x, form))
            return x
    result = formatted(x, form)
    return own(result) if kept and result is x else result


def _keeper(module: nn.Module) -> Call | None:
    """The call in which what this module returns goes on to another; None: others may see it."""
    for call in _here():
        onward = call.onward.get(id(module))
        if onward is None or onward:
            return call if onward else None
        module = call.module
        if is_watched(module):
            return None
    return None


class Fused(nn.Module):
    """What the classes have in common that `fuse` gives to modules among attributes."""

    @property
    def qconfig(self) -> Any:
        """Not there: torch.ao.quantization looks for classes, and would leave this one out."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        if value is not None:
            raise TypeError(
                "quantisation does not know the classes of fused modules: unfuse(model) first, or "
                "quantise `with unfused(model):`"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which reads a class's code: the plain twin."""
        return plain_twin(self)


class FusedConv2d(Fused, nn.Conv2d):
    """A convolution that runs the norm and the activation after it, too."""

    def forward(self, input: Tensor) -> Tensor:
        """The output of the whole block, or as nn.Conv2d's."""
        result = _convolve(self, input)
        return super().forward(_given_back(input)) if result is None else result


class FusedConvTranspose2d(Fused, nn.ConvTranspose2d):
    """A transposed convolution that runs the norm and the activation after it, too."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The output of the whole block, or as nn.ConvTranspose2d's."""
        result = _convolve(self, input) if output_size is None else None
        return super().forward(_given_back(input), output_size) if result is None else result


class Absorbed(Fused):
    """Its work is done by the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        """input, if it is the result of a block that this module is in; else as its class's."""
        if _passes(self, input):
            return input
        forward: Any = super().forward
        result: Tensor = forward(input)
        return result


class AbsorbedBatchNorm2d(Absorbed, nn.BatchNorm2d):
    """Run by the fused convolution before it."""


class AbsorbedKerasBatchNorm2d(Absorbed, KerasBatchNorm2d):
    """Run by the fused convolution before it."""


class AbsorbedSyncBatchNorm(Absorbed, nn.SyncBatchNorm):
    """Run by the fused convolution before it."""


class AbsorbedInstanceNorm2d(Absorbed, nn.InstanceNorm2d):
    """Run by the fused convolution before it."""


class AbsorbedReLU(Absorbed, nn.ReLU):
    """Run by the fused convolution before it."""


class AbsorbedLeakyReLU(Absorbed, nn.LeakyReLU):
    """Run by the fused convolution before it."""


class AbsorbedTanh(Absorbed, nn.Tanh):
    """Run by the fused convolution before it."""


class AbsorbedSigmoid(Absorbed, nn.Sigmoid):
    """Run by the fused convolution before it."""


class AbsorbedELU(Absorbed, nn.ELU):
    """Run by the fused convolution before it."""


class AbsorbedSiLU(Absorbed, nn.SiLU):
    """Run by the fused convolution before it."""


class AbsorbedGELU(Absorbed, nn.GELU):
    """Run by the fused convolution before it."""


# Modules whose stock `forward` a block reproduces, and what they become among attributes.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FusedConv2d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    KerasBatchNorm2d: AbsorbedKerasBatchNorm2d,
    nn.BatchNorm2d: AbsorbedBatchNorm2d,
    nn.SyncBatchNorm: AbsorbedSyncBatchNorm,
    nn.InstanceNorm2d: AbsorbedInstanceNorm2d,
    nn.ReLU: AbsorbedReLU,
    nn.LeakyReLU: AbsorbedLeakyReLU,
    nn.Tanh: AbsorbedTanh,
    nn.Sigmoid: AbsorbedSigmoid,
    nn.ELU: AbsorbedELU,
    nn.SiLU: AbsorbedSiLU,
    nn.GELU: AbsorbedGELU,
}


# --- Classes, which PyTorch changes, too: parametrisations and FSDP derive one from a module's ----

Module = TypeVar("Module", bound=nn.Module)


def give_class(module: nn.Module) -> None:
    """A module of one of PyTorch's classes, or of one that a parametrisation derived from it, gets
    the fused class in its place."""
    for own, fused in FUSED.items():
        if isinstance(module, own) and not isinstance(module, fused):
            module.__class__ = _rebased(type(module), own, fused)
            # Tracers of torch.fx take modules of torch.nn as they are, and look into others.
            module.__dict__["__module__"] = own.__module__
            break


def take_class(module: nn.Module) -> None:
    """The module gets PyTorch's class back."""
    for own, fused in {**FUSED, nn.Sequential: FusedSequential}.items():
        if isinstance(module, fused):
            module.__class__ = _rebased(type(module), fused, own)
            module.__dict__.pop("__module__", None)


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has given this module its class."""
    return isinstance(module, Fused | FusedSequential)


def plain_twin(module: Module) -> Module:
    """A module of PyTorch's class with the same parameters and children."""
    twin = module.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": copy.copy(module._modules)}
    take_class(twin)
    return twin


def _rebased(kind: type, old: type, new: type) -> type:
    """The class with another in its place, or in the place of one that it is derived from."""
    if kind is old:
        return new
    bases = tuple(_rebased(b, old, new) if issubclass(b, old) else b for b in kind.__bases__)
    body = {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.replace(old.__name__, new.__name__), bases, body)
