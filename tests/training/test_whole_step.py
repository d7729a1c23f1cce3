"""Whole steps, eager and as a CUDA graph. Here the graph is a tape: during the capture it takes
down every operation with the tensors it read and wrote, and a replay runs them again on those very
tensors. What a host computed in between is frozen, as in a real graph; tests/gpu has that one."""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastdcgan.data.feeds import Order, make_feed
from fastdcgan.errors import InputError, RunError
from fastdcgan.training import step as one_step
from fastdcgan.training import whole_step
from fastdcgan.training.config import TrainConfig, preset
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import Engine, choose_engine
from fastdcgan.training.readings import Readings
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan.training.whole_step import WholeStep
from fastdcgan_kernels import adam
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.gpu import adam as gpu_adam
from fastdcgan_kernels.gpu import conv_weight
from fastdcgan_kernels.gpu.launch import Launch

pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter")
CPU = torch.device("cpu")
SMALL = {"image_size": 32, "channels": 3, "nz": 12, "ngf": 8, "ndf": 8, "batch_size": 6}


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph together."""

    running = None

    def __init__(self):
        super().__init__()
        self.done, self.generators = [], []

    def __enter__(self):
        Tape.running = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.running = None
        super().__exit__(*error)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Tape.running = None  # launches of an operator run again with it
        out = func(*args, **(kwargs or {}))
        Tape.running = self
        if "empty" not in func._opname:  # an allocation is no work of a graph's
            self.done.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # not a view, nor written in place


@pytest.fixture
def tape(monkeypatch):
    """torch.cuda's graph API on the CPU, as far as whole_step.py uses it."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    made, run = [], Launch.run

    def launched(launch, device):
        with _disable_current_modes():  # what the interpreter does is no operation of the step's
            run(launch, device)
        if Tape.running is not None:
            Tape.running.done.append((run, (launch, device), {}, None))

    monkeypatch.setattr(Launch, "run", launched)

    def new():
        made.append(Tape())
        return made[-1]

    def capture(graph, *, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"  # the feed has a thread of its own
        return graph

    fake = {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": new,
        "graph": capture,
    }
    for name, value in fake.items():
        monkeypatch.setattr(whole_step.torch.cuda, name, value)
    return made


def build(
    graph="off", *, autocast=None, resident=True, said=None, images=15, scale=None, prove=None,
    **more,
):  # fmt: skip
    config = TrainConfig(**{**SMALL, **more})
    names = ("a", "b", "c") if config.classes else None
    state = TrainState(config, CPU, scaling=autocast == torch.float16, classes=names)
    if scale is not None:
        state.scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    pixels = np.random.default_rng(3).integers(0, 256, (images, 36, 36, 3), dtype=np.uint8)
    feed = make_feed(
        types.SimpleNamespace(images=pixels, n=images, window=36, size=32),
        order=Order(images, images, config.batch_size * config.n_critic, 0), device=CPU, hflip=True,
        resident=resident, dtype=autocast or torch.float32,
        labels=np.arange(images) % 3 if config.classes else None,
    )  # fmt: skip
    readings = Readings(100, CPU)
    engine = Engine(CPU, autocast, cuda_graph=graph)
    say = pytest.fail if said is None else said.append
    return WholeStep(state, feed, engine=engine, prove=prove, readings=readings, say=say)


def trained(whole, steps):
    for _ in range(steps):
        whole()
        whole.readings.count()
    whole.feed.close()
    state = whole.state.state_dict()
    rows = whole.readings.take()
    nets = {f"{n}.{k}": v for n in ("netG", "netD", "ema") for k, v in state[n].items()}
    moments = {
        f"{n}.{i}.{k}": v
        for n in ("optG", "optD")
        for i, slots in state[n]["state"].items()
        for k, v in slots.items()
    }
    scales = [scaler.get_scale() for scaler in whole.state.scalers]
    return {**nets, **moments, "rng": state["rng"]["run"]}, rows, scales


def test_an_eager_whole_step_is_feed_noise_and_step():
    whole = build()
    got, rows, _ = trained(whole, 4)
    other = build()
    state, step = other.state, Step(other.state, batch_size=6)
    expected = []
    for index in range(4):
        images = other.feed.batch(index, state.generator)
        z = torch.randn(len(images), 12, 1, 1, generator=state.generator)
        expected.append(step(images, z).tolist())
    assert rows == expected
    assert torch.equal(got["netG.main.0.weight"], state.netG.state_dict()["main.0.weight"])
    assert state.step == whole.state.step == 4


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_graph_and_eager_agree_step_for_step(tape, autocast, resident):
    """Ragged batches included (every third): all tensors, readings, scales and random states are
    the same bits, so the warm-ups and the check have left no trace."""
    eager = trained(build(autocast=autocast, resident=resident), 11)
    whole = build("on", autocast=autocast, resident=resident)
    graphed = trained(whole, 11)
    assert whole.graphed
    assert whole.state.step == 11
    assert len(tape) == 1
    assert tape[0].generators == [whole.state.generator]
    assert graphed[1:] == eager[1:]
    assert whole.figures["graph"]["error"] <= whole.figures["graph"]["allowed"]
    for name, value in eager[0].items():
        assert torch.equal(value, graphed[0][name]), name


@pytest.mark.parametrize(("autocast", "every"), [(None, 2), (None, 3), (torch.float16, 2)])
def test_a_lazy_penalty_has_a_graph_of_its_own(tape, autocast, every):
    """Each step replays the one of its kind, whatever step its warm-up came to; the noise fades,
    spectral norm's vectors move, and the augmentation draws anew, also in replays."""
    options = {
        "loss": "hinge", "r1": 1.0, "penalty_every": every, "spectral_norm": True, "n_critic": 2,
        "diffaugment": "color,translation,cutout", "instance_noise": 0.1,
        "instance_noise_steps": 9, "minibatch_std": True, "batch_size": 3,
    }  # fmt: skip
    torch.manual_seed(1)
    eager = trained(build(autocast=autocast, **options), 7)
    torch.manual_seed(1)
    whole = build("on", autocast=autocast, **options)
    graphed = trained(whole, 7)
    assert len(tape) == len(whole._graphs) == 2
    assert float(whole.state.clock) == 7
    assert graphed[1:] == eager[1:]
    for name, value in eager[0].items():
        assert torch.equal(value, graphed[0][name]), name


@pytest.mark.parametrize("resident", [True, False])
def test_a_graph_takes_the_labels_of_each_batch(tape, resident):
    options = {"classes": True, "resident": resident, "loss": "relativistic", "spectral_norm": True}
    eager = trained(build(**options), 7)
    whole = build("on", **options)
    graphed = trained(whole, 7)
    assert whole.graphed
    assert graphed[1:] == eager[1:]
    assert "netG.embedding.weight" in graphed[0]
    for name, value in eager[0].items():
        assert torch.equal(value, graphed[0][name]), name
    other = build(**options)
    other.feed._labels = other.feed._labels.roll(1)
    assert trained(other, 7)[1] != eager[1], "labels count"


def norms(whole):
    return [[float(g.norm()) for g in gradients] for gradients in whole.gradients()]


def test_gradients_are_those_of_the_last_step_replayed_or_not(tape):
    """Steps 3 and 6 of 15 images in batches of 6 are ragged and run eagerly."""
    eager, graphed = build(), build("on")
    for step in range(1, 8):
        eager()
        graphed()
        assert [len(n) for n in norms(graphed)] == [10, 8]
        for got, expected in zip(norms(graphed), norms(eager), strict=True):
            assert got == pytest.approx(expected, rel=1e-3), step
    assert len(tape) == 1
    for whole in (eager, graphed):
        whole.feed.close()


def test_a_renewed_graph_has_the_optimisers_and_rates_of_the_loaded_state(tape):
    eager, graphed = build(), build("on")
    saved = copy.deepcopy(eager.state.state_dict())
    for whole in (eager, graphed):
        whole()
        whole()
        whole.state.load_state_dict(copy.deepcopy(saved))
        whole.state.optD.param_groups[0]["lr"] = 0.05
        whole.renew()
        for _ in range(2):
            whole()
    assert len(tape) == 2
    (expected, *_), (got, *_) = trained(eager, 0), trained(graphed, 0)
    for name in ("netD.main.0.weight", "netG.main.0.weight", "optD.0.exp_avg"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_graph_of_kernels_and_eager_agree(tape, monkeypatch):
    """In Triton's interpreter: the step's own launches, and weights that are cast once an update,
    which a replay must find as the state is, whatever was loaded into it."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    monkeypatch.setattr(whole_step, "WARM_UPS", 1)  # they take seconds
    tiny = {
        "ngf": 4,
        "ndf": 4,
        "batch_size": 2,
        "images": 5,
        "autocast": torch.float16,
        "scale": 64.0,
    }
    eager, rows, scales = trained(build(**tiny), 2)
    whole = build("on", **tiny)
    graphed, rows_too, scales_too = trained(whole, 2)
    assert whole.graphed
    assert any(isinstance(args[0], Launch) for _, args, _, _ in tape[0].done if args)
    assert (rows, scales) == (rows_too, scales_too)
    assert scales == [64.0, 64.0], "no update was skipped"
    for name, value in eager.items():
        assert torch.equal(value, graphed[name]), name


def test_a_resumed_run_goes_on_as_a_graph(tape):
    """The state is loaded into the tensors that a graph then keeps the addresses of."""
    straight, _, _ = trained(build("on"), 8)
    first = build("on")
    trained(first, 5)
    second = build("on")
    second.state.load_state_dict(first.state.state_dict())
    again, _, _ = trained(second, 3)
    for name, value in straight.items():
        assert torch.equal(value, again[name]), name


def test_a_replay_that_differs_from_a_step_is_given_up_aloud(tape, monkeypatch):
    """An average that counts its steps on the host would be frozen at the capture's count."""
    original = Step.__call__

    def frozen(self, *given, **options):
        self.state.ema.updates.fill_(self.state.step)
        return original(self, *given, **options)

    monkeypatch.setattr(Step, "__call__", frozen)
    expected, _, _ = trained(build(), 7)
    said = []
    whole = build("auto", said=said)
    got, _, _ = trained(whole, 7)
    assert not whole.graphed
    assert len(said) == 1
    assert "does not work as a graph here" in said[0]
    assert "of a step from" in said[0]
    assert whole.figures["graph"]["error"] > whole.figures["graph"]["allowed"]
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    with pytest.raises(RunError, match="of a step from"):
        trained(build("on"), 1)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_graph_is_tried_again_without_the_second_stream(tape, monkeypatch, fails):
    """Then steps run eagerly. What was given up stays so, in steps outside the graph, too."""
    seen, real = [], whole_step._StepGraph

    def graph(*given):
        seen.append(whole._step.overlap)
        if len(seen) <= fails:
            raise RuntimeError(f"made up {len(seen)}")
        return real(*given)

    expected, _, _ = trained(build(), 3)
    said = []
    whole = build("auto", said=said)
    whole._step.overlap = True
    monkeypatch.setattr(whole_step, "_StepGraph", graph)
    got, _, _ = trained(whole, 3)
    assert seen == [True, False]
    lines = (
        "the step does not work as a graph here (made up 1); once more without --overlap",
        "the whole step does not work as a graph here (made up 2); eager",
    )
    assert said == [f"--cuda-graph: {line}" for line in lines[:fails]]
    assert whole.graphed == (fails < 2)
    assert not whole._step.overlap
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_stale_noise_is_seen(tape, monkeypatch):
    """A replay that leaves the generator where it was draws the same noise for ever."""

    class Stale(Tape):
        def replay(self):
            before = self.generators[0].get_state()
            super().replay()
            self.generators[0].set_state(before)

    monkeypatch.setattr(whole_step.torch.cuda, "CUDAGraph", Stale)
    said = []
    whole = build("auto", said=said)
    trained(whole, 2)
    assert not whole.graphed
    assert "other random numbers" in said[0]


def test_a_capture_that_fails_leaves_no_trace(tape, monkeypatch):
    def refused(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    expected, rows, _ = trained(build(), 5)
    monkeypatch.setattr(whole_step.torch.cuda, "graph", refused)
    said = []
    whole = build("auto", said=said)
    got, rows_too, _ = trained(whole, 5)
    assert "operation not permitted when stream is capturing" in said[0]
    assert rows == rows_too
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.fixture
def kernels_to_prove(tape, monkeypatch):
    """Fused blocks by Triton's interpreter, treated as a GPU's are."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    monkeypatch.setattr(whole_step, "wants_proof", lambda device: True)


def kept(whole, plain):
    """The figures of a proof that leaves no trace, and of which all is right."""
    plain._proved = True
    got, rows, scales = trained(whole, 1)
    expected, rows_too, scales_too = trained(plain, 1)
    assert whole.impl == "auto"
    assert (rows, scales) == (rows_too, scales_too)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert json.loads(json.dumps(whole.figures, allow_nan=False)) == whole.figures
    assert whole.figures["blocks"]["largest"] < whole.figures["blocks"]["allowed"] / 4
    assert whole.figures["gradients"]["error"] < whole.figures["gradients"]["allowed"] / 2
    assert whole.figures["update"] == {"wrong": []}
    return whole.figures


TINY = {"ngf": 4, "ndf": 4, "batch_size": 2}


def test_kernels_that_are_right_are_kept(kernels_to_prove):
    figures = kept(build(**TINY), build(**TINY))
    assert "netD.main" in figures["blocks"]["where"] or "netG.main" in figures["blocks"]["where"]
    assert figures["blocks"]["compared"] > 100
    assert figures["blocks"]["unchecked"] == 0


NETS = {
    "spectral norm": {"loss": "hinge", "spectral_norm": True, "minibatch_std": True},
    "classes": {"classes": True, "loss": "relativistic"},
}


@pytest.mark.parametrize("net", NETS)
def test_a_proof_on_the_cpu_is_asked_for(net, monkeypatch):
    """Without anything of torch.cuda's."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    proved, plain = (build(autocast=torch.bfloat16, prove=prove, **TINY, **NETS[net])
                     for prove in (True, None))  # fmt: skip
    kept(proved, plain)
    assert plain.figures == {}


def test_a_proof_of_nets_without_fused_blocks(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    state = TrainState(preset("tf28", channels=1, batch_size=2), CPU)
    images = np.zeros((4, 28, 28, 1), dtype=np.uint8)
    feed = make_feed(
        types.SimpleNamespace(images=images, n=4, window=28, size=28),
        order=Order(4, 4, 2, 0), device=CPU, hflip=False, resident=True,
    )  # fmt: skip
    whole = WholeStep(state, feed, engine=Engine(CPU, None), prove=True, say=pytest.fail)
    whole()
    assert whole.figures["blocks"]["largest"] == whole.figures["blocks"]["compared"] == 0
    assert whole.figures["gradients"]["error"] < 1e-6


def test_an_overflow_of_float16_is_no_fault_of_the_kernels(monkeypatch):
    """As in the first steps of any run; the proof is at a smaller scale, which stays its own."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    options = {"autocast": torch.float16, "scale": 2.0**24, **TINY}
    whole = build(prove=True, **options)
    kept(whole, build(**options))
    assert whole.state.scalers[0].get_scale() == 2.0**23, "the step itself overflowed"


def test_a_step_that_is_put_together_wrongly_is_seen(monkeypatch):
    """Though each operator is right: two batches, and one batch's statistics."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    monkeypatch.setattr(one_step, "stat_groups", lambda groups: contextlib.nullcontext())
    said = []
    whole = build(prove=True, said=said, **TINY)
    whole()
    assert whole.impl == "reference"
    assert "gradients are" in said[0]
    assert whole.figures["gradients"]["error"] > 2 * whole.figures["gradients"]["allowed"]
    assert "update" not in whole.figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_missing_tap_of_one_layer_is_seen(dtype, monkeypatch):
    """Of one weight gradient's 16; and it is said of which, also where it is an error."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    right = conv_weight.weight_gradient

    def without(small, large, geometry, **options):
        out = right(small, large, geometry, **options)
        if geometry.P == 4:
            out[:, :, 1, 2] = 0
        return out

    monkeypatch.setattr(conv_weight, "weight_gradient", without)
    autocast = None if dtype == torch.float32 else dtype
    scale = 64.0 if dtype == torch.float16 else None
    whole = build(prove=True, autocast=autocast, scale=scale, impl="triton", **TINY)
    with pytest.raises(RunError, match=r"of net[GD]\.main\.\d\.weight: gradient of the weight is"):
        whole()
    blocks_of = whole.figures["blocks"]
    assert blocks_of["largest"] > 4 * blocks_of["allowed"]
    assert set(whole.figures) == {"blocks"}


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_kernels_that_a_device_breaks_are_left_aloud(kernels_to_prove, monkeypatch, fault):
    """Their step leaves no trace: training goes on as in plain PyTorch."""
    right = conv_weight.weight_gradient

    def broken(*args, **options):
        if fault == "raises":
            raise RuntimeError("an illegal instruction was encountered\nand so on")
        return right(*args, **options) * 0.9

    monkeypatch.setattr(conv_weight, "weight_gradient", broken)
    said = []
    whole = build(said=said)
    got, _, _ = trained(whole, 2)
    assert whole._step.impl == "reference"
    assert len(said) == 1
    assert {"wrong": "away from plain PyTorch's", "raises": "illegal instruction"}[fault] in said[0]
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    monkeypatch.setattr(whole_step, "wants_proof", lambda device: False)
    expected, _, _ = trained(build(), 2)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.fixture
def updates_to_prove(kernels_to_prove, monkeypatch, tmp_path):
    """Blocks in plain PyTorch; updates by their kernel, which is changed as a test says."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    for module in (adam, one_step):
        monkeypatch.setattr(module, "runs_kernels", lambda device: targets._modes != ["reference"])

    def changed(right, wrong):
        text = Path(gpu_adam.__file__).read_text()
        assert text.count(right) == 1
        file = tmp_path / "changed_adam.py"
        file.write_text(text.replace(right, wrong))
        name = f"{gpu_adam.__package__}.changed_adam"  # for its relative imports
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(gpu_adam, "update", module.update)

    return changed


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_updates_that_are_right_are_kept(updates_to_prove, autocast):
    """Here in a second step, as that of a resumed run; the proof leaves no trace."""
    scale = 64.0 if autocast == torch.float16 else None
    got, expected = [], []
    for proved, found in ((True, got), (False, expected)):
        whole = build(autocast=autocast, scale=scale)
        whole._proved = True
        whole()
        whole._proved = not proved
        found += trained(whole, 1)
        assert whole.impl == "auto"
    assert got[1:] == expected[1:]
    for name, value in expected[0].items():
        assert torch.equal(value, got[0][name]), name


MISTAKES = {
    "first moment": ("share1 * (g - old1)", "share1 * g", "exp_avg"),
    "second moment": ("(g * g - old2)", "(1.01 * g * g - old2)", "exp_avg_sq"),
    "bias of the first": ("one_minus_exp(t * log1)", "one_minus_exp(log1)", "parameters"),
    "bias of the second": ("one_minus_exp(t * log2)", "one_minus_exp(log2)", "parameters"),
    "root": ("tl.sqrt_rn(v) /", "0.99 * tl.sqrt_rn(v) /", "parameters"),
    "rate": ("tl.load(rate)", "(0.99 * tl.load(rate))", "parameters"),
    "last element": ("tl.store(to, value, mask=mask)", "tl.store(to, value, mask=mask & (at < 7))",
                     "parameters, 16-bit copies"),
    "share of the average": ("tl.maximum(9.0 / (10.0 +", "tl.maximum(9.0 / (9.0 +", "average"),
    "average of the old": ("share * (value - old)", "share * (old - value)", "average"),
    "counts": ("tl.load(counts[i])", "tl.load(counts[0]) - 1", "average"),
    "updates": ("tl.load(updates) + 1.0)", "tl.load(updates))", "average"),
    "stale copies": ("(block < FIRST[len(copies)])", "(block < 2)", "16-bit copies"),
    "steps": ("tl.where(taken, 1.0, 0.0)", "0.0", "step"),
    "tickets": ("tl.store(tickets, 0)", "tl.store(tickets, 1)", "parameters"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_update_that_a_device_breaks_is_left_aloud(updates_to_prove, mistake):
    """Though the first moment, and so the gradient, is right."""
    right, wrong, named = MISTAKES[mistake]
    updates_to_prove(right, wrong)
    said = []
    whole = build(autocast=torch.bfloat16, said=said)
    got, _, _ = trained(whole, 2)
    assert whole.impl == "reference"
    assert said == [
        "--impl: fused blocks do not work here "
        f"(an update's {named} are not by Adam's formulas); plain PyTorch"
    ]
    plain = build(autocast=torch.bfloat16)
    plain._proved, plain._step.impl = True, "reference"
    expected, _, _ = trained(plain, 2)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_where_a_graph_is_captured(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(targets, "target_of", lambda device: None)
    cuda, config = torch.device("cuda", 0), TrainConfig(**SMALL)
    assert choose_engine(config, Ranks(), cuda).cuda_graph == "auto"
    off = dataclasses.replace(config, cuda_graph="off")
    assert choose_engine(off, Ranks(), cuda).cuda_graph == "off"
    assert choose_engine(off, Ranks(), cuda).notes == ()
    assert choose_engine(config, Ranks(), CPU).notes == ()
    many = choose_engine(config, Ranks(0, 2, 0), cuda)
    assert many.cuda_graph == "off"
    assert "all-reduces" in many.notes[0]
    keras = preset("tf28", channels=1, impl="reference")  # PyTorch's Adam, whose epsilon is fixed
    assert choose_engine(keras, Ranks(), cuda).cuda_graph == "off"
    assert "Keras" in choose_engine(keras, Ranks(), cuda).notes[0]
    with monkeypatch.context() as there:
        there.setattr(targets, "target_of", lambda device: targets.TARGETS["sm_90"])
        keras = preset("tf28", channels=1)
        assert choose_engine(keras, Ranks(), cuda).cuda_graph == "auto"
    on = dataclasses.replace(config, cuda_graph="on")
    with pytest.raises(InputError, match="--cuda-graph on was given"):
        choose_engine(on, Ranks(), CPU)
    triton = dataclasses.replace(config, impl="triton")
    with pytest.raises(InputError, match="--impl triton was given"):
        choose_engine(triton, Ranks(), CPU)


def test_impl_decides_before_the_environment(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    with targets.implementation("triton"):
        assert targets.mode() == "triton"
        with targets.implementation("auto"):
            assert targets.mode() == "triton"
    with targets.implementation("auto"):
        assert targets.mode() == "reference"
    with pytest.raises(ValueError, match="fast"), targets.implementation("fast"):
        pass


def test_readings_go_round():
    readings = Readings(3, CPU)
    for value in range(3):
        readings.put(torch.full((5,), float(value)))
        full = readings.count()
    assert full
    assert [row[0] for row in readings.take()] == [0.0, 1.0, 2.0]
    readings.put(torch.full((5,), 9.0))
    assert not readings.count()
    assert [row[0] for row in readings.take()] == [9.0]
