"""The ten layers of the 64-pixel DCGAN as questions to the kernels' plan, taken from the nets
themselves. Not here: what the plan answers (expectations.py), and whether that computes right
(blocks.py)."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from fastdcgan import models
from fastdcgan_kernels import plan
from fastdcgan_kernels.cpu import blocks as cpu
from fastdcgan_kernels.functional import runs_cpu_kernels, runs_kernels
from fastdcgan_kernels.geometry import geometry_of
from fastdcgan_kernels.plan import Block, Pair

SIZE, NZ, WIDTH, CHANNELS = 64, 100, 64, 3


def batch_for(device: torch.device) -> int:
    """Images of the steps that are looked at. One number for all that is run on a GPU, so that
    kernels are compiled once."""
    return 128 if device.type == "cuda" else 16


def layers(batch: int, dtype: torch.dtype) -> dict[str, Block]:
    """G1 to G5 and D1 to D5 of a training step: D takes real and generated images as one batch of
    twice as many, with BatchNorm statistics of their own."""
    with torch.device("meta"):
        netG, netD = models.build(
            "dcgan", size=SIZE, nz=NZ, ngf=WIDTH, ndf=WIDTH, channels=CHANNELS
        )
        found: dict[str, Block] = {}
        for letter, net, x in (
            ("G", netG, torch.empty(batch, NZ, 1, 1)),
            ("D", netD, torch.empty(2 * batch, CHANNELS, SIZE, SIZE)),
        ):
            modules = [module for module in net.modules() if not list(module.children())]
            for module, after in pairwise([*modules, nn.Identity()]):
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    up, norm = isinstance(module, nn.ConvTranspose2d), _is_norm(after)
                    found[f"{letter}{sum(name[0] == letter for name in found) + 1}"] = Block(
                        "up" if up else "down",
                        geometry_of(x, module.weight, up, module.stride[0]),
                        dtype,
                        norm,
                        2 if norm and letter == "D" else 1,
                    )
                x = module(x)
    return found


def pairs(found: dict[str, Block]) -> dict[str, Pair]:
    """Those of `layers` that may share a launch, as kernels are asked for them: D5 works on what
    D4 has normalised by groups."""
    last = replace(found["D5"], groups=found["D4"].groups)
    return {"D1+D2": Pair(found["D1"], found["D2"]), "D4+D5": Pair(found["D4"], last)}


def way_of(block: Block, device: torch.device) -> str:
    """How this block runs here: on a GPU one of the words of the kernels' plan, elsewhere "C++" or
    "plain PyTorch"."""
    target = plan.target_of(device)
    if runs_kernels(device) and target is not None:
        return plan.choose(block, target).how
    takes = runs_cpu_kernels(device) and block.dtype == torch.float32
    if takes and cpu.takes(block.geometry, block.kind == "up", block.norm):
        return "C++"
    return "plain PyTorch"


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)
