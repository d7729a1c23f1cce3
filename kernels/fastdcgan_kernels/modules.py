"""The fused block as a module of real children, and how such children are run as one block. Not
here: how they are found in a user's model (fusion.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils.parametrize import is_parametrized

from fastdcgan_kernels import functional
from fastdcgan_kernels.functional import Input

_stat_groups: list[int] = [1]

Convolution = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm2d | nn.SyncBatchNorm


@contextlib.contextmanager
def stat_groups(groups: int) -> Iterator[None]:
    """Inside, a fused nn.Sequential takes its input as so many batches of equal size, one after the
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


class WorkingCopies:
    """The convolution weights of a net in another dtype, all cast in one go. Fused blocks called
    inside `with copies:` read these instead of casting their own weights at every call; gradients
    and updates are the weights' as ever.

    Nothing notices by itself that a weight has changed: `refresh` after every update. What was
    changed otherwise, by the loading of a checkpoint, say, is seen by `fresh`; fused optimisers
    are not.

    Args:
        net: its weights may change in place, and stay where they are.
        dtype: what the blocks compute in, e.g. bfloat16 under autocast.
        narrow: the gradients of the weights are to be in that dtype, too, as convolutions of
            PyTorch's make them under autocast; but here they stay so (`Tensor.grad_dtype`), and
            more than one backward between two updates would add them up in it. `adam.Adam` takes
            them. Default: as the weights.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, narrow: bool = False) -> None:
        # A weight that is computed at each access (spectral norm) has no copy: it is cast.
        self._convs: list[Any] = [
            m for m in net.modules() if is_convolution(m) and not is_parametrized(m)
        ]
        self._weights: list[Tensor] = [m.weight.detach() for m in self._convs]
        self._copies = [torch.empty_like(w, dtype=dtype) for w in self._weights]
        self._versions: list[int] = []
        for conv in self._convs if narrow else ():
            conv.weight.grad = None
            conv.weight.grad_dtype = dtype

    @property
    def of(self) -> dict[Tensor, Tensor]:
        """The copy of each weight."""
        weights = (conv.weight for conv in self._convs)
        return dict(zip(weights, self._copies, strict=True))

    def fresh(self) -> bool:
        """Whether no weight was changed in place, by PyTorch's own count, since the last refresh.
        What a replayed CUDA graph changes is not counted; let it hold the refresh, too."""
        return self._versions == [w._version for w in self._weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now: one launch."""
        if self._weights:
            torch._foreach_copy_(self._copies, self._weights)
        self._versions = [w._version for w in self._weights]

    def written(self) -> None:
        """To be called by who has changed the weights and the copies as `refresh` would have."""
        increment_version(self._copies)
        self._versions = [w._version for w in self._weights]

    def leave(self) -> None:
        """The weights' gradients are in their own dtype again; those there are are dropped."""
        for conv in self._convs:
            conv.weight.grad = None
            conv.weight.grad_dtype = conv.weight.dtype

    def __enter__(self) -> WorkingCopies:
        for conv, copy in zip(self._convs, self._copies, strict=True):
            conv.__dict__["_working"] = copy
        return self

    def __exit__(self, *error: object) -> None:
        for conv in self._convs:
            conv.__dict__.pop("_working", None)


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
            return functional.materialise(run_block(self.conv, self.norm, self.activation, x))
        for part in (self.conv, self.norm, self.activation):
            x = x if part is None else part(x)
        return x


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


def run_block(
    conv: Convolution, norm: Norm | None, activation: nn.Module | None, x: Input
) -> Input:
    """What the modules compute one after the other; `Deferred` or `FromImage` where the block left
    something to whoever takes the result."""
    found = activation_of(activation)
    assert found is not None
    name, slope = found
    up = isinstance(conv, nn.ConvTranspose2d)
    stride, padding = conv.stride[0], int(conv.padding[0])
    working: Tensor | None = getattr(conv, "_working", None)
    if norm is None:
        options: Any = {
            "stride": stride, "padding": padding, "activation": name, "slope": slope,
            "working": working,
        }  # fmt: skip
        if up:
            return functional.conv_transpose_act(x, conv.weight, conv.bias, **options)
        plain: Input = functional.conv_act(x, conv.weight, conv.bias, defer=True, **options)
        return plain
    # As nn.BatchNorm2d.forward; the count stays on its device.
    groups = groups_now()
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    batches = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    if batches is not None and norm.momentum is None:  # of each group in turn
        batches.add_(groups)
        counts = [batches - left for left in reversed(range(groups))]
        momentum, batches = 1.0 / torch.stack(counts).float(), None
    moving = not norm.training or norm.track_running_stats
    op = functional.conv_transpose_bn_act if up else functional.conv_bn_act
    result: Input = op(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean if moving else None,
        norm.running_var if moving else None,
        stride=stride,
        padding=padding,
        training=norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum=momentum,
        eps=norm.eps,
        activation=name,
        slope=slope,
        stat_groups=groups,
        sync=_process_group(norm),
        batches=batches,
        working=working,
        defer=True,
    )
    return result


def _process_group(norm: Norm) -> str:
    """Name of the processes whose batches are normalised as one; "" for this one alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    assert group is not None
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


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
