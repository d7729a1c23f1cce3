"""The tuner's decisions, with an invented clock and candidates that are wrong, raise or are slow;
and its experiments, in the interpreter."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from fastdcgan_kernels import ConvBlock, fuse
from fastdcgan_kernels.choice import choose, heuristics, measured
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import INTERPRETER
from fastdcgan_kernels.choice.types import Block, Choice, How, Task
from fastdcgan_kernels.gpu import blocks, conv_pointers
from fastdcgan_kernels.gpu.launch import watching
from fastdcgan_kernels.tuner import trials, tuning
from fastdcgan_kernels.tuner.__main__ import main

CPU = torch.device("cpu")
MID = Geometry(4, 4, 2, 6, 8, 4, 5, 2, 1)
IMAGE = replace(MID, CL=3)
END = Geometry(4, 1, 1, 6, 4, 4, 5, 1, 0)
TASK = Task("conv_transposed", MID, torch.float32, "none", "store", 1)
BLOCK = Block(False, MID, torch.float32, True, 1)
TILE = Tile(32, 16, 16, 2, 4, 3, "descriptors")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Measurements of each test are its own; kernels run in the interpreter."""
    monkeypatch.setenv("FASTDCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    measured._table.cache_clear()
    yield tmp_path / "cache"
    measured._table.cache_clear()


class Contestants:
    """A trial of named candidates: what each gives, and how long it takes."""

    def __init__(self, **seconds):
        self.seconds = seconds

    def prepare(self, candidate):
        if candidate == "broken":
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        return lambda: candidate

    def wrong(self, raw):
        return "wrong by 3" if raw.startswith("wrong") else ""

    def timer(self, run):
        return self.seconds[run()]


def contest(*candidates, **seconds):
    """(the winner, what was said)."""
    trial, said = Contestants(**seconds), []
    best = tuning.contest("layer", candidates, trial, trial.timer, said.append)
    assert all(line.startswith("layer: ") and "\n" not in line for line in said)
    return best, said


def test_the_fastest_wins_and_the_slower_are_named():
    best, said = contest("a", "b", "c", a=3e-6, b=1e-6, c=2e-6)
    assert best == "b"
    assert said == [
        "layer: dropped a: 3.0 us", "layer: dropped c: 2.0 us", "layer: kept b: 1.0 us"
    ]  # fmt: skip


def test_a_wrong_candidate_is_dropped_untimed_however_fast():
    best, said = contest("a", "wrong", a=3e-6)
    assert best == "a"
    assert said[0] == "layer: dropped wrong: wrong by 3"


def test_a_candidate_that_raises_is_dropped_in_one_line():
    best, said = contest("broken", "a", a=3e-6)
    assert best == "a"
    assert said[0] == (
        "layer: dropped broken: RuntimeError: out of resource: shared memory Required: 300000"
    )


def test_a_timer_that_raises_drops_its_candidate():
    best, said = contest("a", "b", a=1e-6)  # b has no time: KeyError
    assert best == "a"
    assert "dropped b: KeyError" in said[0]


@pytest.mark.parametrize(("gain", "wins"), [(0.0, "a"), (0.015, "a"), (0.03, "b")])
def test_the_default_stays_unless_the_gain_is_more_than_noise(gain, wins):
    best, said = contest("a", "b", a=1.0, b=1.0 - gain)
    assert best == wins
    assert ("the default" in said[-1]) == (wins == "a")


def test_a_default_that_is_wrong_leaves_whatever_is_right():
    assert contest("wrong", "a", "b", a=2.0, b=1.99)[0] == "b"
    best, said = contest("wrong", "broken")
    assert best is None
    assert said[-1] == "layer: no kernel is right (broken raised); nothing stored"


def test_plain_pytorch_is_not_stored_because_the_default_raised():
    best, said = contest("broken", "wrong", "reference", reference=1e-6)
    assert best is None
    assert said[2:] == [
        "layer: dropped reference: the default raised, which does not prove it slower",
        "layer: no kernel is right (broken raised); nothing stored",
    ]
    # Another right kernel runs where the default does not, though plain PyTorch was faster.
    assert contest("broken", "a", "reference", a=3e-6, reference=1e-6)[0] == "a"


def test_plain_pytorch_is_stored_where_the_default_is_wrong_or_slower():
    """Also if another candidate raised: this one would have been compared with the default."""
    assert contest("wrong", "broken", "reference", reference=3e-6)[0] == "reference"
    assert contest("a", "broken", "reference", a=3e-6, reference=1e-6)[0] == "reference"
    assert contest("a", "broken", "reference", a=1e-6, reference=3e-6)[0] == "a"


# The experiments


@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("transposed", "geometry"),
    [(False, MID), (True, MID), (False, IMAGE), (True, IMAGE), (False, END), (True, END)],
)
def test_every_way_to_run_a_block_is_right(transposed, geometry, norm, how):
    trial = trials.BlockTrial(Block(transposed, geometry, torch.float32, norm, 1), CPU)
    assert trial.wrong(trial.prepare(how)()) == ""


@pytest.mark.parametrize(("how", "undone"), [("hybrid", 0), ("materialised", 1), ("prologue", 0)])
def test_a_trial_has_the_passes_of_its_way(how, undone):
    """Over the input, and over the gradient, written out for both products."""
    run = trials.BlockTrial(replace(BLOCK, norm=False), CPU).prepare(how)
    ran = []
    with watching(lambda one: ran.append(one.kernel.fn.__name__)):
        run()
    assert ran.count("activation_gradient") == undone
    assert ran.count("apply_prologue") == (0 if how == "prologue" else 2)


def test_statistics_of_groups_are_their_own():
    one, two = (
        trials.BlockTrial(Block(False, MID, torch.bfloat16, True, groups), CPU) for groups in (1, 2)
    )
    assert two.wrong(two.prepare("prologue")()) == ""
    assert "wrong" in one.wrong(two.prepare("prologue")())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "prologue", "epilogue"),
    [
        ("conv_transposed", "activate", "statistics"),
        ("conv_transposed", "none", "actgrad"),
        ("conv", "normgrad", "gradient"),
        ("conv", "actgrad", "store"),
        ("weight_gradient", "both", "store"),
        ("weight_gradient", "none", "store"),
        ("image_conv", "none", "statistics"),
        ("image_conv_transposed", "activate", "store"),
        ("image_weight_gradient", "both", "store"),
    ],
)
def test_every_kernel_is_right_and_its_parts_sum_up(op, prologue, epilogue, dtype):
    geometry = IMAGE if op.startswith("image") else MID
    trial = trials.TileTrial(Task(op, geometry, dtype, prologue, epilogue, 2), CPU)
    for split in (1, 1 if op in ("image_conv_transposed", "image_conv") else 2):
        assert trial.wrong(trial.prepare(Tile(16, 16, 16, split, 1, 1))()) == ""


def sabotage(result, part):
    """A result with one mistake."""
    if part == "value":
        value = result.value.clone()
        value[-1, -1, -1, -1] += 1.0
        return replace(result, value=value)
    if part == "nan":
        return replace(result, value=result.value * torch.nan)
    changed = result.partials.clone()
    sums = changed[0 if part == "first sum" else 1, ..., 0]
    sums += 1.0 + 0.5 * sums
    return replace(result, partials=changed)


@pytest.mark.parametrize("part", ["value", "nan", "first sum", "second sum"])
@pytest.mark.parametrize("epilogue", ["statistics", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_pixel_or_sum_is_seen(dtype, epilogue, part):
    task = Task("conv", MID, dtype, "none", epilogue, 1)
    trial = trials.TileTrial(task, CPU)
    result = trial.prepare(choose.tile_for(task, INTERPRETER))()
    assert trial.wrong(result) == ""
    assert "wrong" in trial.wrong(sabotage(result, part))


def backwards(run):
    """A clock for which every run is faster than the one before."""
    backwards.time /= 2
    run()
    return backwards.time


@pytest.fixture(autouse=True)
def clock():
    backwards.time = 1.0


def test_a_wrong_kernel_is_dropped_though_it_is_the_fastest(monkeypatch):
    convolve = conv_pointers.convolve

    def wrong_if_deep(*given, tile, **options):
        result = convolve(*given, tile=tile, **options)
        return sabotage(result, "value") if tile.depth == 32 else result

    monkeypatch.setattr(conv_pointers, "convolve", wrong_if_deep)
    first, second, third = (Tile(32, 16, depth, 1, 1, 1) for depth in (16, 64, 32))
    said = []
    found = tuning.tune_questions(
        [TASK], CPU, say=said.append, timer=backwards,
        candidates=lambda asked, target: [first, second, third],
    )  # fmt: skip
    assert found == {TASK: second}
    assert "dropped 32x16x32, split 1, 1 warps, 1 stages, by pointers: wrong, " in said[0]
    assert choose.tile_for(TASK, INTERPRETER) == second


def test_a_wrong_convolution_of_the_vendor_is_dropped(monkeypatch):
    vendor = blocks._vendor
    monkeypatch.setattr(blocks, "_vendor", lambda *given: vendor(*given).roll(1, 3))
    said = []
    with choose.recording():
        found = tuning.tune_questions([BLOCK], CPU, say=said.append, timer=backwards)
    assert found == {BLOCK: "reference"}
    assert "dropped vendor: wrong" in said[0]
    assert choose.choose(BLOCK, INTERPRETER) == Choice("reference", measured=True)


def test_a_choice_that_was_measured_is_how_the_block_runs():
    """reference: no kernel; vendor: kernels, but none of a convolution; and the same numbers."""
    block = ConvBlock(nn.Conv2d(5, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    x, ran = torch.randn(4, 5, 8, 4), []
    expected = block(x)
    for how, kernels, convolves in (
        ("reference", False, False), ("vendor", True, False), ("prologue", True, True),
    ):  # fmt: skip
        measured.store({BLOCK: how}, "interpreter")
        ran.clear()
        with watching(lambda one: ran.append(one.kernel.fn.__name__)):
            torch.testing.assert_close(block(x), expected)
        assert bool(ran) == kernels
        assert any(name.startswith("gather") for name in ran) == convolves


def test_plain_pytorch_may_win_without_a_norm_too(monkeypatch):
    block = ConvBlock(nn.Conv2d(5, 6, 4, 2, 1), None, nn.Tanh())
    x = torch.randn(4, 5, 8, 4).bfloat16()  # the parameters are float32, as kernels take them
    expected = block(x)
    measured.store({replace(BLOCK, dtype=torch.bfloat16, norm=False): "reference"}, "interpreter")
    monkeypatch.setattr(blocks, "conv_act", None)
    assert block(x).dtype == torch.bfloat16
    torch.testing.assert_close(block(x), expected, rtol=2e-2, atol=2e-2)  # a rounding or two


def test_compile_takes_choices_for_constants_and_batches_by_powers_of_two():
    """In one graph, though a file is read; one compilation serves batches of 9 to 16."""
    compiled = []
    model = fuse(net()[2:])

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch in (9, 10, 15, 16):
        x = torch.randn(batch, 5, 8, 8)
        torch.testing.assert_close(run(x), model(x))
    assert len(compiled) == 1


def net():
    return nn.Sequential(
        nn.Conv2d(3, 5, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(5, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 7, 4, 2, 1),
    )


def test_tune_finds_measures_and_stores_what_a_model_runs(monkeypatch):
    monkeypatch.setattr(heuristics, "neighbours", lambda *asked: [heuristics.default_tile(*asked)])
    model, said = fuse(net()), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 3, 8, 8)
    found = tuning.tune(model, x, say=said.append, timer=backwards)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    assert {asked.geometry.N for asked in found} == {4}
    tasks = {
        (asked.op, asked.prologue, asked.epilogue) for asked in found if isinstance(asked, Task)
    }
    assert {
        ("image_conv", "none", "store"), ("image_conv_transposed", "none", "store"),
        ("image_weight_gradient", "none", "store"), ("conv_transposed", "none", "gradient"),
        ("conv", "none", "statistics"), ("conv_transposed", "normgrad", "actgrad"),
        ("weight_gradient", "none", "store"), ("weight_gradient", "both", "store"),
    } <= tasks  # fmt: skip
    asked = {(one.geometry.CS, one.norm) for one in found if isinstance(one, Block)}
    assert asked == {(5, False), (6, True), (7, False)}
    order = [isinstance(asked, Block) for asked in found]
    assert order == sorted(order)  # the tiles of kernels before the blocks that run them
    measured._table.cache_clear()
    with choose.recording() as asked:
        model(x).sum().backward()
    assert set(asked) <= set(found)
    assert all(measured.stored(one, "interpreter") for one in asked)

    said.clear()
    assert tuning.tune(model, x, say=said.append, timer=backwards) == {}
    assert all(line.endswith("measured before") for line in said)
    one = [next(iter(found))]
    anew = tuning.tune_questions(one, CPU, again=True, say=said.append, timer=backwards)
    assert list(anew) == one


def test_a_kernel_that_does_not_run_here_leaves_its_blocks_to_the_vendor(monkeypatch):
    """Not to plain PyTorch, though that is the fastest by this clock."""

    class TooLarge:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(conv_pointers, "gather_pointers", TooLarge())
    model, said = fuse(net()[2:4]), []
    found = tuning.tune(model, torch.randn(2, 5, 8, 4), say=said.append, timer=backwards)
    (choice,) = (found[one] for one in found if isinstance(one, Block))
    assert choice == "vendor"
    assert {one.op for one in found if isinstance(one, Task)} == {"weight_gradient"}
    assert any("no kernel is right" in line for line in said)
    assert model(torch.randn(2, 5, 8, 4)).isfinite().all()


def test_an_operator_that_raises_leaves_the_default(monkeypatch):
    """As where a dispatcher refuses every call of it: nothing is stored, and it is asked again."""

    def refused(*given, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(blocks, "conv_bn", refused)
    said = []
    assert tuning.tune_questions([BLOCK], CPU, say=said.append, timer=backwards) == {}
    assert "(hybrid, materialised, prologue, vendor raised); nothing stored" in said[-1]
    assert choose.choose(BLOCK, INTERPRETER) == Choice("hybrid", measured=False)
    assert not measured.stored(BLOCK, "interpreter")


def test_a_model_without_fused_blocks_has_nothing_to_tune(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    with pytest.raises(ValueError, match=r"on cpu: fuse\(model\) and move it to a GPU"):
        tuning.tune(net(), torch.randn(2, 3, 8, 8))


def test_what_cannot_be_tried_or_stored_is_said(monkeypatch):
    said = []

    def trial_of(asked, device):
        if asked is BLOCK:
            raise RuntimeError("out of memory")
        return SimpleNamespace(prepare=lambda tile: lambda: tile, wrong=lambda raw: "")

    def full(found, device):
        raise OSError("no space left")

    monkeypatch.setattr(measured, "store", full)
    found = tuning.tune_questions(
        [BLOCK, TASK], CPU, say=said.append, timer=backwards, trial_of=trial_of,
        candidates=lambda asked, target: [TILE],
    )  # fmt: skip
    assert found == {TASK: TILE}
    assert "not measured: RuntimeError: out of memory" in said[0]
    assert "not stored: OSError: no space left" in said[-1]


# The clock


@pytest.fixture
def fake_cuda(monkeypatch):
    """A GPU whose only property is the time; `replays` take the times given, in order."""
    state = SimpleNamespace(now=0.0, durations=[], captured=0, error=None)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            state.now += state.durations.pop(0)

    def graph(given, *, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        state.captured += 1
        if state.error:
            raise state.error
        return nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "Event": Event,
        "stream": lambda given: nullcontext(), "CUDAGraph": Graph, "graph": graph,
        "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def test_the_time_is_the_median_replay_of_a_graph(fake_cuda):
    fake_cuda.durations = [1.0] * 5 + [99.0] * 5 + [2.0] * 5  # milliseconds
    runs, said = [], []
    seconds = trials.device_time(lambda: runs.append(1), said.append, repeats=3)
    assert seconds == pytest.approx(2e-3)
    assert len(runs) == 3 + 1  # warm, then captured
    assert (fake_cuda.captured, said) == (1, [])


def test_a_capture_that_fails_is_said_and_the_runs_are_timed(fake_cuda):
    fake_cuda.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    said = []

    def run():
        fake_cuda.now += 3.0

    assert trials.device_time(run, said.append, repeats=3) == pytest.approx(3e-3)
    assert said == [
        "timed without a CUDA graph, launches included: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]


# The command


def test_help_does_not_wait_for_torch(environment):
    code = (
        "import sys; from fastdcgan_kernels.tuner.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--batch" in done.stdout


def test_without_a_gpu_the_command_says_so_in_one_line(command):
    done = command("fastdcgan_kernels.tuner", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nothing to tune: PyTorch sees no GPU that the kernels run on\n"


def test_the_command_refuses_a_batch_of_nothing(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--batch", "0"])
    assert caught.value.code == 2
    assert "--batch 0 was given" in capsys.readouterr().err
