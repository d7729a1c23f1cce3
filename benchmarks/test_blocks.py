"""Every block of the 64-pixel DCGAN: forward, backward and both, by itself. On a GPU the time is
the device's alone (the host launches ahead, the L2 cache is flushed between); what launching costs
shows in the whole step. On the CPU nothing is compiled here, because compiling the blocks one by
one would take longer than the whole suite."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ours, peers
from benchmarks.ours import DEVICE
from benchmarks.peers import autocast
from benchmarks.timing import Workload
from fastdcgan.hardware import amp_dtype
from fastdcgan_kernels import fuse

CUDA = DEVICE.type == "cuda"
BATCH = 128 if CUDA else 16
MODES = ("forward", "backward", "both")
VARIANTS = {
    "pytorch example": {"memory_format": torch.contiguous_format},
    "pytorch channels_last": {},
    "pytorch tuned": {"amp": amp_dtype(DEVICE) is not None, "compile": CUDA},
    "fastdcgan": {"wrap": fuse},
    "fastdcgan --amp": {"wrap": fuse, "amp": True},
}


@pytest.fixture(scope="module")
def blocks():
    """Name -> (layers, input). The latents are the one input whose gradient nobody wants."""
    found = {}
    side = 1
    for i, layers in enumerate(peers.generator_layers(), start=1):
        CI = layers[0].in_channels
        x = torch.randn(BATCH, CI, side, side).requires_grad_(i > 1)
        found[f"G{i}"] = (layers, x)
        side = 4 if i == 1 else 2 * side
    for i, layers in enumerate(peers.discriminator_layers(), start=1):
        CI = layers[0].in_channels
        found[f"D{i}"] = (layers, torch.randn(BATCH, CI, side, side).requires_grad_())
        side //= 2
    return found


def workload(
    layers: list[nn.Module],
    x: Tensor,
    mode: str,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    amp: bool = False,
    compile: bool = False,
    wrap: Callable[[nn.Sequential], nn.Module] = lambda block: block,
) -> Workload:
    """One block, forward, backward, or both; `x` and the gradient of the output are given.

    Args:
        x: (N, CI, H, W); its gradient is wanted where it requires one.
        mode: "forward", "backward" or "both". The forward pass keeps what the backward one needs.
        wrap: makes another module of the block.
    """
    dtype = ours.native_amp(DEVICE) if amp else None
    module = wrap(nn.Sequential(*copy.deepcopy(layers)).to(DEVICE, memory_format=memory_format))
    wanted = x.requires_grad
    x = x.detach().to(DEVICE, memory_format=memory_format).requires_grad_(wanted)
    module = torch.compile(module, dynamic=False) if compile else module

    def forward() -> Tensor:
        with autocast(DEVICE, dtype):
            out: Tensor = module(x)
        return out

    out = forward().detach()
    gradient = torch.randn_like(out, memory_format=memory_format)
    inputs = [*module.parameters(), *([x] if wanted else [])]
    if mode == "forward":
        return Workload(forward, len(x))
    if mode == "both":
        return Workload(lambda: torch.autograd.grad(forward(), inputs, gradient), len(x))
    ahead: list[Tensor] = []
    return Workload(
        lambda: torch.autograd.grad(ahead.pop(), inputs, gradient),
        len(x),
        before=lambda: ahead.append(forward()),
    )


@pytest.mark.parametrize("block", [f"{net}{i}" for net in "GD" for i in range(1, 6)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_block(together, blocks, block, mode, variant):
    layers, x = blocks[block]
    makers = {
        name: partial(workload, layers, x, mode, **options) for name, options in VARIANTS.items()
    }
    together("block", makers, variant, rounds=9, flush=True, block=block, mode=mode, batch=BATCH)
