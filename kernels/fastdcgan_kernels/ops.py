"""The blocks as torch.library operators: opaque to torch.compile, with shapes for fake and meta
tensors. Not here: their gradients (autograd.py), what they compute (gpu/blocks.py), those of the
CPU (cpu/ops.py), and what users call (functional.py).

An operator returns a tensor for everything; a gradient that was not asked for has no elements. Its
arguments have no defaults: before a call, PyTorch drops trailing arguments that equal theirs, and
PyTorch 2.11 then looks for the mutated ones among those left (IndexError).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .choice.geometry import empty_output, gradient_dtype
from .choice.spec import BlockSpec, Buffers, Inputs, Need, Saved, Signature

NAMESPACE = "fastdcgan"
ops: Any = getattr(torch.ops, NAMESPACE)
CHANNELS_LAST = torch.channels_last
SIGNATURES: dict[str, Signature] = {}
"""The arguments of each operator, by its name."""


def operator(
    name: str, signature: Signature, run: str | Callable[..., Any], fake: Callable[..., Any],
    returns: int, changed: Sequence[str] = (), gradients: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The operator of flat arguments that functions of a signature's values make.

    Args:
        run: its results; a name is that of a function in gpu/blocks.py, which imports Triton.
        fake: the same without values.
        returns: how many tensors.
        changed: the arguments that it changes in place.
        gradients: `run` returns a dict by these names.
    """

    def call(*flat: Any) -> Any:
        values = signature.restore(flat)
        if callable(run):
            found = run(*values)
        else:
            from .gpu import blocks

            found = getattr(blocks, run)(*values)
        if not gradients:
            return found
        (saved,) = (value for value in values if isinstance(value, Saved))
        return _in_order(found, saved, gradients)

    SIGNATURES[name] = signature
    schema = signature.schema(returns, changed)
    made = torch.library.custom_op(
        f"{NAMESPACE}::{name}", call, mutates_args=changed, schema=schema
    )
    made.register_fake(lambda *flat: fake(*signature.restore(flat)))
    return made


def gradients(
    name: str, signature: Signature, run: str | Callable[..., Any], names: Sequence[str]
) -> Any:
    """The operator of these gradients, where `run` gives those that are needed by their names, and
    the signature ends in (Saved, BlockSpec, Need)."""

    def empty(*values: Any) -> tuple[Tensor, ...]:
        *_, saved, _spec, need = values
        of = {name: getattr(saved, name) for name in names}
        wanted = {name for name in names if getattr(need, {"x_coef": "x"}.get(name, name), True)}
        made = {n: _empty_gradient(t) for n, t in of.items() if n in wanted and t is not None}
        return _in_order(made, saved, names)

    return operator(name, signature, run, empty, len(names), gradients=names)


def _in_order(found: dict[str, Tensor], saved: Saved, names: Sequence[str]) -> tuple[Tensor, ...]:
    if "bias" in found and saved.bias is not None:
        found["bias"] = found["bias"].to(saved.bias.dtype)
    return tuple(found[name] if name in found else saved.x.new_empty(0) for name in names)


def _empty_gradient(like: Tensor) -> Tensor:
    form = CHANNELS_LAST if like.dim() == 4 else torch.preserve_format
    return torch.empty_like(like, dtype=gradient_dtype(like), memory_format=form)


def output(inputs: Inputs, spec: BlockSpec) -> Tensor:
    """A block's output without values."""
    return empty_output(inputs.x, inputs.weight, spec.transposed, spec.stride, spec.padding)


def _fake_conv_bn(inputs: Inputs, buffers: Buffers, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    y = output(inputs, spec)
    return y, y.new_empty((5, spec.groups, y.shape[1]), dtype=torch.float32)


def _fake_activate_backward(
    g: Tensor, y: Tensor, coef: Tensor, spec: BlockSpec
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y, memory_format=CHANNELS_LAST), torch.empty_like(coef)


LAYER = "transposed stride padding x_activation x_slope"
NEED = (Need, "x weight bias")
GRADIENTS: tuple[str, ...] = ("x", "x_coef", "weight", "bias")

# fmt: off
conv_bn = operator(
    "conv_bn",
    Signature(
        "", (Inputs, "x x_coef x_activated weight bias gamma beta working"), (Buffers, ""),
        (BlockSpec, f"{LAYER} groups eps sync momentum correction"),
    ),
    "conv_bn", _fake_conv_bn, returns=2, changed=("running_mean", "running_var", "batches"),
)
conv_bn_backward = gradients(
    "conv_bn_backward",
    Signature(
        "gy gcoef?", (Saved, "x x_coef x_activated weight bias working y!"),
        (BlockSpec, f"{LAYER} groups sync"), NEED,
    ),
    "conv_bn_backward", GRADIENTS,
)
conv_act = operator(
    "conv_act",
    Signature(
        "", (Inputs, "x x_coef x_activated weight bias working"),
        (BlockSpec, f"{LAYER} activation slope undone"),
    ),
    "conv_act", output, returns=1,
)
conv_act_backward = gradients(
    "conv_act_backward",
    Signature(
        "g", (Saved, "x x_coef x_activated weight bias working out"),
        (BlockSpec, f"{LAYER} activation slope"), NEED,
    ),
    "conv_act_backward", GRADIENTS,
)
activate = operator(
    "activate", Signature("y coef", (BlockSpec, "activation slope")), "activate",
    lambda y, coef, spec: torch.empty_like(y, memory_format=CHANNELS_LAST), returns=1,
)
activate_backward = operator(
    "activate_backward", Signature("g y coef", (BlockSpec, "activation slope")),
    "activate_backward", _fake_activate_backward, returns=2,
)
# fmt: on
