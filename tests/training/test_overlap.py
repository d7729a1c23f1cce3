"""Steps with a second stream beside the backward pass. Here streams are names, and a step in the
interpreter is taken down: each launch and each of PyTorch's operations, in what stream, what memory
it read and wrote, and what it waited for. Whatever meets in memory must be in order, and memory
that was given back counts: a GPU's is handed out again as soon."""

import contextlib
import dataclasses
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdcgan.training import plan
from fastdcgan.training import step as one_step
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan_kernels import adam, aside
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.gpu import launch
from tests.training.steps import batches

pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {
    "image_size": 32, "channels": 3, "nz": 8, "ngf": 8, "ndf": 8, "batch_size": 2, "impl": "triton",
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Streams as names with clocks, and what is done in each: (what, stream, its time, what it has
    seen of all, [(start, end)] of the memory read, of that written)."""

    def __init__(self):
        super().__init__()
        self.now, self.done, self.clocks, self.held = "first", [], {}, []

    def stream(self, name):
        own = types.SimpleNamespace(device=CUDA, name=name)
        own.record_event = lambda: dict(self.clocks.get(own.name, {}))
        own.wait_event = lambda seen: self.wait(own.name, seen)
        own.wait_stream = lambda other: self.wait(own.name, other.record_event())
        return own

    def wait(self, one, seen):
        mine = self.clocks.setdefault(one, {})
        for name, time in seen.items():
            mine[name] = max(mine.get(name, 0), time)

    @contextlib.contextmanager
    def inside(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def take(self, what, read, written):
        clock = self.clocks.setdefault(self.now, {})
        clock[self.now] = clock.get(self.now, 0) + 1
        self.done.append((what, self.now, clock[self.now], dict(clock), read, written))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func._opname:
            changed = [
                args[at] for at, argument in enumerate(func._schema.arguments[: len(args)])
                if argument.alias_info is not None and argument.alias_info.is_write
            ]  # fmt: skip
            new = [] if func._opname in ("detach", "set_") else out
            self.take(func._opname, places((args, kwargs)), places((changed, new)))
        return out

    def launched(self, run):
        def call(one, device):
            tensors = tensors_of(one.arguments)
            before = [bits(t) for t in tensors]
            run(one, device)
            pairs = zip(tensors, before, strict=True)
            changed = [t for t, old in pairs if not torch.equal(bits(t), old)]
            if self.now != "first":  # of the second stream's own memory, which the first gets never
                self.held += [t.untyped_storage() for t in changed]
            self.take(one.kernel.fn.__name__, places(tensors), places(changed))

        def untraced(one, device):
            with torch.utils._python_dispatch._disable_current_modes():
                call(one, device)

        return untraced

    def conflicts(self):
        """Pairs that meet in memory, one of them writing, of which neither has seen the other."""
        found = []
        for at, (what, stream, _, seen, read, written) in enumerate(self.done):
            for other, its, time, _, its_read, its_written in self.done[:at]:
                late = its != stream and seen.get(its, 0) < time
                if late and (meet(written, its_read + its_written) or meet(read, its_written)):
                    found.append((other, what))
        return found

    def in_second(self):
        return [what for what, stream, *_ in self.done if stream == "second"]


def bits(t):
    values = t.detach().clone(memory_format=torch.contiguous_format)
    return values.reshape(-1).view(torch.uint8)


def tensors_of(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [t for each in value for t in tensors_of(each)]
    base = getattr(value, "base", value)  # a descriptor's
    return [base] if isinstance(base, torch.Tensor) and base.numel() else []


def places(value):
    found = []
    for t in tree_leaves(value):
        if isinstance(t, torch.Tensor) and t.numel() and not t.is_meta:
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return found


def meet(some, others):
    return any(a < d and c < b for a, b in some for c, d in others)


def trained(steps=2, autocast=None, trace=None, monkeypatch=None, ragged=None, **options):
    """Tensors after some steps, all but the first of them traced."""
    torch.manual_seed(0)
    config = TrainConfig(**SMALL | options)
    state = TrainState(config, CPU, scaling=autocast == torch.float16)
    step = Step(state, batch_size=2, autocast=autocast, overlap=trace is not None)
    rows = []
    for at, (images, z) in enumerate(batches(config, steps, ragged=ragged)):
        with contextlib.ExitStack() as stack:
            if trace is not None:
                inside = stack.enter_context(monkeypatch.context())
                real = aside.forked
                inside.setattr(one_step, "forked", lambda device, on, real=real: real(CUDA, on))
                inside.setattr(aside, "_second", lambda index: trace.stream("second"))
                fake = {
                    "device": lambda device: contextlib.nullcontext(),
                    "current_device": lambda: 0,
                    "current_stream": lambda device=None: trace.stream(trace.now),
                    "stream": trace.inside,
                }
                for name, value in fake.items():
                    inside.setattr(aside.torch.cuda, name, value)
                if at == steps - 1:
                    inside.setattr(launch.Launch, "run", trace.launched(launch.Launch.run))
                    stack.enter_context(trace)
            rows.append(step(images, z))
    moments = [t for opt in (state.optD, state.optG) for p in opt.param_groups[0]["params"]
               for t in opt.state[p].values()]  # fmt: skip
    averages = [*state.optG.average.of.values(), state.optG.average.updates]
    weights = [*state.netG.state_dict().values(), *state.netD.state_dict().values()]
    return [torch.stack(rows), *weights, *moments, *averages]


@pytest.fixture(autouse=True)
def small_parameters_are_early(monkeypatch):
    monkeypatch.setattr(adam, "EARLY", 1000)


def early(trace):
    return trace.in_second().count("adam")


@pytest.mark.parametrize(
    ("autocast", "options", "updates"),
    [
        (None, {}, True),
        (torch.bfloat16, {}, True),
        (torch.float16, {}, False),  # whether a scaled gradient overflows is known at the end
        (None, {"r1": 1.0}, True),  # G's alone: a penalty's gradients come to D's
        (None, {"loss": "relativistic"}, True),
        (None, {"spectral_norm": True, "n_critic": 2, "batch_size": 2}, True),
    ],
    ids=["fp32", "bf16", "fp16", "penalty", "paired", "spectral norm"],
)
def test_overlapping_steps_are_the_steps_bit_for_bit_and_in_order(
    monkeypatch, autocast, options, updates
):
    trace = Trace()
    ours = trained(autocast=autocast, trace=trace, monkeypatch=monkeypatch, **options)
    plain = trained(autocast=autocast, **options)
    assert all(map(torch.equal, map(bits, ours), map(bits, plain)))
    assert trace.conflicts() == []
    second = set(trace.in_second())
    assert {"weight_gradient_pointers"} <= second
    assert bool(early(trace)) == updates
    assert second <= {
        "weight_gradient_pointers", "image_weight_gradient", "reduce_splits", "adam",
        "weight_gradient_descriptors",
    }  # fmt: skip


def test_what_is_put_aside(monkeypatch):
    """Every weight's gradient, and the updates of those with EARLY elements; the others' is one
    launch a net, in the first stream, with the average."""
    trace = Trace()
    trained(trace=trace, monkeypatch=monkeypatch)
    launches = [(what, stream) for what, stream, *_ in trace.done if "adam" in what]
    state = TrainState(TrainConfig(**SMALL), CPU)
    large = sum(p.numel() >= adam.EARLY for _, p in state.trained())
    assert large >= 4
    assert launches.count(("adam", "second")) == large
    assert launches.count(("adam", "first")) == 2
    gradients = [what for what in trace.in_second() if "weight_gradient" in what]
    assert len(gradients) == 8  # of four layers in each net


@pytest.mark.parametrize("where", ["aside", "join"])
def test_a_wait_that_is_missing_is_found(monkeypatch, where):
    trace = Trace()

    class Wrong(aside.Fork):
        def aside(self, *read, **since):
            if where == "join":
                return super().aside(*read, **since)
            return torch.cuda.stream(self.second)

        def join(self):
            if where == "aside":
                super().join()

    monkeypatch.setattr(aside, "Fork", Wrong)
    trained(trace=trace, monkeypatch=monkeypatch)
    assert trace.conflicts()


def test_what_the_second_stream_reads_is_kept(monkeypatch):
    """Else the first stream would be given its memory again."""
    trace, kept = Trace(), []

    class Seen(aside.Fork):
        def aside(self, *read, **since):
            given = [vars(each) if dataclasses.is_dataclass(each) else each for each in read]
            kept.extend(places(given))
            return super().aside(*read, **since)

        def join(self):
            assert self._kept
            super().join()
            assert not self._kept

    monkeypatch.setattr(aside, "Fork", Seen)
    trained(trace=trace, monkeypatch=monkeypatch)
    mine = [one for _, stream, *_, written in trace.done if stream == "second" for one in written]
    gradients = [
        one for what, stream, *_, read, _ in trace.done
        if stream == "second" and what != "adam" for one in read
    ]  # fmt: skip
    assert len(gradients) > 16
    assert [one for one in gradients if not meet([one], kept + mine)] == []


def test_a_gradient_that_is_added_to_another_is_not_put_aside(monkeypatch):
    """Autograd would add them in the first stream before the streams have joined."""
    weight = torch.nn.Parameter(torch.zeros(3))
    assert not aside.waits(weight)
    assert aside.waits(weight * 2)  # spectral norm's, say
    weight.grad = torch.zeros(3)
    assert aside.waits(weight)


def test_nothing_is_put_aside_without_streams():
    with aside.forked(CPU), aside.aside(1):
        assert aside._forks == []


H100 = targets.TARGETS["sm_90"]


@pytest.mark.parametrize(
    ("options", "device", "why"),
    [
        ({}, CUDA, ""),
        ({"image_size": 64}, CPU, "it takes a second CUDA stream, and this is cpu"),
        (
            {"compile": True, "cuda_graph": "off"},
            CUDA,
            "passes that --compile compiles read the gradients on their way",
        ),
        ({"updates": "simultaneous"}, CUDA, "with --updates simultaneous two passes add"),
        ({"impl": "reference"}, CUDA, "it is for fused blocks, and these are plain PyTorch"),
    ],
)
def test_a_plan_says_where_nothing_overlaps(monkeypatch, options, device, why):
    monkeypatch.setattr(plan.targets, "target_of", lambda of: H100 if of.type == "cuda" else None)
    config = TrainConfig(channels=3, overlap="on", **options)
    engine = plan.choose_engine(config, Ranks(), device)
    assert engine.overlap == (not why)
    said = [note for note in engine.notes if "--overlap" in note]
    assert said == [] if not why else said[0].startswith(f"--overlap: off, because {why}")
    for wish in ("off", "auto"):
        engine = plan.choose_engine(dataclasses.replace(config, overlap=wish), Ranks(), device)
        assert engine.overlap == (wish == "auto" and not why)
        assert [note for note in engine.notes if "--overlap" in note] == []


def test_by_default_passes_overlap_in_a_graph_alone(monkeypatch):
    monkeypatch.setattr(plan.targets, "target_of", lambda of: H100)
    for graph in ("auto", "off"):
        engine = plan.choose_engine(TrainConfig(channels=3, cuda_graph=graph), Ranks(), CUDA)
        assert engine.overlap == (graph == "auto")
    assert not plan.choose_engine(TrainConfig(channels=3), Ranks(0, 2), CUDA).overlap


@pytest.mark.parametrize(
    ("options", "compiled"),
    [({}, False), ({"cuda_graph": "off"}, True), ({"impl": "reference"}, True)],
)
def test_nothing_is_compiled_where_blocks_and_a_graph_leave_nothing(monkeypatch, options, compiled):
    monkeypatch.setattr(plan.targets, "target_of", lambda of: H100)
    engine = plan.choose_engine(TrainConfig(channels=3, compile=True, **options), Ranks(), CUDA)
    assert engine.compile == compiled
    assert engine.overlap == (not compiled)
    assert any(note.startswith("--compile: left out") for note in engine.notes) == (not compiled)
