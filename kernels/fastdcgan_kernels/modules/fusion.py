"""fuse(model): finds convolution, norm, activation in a user's model and runs them as fused
blocks. Only the classes of modules change, so parameters, buffers, hooks, keys and isinstance stay
as they were, and deepcopy and pickle need no help. Not here: the blocks, and
those classes (block.py).

In an nn.Sequential the blocks are looked for at every call. Among attributes the order of calls is
read with torch.fx, once; a convolution then runs its block only while the module's own forward runs
as it was read, and is itself whenever anybody else calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from .block import (
    ConvBlock,
    FusedSequential,
    after,
    before,
    block_at,
    flat,
    give_class,
    hands_on,
    is_block,
    is_convolution,
    is_fused,
    is_special,
    take_class,
    why_not_conv,
)
from .reading import Reading, read
from .share import multiplications, share

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Finding:
    """A run of modules, by their names in the model, that is fused; or a convolution that is not,
    and why. `part`: of all convolutions' multiplications on the example that `fuse` was given, from
    0 to 1; None without one."""

    names: tuple[str, ...]
    fused: bool
    reason: str = ""
    part: float | None = None

    def __str__(self) -> str:
        said = f"{'fused' if self.fused else 'left '} {' + '.join(self.names)}"
        said += "" if self.part is None else f" ({self.part:.1%})"
        return said + (f": {self.reason}" if self.reason else "")


def fuse(model: Model, *, verbose: bool = False, example: Any = None) -> Model:
    """Run the model's convolution + norm + activation blocks as fused kernels.

    Found are nn.Conv2d and nn.ConvTranspose2d (square kernels of 1 to 7 pixels a side, stride 1 or
    2, any padding; neither grouped nor dilated), each alone or followed by a norm, an activation or
    both. Norms are nn.BatchNorm2d, nn.SyncBatchNorm and nn.InstanceNorm2d (without running
    statistics); activations nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SiLU and nn.GELU
    (the exact one). They are found in nn.Sequential at any depth, and as attributes that a module's
    own forward calls in order (read with torch.fx, in training and evaluation). Everything else
    runs as it did: so does a module that has hooks, whenever it got them, a module that is called
    by itself, and a forward that is given other arguments, or finds other attributes, than it was
    read with.

    Args:
        model: any module; it is changed in place. Classes change: `type(m) is nn.Sequential` does
            not hold afterwards, isinstance does.
        verbose: print what was fused, what was left, and why. Default False; `findings(model)`
            has the same as data.
        example: an input, or a tuple of arguments: findings say how much of the convolutions'
            multiplications on it they are, and what is printed how much of them runs fused, as
            `share` does. Default None: they do not.

    Returns:
        The model. Outputs and gradients have the memory format of the plain model's; inside, blocks
        are channels_last. Gradients are those of `functional.conv_bn_act`.
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
    for module in reversed(names):
        _join(module, module is not model)
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
    given = example if isinstance(example, tuple) else (example,)
    if example is not None:
        counts = {names[m]: count for m, count in multiplications(model, *given).items()}
        whole = max(1, sum(counts.values()))
        found = [replace(f, part=sum(counts.get(n, 0) for n in f.names) / whole) for f in found]
        model.__dict__["_fuse_findings"] = tuple(found)
    if verbose:
        print(*found, sep="\n")
    if verbose and example is not None:
        done = share(model, *given)
        print(f"fused kernels do {done:.1%} of the convolutions' multiplications on this input")
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`: every module gets its own class back. Returns the model."""
    for module in model.modules():
        take_class(module)
        for name in ("_fuse_findings", "_fuse_run", "_fuse_reading"):
            module.__dict__.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (before, after)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return model


@contextlib.contextmanager
def unfused(model: Model) -> Iterator[Model]:
    """Inside, the model is as it was before `fuse`, for tools that look at classes and code
    (torch.jit.script, quantisation, initialisers that ask `type(m) == nn.Conv2d`); afterwards what
    was fused is fused again."""
    fused = [module for module in model.modules() if "_fuse_findings" in module.__dict__]
    if not fused and any(is_fused(module) for module in model.modules()):
        fused = [model]  # a part of a model that was fused
    unfuse(model)
    try:
        yield model
    finally:
        for module in fused:
            fuse(module)


def findings(model: nn.Module) -> tuple[Finding, ...]:
    """What `fuse` found in this model; () for a model that it has not seen."""
    found: tuple[Finding, ...] = model.__dict__.get("_fuse_findings", ())
    return found


def _fuse_one(module: nn.Module, reasons: dict[nn.Module, str]) -> list[list[nn.Module]]:
    """Fuse what this module itself calls; its children are fused by themselves."""
    if type(module) is nn.Sequential:
        children, blocks, at = list(flat(module)), [], 0
        while at < len(children):
            blocks.append(block_at(children, at))
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
        reading = read(module, own)
    except Exception as error:  # whatever a user's forward may raise when it is given a proxy
        first = str(error).splitlines()[0] if str(error) else ""
        why = f"its forward cannot be read by torch.fx ({type(error).__name__}: {first})"
        reasons.update(dict.fromkeys(convs, why))
        return []
    reasons.update(dict.fromkeys(convs, "its module's forward does not call it once, by itself"))
    if not reading.runs:
        return []
    for run in reading.runs:
        for one in run.modules:
            give_class(one)
        run.modules[0].__dict__["_fuse_run"] = run
    _follow(module, reading)
    return [run.modules for run in reading.runs]


def _follow(module: nn.Module, reading: Reading) -> None:
    module.__dict__["_fuse_reading"] = reading
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def _join(module: nn.Module, is_part: bool) -> None:
    """A module that only calls others, which are fused, lets them hand their results on."""
    kind = type(module)
    if kind is nn.Sequential and any(map(hands_on, flat(module))):
        module.__class__ = FusedSequential
    stock = kind.__module__.startswith("torch.nn") or kind in (FusedSequential, ConvBlock)
    if stock or "_fuse_reading" in module.__dict__:
        return
    own = dict(_called(module))
    if not any(isinstance(m, FusedSequential) or "_fuse_reading" in vars(m) for m in own.values()):
        return
    try:
        reading = read(module, own)
    except Exception:  # as above; then each result has the plain model's format
        return
    if reading.edges or (is_part and reading.takes and reading.gives):
        _follow(module, reading)


def _called(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, child) that the module's own forward may call: also those in lists and dicts."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
