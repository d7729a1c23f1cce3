"""Several processes, one run: who is who under torchrun, and the few collectives that training
needs. With one process every function here does nothing.

Each process trains on its rows of the global batch and scales its loss by its share of them (so a
ragged last batch is averaged rightly); gradients are then summed in one flat all-reduce a net.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fastdcgan.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` on its own machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process where it says nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    try:
        rank, world, local_rank = (
            int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
    except ValueError:
        raise InputError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers") from None
    return Ranks(rank, world, local_rank)


def join(ranks: Ranks, device: torch.device) -> None:
    """Joins the process group (NCCL between CUDA devices, gloo otherwise)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world > 1 and not dist.is_initialized():
        # Both backends: gloo carries the host's own flags, so that they never wait for a device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def processes() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leave() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over all processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set in any process: all get the same answer."""
    if not dist.is_initialized():
        return flag
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def from_first(value: T) -> T:
    """The first process's `value`, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        any_rank(False)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all processes, unequal shares included; on any device.

    torch.nn.SyncBatchNorm is used on CUDA; it refuses CPU tensors, and this one serves there.
    x: (N, C, H, W). First order gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x by the mean and biased variance over (N, H, W) of all processes."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        given = x.dtype
        x = x.to(torch.promote_types(given, torch.float32))
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = all_reduce(torch.cat([x.sum([0, 2, 3]), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = x - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().sum([0, 2, 3])) / total
        if self.track_running_stats and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = (
                    1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                )
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (total / (total - 1)), momentum)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        out: Tensor = centred * scale.view(1, -1, 1, 1)
        if self.affine:
            out = out + self.bias.view(1, -1, 1, 1)
        return out.to(given)


def synchronise_batch_norm(net: nn.Module, device: torch.device) -> None:
    """Makes every BatchNorm2d inside `net` take its batch from all processes, in place: the same
    parameters, buffers and state-dict keys."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
