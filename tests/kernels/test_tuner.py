"""The tuner's decisions, with an invented clock and candidates that are wrong, raise or are slow;
its experiments, in the interpreter; and the file of measurements, which processes share."""

import json
import multiprocessing
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import nn

from fastdcgan_kernels import (
    ConvBlock,
    blocks,
    convolution,
    findings,
    fuse,
    image,
    measured,
    plan,
    trials,
    tuner,
)
from fastdcgan_kernels.geometry import Geometry, Tile

CPU = torch.device("cpu")
GPU = "Some GPU (80 GB)"
MID = Geometry(4, 4, 2, 6, 8, 4, 5, 2, 1)
IMAGE = replace(MID, CL=3)
END = Geometry(4, 1, 1, 6, 4, 4, 5, 1, 0)
TASK = plan.Task("up", MID, torch.float32, "none", "store", 1)
BLOCK = plan.Block("down", MID, torch.float32, True, 1)
TILE = Tile(32, 16, 16, 2, 4, 3, True)
PAIRS = {  # whose launches are shared, and where
    "image": ([Geometry(4, 8, 4, 8, 16, 8, 3, 2, 1), Geometry(4, 4, 2, 6, 8, 4, 8, 2, 1)],
              (False, True), (image, "image_weight_gradient_through")),
    "norm": ([Geometry(4, 4, 4, 6, 8, 8, 5, 2, 1), Geometry(4, 1, 1, 1, 4, 4, 6, 1, 0)],
             (True, False), (blocks, "logit_gradients")),
}  # fmt: skip


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
    best = tuner.contest("layer", candidates, trial, trial.timer, said.append)
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


# The file


def write(text):
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    measured._table.cache_clear()
    return path


def stored():
    return json.loads(measured.cache_file(GPU).read_text())


def test_what_is_stored_is_found_in_this_process_and_the_next():
    assert measured.stored_tile(TASK, GPU) is None
    measured.store({TASK: TILE, BLOCK: "vendor"}, GPU)
    for _ in range(2):
        assert measured.stored_tile(TASK, GPU) == TILE
        assert measured.stored_choice(BLOCK, GPU) == "vendor"
        measured._table.cache_clear()
    assert measured.stored_tile(TASK, "Other GPU") is None
    assert measured.stored_tile(replace(TASK, dtype=torch.float16), GPU) is None
    assert stored()["device"] == GPU
    assert list(stored()["entries"]) == [f"torch {torch.__version__}, triton {triton.__version__}"]


def test_the_file_is_read_once_and_a_missing_one_is_no_news(monkeypatch):
    reads, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda path: reads.append(path) or read(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert measured.stored_tile(TASK, GPU) is None
            assert measured.stored_choice(BLOCK, GPU) is None
    assert len(reads) == 1


def test_the_file_is_where_other_things_of_the_user_are_kept(monkeypatch, tmp_path):
    assert measured.cache_file(GPU) == tmp_path / "cache" / "tuned-Some-GPU-80-GB.json"
    monkeypatch.delenv("FASTDCGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert measured.cache_file("A/B").parent == tmp_path / "shared" / "fastdcgan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.cache_file("A/B") == tmp_path / ".cache" / "fastdcgan" / "tuned-A-B.json"


def test_other_versions_are_not_used_and_not_lost(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0")
        measured.store({TASK: TILE}, GPU)
    measured._table.cache_clear()
    with pytest.warns(UserWarning, match=r"are of torch 2\.0, triton .*tune again"):
        assert measured.stored_tile(TASK, GPU) is None
    measured.store({TASK: replace(TILE, rows=64)}, GPU)
    assert measured.stored_tile(TASK, GPU).rows == 64
    assert len(stored()["entries"]) == 2


GOOD = json.dumps(measured._plain(TILE))
KEY = json.dumps(measured._key(TASK))
VERSIONS = json.dumps(measured._versions())
USELESS = {
    "empty": "",
    "truncated": '{"format": 1, "entries": {',
    "no object": "[1, 2]",
    "no text": "\udcff",
    "deep": "[" * 100_000,
    "another format": '{"format": 99, "entries": {}}',
    "entries missing": '{"format": 1}',
    "entries no object": '{"format": 1, "entries": [1]}',
    "rows no object": f'{{"format": 1, "entries": {{{VERSIONS}: 3}}}}',
    "no question": f'{{"format": 1, "entries": {{{VERSIONS}: {{"x": {GOOD}}}}}}}',
    "no tile": f'{{"format": 1, "entries": {{{VERSIONS}: {{{KEY}: {{"rows": 16}}}}}}}}',
    "tile of words": f'{{"format": 1, "entries": {{{VERSIONS}: {{{KEY}: {{"rows": "a"}}}}}}}}',
    "tile of tomorrow": f'{{"format": 1, "entries": {{{VERSIONS}: {{{KEY}: '
    f"{GOOD[:-1]}, "
    '"warp_groups": 2}}}}',
    "tile no object": f'{{"format": 1, "entries": {{{VERSIONS}: {{{KEY}: "vendor"}}}}}}',
}


@pytest.mark.parametrize("text", USELESS.values(), ids=USELESS)
def test_a_useless_file_is_one_warning_and_is_replaced(text):
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert measured.stored_tile(TASK, GPU) is None
        assert measured.stored_choice(BLOCK, GPU) is None
    assert len(caught) == 1
    assert "are ignored" in str(caught[0].message)
    assert str(path) in str(caught[0].message)
    measured.store({BLOCK: "prologue", TASK: TILE}, GPU)
    measured._table.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.stored_choice(BLOCK, GPU) == "prologue"
        assert measured.stored_tile(TASK, GPU) == TILE


def test_a_choice_that_is_none_is_refused():
    measured.store({BLOCK: "vendor"}, GPU)
    write(measured.cache_file(GPU).read_text().replace('"vendor"', '"cudnn"'))
    with pytest.warns(UserWarning, match="'cudnn' is not a choice"):
        assert measured.stored_choice(BLOCK, GPU) is None


def test_a_file_that_cannot_be_read_does_not_stop_a_forward_pass():
    measured.cache_file("interpreter").mkdir(parents=True)
    block = ConvBlock(nn.Conv2d(3, 5, 4, 2, 1))
    with pytest.warns(UserWarning, match="are ignored"):
        block(torch.randn(2, 3, 4, 4)).sum().backward()
    assert block.conv.weight.grad is not None


def test_a_home_that_is_unknown_does_not_stop_a_lookup(monkeypatch):
    monkeypatch.setattr(
        measured, "cache_file", lambda device: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    with pytest.warns(UserWarning, match="no home"):
        assert measured.stored_tile(TASK, GPU) is None


def test_processes_that_store_at_once_lose_nothing():
    """Each adds one answer at a time; all start together."""
    processes, each = 4, 12
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(processes)

    def work(number):
        start.wait()
        for step in range(each):
            task = replace(TASK, geometry=replace(MID, CS=1000 * number + step + 1))
            measured.store({task: TILE}, GPU)

    running = [fork.Process(target=work, args=(number,)) for number in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert len(stored()["entries"][measured._versions()]) == processes * each
    assert not list(measured.cache_file(GPU).parent.glob("*.tmp"))


def test_a_batch_shares_what_was_measured_for_the_next_power_of_two():
    target = replace(plan.TARGETS["sm_80"], device=GPU)

    def of(batch, asked):
        return replace(asked, geometry=replace(asked.geometry, N=batch))

    measured.store({of(256, TASK): TILE, of(256, BLOCK): "vendor"}, GPU)
    for batch in (129, 200, 256):
        assert plan.tile_for(of(batch, TASK), target) == TILE
        assert plan.choose(of(batch, BLOCK), target) == plan.Choice("vendor", measured=True)
    for batch in (128, 257):
        assert plan.tile_for(of(batch, TASK), target) != TILE
        assert not plan.choose(of(batch, BLOCK), target).measured


# The experiments


@pytest.mark.parametrize("how", ["materialised", "prologue", "vendor", "reference"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("kind", "geometry"),
    [("down", MID), ("up", MID), ("down", IMAGE), ("up", IMAGE), ("down", END), ("up", END)],
)
def test_every_way_to_run_a_block_is_right(kind, geometry, norm, how):
    trial = trials.BlockTrial(plan.Block(kind, geometry, torch.float32, norm, 1), CPU)
    assert trial.wrong(trial.prepare(how)()) == ""


def test_statistics_of_groups_are_their_own():
    one, two = (
        trials.BlockTrial(plan.Block("down", MID, torch.bfloat16, True, groups), CPU)
        for groups in (1, 2)
    )
    assert two.wrong(two.prepare("prologue")()) == ""
    assert "wrong" in one.wrong(two.prepare("prologue")())


def pair_of(name, dtype=torch.float32, groups=1):
    geometries, norms, _ = PAIRS[name]
    first, second = (
        plan.Block("down", g, dtype, norm, groups if norm or name == "norm" else 1)
        for g, norm in zip(geometries, norms, strict=True)
    )
    return plan.Pair(first, second)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_right_in_every_way_and_its_launch_is_shared(name, dtype, groups, monkeypatch):
    pair, (module, launch), shared = pair_of(name, dtype, groups), PAIRS[name][2], []
    run = getattr(module, launch)
    monkeypatch.setattr(module, launch, lambda *a, **k: shared.append(1) or run(*a, **k))
    trial = trials.PairTrial(pair, CPU)
    both = plan.pairs([TASK, pair.second, pair.first, plan.Block("up", MID, dtype, True, groups)])
    assert both == ([pair] if name == "norm" or groups == 2 else [])  # one batch: G's step
    every = plan.ways(pair, plan.INTERPRETER)
    assert len(every) == 2  # as they are is materialised
    for hows in [*every, ("vendor", "vendor"), ("reference", "reference")]:
        shared.clear()
        assert trial.wrong(trial.prepare(hows)()) == "", hows
        assert bool(shared) == (hows[1] == "prologue")


@pytest.mark.parametrize("fault", ["wrong", "raises", "slow", "none"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_shared_launch_is_chosen_where_it_is_right_and_faster(name, fault, monkeypatch):
    """Then both layers' own choices say so, and a net's launches are shared; else each keeps its
    own choice."""
    pair, (module, launch) = pair_of(name, groups=2), PAIRS[name][2]
    blocks_of, run = [pair.first, pair.second], getattr(module, launch)

    def changed(*args, **options):
        if fault == "raises":
            raise RuntimeError("an illegal instruction")
        found = run(*args, **options)
        if fault != "wrong":
            return found
        return found * 1.01 if name == "image" else (found[0], found[1] * 1.01)

    monkeypatch.setattr(module, launch, changed)

    def trial_of(asked, device):
        if asked == pair:
            return trials.PairTrial(pair, device)
        return SimpleNamespace(prepare=lambda how: lambda: how, wrong=lambda raw: "")

    of_shared = {"slow": [4.0], "none": [1.0]}.get(fault, [])  # what is wrong is not timed
    seconds, said = [5.0, 5.0, 3.0, *of_shared, 3.5], []
    found = tuner.tune_questions(
        blocks_of, CPU, say=said.append, timer=lambda run: seconds.pop(0), trial_of=trial_of,
        candidates=lambda asked, target: plan.ways(asked, target) if asked == pair else ["vendor"],
    )  # fmt: skip
    hows = [plan.choose(block, plan.INTERPRETER).how for block in blocks_of]
    assert hows == [found[block] for block in blocks_of]
    alone = ["vendor", "vendor"]
    shared = ["prologue"] * 2 if name == "image" else ["vendor", "prologue"]
    assert hows == (shared if fault == "none" else alone)
    lost = alone if fault == "none" else shared
    why = {"wrong": "wrong, ", "raises": "RuntimeError: an illegal", "slow": "40", "none": "30"}
    assert any(f": dropped {' and '.join(lost)}: {why[fault]}" in line for line in said)
    said.clear()
    assert tuner.tune_questions(blocks_of, CPU, say=said.append) == {}
    assert len(said) == 2  # nothing of the pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "prologue", "epilogue"),
    [
        ("up", "activate", "statistics"),
        ("down", "normgrad", "gradient"),
        ("down", "actgrad", "store"),
        ("weight_gradient", "both", "store"),
        ("weight_gradient", "none", "store"),
        ("image_down", "none", "statistics"),
        ("image_up", "activate", "store"),
        ("image_weight_gradient", "both", "store"),
    ],
)
def test_every_kernel_is_right_and_its_parts_sum_up(op, prologue, epilogue, dtype):
    geometry = IMAGE if op.startswith("image") else MID
    trial = trials.TileTrial(plan.Task(op, geometry, dtype, prologue, epilogue, 2), CPU)
    for split in (1, 1 if op in ("image_up", "image_down") else 2):
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
    task = plan.Task("down", MID, dtype, "none", epilogue, 1)
    trial = trials.TileTrial(task, CPU)
    result = trial.prepare(plan.tile_for(task, plan.INTERPRETER))()
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
    gather = convolution.gather

    def wrong_if_deep(*given, tile, **options):
        result = gather(*given, tile=tile, **options)
        return sabotage(result, "value") if tile.depth == 32 else result

    monkeypatch.setattr(convolution, "gather", wrong_if_deep)
    first, second, third = (Tile(32, 16, depth, 1, 1, 1) for depth in (16, 64, 32))
    said = []
    found = tuner.tune_questions(
        [TASK], CPU, say=said.append, timer=backwards,
        candidates=lambda asked, target: [first, second, third],
    )  # fmt: skip
    assert found == {TASK: second}
    assert "dropped 32x16x32, split 1, 1 warps, 1 stages: wrong, " in said[0]
    assert plan.tile_for(TASK, plan.INTERPRETER) == second


def test_a_wrong_convolution_of_the_vendor_is_dropped(monkeypatch):
    vendor = blocks._vendor
    monkeypatch.setattr(blocks, "_vendor", lambda *given: vendor(*given).roll(1, 3))
    said = []
    with plan.recording():
        found = tuner.tune_questions([BLOCK], CPU, say=said.append, timer=backwards)
    assert found == {BLOCK: "reference"}
    assert "dropped vendor: wrong" in said[0]
    assert plan.choose(BLOCK, plan.INTERPRETER) == plan.Choice("reference", measured=True)


def test_a_choice_that_was_measured_is_how_the_block_runs(monkeypatch):
    """reference: plain PyTorch and no kernel; vendor: its convolution; and the same numbers."""
    block = ConvBlock(nn.Conv2d(5, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    x, ran = torch.randn(4, 5, 8, 4), []
    expected = block(x)
    for name in ("_vendor", "_convolve"):
        inner = getattr(blocks, name)
        monkeypatch.setattr(
            blocks,
            name,
            lambda *given, name=name, inner=inner: ran.append(name) or inner(*given),
        )
    for how, runs in (("reference", []), ("vendor", ["_vendor"]), ("prologue", ["_convolve"])):
        measured.store({BLOCK: how}, "interpreter")
        ran.clear()
        torch.testing.assert_close(block(x), expected)
        assert ran == runs


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
    monkeypatch.setattr(plan, "neighbours", lambda task, target: [plan._heuristic(task, target)])
    model, said = fuse(net()), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 3, 8, 8)
    found = tuner.tune(model, x, say=said.append, timer=backwards)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    assert {asked.geometry.N for asked in found} == {4}
    tasks = {
        (asked.op, asked.prologue, asked.epilogue)
        for asked in found
        if isinstance(asked, plan.Task)
    }
    assert {
        ("image_down", "none", "store"), ("image_up", "none", "store"),
        ("image_up", "actgrad", "store"), ("image_weight_gradient", "both", "store"),
        ("down", "none", "statistics"), ("up", "normgrad", "store"),
        ("weight_gradient", "none", "store"), ("weight_gradient", "both", "store"),
    } <= tasks  # fmt: skip
    asked = {(one.geometry.CS, one.norm) for one in found if isinstance(one, plan.Block)}
    assert asked == {(5, False), (6, True), (7, False)}
    order = [isinstance(asked, plan.Block) for asked in found]
    assert order == sorted(order)  # the tiles of kernels before the blocks that run them
    measured._table.cache_clear()
    with plan.recording() as asked:
        model(x).sum().backward()
    assert set(asked) <= set(found)
    assert all(measured.known(one, "interpreter") for one in asked)

    said.clear()
    assert tuner.tune(model, x, say=said.append, timer=backwards) == {}
    assert all(line.endswith("measured before") for line in said)
    one = [next(iter(found))]
    anew = tuner.tune_questions(one, CPU, again=True, say=said.append, timer=backwards)
    assert list(anew) == one


def test_a_kernel_that_does_not_run_here_leaves_its_blocks_to_the_vendor(monkeypatch):
    """Not to plain PyTorch, though that is the fastest by this clock."""

    class TooLarge:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(convolution, "gather_pointers", TooLarge())
    model, said = fuse(net()[2:4]), []
    found = tuner.tune(model, torch.randn(2, 5, 8, 4), say=said.append, timer=backwards)
    (choice,) = (found[one] for one in found if isinstance(one, plan.Block))
    assert choice == "vendor"
    assert {one.op for one in found if isinstance(one, plan.Task)} == {"weight_gradient"}
    assert any("no kernel is right" in line for line in said)
    assert model(torch.randn(2, 5, 8, 4)).isfinite().all()


def test_an_operator_that_raises_leaves_the_default(monkeypatch):
    """As where a dispatcher refuses every call of it: nothing is stored, and it is asked again."""

    def refused(*given, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(blocks, "conv_bn", refused)
    said = []
    assert tuner.tune_questions([BLOCK], CPU, say=said.append, timer=backwards) == {}
    assert "(materialised, prologue, vendor raised); nothing stored" in said[-1]
    assert plan.choose(BLOCK, plan.INTERPRETER) == plan.Choice("materialised", measured=False)
    assert not measured.known(BLOCK, "interpreter")


def test_a_model_without_fused_blocks_has_nothing_to_tune(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    with pytest.raises(ValueError, match=r"on cpu: fuse\(model\) and move it to a GPU"):
        tuner.tune(net(), torch.randn(2, 3, 8, 8))


def test_what_cannot_be_tried_or_stored_is_said(monkeypatch):
    said = []

    def trial_of(asked, device):
        if asked is BLOCK:
            raise RuntimeError("out of memory")
        return SimpleNamespace(prepare=lambda tile: lambda: tile, wrong=lambda raw: "")

    def full(found, device):
        raise OSError("no space left")

    monkeypatch.setattr(measured, "store", full)
    found = tuner.tune_questions(
        [BLOCK, TASK], CPU, say=said.append, timer=backwards, trial_of=trial_of,
        candidates=lambda asked, target: [TILE],
    )  # fmt: skip
    assert found == {TASK: TILE}
    assert "not measured: RuntimeError: out of memory" in said[0]
    assert "not stored: OSError: no space left" in said[-1]


def test_a_file_that_another_process_keeps_is_given_up(monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(measured, "PATIENCE", 0.05)
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"), pytest.raises(OSError, match="lock"):
        measured.store({TASK: TILE}, GPU)
    assert measured.stored_tile(TASK, GPU) == TILE  # in this process


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
        "import sys; from fastdcgan_kernels import tuner\n"
        "try: tuner.main(['--help'])\n"
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
        tuner.main(["--batch", "0"])
    assert caught.value.code == 2
    assert "--batch 0 was given" in capsys.readouterr().err


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_commands_nets_are_the_dcgan_and_fuse_whole(size):
    with torch.device("meta"):
        generator, discriminator = tuner.dcgan(size)
        images = generator(torch.empty(2, 100, 1, 1))
        assert images.shape == (2, 3, size, size)
        assert discriminator(images).shape == (2, 1, 1, 1)
    for model in (generator, discriminator):
        found = findings(fuse(model))
        assert len(found) == size.bit_length() - 2
        assert all(one.fused for one in found)
