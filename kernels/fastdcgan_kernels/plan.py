"""Which implementation and which tile: policy, and no kernels; imports no Triton.

A choice is one of
    materialised  our GEMM; activations and gradients through the norm are passes of their own
    prologue      our GEMM, which normalises and activates its operands as it loads them
    vendor        PyTorch's convolution, with our statistics, normalise, activate and backward
    reference     plain PyTorch
None of the defaults below was timed on a GPU: they are predictions. tuner.py measures on the
user's device, and what it stored is taken before any default.

By bytes and launches alone a prologue is better everywhere (benchmarks/cost_model.py: a step of 128
images moves 1.1 GB in 76 launches, and 1.7 GB in 110 materialised). That counts no instructions. A
prologue transforms each value once for every tap and column tile that reads it: by docs/inspect.md
a sm_90 program with one has some 100 instructions for each matrix instruction in its loop, some 30
without. A multiprocessor starts 4 warps' instructions a cycle and multiplies 2048 pairs of bf16, so
8 warps with a 128x64x64 step need 97 * 4 * 8 / 4 = 780 cycles for 256 of products with a prologue,
and with a 128x128x64 step 134 * 8 / 4 = 270 for 512 without. For D's third layer at batch 128 that
is about 40 us more, and the pass over its input that it saves takes about 11. So the default is
materialised, and where memory is slow beside arithmetic the tuner will say otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch

from fastdcgan_kernels.geometry import Geometry, Tile, cdiv

How = Literal["materialised", "prologue", "vendor", "reference"]
MODES = ("auto", "reference", "triton")


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
    tf32: bool = True  # products of float32 in TF32
    device: str = ""  # name of the device itself, by which measured choices are stored


# Shared memory of a block: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability" (maximum per block, opt-in); LDS of a work-group: AMD's CDNA3 and CDNA4 ISA guides.
# Multiprocessors: of A100, L40S, H100 SXM, B200, RTX 5090, MI300X, MI355X, by their data sheets.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912, 108, False),
        Target("sm_89", "cuda", 89, 32, 101_376, 142, False),
        Target("sm_90", "cuda", 90, 32, 232_448, 132, True),
        Target("sm_100", "cuda", 100, 32, 232_448, 148, True),
        Target("sm_120", "cuda", 120, 32, 101_376, 170, True),
        Target("gfx942", "hip", "gfx942", 64, 65_536, 304, False),
        Target("gfx950", "hip", "gfx950", 64, 163_840, 256, False, tf32=False),
    )
}
INTERPRETER = Target(
    "interpreter", "cpu", "interpreter", 1, 1 << 40, 1, False, device="interpreter"
)

_modes: list[str] = []
_assumed: list[Target] = []
_overrides: list[Mapping[Block, How] | How] = []
_questions: list[dict[Block | Task, None]] = []


@dataclass(frozen=True)
class Task:
    """One kernel's work: op is "down", "up" or "weight_gradient", or image_ and that."""

    op: str
    geometry: Geometry
    dtype: torch.dtype
    prologue: str  # "none": operands are loaded as they are
    epilogue: str
    groups: int


@dataclass(frozen=True)
class Block:
    """One layer on one batch, for the choice among implementations."""

    kind: str  # "down" or "up"
    geometry: Geometry
    dtype: torch.dtype
    norm: bool
    groups: int


@dataclass(frozen=True)
class Pair:
    """Two layers down, one behind the other, that share a launch on the way back where the second,
    or both of the first two, run by "prologue" (docs/fused-blocks.md). Each has its own choice;
    what they gain is seen on both together."""

    first: Block
    second: Block

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        return self.first.dtype


Question = TypeVar("Question", Block, Task)


@dataclass(frozen=True)
class Choice:
    """`how` is one of the module's four words; `measured`: by the tuner, on this device."""

    how: How
    measured: bool = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def mode() -> str:
    """As `implementation` says, else FASTDCGAN_IMPL: "auto" (default), "reference" or "triton".

    Raises:
        ValueError: for anything else.
    """
    if _modes:
        return _modes[-1]
    given = os.environ.get("FASTDCGAN_IMPL", "auto")
    if given not in MODES:
        raise ValueError(f"FASTDCGAN_IMPL={given!r} was given; give one of {', '.join(MODES)}")
    return given


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def target_of(device: torch.device) -> Target | None:
    """What kernels on this device are made for; None where none run."""
    if device.type == "meta":
        return _assumed[-1] if _assumed else None
    if device.type == "cpu":
        return INTERPRETER if os.environ.get("TRITON_INTERPRET") == "1" else None
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return None


@functools.cache
def _cuda_target(index: int) -> Target | None:
    """The known target at or below this device's capability, with the device's own figures."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        known = TARGETS.get(properties.gcnArchName.split(":")[0])
        return known and replace(
            known, multiprocessors=properties.multi_processor_count, device=properties.name
        )
    capability = 10 * properties.major + properties.minor
    below = [
        target
        for target in TARGETS.values()
        if target.backend == "cuda" and int(target.arch) // 10 == capability // 10
        and int(target.arch) <= capability
    ]  # fmt: skip
    if not below:
        return None
    known = max(below, key=lambda target: int(target.arch))
    shared = getattr(properties, "shared_memory_per_block_optin", known.shared_bytes)
    return replace(
        known,
        shared_bytes=min(known.shared_bytes, shared),
        multiprocessors=properties.multi_processor_count,
        device=properties.name,
    )


@contextlib.contextmanager
def implementation(mode: str) -> Iterator[None]:
    """Inside, `mode` is what FASTDCGAN_IMPL says outside; "auto" leaves it as that says."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} was given; give one of {', '.join(MODES)}")
    if mode == "auto":
        yield
        return
    _modes.append(mode)
    try:
        yield
    finally:
        _modes.pop()


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Inside, tensors on the meta device are taken to be on this target."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


@contextlib.contextmanager
def override(how: How | Mapping[Block, How]) -> Iterator[None]:
    """Inside, every block runs like this, or these blocks, bucketed, like that."""
    if isinstance(how, str) and how not in get_args(How):
        raise ValueError(f"how={how!r} was given; give one of {', '.join(get_args(How))}")
    _overrides.append(how)
    try:
        yield
    finally:
        _overrides.pop()


@contextlib.contextmanager
def recording() -> Iterator[dict[Block | Task, None]]:
    """What `choose` and `tile_for` are asked inside, bucketed, each once, in order."""
    asked: dict[Block | Task, None] = {}
    _questions.append(asked)
    try:
        yield asked
    finally:
        _questions.pop()


def bucket(n: int) -> int:
    """The power of two at or above n: batches of 65 to 128 share one decision. By comparisons, so
    that torch.compile, too, asks no more of a batch than these bounds."""
    power = 1
    while power < n:
        power *= 2
    return power


def _bucketed(asked: Question) -> Question:
    return replace(asked, geometry=replace(asked.geometry, N=bucket(asked.geometry.N)))


def choose(block: Block, target: Target) -> Choice:
    """How this block runs here: as overridden, else as measured, else materialised. That default,
    which was not timed, keeps loads free of arithmetic that 16 taps would repeat."""
    block = _bucketed(block)
    if _questions:
        _questions[-1][block] = None
    if _overrides:
        given = _overrides[-1]
        if isinstance(given, str):
            return Choice(given)
        if block in given:
            return Choice(given[block])
    g = block.geometry
    numbers = (g.N, g.P, g.Q, g.CS, g.H, g.W, g.CL, g.stride, g.pad)
    sizes = tuple([operator.index(n) for n in numbers])  # torch.compile may have symbols there
    stored = _measured(target.device, block.kind, sizes, block.dtype, block.norm, block.groups)
    return Choice(stored, measured=True) if stored else Choice("materialised")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _measured(
    device: str, kind: str, sizes: tuple[int, ...], dtype: torch.dtype, norm: bool, groups: int
) -> How | None:
    """What the tuner stored. torch.compile takes it for a constant, and does not look into the
    reading of a file; for that the arguments are plain."""
    from fastdcgan_kernels import measured

    block = Block(kind, Geometry(*sizes), dtype, norm, groups)
    stored: How | None = measured.stored_choice(block, device)
    return stored


def tile_for(task: Task, target: Target) -> Tile:
    """The tile of this task: a measured one, else the heuristic's."""
    from fastdcgan_kernels import measured

    task = _bucketed(task)
    if _questions:
        _questions[-1][task] = None
    return measured.stored_tile(task, target.device) or _heuristic(task, target)


def tile_of_both(tile: Tile, target: Target) -> Tile:
    """That of both gradients of an image in one launch, from that of the features' alone; others
    would spill (inspect.py)."""
    rows = 32 if target.name in ("sm_80", "sm_89", "sm_120") else 64
    return replace(tile, rows=rows, stages=1 if target.name == "gfx942" else tile.stages)


def parts(target: Target, groups: int) -> int:
    """Programs of each group that go over its tiles and keep a sum: one for each multiprocessor in
    all, because each writes its part of the sum, which is then read once more."""
    return max(1, target.multiprocessors // groups)


def shared_bytes(task: Task, tile: Tile) -> int:
    """Estimate of the shared memory that a program takes: its operands, in every stage."""
    operands = 2 if task.prologue != "none" else 1
    return tile.stages * operands * (tile.rows + tile.columns) * tile.depth * task.dtype.itemsize


def neighbours(task: Task, target: Target) -> list[Tile]:
    """The heuristic's tile, then those one step away from it that fit: what the tuner tries."""
    first = _heuristic(task, target)
    steps = {  # least and most; a step is a factor of 2
        "rows": (64 if target.name in ("sm_90", "sm_100") else 16, 256),
        "columns": (16, 256),
        "depth": (16, 128 // task.dtype.itemsize),
        "split": (1, 64),
        "stages": (2, 4),
    }
    if task.op in ("image_up", "image_weight_gradient"):
        del steps["columns"]  # not read
    if task.op in ("image_up", "image_down"):
        del steps["split"]  # not read
    found = [replace(first, warps=12 - first.warps)]
    if target.descriptors and not task.op.startswith("image_"):
        found.append(replace(first, descriptors=not first.descriptors))
    for name, (least, most) in steps.items():
        value = getattr(first, name)
        others = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        for other in others:
            if least <= other <= most:
                tile = replace(first, **{name: other})
                found.append(replace(tile, warps=_warps(task, tile.rows, tile.columns)))
    fit = [
        tile
        for tile in found
        if shared_bytes(task, tile) <= target.shared_bytes
        and tile.rows * tile.columns <= 128 * 256
        and tile.warps >= _warps(task, tile.rows, tile.columns)
    ]
    return list(dict.fromkeys([first, *fit]))


def pairs(asked: Iterable[Block | Task]) -> list[Pair]:
    """Those layers among these that share a launch: a discriminator's last two, and its first two
    in a step of its own, where they see two batches at once. (With one batch it is G that learns,
    from the gradient of the image.)"""
    blocks = [one for one in asked if isinstance(one, Block) and one.kind == "down"]
    return [
        Pair(one, two)
        for one in blocks
        for two in blocks
        if (two.geometry.N, two.geometry.CL, two.geometry.H, two.geometry.W)
        == (one.geometry.N, one.geometry.CS, one.geometry.P, one.geometry.Q)
        and one.dtype == two.dtype
        and (_through_image(one, two) or _through_norm(one, two))
    ]


def _through_image(one: Block, two: Block) -> bool:
    g = one.geometry
    image = g.stride == 2 and g.CL <= 4 and g.CS % 8 == 0
    return image and not one.norm and two.norm and two.groups > 1 and two.geometry.stride == 2


def _through_norm(one: Block, two: Block) -> bool:
    number = two.geometry.stride == 1 and two.geometry.CS == 1
    return one.norm and number and not two.norm and one.groups == two.groups


def ways(pair: Pair, target: Target) -> list[tuple[How, How]]:
    """How both layers of a pair may run: as they are to, the launch shared, and not."""
    first, second = (choose(block, target).how for block in (pair.first, pair.second))
    every: list[tuple[How, How]] = [(first, second)]
    if pair.first.norm:  # how that one runs is another question
        every += [(first, "prologue"), (first, "materialised")]
    else:
        every += [("prologue", "prologue"), ("materialised", "materialised")]
    return list(dict.fromkeys(every))


def _warps(task: Task, rows: int, columns: int) -> int:
    """4, and 8 where so few threads would spill (inspect.py)."""
    most = 64 * 64 if task.epilogue == "gradient" else 128 * 64
    if task.prologue != "none":
        most = 64 * 32
    if task.dtype == torch.float32:
        most = 32 * 32
    return 8 if rows * columns > most else 4


def _power(n: int, least: int, most: int) -> int:
    """The smallest power of two that covers n, within bounds."""
    return max(least, min(most, bucket(n)))


@functools.lru_cache(maxsize=4096)
def _heuristic(task: Task, target: Target) -> Tile:
    """Large tiles while there are programs for every multiprocessor and room for their operands;
    then smaller ones, then parts of the sum. Start: 128 x 128 x 64 with 8 warps and 3 stages, which
    compiles without spills for all GEMMs here (inspect.py)."""
    g, op = task.geometry, task.op.removeprefix("image_")
    image = task.op.startswith("image_")
    size = task.dtype.itemsize
    pixels, groups = g.N // task.groups * g.P * g.Q, task.groups
    if op == "weight_gradient":  # the groups are one sum
        m, n, k, copies = g.CS, (64 if image else g.CL), groups * pixels, (1 if image else 16)
        groups = 1
    elif op == "down":
        m, n, k, copies = pixels, g.CS, (64 if image else 16 * g.CL), 1
    else:
        m, n = pixels, 16 if image else g.CL
        k = 9 * g.CS if image else (4 if g.stride > 1 else 1) * g.CS
        copies = 1 if image else g.phases
    depth_of = k if image and op == "down" else {"down": g.CL, "up": g.CS}.get(op, k)
    if target.name == "interpreter":  # what an operation costs hardly depends on its size
        rows, columns, depth = _power(m, 16, 512), _power(n, 16, 128), _power(depth_of, 16, 512)
        return Tile(rows, columns, depth, warps=1, stages=1)
    rows, columns = _power(m, 16, 128), _power(n, 16, 128)
    depth = _power(depth_of, 16, 128 // size)
    if target.name in ("sm_90", "sm_100"):
        rows = max(rows, 64)  # the least that their matrix instructions take
    if task.prologue != "none" or task.epilogue == "gradient":
        columns = min(columns, 64)  # operands or another tile in registers: more would spill

    def programs(rows: int, columns: int) -> int:
        return cdiv(m, rows) * cdiv(n, columns) * copies * groups

    while programs(rows, columns) < target.multiprocessors and max(rows, columns) > 64:
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    steps = cdiv(k, depth)
    split = 1
    if not (image and op != "weight_gradient"):
        # A sum in parts is written, read and added once more: not for the last quarter.
        while split < 32 and programs(rows, columns) * split < target.multiprocessors * 3 // 4:
            if steps // (2 * split) < 4:
                break
            split *= 2
    stages = 2 if task.prologue != "none" or task.epilogue == "gradient" else 3

    def shared(stages: int, depth: int) -> int:
        return shared_bytes(task, Tile(rows, columns, depth, stages=stages))

    while shared(stages, depth) > target.shared_bytes * 3 // 4:
        if stages > 2:
            stages -= 1
        elif depth > 16:
            depth //= 2
        else:
            break
    warps = _warps(task, rows, columns)
    if {"down": g.CL, "up": g.CS}.get(op, 8) * size % 16:
        warps = 8  # no 16-byte loads: the addresses of smaller ones take registers
    # A prologue works on registers: then the way through them is no detour.
    descriptors = target.descriptors and not image and task.prologue == "none"
    return Tile(rows, columns, depth, split, warps, stages, descriptors)
