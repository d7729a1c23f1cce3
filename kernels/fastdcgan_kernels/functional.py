"""The blocks as differentiable functions: convolution, [BatchNorm], activation, by fused kernels
where there are any for the device, shape and dtype, and in plain PyTorch (reference.py) elsewhere.
Not here: what the kernels do (gpu/blocks.py), which of them run (choice/).

The kernels cover square kernels of 1 to 7 pixels a side with stride 1 or 2 and any padding, in
float32, bfloat16 and float16. FASTDCGAN_IMPL says what happens elsewhere: `auto` (default) and
`reference` run plain PyTorch, `triton` raises.

Gradients: first order by kernels; where a graph of the gradient is asked for (create_graph=True),
the gradient is computed in plain PyTorch, so that higher orders are those of its functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import autograd as _  # noqa: F401  (gives the operators their gradients)
from . import reference
from .choice import choose, plain
from .choice.geometry import KERNEL, Padding, sides_of
from .choice.spec import BlockSpec, Buffers, Inputs
from .choice.targets import mode, target_of
from .choice.types import Block, How
from .cpu import blocks as cpu
from .ops import SIGNATURES, ops
from .reference import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Deferred(NamedTuple):
    """A block's output of which the activation is left to its consumer: raw y [N, C, P, Q],
    coef [5, groups, C] (mean, scale, shift, and two for the way back), and the activation of
    scale * (y - mean) + shift."""

    y: Tensor
    coef: Tensor
    activation: str
    slope: float

    @property
    def shape(self) -> torch.Size:
        """That of the output."""
        return self.y.shape


class Activated(NamedTuple):
    """The output y = act(z) of a block without a norm, for a consumer that gives the gradient of z
    for it."""

    y: Tensor
    activation: str
    slope: float

    @property
    def shape(self) -> torch.Size:
        """That of the output."""
        return self.y.shape


Runner: TypeAlias = How | Literal["cpu"]
Input: TypeAlias = "Tensor | Deferred | Activated"


def conv_bn_act(
    x: Input, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, *, stride: int, padding: Padding,
    training: bool, momentum: float | Tensor, eps: float, activation: Activation,
    slope: float = 0.0, stat_groups: int = 1, sync: str = "", batches: Tensor | None = None,
    working: Tensor | None = None, defer: bool = False,
) -> Any:  # fmt: skip
    """act(gamma * (y - mean) / sqrt(var + eps) + beta) with y = conv2d(x, weight) + bias.

    Arguments, result and errors are those of `reference.conv_bn_act`, and besides:

    Args:
        x: any strides; float32, bfloat16 or float16 for the kernels. Under autocast it is cast to
            the autocast dtype; parameters, statistics and coefficients stay as they are, and
            gradients come in the dtypes of the parameters.
        momentum: a float, or a tensor on the device (a cumulative average's 1 / count): 0-dim, or
            [stat_groups].
        stat_groups: x is that many batches of equal size, one after the other: each is normalised
            with its own statistics, and the running buffers see them in order. With as many as x
            has images this is InstanceNorm. Default 1.
        sync: name of the process group over which the batch's statistics are taken
            (SyncBatchNorm); "": this process alone. Default "".
        batches: int64 of no dimension, in training: counts the batches that the running buffers
            have seen, stat_groups at a call, in place. Default None.
        working: the weight in the dtype of x and channels_last, for the kernels to read; gradients
            are the weight's. It must be no other than the weight when it is read. Default None: it
            is cast, once for both ways.
        defer: return `Deferred`, for another block to take as its x. Default False.

    Returns:
        (N, CO, P, Q), channels_last; or `Deferred`.

    Raises:
        ValueError: as the reference; or FASTDCGAN_IMPL=triton and no kernel for this.
    """
    spec = BlockSpec(False, stride, sides_of(padding), activation, slope, eps, stat_groups, sync)
    inputs = replace(inputs_of(x, weight, bias, working), gamma=gamma, beta=beta)
    buffers = Buffers(running_mean, running_var, batches)
    return with_norm(x, inputs, buffers, spec, training, momentum, defer)


def conv_transpose_bn_act(
    x: Input, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, *, stride: int,
    padding: Padding, output_padding: Padding = 0, training: bool, momentum: float | Tensor,
    eps: float, activation: Activation, slope: float = 0.0, stat_groups: int = 1, sync: str = "",
    batches: Tensor | None = None, working: Tensor | None = None, defer: bool = False,
) -> Any:  # fmt: skip
    """As `conv_bn_act`, with y = conv_transpose2d(x, weight) + bias and weight (CI, CO, K, K)."""
    spec = BlockSpec(
        True, stride, sides_of(padding, output_padding), activation, slope, eps, stat_groups, sync
    )
    inputs = replace(inputs_of(x, weight, bias, working), gamma=gamma, beta=beta)
    buffers = Buffers(running_mean, running_var, batches)
    return with_norm(x, inputs, buffers, spec, training, momentum, defer)


def conv_act(
    x: Input, weight: Tensor, bias: Tensor | None = None, *, stride: int, padding: Padding,
    activation: Activation, slope: float = 0.0, working: Tensor | None = None, defer: bool = False,
) -> Any:  # fmt: skip
    """act(conv2d(x, weight) + bias); as `reference.conv_act`, dtypes and x as `conv_bn_act`.
    defer: `Activated` or `Deferred` may be returned. Default False."""
    spec = BlockSpec(False, stride, sides_of(padding), activation, slope)
    return without_norm(x, inputs_of(x, weight, bias, working), spec, defer)


def conv_transpose_act(
    x: Input, weight: Tensor, bias: Tensor | None = None, *, stride: int, padding: Padding,
    output_padding: Padding = 0, activation: Activation, slope: float = 0.0,
    working: Tensor | None = None, defer: bool = False,
) -> Any:  # fmt: skip
    """act(conv_transpose2d(x, weight) + bias); else as `conv_act`."""
    spec = BlockSpec(True, stride, sides_of(padding, output_padding), activation, slope)
    return without_norm(x, inputs_of(x, weight, bias, working), spec, defer)


def materialise(x: Input) -> Tensor:
    """The output that a `Deferred` or `Activated` stands for; a tensor as it is."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Activated):
        return reference.undone(*x)
    spec = BlockSpec(activation=x.activation, slope=x.slope)
    out: Tensor = ops.activate(*SIGNATURES["activate"].flatten(x.y, x.coef, spec))
    return out


def _tensor(x: Input) -> Tensor:
    return x if isinstance(x, Tensor) else x.y


def bce(
    logits: Tensor, targets: Tensor, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of sigmoid(logits), a mean over each of the groups, with its gradient.

    Args:
        logits: (groups * B,), any floating dtype: equal batches, one after the other.
        targets: (groups,), float32: what each batch is to be, 1 for "real".
        share: of this process in the global batch; everything returned is multiplied by it.
        scale: (), float32: the gradient is multiplied by it, too (fp16's loss scale). Default: 1.

    Returns:
        (1 + groups,) float32: the sum of the groups' losses, and the mean probability of each; and
        the gradient of that sum, in the shape and dtype of `logits`. By the twin in reference.py
        where there are no kernels, or for float64.
    """
    if logits.dtype == torch.float64 or not runs_kernels(logits.device):
        return reference.bce(logits, targets, share=share, scale=scale)
    from .gpu import loss

    return loss.bce(logits, targets, share, scale)


def defers(x: Input, weight: Tensor, spec: BlockSpec, norm: bool = True) -> bool:
    """Whether the block that takes an x like this would rather apply its producer's activation
    itself (the choices "hybrid" and "prologue"). `norm`: it has one."""
    x = _cast(x)
    if unsupported(x, weight, spec) or not runs_kernels(_tensor(x).device):
        return False
    return _how(x, weight, spec, norm) in ("hybrid", "prologue")


def runner_of(x: Input, weight: Tensor, spec: BlockSpec, norm: bool = True) -> Runner:
    """What runs a block on x: Triton's kernels, in which way; "cpu": the CPU's; "reference": plain
    PyTorch. x: (N, CI, H, W), uncast; norm: the block has one.

    Raises:
        ValueError: FASTDCGAN_IMPL=triton and no kernel for this.
    """
    x = _cast(x)
    if plain.is_asked_for(_tensor(x), weight):
        return "reference"
    if not spec.sync and _takes_cpu_kernels(x, weight, spec, norm):
        return "cpu"
    return _how(x, weight, spec, norm) if _takes_kernels(x, weight, spec) else "reference"


def _how(x: Input, weight: Tensor, spec: BlockSpec, norm: bool) -> How:
    """The choice for this block; the default where no device is known."""
    y = _tensor(x)
    target = target_of(y.device)
    if target is None:
        return choose.DEFAULT
    block = Block(spec.transposed, spec.geometry(y, weight), y.dtype, norm, spec.groups)
    return choose.choose(block, target).how


def unsupported(x: Input, weight: Tensor, spec: BlockSpec) -> str:
    """Why there is no kernel for this convolution; "" if there is one (on some device)."""
    y, transposed = _tensor(x), spec.transposed
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3]
    if not square or not 1 <= weight.shape[2] <= KERNEL:
        return f"kernels are square, 1x1 to 7x7; the weight is {tuple(weight.shape)}"
    if spec.stride not in (1, 2):
        return f"stride {spec.stride}; kernels have 1 and 2"
    if y.dim() != 4 or y.shape[1] != weight.shape[0 if transposed else 1]:
        return f"x {tuple(y.shape)} does not fit the weight {tuple(weight.shape)}"
    g = spec.geometry(y, weight)
    if min(g.P, g.Q, g.H, g.W) < 1 or min(spec.padding[:2]) < 0:
        return f"nothing is left of x {tuple(y.shape)}, or padding {spec.padding} is negative"
    if y.numel() == 0 or weight.numel() == 0:
        return f"x {tuple(y.shape)} or the weight {tuple(weight.shape)} is empty"
    if y.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"x is {y.dtype} and the weight {weight.dtype}; kernels take 32 and 16 bit floats"
    if spec.slope < 0:
        return f"slope {spec.slope} is negative: the output's sign would not be the input's"
    if weight.numel() >= 2**31:
        return f"a weight of {weight.numel()} elements"
    return ""


def _cast(x: Input) -> Input:
    """x in the autocast dtype, where autocast is on and would cast it."""
    if not isinstance(x, Tensor):
        return x
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    if on and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def runs_kernels(device: torch.device) -> bool:
    """Whether the setting and the device let kernels run.

    Raises:
        ValueError: FASTDCGAN_IMPL=triton, and the device has none.
    """
    setting = mode()
    if setting == "reference":
        return False
    if setting == "triton":
        if device.type == "meta" or target_of(device) is not None:
            return True
        raise ValueError(
            f"FASTDCGAN_IMPL=triton, and {device} has no kernels: unset it, or move to a GPU"
        )
    return device.type == "cuda" and target_of(device) is not None


def _takes_kernels(x: Input, weight: Tensor, spec: BlockSpec) -> bool:
    if not runs_kernels(_tensor(x).device):
        return False
    why = unsupported(x, weight, spec)
    if why and mode() == "triton":
        raise ValueError(f"FASTDCGAN_IMPL=triton, and there is no kernel: {why}")
    return not why


def runs_cpu_kernels(device: torch.device) -> bool:
    """Whether the setting, the device and its compiler let the kernels of the CPU run: cpu/."""
    return (
        device.type == "cpu" and mode() == "auto" and target_of(device) is None and cpu.is_there()
    )


def _takes_cpu_kernels(x: Input, weight: Tensor, spec: BlockSpec, norm: bool) -> bool:
    """Whether x, cast, is a tensor that the kernels of the CPU take: cpu/blocks.py. In bfloat16
    they take what autocast makes of a block in float32, never a block in bfloat16."""
    narrow = isinstance(x, Tensor) and x.dtype == torch.bfloat16
    return (
        isinstance(x, Tensor)
        and x.device == weight.device
        and x.device.type == "cpu"
        and weight.dtype == torch.float32
        and (x.dtype == torch.float32 or (narrow and torch.is_autocast_enabled("cpu")))
        and not unsupported(x, weight, spec)
        and cpu.takes(spec.geometry(x, weight), spec.transposed, norm, narrow)
        and runs_cpu_kernels(x.device)
    )


def _like(inputs: Inputs) -> Inputs:
    """Parameters in the dtype of x, as kernels take them and PyTorch's convolutions must have."""
    dtype, bias = inputs.x.dtype, inputs.bias
    return replace(
        inputs, weight=inputs.weight.to(dtype), bias=None if bias is None else bias.to(dtype)
    )


def _given(x: Input, inputs: Inputs, spec: BlockSpec) -> tuple[Inputs, BlockSpec]:
    """With x and what its producer left to do."""
    if isinstance(x, Deferred):
        spec = replace(spec, x_activation=x.activation, x_slope=x.slope)
        return replace(inputs, x=x.y, x_coef=x.coef), spec
    if isinstance(x, Activated):
        spec = replace(spec, x_activation=x.activation, x_slope=x.slope)
    return replace(inputs, x=_tensor(x)), spec


def inputs_of(x: Input, weight: Tensor, bias: Tensor | None, working: Tensor | None) -> Inputs:
    """Of a block on x, whatever its producer left to do."""
    return Inputs(_tensor(x), weight, bias=bias, working=working)


def with_norm(
    x: Input, inputs: Inputs, buffers: Buffers, spec: BlockSpec, training: bool,
    momentum: float | Tensor, defer: bool, how: Runner | None = None,
) -> Any:  # fmt: skip
    """A block with a norm, by `how`, where that is known, else `runner_of`."""
    reference.check_activation(spec.activation, spec.slope)
    x, weight, groups = _cast(x), inputs.weight, spec.groups
    if isinstance(x, Deferred) and x.coef.shape[1] != groups:
        x = materialise(x)  # kernels take one number of groups
    inputs, spec = _given(x, inputs, spec)
    tracked = buffers.running_mean is not None and buffers.running_var is not None
    how = how or runner_of(x, weight, spec, True)
    if how != "reference" and not training and tracked:
        return without_norm(x, reference.fold(inputs, buffers, spec), spec)
    if x.shape[0] % groups:
        raise ValueError(f"stat_groups={groups} does not divide a batch of {x.shape[0]}")
    if not training:
        buffers = replace(buffers, batches=None)

    def count() -> None:
        if buffers.batches is not None:
            buffers.batches.add_(groups)

    if how == "reference":
        inputs = _like(inputs) if runs_kernels(inputs.x.device) else inputs
        outs = [
            reference.block(
                replace(inputs, x=part), buffers, spec, training,
                reference.momentum_of(momentum, group),
            )
            for group, part in enumerate(materialise(x).chunk(groups))
        ]  # fmt: skip
        count()
        return outs[0] if groups == 1 else torch.cat(outs)
    if not spec.sync:
        try:
            reference.check_values_per_channel(output_shape(x, weight, spec), groups)
        except ValueError:
            count()  # nn.BatchNorm2d counts before it refuses
            raise
    if isinstance(momentum, Tensor):
        buffers = replace(buffers, momenta=momentum)
    else:
        spec = replace(spec, momentum=momentum)
    if how == "cpu":
        spec, left = _for_cpu(spec)
        flat = SIGNATURES["cpu_conv_norm"].flatten(inputs, buffers, spec)
        return reference.act(ops.cpu_conv_norm(*flat)[0], left, spec.slope)
    inputs = replace(inputs, x_activated=_activated(x, weight, spec, how), working=_working(inputs))
    y, coef = ops.conv_bn(*SIGNATURES["conv_bn"].flatten(inputs, buffers, spec))
    deferred = Deferred(y, coef, spec.activation, spec.slope)
    return deferred if defer else materialise(deferred)


def without_norm(
    x: Input, inputs: Inputs, spec: BlockSpec, defer: bool = False, how: Runner | None = None
) -> Any:
    """The same of a block without one."""
    reference.check_activation(spec.activation, spec.slope)
    x, weight = _cast(x), inputs.weight
    inputs, spec = _given(x, inputs, spec)
    spec = replace(spec, groups=x.coef.shape[1] if isinstance(x, Deferred) else 1)
    how = how or runner_of(x, weight, spec, False)
    if how == "cpu":
        spec, left = _for_cpu(spec)
        out = ops.cpu_conv_act(*SIGNATURES["cpu_conv_act"].flatten(inputs, spec))
        return reference.act(out, left, spec.slope)
    if how == "reference":
        inputs = _like(inputs) if runs_kernels(inputs.x.device) else inputs
        return reference.block_without_norm(replace(inputs, x=materialise(x)), spec)
    inputs = replace(inputs, x_activated=_activated(x, weight, spec, how), working=_working(inputs))
    if spec.activation in reference.OF_INPUT and torch.is_grad_enabled():
        # Its input is kept for the way back: as behind a norm, here one that changes nothing.
        y = ops.conv_act(*SIGNATURES["conv_act"].flatten(inputs, replace(spec, activation="none")))
        deferred = Deferred(y, _no_norm(y), spec.activation, spec.slope)
        return deferred if defer else materialise(deferred)
    undoes = how in ("hybrid", "prologue") and spec.activation != "none"
    spec = replace(spec, undone=defer and undoes and torch.is_grad_enabled())
    out = ops.conv_act(*SIGNATURES["conv_act"].flatten(inputs, spec))
    return Activated(out, spec.activation, spec.slope) if spec.undone else out


def _no_norm(y: Tensor) -> Tensor:
    """Coefficients [5, 1, C] with which y is as it is: mean and shift 0, the others 1."""
    coef = torch.ones(5, 1, y.shape[1], device=y.device)
    coef[:3:2] = 0.0
    return coef


def _for_cpu(spec: BlockSpec) -> tuple[BlockSpec, str]:
    """The block for the kernels of the CPU, and the activation that is left to PyTorch's own."""
    if spec.activation in cpu.ACTIVATIONS:
        return spec, "none"
    return replace(spec, activation="none"), spec.activation


def _activated(x: Input, weight: Tensor, spec: BlockSpec, how: How) -> Tensor | None:
    """What a hybrid block reads for a `Deferred` in place of its y, without gradients: those of y
    and coef are the block's own. None: y itself, where activating a value as it is loaded repeats
    nothing."""
    if how != "hybrid" or not isinstance(x, Deferred):
        return None
    if spec.geometry(x.y, weight).reads_once(spec.transposed):
        return None
    return materialise(x._replace(y=x.y.detach(), coef=x.coef.detach()))


def output_shape(x: Input, weight: Tensor, spec: BlockSpec) -> torch.Size:
    """That of a block's output on x."""
    g = spec.geometry(_tensor(x), weight)
    return torch.Size((g.N, g.CL, g.H, g.W) if spec.transposed else (g.N, g.CS, g.P, g.Q))


def _working(inputs: Inputs) -> Tensor | None:
    """What the kernels read for the weight, made once for the way there and the way back; None: the
    weight itself."""
    weight, dtype = inputs.weight, inputs.x.dtype
    if inputs.working is not None and inputs.working.dtype == dtype:
        return inputs.working
    if weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return None
    return weight.detach().to(dtype, memory_format=torch.channels_last)
