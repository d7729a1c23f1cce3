"""What is asked and what is answered: devices, the work of one kernel, blocks of a net. Data alone.
Not here: shapes and tiles (geometry.py), a block's tensors (spec.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from .devices import Device
from .geometry import Geometry, Tile

How = Literal["hybrid", "materialised", "prologue", "vendor", "reference"]  # the default first


@dataclass(frozen=True)
class Target:
    """A kind of device: what the compiler is told, and what a tile must fit."""

    name: str
    backend: str  # "cuda", "hip", or "cpu" for the interpreter
    arch: int | str
    warp_size: int
    shared_bytes: int  # most that one program may have
    multiprocessors: int
    descriptors: bool  # loads by tensor descriptor (TMA)
    peaks: Device  # of a card of this kind; a device has as much of them as multiprocessors
    tf32: bool = True  # products of float32 in TF32
    device: str = ""  # name of the device itself, by which measured choices are stored


@dataclass(frozen=True)
class Task:
    """One kernel's work: op is "conv", "conv_transposed" or "weight_gradient", with "image_" before
    it where the large side has an image's few channels."""

    op: str
    geometry: Geometry
    dtype: torch.dtype
    prologue: str  # "none": operands are loaded as they are
    epilogue: str
    groups: int


@dataclass(frozen=True)
class Block:
    """One layer on one batch, for the choice among implementations."""

    transposed: bool
    geometry: Geometry
    dtype: torch.dtype
    norm: bool
    groups: int


@dataclass(frozen=True)
class Choice:
    """`how` a block runs; `measured`: by the tuner, on this device."""

    how: How
    measured: bool = False


Question: TypeAlias = Block | Task
Answer: TypeAlias = How | Tile  # a block's, a task's
