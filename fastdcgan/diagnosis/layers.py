"""The ten layers of the 64-pixel DCGAN as questions about kernels. Not here: what is answered
(expectations.py), and whether that computes right (blocks.py)."""

import torch

from fastdcgan_kernels import dcgan
from fastdcgan_kernels.choice import choose, targets
from fastdcgan_kernels.choice.types import Block
from fastdcgan_kernels.cpu import blocks as cpu
from fastdcgan_kernels.functional import runs_cpu_kernels, runs_kernels

SIZE, CHANNELS = 64, 3


def batch_for(device: torch.device) -> int:
    """Images of the steps that are looked at. One number for all that is run on a GPU, so that
    kernels are compiled once."""
    return 128 if device.type == "cuda" else 16


def layers(batch: int, dtype: torch.dtype) -> dict[str, Block]:
    """G1 to G5 and D1 to D5 of a training step: D takes real and generated images as one batch of
    twice as many, with BatchNorm statistics of their own."""
    found = {}
    for layer in dcgan.layers(SIZE, CHANNELS):
        groups = 2 if layer.name[0] == "D" else 1
        geometry = layer.geometry(groups * batch)
        groups = groups if layer.norm else 1
        found[layer.name] = Block(layer.transposed, geometry, dtype, layer.norm, groups)
    return found


def way_of(block: Block, device: torch.device) -> str:
    """How this block runs here: on a GPU one of the words of the kernels' plan, elsewhere "C++" or
    "plain PyTorch"."""
    target = targets.target_of(device)
    if runs_kernels(device) and target is not None:
        return choose.choose(block, target).how
    takes = runs_cpu_kernels(device) and block.dtype == torch.float32
    if takes and cpu.takes(block.geometry, block.transposed, block.norm):
        return "C++"
    return "plain PyTorch"
