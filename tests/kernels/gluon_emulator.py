"""Runs gpu/conv_gluon.py, its own source, on the CPU, which Triton cannot: with a stand-in for
Gluon. A partition of warps is a thread, of which one runs at a time; after what it does, chance
picks who goes on, from a seed, so a run can be repeated.

It is hostile. A copy lands late and in any order, and until then its place holds NaN, as all shared
memory does at first. A product reads its operands when it is waited for, and a store its buffer.
What is written while it is read or on its way, or read while it lands, or stored without a fence,
is a `Fault`; where nobody can go on, that is one, too. TMA's boxes are 0 outside of the tensor.

Not seen here: layouts, registers, barriers among the warps of a partition (test_conv_gluon.py looks
for those in the PTX), how Triton reads the source, and the hardware. Not here: any test.
"""

import builtins
import importlib.util
import random
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import torch

from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.gpu import descriptors, tile

SOURCE = Path(tile.__file__).with_name("conv_gluon.py")
SWITCHES = 0.3  # how often another thread goes on after what one did
SLOW = 0.3  # how many copies land only when nothing else can, the oldest last
PATIENCE = 60  # seconds for a program; who waits in vain is found without it


class Fault(AssertionError):
    """What the hardware would not forgive."""


class Ended(BaseException):
    """Another thread failed."""


# --- Who goes on ----------------------------------------------------------------------------------


class Partition(threading.Thread):
    """A partition of warps, and what it has in flight."""

    def __init__(self, name, run):
        super().__init__(name=name, daemon=True)
        self.turn, self.ready, self.over = threading.Semaphore(0), lambda: True, False
        self.products, self.stores = [], []  # in flight
        self._run = run

    def run(self):
        self.turn.acquire()
        try:
            if now.error is None:
                self._run()
                if self.products or self.stores:
                    raise Fault(f"{self.name} left something in flight")
        except Ended:
            pass
        except BaseException as error:
            now.error = now.error or error
        self.over = True
        now.go_on()


class Program:
    """One program of the grid: its partitions, and who of them goes on."""

    def __init__(self, place, chance):
        self.place, self.chance = place, chance
        self.partitions, self.error, self.running = [], None, None
        self.copies, self.slow = [], []  # that have not landed

    def start(self, parts):
        for at, (function, args) in enumerate(parts):
            name = f"{function.__name__} {at}"
            self.partitions.append(Partition(name, lambda f=function, a=args: f(*a)))
        for partition in self.partitions:
            partition.start()
        self.go_on()
        for partition in self.partitions:
            partition.join(PATIENCE)
            if partition.is_alive():
                raise Fault(f"{partition.name} does not end")
        if self.error is not None:
            raise self.error

    def wait(self, ready=None):
        """Called by a partition: goes on when it is `ready`, and chance lets it."""
        own = self.running
        if ready is None:
            if self.chance.random() > SWITCHES:
                return
            ready = lambda: True  # noqa: E731
        own.ready = ready
        self.go_on()
        own.turn.acquire()
        if self.error is not None:
            raise Ended

    def copy(self, land):
        """Takes a copy, that lands some time."""
        (self.slow if self.chance.random() < SLOW else self.copies).append(land)

    def go_on(self):
        """Picks who is next, until that is a partition."""
        while True:
            alive = [p for p in self.partitions if not p.over]
            if self.error is not None:
                for partition in alive:
                    partition.turn.release()
                return
            able = [p for p in alive if p.ready()]
            if not able and not self.copies:
                self.copies = self.slow[-1:]
                del self.slow[-1:]
            if not able and not self.copies:
                if alive:
                    names = ", ".join(p.name for p in alive)
                    self.error = Fault(f"deadlock: {names} wait for what nobody will do")
                    continue
                return
            choice = self.chance.choice([*able, *self.copies])
            if isinstance(choice, Partition):
                self.running = choice
                choice.turn.release()
                return
            self.copies.remove(choice)
            choice()


now = Program(None, None)  # the one that runs


# --- Values ---------------------------------------------------------------------------------------


class Int(int):
    """A scalar. C divides towards zero and Python downwards: never below zero, then."""

    def __floordiv__(self, other):
        assert self >= 0 < other
        return Int(int(self) // int(other))

    def __mod__(self, other):
        assert self >= 0 < other
        return Int(int(self) % int(other))

    def __add__(self, other):
        return Int(int(self) + other) if isinstance(other, int) else other + int(self)

    def __mul__(self, other):
        return Int(int(self) * other) if isinstance(other, int) else other * int(self)

    def __sub__(self, other):
        return Int(int(self) - other)

    def __rsub__(self, other):
        return Int(other - int(self))

    def __xor__(self, other):
        return Int(int(self) ^ other)

    __radd__, __rmul__ = __add__, __mul__

    def to(self, dtype):
        return float(self)


class Values(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def split(self):
        return self[..., 0], self[..., 1]


def values(tensor):
    return tensor.as_subclass(Values)


class Pointer:
    def __init__(self, flat, at=0):
        self.flat, self.at = flat, at

    def __add__(self, more):
        return Pointer(self.flat, self.at + more)


def load(pointer):
    return values(pointer.flat[pointer.at.long()])


def store(pointer, value):
    at = pointer.at.long() if isinstance(pointer.at, torch.Tensor) else int(pointer.at)
    if not pointer.flat[at].isnan().all():
        raise Fault("written twice")
    pointer.flat[at] = value


def where(condition, a, b):
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, a, b)
    return Int(a if condition else b)


# --- Shared memory, barriers, copies, products ----------------------------------------------------


class Memory:
    """Shared memory, and what happens there: `place` is the same for all views of one allocation's
    entry."""

    def __init__(self, data, place=None):
        self.data = data
        self.place = place or SimpleNamespace(landing=0, leaving=0, read=0, unfenced=None)
        self._entries = {}

    @property
    def shape(self):
        return list(self.data.shape)

    def index(self, i):
        return self._entries.setdefault(int(i), Memory(self.data[int(i)]))

    def reshape(self, shape):
        return Memory(self.data.view(shape), self.place)

    def permute(self, order):
        return Memory(self.data.permute(order), self.place)

    def _expect(self, what, *, written):
        place = self.place
        if place.landing:
            raise Fault(f"{what} where a copy has not landed")
        if written and place.leaving:
            raise Fault(f"{what} where a store has not read")
        if written and place.read:
            raise Fault(f"{what} where a product has not read")

    def store(self, value):
        self._expect("written", written=True)
        assert (value.shape, value.dtype) == (self.data.shape, self.data.dtype)
        self.data.copy_(value)
        self.place.unfenced = now.running
        fenced.add(self)
        now.wait()

    def load(self, layout):
        self._expect("read", written=False)
        now.wait()
        return values(self.data.clone())

    def begin_product(self):
        self._expect("multiplied", written=False)
        self.place.read += 1

    def begin_store(self):
        self._expect("stored", written=False)
        if self.place.unfenced is not None:
            raise Fault("stored without a fence")
        self.place.leaving += 1

    def begin_copy(self):
        self._expect("copied to", written=True)
        if self.place.unfenced is not None:
            raise Fault("copied to without a fence")
        self.place.landing += 1
        self.data.fill_(float("nan"))


fenced = set()  # what somebody wrote since his last fence


def fence():
    for memory in [m for m in fenced if m.place.unfenced is now.running]:
        memory.place.unfenced = None
        fenced.discard(memory)
    for barrier in unfenced_barriers:
        barrier.fenced = True
    unfenced_barriers.clear()


unfenced_barriers = []


class Barriers:
    """index(i) is one of them."""

    def __init__(self, n):
        self._all = [SimpleNamespace(phase=0, count=None, fenced=False) for _ in range(n)]

    def index(self, i):
        return self._all[int(i)]


def init(barrier, count):
    barrier.count = barrier.left = count
    barrier.bytes = 0
    unfenced_barriers.append(barrier)


def turn_over(barrier):
    if barrier.left == 0 and barrier.bytes == 0:
        barrier.phase, barrier.left = barrier.phase ^ 1, barrier.count


def wait_for(barrier, turn):
    now.wait(lambda: barrier.phase != int(turn))


def arrive(barrier, count=1):
    barrier.left -= count
    if barrier.left < 0:
        raise Fault("arrived twice in one turn")
    turn_over(barrier)
    now.wait()


def expect(barrier, nbytes):
    barrier.bytes += nbytes
    arrive(barrier)


class Descriptor:
    def __init__(self, base, shape, strides, block_shape, layout):
        assert len(shape) == len(strides) == len(block_shape) <= 5
        assert layout["rank"] == len(block_shape)
        assert strides[-1] == 1
        assert all(s * base.element_size() % 16 == 0 for s in strides[:-1])
        assert base.data_ptr() % 16 == 0
        assert all(0 < n <= 256 and n & (n - 1) == 0 for n in block_shape)
        self.base, self.layout, self.dtype = base, layout, base.dtype
        self.block_shape = list(block_shape)
        self.block_type = SimpleNamespace(shape=self.block_shape)
        self.view = base.as_strided(shape, strides, base.storage_offset())

    def met(self, corner):
        """Where a box meets the tensor, in the tensor and in the box; None: nowhere."""
        ends = zip(map(int, corner), self.block_shape, self.view.shape, strict=True)
        pairs = [(max(c, 0), min(c + b, n), c) for c, b, n in ends]
        if any(low >= high for low, high, _ in pairs):
            return None
        inside = tuple(slice(low, high) for low, high, _ in pairs)
        return inside, tuple(slice(low - c, high - c) for low, high, c in pairs)


def copy_in(descriptor, corner, barrier, memory):
    assert memory.shape == descriptor.block_shape
    if not barrier.fenced:
        raise Fault("a copy may not see its barrier: no fence since it was made")
    memory.begin_copy()

    def land():
        box = torch.zeros(descriptor.block_shape, dtype=descriptor.dtype)
        if met := descriptor.met(corner):
            box[met[1]] = descriptor.view[met[0]]
        memory.data.copy_(box)
        memory.place.landing -= 1
        barrier.bytes -= box.numel() * box.element_size()
        turn_over(barrier)

    now.copy(land)
    now.wait()


def copy_out(descriptor, corner, memory):
    assert memory.shape == descriptor.block_shape
    memory.begin_store()

    def leave():
        if met := descriptor.met(corner):
            if not descriptor.view[met[0]].isnan().all():
                raise Fault("stored twice")
            descriptor.view[met[0]] = memory.data[met[1]]
        memory.place.leaving -= 1

    now.running.stores.append(leave)
    now.wait()


def drain(queue, left):
    while len(queue) > left:
        queue.pop(0)()


def store_wait(left):
    drain(now.running.stores, left)
    now.wait()


def product(a, b, acc, use_acc, is_async):
    """Into acc, in place, as the hardware does."""
    assert is_async
    assert [a.shape[0], b.shape[1]] == [*acc.shape]
    for operand in (a, b):
        operand.begin_product()

    def multiply():
        if not use_acc:
            acc.zero_()
        acc.add_(a.data.float() @ b.data.float())
        for operand in (a, b):
            operand.place.read -= 1

    now.running.products.append(multiply)
    now.wait()
    return acc


def product_wait(left, deps):
    drain(now.running.products, left)
    return deps[0]


def allocate(dtype, shape, layout):
    if dtype is torch.int64:
        return Barriers(shape[0])
    return Memory(torch.full(shape, float("nan"), dtype=dtype))


# --- Gluon ----------------------------------------------------------------------------------------


class Jitted:
    """A function; with [grid] a launch of it, of one program after the other."""

    seed = 0

    def __init__(self, fn):
        self.fn, self.__name__ = fn, fn.__name__

    def __call__(self, *args):
        return self.fn(*args)

    def __getitem__(self, grid):
        def launch(num_warps, num_stages, enable_fp_fusion, **arguments):
            global now
            given = {name: argument(value) for name, value in arguments.items()}
            for at in range(grid[0]):
                now = Program((at, grid[0]), random.Random(1000 * Jitted.seed + at))
                self.fn(**given)

        return launch


def argument(value):
    """As a kernel sees it."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.as_strided((value.numel(),), (1,), value.storage_offset()))
    if type(value) is tile.Stored:
        return type(value)(*map(argument, value))
    return Int(value) if type(value) is int else value


def jit(fn=None, **_):
    return Jitted(fn) if fn else Jitted


def plain(jitted):
    """A function of Triton's language, by the stand-in."""
    fn = jitted.fn
    return FunctionType(fn.__code__, {**fn.__globals__, "tl": tl}, fn.__name__, fn.__defaults__)


tl = SimpleNamespace(
    maximum=lambda z, least, propagate_nan: z.clamp(min=least), where=torch.where, exp=torch.exp,
    abs=torch.abs, PropagateNan=SimpleNamespace(ALL=None), static_assert=lambda *a: None,
)  # fmt: skip
language = SimpleNamespace(
    constexpr=lambda value: value, float32=torch.float32, int64=torch.int64,
    NVMMADistributedLayout=lambda *a: a, NVMMASharedLayout=lambda **k: k,
    SliceLayout=lambda *a: a, convert_layout=lambda x, layout: x,
    program_id=lambda axis: Int(now.place[0]), num_programs=lambda axis: Int(now.place[1]),
    to_tensor=Int, cdiv=lambda a, b: Int(-(-int(a) // int(b))),
    minimum=lambda a, b: Int(min(a, b)), where=where, static_range=builtins.range,
    allocate_shared_memory=allocate,
    warp_specialize=lambda parts, warps, registers: now.start(parts),
    arange=lambda a, b, layout: values(torch.arange(a, b)), load=load, store=store,
    full=lambda shape, value, dtype, layout: values(torch.full(shape, value, dtype=dtype)),
    sum=lambda x, axis: x.sum(dim=axis),
)  # fmt: skip
mbarrier = SimpleNamespace(
    init=init, wait=wait_for, arrive=arrive, expect=expect, MBarrierLayout=lambda: None
)
tma = SimpleNamespace(
    async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
)
hopper = SimpleNamespace(
    fence_async_shared=fence, mbarrier=mbarrier, tma=tma, warpgroup_mma=product,
    warpgroup_mma_wait=product_wait,
)  # fmt: skip
GLUON = "triton.experimental.gluon"
STAND_INS = {
    "triton.experimental": SimpleNamespace(),
    GLUON: SimpleNamespace(jit=jit, constexpr_function=lambda fn: fn, language=language),
    f"{GLUON}.language": SimpleNamespace(),
    f"{GLUON}.language.nvidia": SimpleNamespace(),
    f"{GLUON}.language.nvidia.hopper": hopper,
    f"{GLUON}.nvidia": SimpleNamespace(),
    f"{GLUON}.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
}


@contextmanager
def _instead():
    """Inside, these modules are imported in the place of Triton's."""
    kept = {name: sys.modules.get(name) for name in STAND_INS}
    for name, members in STAND_INS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(vars(members))
    try:
        yield
    finally:
        for name, module in kept.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def emulated(*changes, programs=3, seed=0):
    """The module conv_gluon on the stand-in, on a card of so many multiprocessors.

    Args:
        changes: (old, new) pieces of its source, to plant faults; the first place of each.
        seed: of chance.
    """
    text = SOURCE.read_text("utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    name = "fastdcgan_kernels.gpu.conv_gluon_emulated"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    module.__package__ = "fastdcgan_kernels.gpu"
    with _instead():
        exec(compile(text, SOURCE, "exec"), vars(module))
    for jitted in (tile.activate, tile.activation_derivative, descriptors.large_box):
        setattr(module, jitted.fn.__name__, plain(jitted))
    module.range = lambda *a: builtins.map(Int, builtins.range(*a))
    card = replace(TARGETS["sm_90"], multiprocessors=programs)
    module.target_of = lambda device: card
    Jitted.seed = seed
    fenced.clear()
    unfenced_barriers.clear()
    return module
