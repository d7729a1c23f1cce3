"""The blocks as differentiable functions: convolution, [BatchNorm], activation, by fused kernels
where there are any for the device, shape and dtype, and in plain PyTorch (reference.py) elsewhere.
Not here: what the kernels do (blocks.py), which of them run (plan.py).

The kernels cover 4x4 convolutions of stride 2 and padding 1 with even sides, and of stride 1 and
padding 0 between 1x1 and 4x4 pixels, in float32, bfloat16 and float16. FASTDCGAN_IMPL says what
happens elsewhere: `auto` (default) and `reference` run plain PyTorch, `triton` raises.

Gradients: first order by kernels; where a graph of the gradient is asked for (create_graph=True),
the gradient is computed in plain PyTorch, so that higher orders are those of its functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from fastdcgan_kernels import plan, reference
from fastdcgan_kernels.cpu import blocks as cpu
from fastdcgan_kernels.geometry import geometry_of
from fastdcgan_kernels.ops import ops
from fastdcgan_kernels.reference import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Deferred(NamedTuple):
    """A block's output of which the activation is left to its consumer: raw y [N, C, P, Q],
    coef [5, groups, C] (mean, scale, shift, and two for the way back), and the activation of
    scale * (y - mean) + shift; gamma and beta, if that is what coef was made of, here alone."""

    y: Tensor
    coef: Tensor
    activation: str
    slope: float
    gamma: Tensor | None = None
    beta: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the output."""
        return self.y.shape


class FromImage(NamedTuple):
    """The output y = act(conv2d(image, weight)) of a layer with what its consumer needs to work out
    the gradients of image and weight itself: signs of y, uint8 [N, P, Q, CO / 8], and the weight as
    the kernels take it, or None."""

    y: Tensor
    signs: Tensor
    image: Tensor
    weight: Tensor
    working: Tensor | None
    activation: str
    slope: float

    @property
    def shape(self) -> torch.Size:
        """That of the output."""
        return self.y.shape


Input: TypeAlias = "Tensor | Deferred | FromImage"


def conv_bn_act(
    x: Input,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int,
    padding: int,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
    stat_groups: int = 1,
    sync: str = "",
    batches: Tensor | None = None,
    working: Tensor | None = None,
    defer: bool = False,
) -> Any:
    """act(gamma * (y - mean) / sqrt(var + eps) + beta) with y = conv2d(x, weight) + bias.

    Arguments, result and errors are those of `reference.conv_bn_act`, and besides:

    Args:
        x: any strides; float32, bfloat16 or float16 for the kernels. Under autocast it is cast to
            the autocast dtype; parameters, statistics and coefficients stay as they are, and
            gradients come in the dtypes of the parameters.
        momentum: a float, or a tensor on the device (a cumulative average's 1 / count): 0-dim, or
            [stat_groups].
        stat_groups: x is that many batches of equal size, one after the other: each is normalised
            with its own statistics, and the running buffers see them in order. Default 1.
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
    return _block(
        False, x, weight, bias, gamma, beta, running_mean, running_var, stride, padding,
        training, momentum, eps, activation, slope, stat_groups, sync, batches, working, defer,
    )  # fmt: skip


def conv_transpose_bn_act(
    x: Input,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int,
    padding: int,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: Activation,
    slope: float = 0.0,
    stat_groups: int = 1,
    sync: str = "",
    batches: Tensor | None = None,
    working: Tensor | None = None,
    defer: bool = False,
) -> Any:
    """As `conv_bn_act`, with y = conv_transpose2d(x, weight) + bias and weight (CI, CO, 4, 4)."""
    return _block(
        True, x, weight, bias, gamma, beta, running_mean, running_var, stride, padding,
        training, momentum, eps, activation, slope, stat_groups, sync, batches, working, defer,
    )  # fmt: skip


def conv_act(
    x: Input,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    activation: Activation,
    slope: float = 0.0,
    working: Tensor | None = None,
    defer: bool = False,
) -> Any:
    """act(conv2d(x, weight) + bias); as `reference.conv_act`, dtypes and x as `conv_bn_act`.
    defer: a layer from an image may return `FromImage`. Default False."""
    return _plain(False, x, weight, bias, stride, padding, activation, slope, working, defer)


def conv_transpose_act(
    x: Input,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    activation: Activation,
    slope: float = 0.0,
    working: Tensor | None = None,
) -> Tensor:
    """act(conv_transpose2d(x, weight) + bias); else as `conv_act`."""
    out: Tensor = _plain(True, x, weight, bias, stride, padding, activation, slope, working)
    return out


def materialise(x: Input) -> Tensor:
    """The output that a `Deferred` or `FromImage` stands for; a tensor as it is."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, FromImage):
        return x.y
    out: Tensor = ops.activate(x.y, x.coef, x.activation, x.slope)
    return out


def _tensor(x: Input) -> Tensor:
    return x if isinstance(x, Tensor) else x.y


def defers(
    x: Input,
    weight: Tensor,
    stride: int,
    padding: int,
    transposed: bool,
    norm: bool = True,
    groups: int = 1,
) -> bool:
    """Whether the block that takes an x like this would rather apply its producer's activation
    itself (the plan's choice "prologue"). `norm`: it has one; `groups`: its stat_groups."""
    x = _cast(x)
    if unsupported(x, weight, stride, padding, transposed) or not runs_kernels(_tensor(x).device):
        return False
    return _how(x, weight, stride, transposed, norm, groups) == "prologue"


def _how(
    x: Input, weight: Tensor, stride: int, transposed: bool, norm: bool, groups: int
) -> plan.How:
    """The plan's choice for this block; the default where no device is known."""
    y = _tensor(x)
    target = plan.target_of(y.device)
    if target is None:
        return "materialised"
    geometry = geometry_of(y, weight, transposed, stride)
    block = plan.Block("up" if transposed else "down", geometry, y.dtype, norm, groups)
    return plan.choose(block, target).how


def unsupported(
    x: Input, weight: Tensor, stride: int, padding: int, transposed: bool, slope: float = 0.0
) -> str:
    """Why there is no kernel for this convolution; "" if there is one (on some device)."""
    y = _tensor(x)
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (4, 4):
        return f"kernels are 4x4, the weight is {tuple(weight.shape)}"
    if (stride, padding) not in ((2, 1), (1, 0)):
        return f"stride {stride} with padding {padding}; kernels have 2 with 1, or 1 with 0"
    if y.dim() != 4 or y.shape[1] != weight.shape[0 if transposed else 1]:
        return f"x {tuple(y.shape)} does not fit the weight {tuple(weight.shape)}"
    sides = tuple(y.shape[2:])
    if stride == 1 and sides != ((1, 1) if transposed else (4, 4)):
        return f"stride 1 takes {'1x1' if transposed else '4x4'} pixels, x is {tuple(y.shape)}"
    if stride == 2 and not transposed and (sides[0] % 2 or sides[1] % 2 or 0 in sides):
        return f"sides must be even, x is {tuple(y.shape)}"
    if y.numel() == 0 or weight.numel() == 0:
        return f"x {tuple(y.shape)} or the weight {tuple(weight.shape)} is empty"
    if y.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"x is {y.dtype} and the weight {weight.dtype}; kernels take 32 and 16 bit floats"
    if slope < 0:
        return f"slope {slope} is negative: the output's sign would not be the input's"
    if weight.numel() >= 2**31:
        return f"a weight of {weight.numel()} elements"
    return ""


def _cast(x: Input) -> Tensor | Deferred:
    """x in the autocast dtype, where autocast is on and would cast it; without the layer before
    it."""
    if isinstance(x, FromImage):
        return x.y
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
    mode = plan.mode()
    if mode == "reference":
        return False
    if mode == "triton":
        if device.type == "meta" or plan.target_of(device) is not None:
            return True
        raise ValueError(
            f"FASTDCGAN_IMPL=triton, and {device} has no kernels: unset it, or move to a GPU"
        )
    return device.type == "cuda" and plan.target_of(device) is not None


def _takes_kernels(
    x: Input, weight: Tensor, stride: int, padding: int, transposed: bool, slope: float
) -> bool:
    if not runs_kernels(_tensor(x).device):
        return False
    why = unsupported(x, weight, stride, padding, transposed, slope)
    if why and plan.mode() == "triton":
        raise ValueError(f"FASTDCGAN_IMPL=triton, and there is no kernel: {why}")
    return not why


def runs_cpu_kernels(device: torch.device) -> bool:
    """Whether the setting, the device and its compiler let the kernels of the CPU run: cpu/."""
    return (
        device.type == "cpu"
        and plan.mode() == "auto"
        and plan.target_of(device) is None
        and cpu.is_there()
    )


def _takes_cpu_kernels(
    x: Input, weight: Tensor, stride: int, padding: int, transposed: bool, slope: float, norm: bool
) -> TypeGuard[Tensor]:
    """Whether x is a tensor that the kernels of the CPU take: cpu/blocks.py."""
    return (
        isinstance(x, Tensor)
        and x.device == weight.device
        and x.dtype == weight.dtype == torch.float32
        and not unsupported(x, weight, stride, padding, transposed, slope)
        and cpu.takes(geometry_of(x, weight, transposed, stride), transposed, norm)
        and runs_cpu_kernels(x.device)
    )


def _like(x: Input, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Parameters in the dtype of x, as kernels take them and PyTorch's convolutions must have."""
    dtype = _tensor(x).dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _block(
    up: bool, x: Input, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, stride: int,
    padding: int, training: bool, momentum: float | Tensor, eps: float, activation: Activation,
    slope: float, groups: int, sync: str, batches: Tensor | None, working: Tensor | None,
    defer: bool,
) -> Any:  # fmt: skip
    reference.check_activation(activation)
    layer = x
    x = _cast(x)
    if not sync and _takes_cpu_kernels(x, weight, stride, padding, up, slope, norm=True):
        if training and batches is not None:
            batches.add_(groups)
        return cpu.conv_bn_act(
            x, weight, bias, gamma, beta, running_mean, running_var, up, stride, training,
            momentum, eps, activation, slope, groups,
        )  # fmt: skip
    kernels = _takes_kernels(x, weight, stride, padding, up, slope)
    if kernels and not training and running_mean is not None and running_var is not None:
        weight, bias = reference.fold(
            weight, bias, gamma, beta, running_mean, running_var, eps, transposed=up
        )
        return _plain(up, x, weight, bias, stride, padding, activation, slope, None)
    if x.shape[0] % groups:
        raise ValueError(f"stat_groups={groups} does not divide a batch of {x.shape[0]}")
    how = _how(x, weight, stride, up, True, groups) if kernels else "reference"
    if kernels and how == "reference":
        kernels = False
        weight, bias = _like(x, weight, bias)
    if not kernels:
        op = reference.conv_transpose_bn_act if up else reference.conv_bn_act
        outs = [
            op(
                part, weight, bias, gamma, beta, running_mean, running_var, stride=stride,
                padding=padding, training=training, eps=eps, activation=activation, slope=slope,
                momentum=reference.momentum_of(momentum, group), sync=sync,
            )
            for group, part in enumerate(materialise(x).chunk(groups))
        ]  # fmt: skip
        if training and batches is not None:
            batches.add_(groups)
        return outs[0] if groups == 1 else torch.cat(outs)
    y, coef, x_activation, x_slope = x[:4] if isinstance(x, Deferred) else (x, None, "none", 0.0)
    if not sync:
        try:
            reference.check_values_per_channel(_output_shape(y, weight, stride, up), groups)
        except ValueError:
            if training and batches is not None:
                batches.add_(groups)  # nn.BatchNorm2d counts before it refuses
            raise
    momenta = momentum if isinstance(momentum, Tensor) else None
    before: tuple[Tensor | None, ...] = (None, None, None, None)
    taken = how == "prologue" and bias is None and stride == 2 and not up
    if isinstance(layer, FromImage) and taken:
        before = layer.image, layer.weight, layer.working, layer.signs
        y, x_activation, x_slope = y.detach(), layer.activation, layer.slope
    y, coef = ops.conv_bn(
        y, coef, weight, bias, gamma, beta, up, stride, groups, eps, x_activation, x_slope, sync,
        _working(weight, y.dtype, working), running_mean, running_var, batches,
        0.0 if isinstance(momentum, Tensor) else momentum, momenta, *before,
    )  # fmt: skip
    deferred = Deferred(y, coef, activation, slope, *((None, None) if sync else (gamma, beta)))
    return deferred if defer else materialise(deferred)


def _plain(
    up: bool, x: Input, weight: Tensor, bias: Tensor | None, stride: int, padding: int,
    activation: Activation, slope: float, working: Tensor | None, defer: bool = False,
) -> Any:  # fmt: skip
    reference.check_activation(activation)
    x = _cast(x)
    if _takes_cpu_kernels(x, weight, stride, padding, up, slope, norm=False):
        return cpu.conv_act(x, weight, bias, up, stride, activation, slope)
    kernels = _takes_kernels(x, weight, stride, padding, up, slope)
    groups = x.coef.shape[1] if isinstance(x, Deferred) else 1
    how = _how(x, weight, stride, up, False, groups) if kernels else "reference"
    if kernels and how == "reference":
        kernels = False
        weight, bias = _like(x, weight, bias)
    if not kernels:
        op = reference.conv_transpose_act if up else reference.conv_act
        return op(
            materialise(x), weight, bias, stride=stride, padding=padding,
            activation=activation, slope=slope,
        )  # fmt: skip
    y, coef, x_activation, x_slope = x[:4] if isinstance(x, Deferred) else (x, None, "none", 0.0)
    norm: tuple[Tensor | None, Tensor | None] = (None, None)
    to_a_number = not up and stride == 1 and weight.shape[0] == 1 and activation == "none"
    if isinstance(x, Deferred) and how == "prologue" and to_a_number and bias is None:
        norm = (x.gamma, x.beta) if x.gamma is not None and x.beta is not None else norm
    working = _working(weight, y.dtype, working)
    signed = (
        defer and how == "prologue" and isinstance(x, Tensor) and not up and bias is None
        and stride == 2 and y.shape[1] <= 4 and weight.shape[0] % 8 == 0
        and activation in ("relu", "leaky_relu") and torch.is_grad_enabled()
    )  # fmt: skip
    out, signs = ops.conv_act(
        y, coef, weight, bias, up, stride, x_activation, x_slope, activation, slope, working,
        signed, *norm,
    )  # fmt: skip
    return FromImage(out, signs, y, weight, working, activation, slope) if signed else out


def _output_shape(x: Tensor, weight: Tensor, stride: int, up: bool) -> torch.Size:
    g = geometry_of(x, weight, up, stride)
    return torch.Size((g.N, g.CL, g.H, g.W) if up else (g.N, g.CS, g.P, g.Q))


def _working(weight: Tensor, dtype: torch.dtype, given: Tensor | None) -> Tensor | None:
    """What the kernels read for the weight, made once for the way there and the way back; None: the
    weight itself."""
    if given is not None and given.dtype == dtype:
        return given
    if weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return None
    return weight.detach().to(dtype, memory_format=torch.channels_last)
