"""What a piece of a program asks of a GPU, counted while it runs on tensors without data: kernel
launches, bytes, FLOPs. Not here: which piece (cost_model.py), and any measure of time.

Two kinds of work are seen. Triton launches are recorded with all their arguments
(`fastdcgan_kernels.gpu.launch.recording`); PyTorch's operations are seen as they are dispatched.

Bytes: every tensor that a launch reads counts once, every one that it writes counts once; a gather
counts what it takes. So these are the bytes that must move if nothing stays in a cache from one
launch to the next. An operation of PyTorch is one launch, but that BatchNorm in training is two
(statistics, then values; on the way back sums, then values: ATen/native/cuda/Normalization.cu), a
convolution's gradients are one each, and lists of tensors are cut as ATen cuts them. What libraries
add inside an operation, such as cuDNN's changes of layout, is not seen, and not counted.

FLOPs: products and sums of convolutions, two a multiplication, and nothing else; `flops` are those
made, padding of tiles included, `useful` those of the convolution itself.

L2: what passes between the L2 and the multiprocessors. A tile of a product loads its operands anew
at each step, whoever loaded them before, so these are many times the bytes above; everything else
passes once. Tiles of a library's products are not known: LIBRARY_TILE is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdcgan_kernels import ops
from fastdcgan_kernels.gpu.conv_image import strips
from fastdcgan_kernels.gpu.launch import Launch, recording

# PyTorch's multi-tensor launches (ATen/native/cuda/MultiTensorApply.cuh): elements of a chunk,
# chunks of a launch, and tensors of a launch by the number of lists.
CHUNK, CHUNKS = 65_536, 320
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}

# ASSUMED: rows and columns of the tiles in which cuDNN multiplies.
LIBRARY_TILE = 128

# Operations that read nothing of the tensor they write over.
OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")
GATHERING = ("index", "index_select")


@dataclass(frozen=True)
class Work:
    """What one launch, or several of one operation, ask for."""

    name: str
    launches: int
    read: int
    written: int
    flops: int = 0
    useful: int = 0
    tile_loads: int = 0
    """Bytes of operands that tiles of products load, one tile after the other."""
    operands: int = 0
    """Bytes of these operands, each once; they are among those read."""
    programs: int = 0
    """Of a launch of ours; 0 where unknown."""

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def l2(self) -> int:
        """Bytes through the L2."""
        return self.bytes - self.operands + self.tile_loads


@contextmanager
def counting() -> Iterator[list[Work]]:
    """What is launched and dispatched inside, in its order. On the meta device our operators run
    their launches in the recorder; operations on fake tensors are seen as on any device."""
    work: list[Work] = []
    with recording() as launches, _Operations(work, launches):
        yield work


class _Operations(TorchDispatchMode):
    def __init__(self, work: list[Work], launches: list[Launch]) -> None:
        super().__init__()
        self._work, self._launches = work, launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastdcgan":  # its body, where a fake would do for the shapes
            with self:
                result = getattr(ops, func._opname)._init_fn(*args, **kwargs)
            self._take_launches()
            return result
        if func.namespace == "aten" and _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._take_launches()
        if func._opname == "_local_scalar_dense":  # .item(): the device is waited for
            if _tensors(args):
                self._work.append(Work("copy to the host", 1, args[0].itemsize, 0))
            return 1.0
        result = func(*args, **kwargs)
        self._work += _work_of(func, args, kwargs, result)
        return result

    def __exit__(self, *error: Any) -> None:
        self._take_launches()
        super().__exit__(*error)

    def _take_launches(self) -> None:
        """Launches as numbers: who keeps a gradient keeps autograd from giving it away, and it
        would be copied."""
        self._work += [work_of_launch(launch) for launch in self._launches]
        self._launches.clear()


def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(func.has_kernel_for_dispatch_key(key))


# --- PyTorch's operations -------------------------------------------------------------------------


def size(tensor: Tensor) -> int:
    """Bytes of the elements; those of an expanded tensor once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride or not n) * tensor.itemsize


def _tensors(value: Any) -> list[Tensor]:
    """Those without data, each once: tensors with data are the host's and cost a device nothing."""
    found: dict[Any, Tensor] = {}
    for t in tree_leaves(value):
        if isinstance(t, FakeTensor) or (isinstance(t, Tensor) and t.is_meta):
            found.setdefault((_memory(t), t.storage_offset(), t.shape, t.stride()), t)
    return list(found.values())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _work_of(func: Any, args: Any, kwargs: Any, result: Any) -> list[Work]:
    """One launch for every operation, but none for a view or an allocation."""
    name = func._opname
    if func.namespace != "aten" or func.is_view or "empty" in name or name in ("detach", "set_"):
        return []
    if name.startswith("_foreach_"):
        return [_multi_tensor(func, [arg for arg in args if isinstance(arg, (list, tuple))])]
    if name == "convolution_backward":
        return _convolution_backward(args, result)
    changed = _tensors([args[at] for at in _written_arguments(func) if at < len(args)])
    old = {_memory(t) for t in _tensors((args, kwargs))}
    new = [t for t in _tensors(result) if _memory(t) not in old]
    if not changed and not new:
        return []  # a question, or a tensor that was as wanted
    read = [t for t in _tensors((args, kwargs)) if not _is_one_of(t, changed)]
    if not name.startswith(OVERWRITING):
        read += changed
    taken, launches = sum(map(size, read)), 1
    if "batch_norm" in name and any(arg is True for arg in args):  # in training
        two = args[:2] if "backward" in name else args[:1]
        taken, launches = taken + sum(map(size, two)), 2
    if name in GATHERING:
        taken += size(result) - size(args[0])
    written = sum(map(size, [*changed, *new]))
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return [_library_product(name, taken, written, flops, new[0].itemsize)]
    return [Work(name, launches, taken, written)]


def _library_product(name: str, read: int, written: int, flops: int, itemsize: int) -> Work:
    """One launch, whose tiles are assumed."""
    loads = Product(flops, LIBRARY_TILE, LIBRARY_TILE).loads * itemsize
    return Work(name, 1, read, written, flops, flops, max(loads, read), read)


def _is_one_of(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _written_arguments(func: Any) -> list[int]:
    return [
        at
        for at, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _convolution_backward(args: Any, result: Any) -> list[Work]:
    """Each gradient is a launch of its own."""
    dy, x, weight = args[:3]
    count = flop_registry[torch.ops.aten.convolution_backward]
    found = []
    for at, other in ((0, weight), (1, x)):
        if args[-1][at]:
            mask = [at == 0, at == 1, False]
            flops = count(*args[:-1], mask, out_val=result)
            name = ("convolution, input gradient", "convolution, weight gradient")[at]
            read, written = size(dy) + size(other), size(result[at])
            found.append(_library_product(name, read, written, flops, dy.itemsize))
    if args[-1][2]:
        found.append(Work("convolution, bias gradient", 1, size(dy), size(result[2])))
    return found


def _multi_tensor(func: Any, lists: Iterable[Any]) -> Work:
    """An operation on lists of tensors: as many launches as PyTorch cuts its chunks into."""
    lists = [[t for t in one if isinstance(t, Tensor)] for one in lists]
    lists = [one for one in lists if _tensors(one)]
    name = func._opname
    if not lists:
        return Work(name, 0, 0, 0)
    writes = set(_written_arguments(func))
    total = [sum(map(size, one)) for one in lists]
    written = sum(n for at, n in enumerate(total) if at in writes)
    read = sum(n for at, n in enumerate(total) if at not in writes or name != "_foreach_copy_")
    if not writes:
        written = total[0]
    launches = multi_tensor_launches([t.numel() for t in lists[0]], len(lists))
    return Work(name, launches, read, written)


def multi_tensor_launches(elements: Iterable[int], lists: int) -> int:
    """Launches for tensors of so many elements, in so many lists."""
    launches = tensors = chunks = 0
    for n in elements:
        tensors += 1
        for at in range(-(-n // CHUNK)):
            chunks += 1
            last = at == -(-n // CHUNK) - 1
            if chunks == CHUNKS or (last and tensors == TENSORS[lists]):
                launches, chunks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (chunks > 0)


# --- Our launches ---------------------------------------------------------------------------------


# Arguments that products load; the rest is read by prologues and epilogues.
OPERANDS = ("x", "x_aux", "w", "small", "small_aux", "large", "large_aux", "image")


class Product(NamedTuple):
    """Products [rows, K] x [K, columns], one for each tile."""

    flops: int
    rows: int
    columns: int
    left: int = 1
    """How often a step loads its [rows, K] operand: 0 where it is there already, 2 with an aux."""
    right: int = 1
    """The same, of [K, columns]."""

    @property
    def loads(self) -> int:
        """Elements that all tiles load."""
        pairs = self.flops // 2
        return pairs * self.left // self.columns + pairs * self.right // self.rows


def work_of_launch(launch: Launch) -> Work:
    """By what the kernel of that name does with its arguments (`fastdcgan_kernels/gpu`)."""
    name, given = launch.kernel.fn.__name__, launch.named
    reads, writes = traffic(name, given)
    products, useful = _products(name, launch.grid, given)
    taken = sum(_size(given[r]) for r in reads)
    if name == "crop":  # of uint8 images, as many values as it writes
        taken += given["out"].numel()
    written = sum(_size(given[w]) for w in writes)
    if name == "adam":  # buffers, behind the parameters, are only read
        written -= _size(given["values"][len(given["steps"]) :])
    loads = operands = 0
    if products:
        element = _tensor(given["small" if "small" in given else "x"]).itemsize
        loads = sum(product.loads for product in products) * element
        operands = sum(_size(given[r]) for r in reads if r in OPERANDS)
    flops = sum(product.flops for product in products)
    programs = math.prod(launch.grid)
    return Work(name, 1, taken, written, flops, useful, loads, operands, programs)


def _size(value: Any) -> int:
    """Bytes of a tensor, of the tensor that a descriptor describes, or of several."""
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return size(_tensor(value))


def _tensor(value: Any) -> Tensor:
    """The tensor, or that of a descriptor."""
    found: Tensor = value if isinstance(value, Tensor) else value.base
    return found


def _operand(name: str, given: dict[str, Any], prologue: str) -> list[str]:
    """What `load_operand` reads."""
    reads = [name]
    if prologue in ("normgrad", "actgrad"):
        reads.append(f"{name}_aux")
    if prologue in ("activate", "normgrad"):
        reads.append(f"{name}_coef")
    return reads


def _epilogue(given: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What `store_tile` and `finish` read and write."""
    reads, writes = [], ["out"]
    if given["HAS_BIAS"]:
        reads.append("end_bias")
    if given["EPILOGUE"] == "gradient":
        reads += ["end_aux", "end_coef"]
    if given["EPILOGUE"] == "actgrad":
        reads.append("end_aux")
    more_reads, more_writes = _partials(given, given["EPILOGUE"])
    return [*reads, *more_reads], [*writes, *more_writes]


def _partials(given: dict[str, Any], kind: str) -> tuple[list[str], list[str]]:
    """What `finish` reads and writes for an epilogue of this kind: each program its row, the last
    one all of them, and what it makes of them."""
    if kind not in ("statistics", "gradient", "column"):
        return [], []
    rows = ["end_partials", *["end_counts"] * (kind == "statistics")]
    if "end_merged" in given:  # nothing is: a launch to come merges them
        return [], rows
    if kind != "statistics":  # coefficients whose gradient it makes are those that it has read
        return rows, [*rows, "end_merged_out"]
    moved = ["end_merged_running", "end_merged_batches"]
    reads = [f"end_merged_{name}" for name in ("gamma", "beta", "momenta")]
    writes = ["end_merged_coef", "end_merged_stats", *moved]
    return [*rows, *reads, *moved], [*rows, *writes]


def traffic(name: str, given: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the arguments that are read and of those that are written."""
    if name in ("gather_pointers", "gather_descriptors", "image_down", "image_up"):
        reads, writes = _epilogue(given)
        return [*_operand("x", given, given["PROLOGUE"]), "w", *reads], writes
    if name == "gather_gluon":
        reads, writes = _epilogue(given)
        return ["x", "w", *reads], writes
    if "weight_gradient" in name:
        small = _operand("small", given, given["SMALL_PROLOGUE"])
        return [*small, *_operand("large", given, given["LARGE_PROLOGUE"])], ["out"]
    if name == "reduce_splits":
        reads, writes = _epilogue(given)
        return ["parts", *reads], writes
    if name == "apply_prologue":
        return _operand("x", given, given["PROLOGUE"]), ["out"]
    if name == "prologue_sums":
        reads, writes = _partials(given, "column")
        return [*_operand("x", given, given["PROLOGUE"]), *reads], writes
    if name == "partial_statistics":
        reads, writes = _partials(given, "statistics")
        return ["y", *reads], writes
    if name == "activation_gradient":
        reads, writes = _partials(given, "gradient")
        return ["g", "end_aux", "end_coef", *reads], ["out", *writes]
    if name == "merge_rows":
        reads, writes = _partials(given, given["KIND"])
        of = ["partials", "counts"] if given["KIND"] == "statistics" else ["partials", "end_coef"]
        return [*of, *reads], writes
    if name == "bce_rows":
        return ["logits", "targets", *["scale"] * given["SCALED"]], ["row", "gradient"]
    if name == "adam":
        followed = ["updates"] * bool(given["averages"])
        state = ["values", "first_moments", "second_moments", "steps", "averages", *followed]
        gradients, scaled = ["narrow", "gradients"], given["SCALED"]
        reads = [*gradients, "counts", "rate", *["scale", "found_inf"] * scaled]
        return [*state, *reads], [*state, *gradients * scaled, "copies", "counted"]
    if name == "crop":
        moved = [*["top", "left"] * given["MOVED"], *["flipped"] * given["FLIPPED"]]
        return ["rows", *moved], ["out"]
    raise ValueError(f"a launch of {name}, of which nothing is known here: say what it reads")


def _products(name: str, grid: tuple[int, ...], given: dict[str, Any]) -> tuple[list[Product], int]:
    """Those that the kernel makes with `tl.dot`, and the FLOPs of the convolution itself."""
    if name != "gather_gluon" and "PRECISION" not in given:  # no tl.dot
        return [], 0

    def padded(n: int, block: int) -> int:
        return -(-n // block) * block

    def loaded(prologue: str) -> int:
        return 2 if given.get(prologue) in ("normgrad", "actgrad") else 1

    columns = given.get("BLOCK_N", given.get("WINDOW", 64)) * given.get("TAPS", 1)
    rows = given["BLOCK_M"]
    images = given["groups"] * given["images"]
    pixels = given["images"] * given["P"] * given["Q"]
    depth = given.get("BLOCK_K", 64)
    small = ("HI", "WI") if given.get("TRANSPOSED") and "HI" in given else ("P", "Q")
    taps = given[small[0]] * given[small[1]] * given.get("K", 4) ** 2
    useful = 2 * images * taps * given["CS"] * given["CL"]
    if "weight_gradient" in name:
        made = 2 * grid[0] * rows * columns * given["groups"] * padded(pixels, depth)
        small, large = loaded("SMALL_PROLOGUE"), loaded("LARGE_PROLOGUE")
        return [Product(made, rows, columns, small, large)], useful
    phases, wide = given["PHASE"] ** 2, padded(given["CO"], columns)
    tiles = padded(pixels, rows) // rows * phases  # of a group, which its programs share
    if "BOX" in given or "BOX_N" in given:
        deep = given["BOX"][0] if "BOX" in given else given["BOX_N"]
        tiles = padded(given["images"], deep) * given["P"] * given["Q"] // rows * phases
    if name == "image_down":
        k = padded(given["WINDOW"], depth)
    elif name == "image_up":  # all taps of a pixel are columns
        k, wide = padded(given["CS"], depth), columns
        tiles = given["images"] * strips(given["P"], given["Q"], rows)[1]
    else:
        k = given["SIDE"] ** 2 * padded(given["CI"], depth)
    made = 2 * given["groups"] * tiles * rows * wide * k
    return [Product(made, rows, columns, loaded("PROLOGUE"))], useful
