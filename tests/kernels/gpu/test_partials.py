"""Sums over many programs (in the interpreter): few rows of them, merged by whichever program comes
last, with the same bits; the tickets that tell which; and what the compiler makes of the order."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import interpreter

from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.gpu import batchnorm as norm
from fastdcgan_kernels.gpu import conv_image, conv_pointers, partials, tile
from fastdcgan_kernels.gpu.launch import watching
from fastdcgan_kernels.gpu.tile import Operand
from fastdcgan_kernels.inspect.launches import launches
from tests.kernels import exact
from tests.kernels.exact import EPS, Draw, close, layer

GROUPS = pytest.mark.parametrize("groups", [1, 2])


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """Two: at most four rows of partials."""
    monkeypatch.setattr(targets, "INTERPRETER", replace(targets.INTERPRETER, multiprocessors=2))


@pytest.fixture
def taken(monkeypatch):
    """The tickets that launches take, of which later ones get the same: zeros that are left."""
    pool, given = torch.zeros(64, dtype=torch.int32), []

    def take(device, n):
        given.append(n)
        return pool[:n]

    monkeypatch.setattr(tile, "tickets", take)
    yield given
    assert not pool.any()


def reversed_order(builder, x, y, z):
    across, down, deep = builder.grid_dim
    return across - 1 - x, down - 1 - y, deep - 1 - z


def other_order(builder, x, y, z):
    """Every third program first along the first axis, the axes in turn."""
    across, _, _ = builder.grid_dim
    order = [at for start in (1, 0, 2) for at in range(start, across, 3)]
    return order[x], y, z


def in_order(monkeypatch, order):
    """Programs run in this order."""
    run = interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        run(self, *order(self, x, y, z))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)


def by_rows(groups):
    """Of a tensor: statistics, both sums, a column's sum."""
    draw = Draw(torch.bfloat16)
    y, g = draw.normal(4, 70, 16, 15, offset=2.0), draw.normal(4, 70, 16, 15)
    gamma, beta = draw.normal(70), draw.normal(70)
    running = norm.Running(torch.zeros(70), torch.ones(70), 0.1, torch.tensor(3))
    merged = norm.merged_statistics(y, groups, 70, gamma, beta, EPS, running)
    norm.statistics(y, groups, merged)
    gy, gcoef = norm.activation_backward(g, y, merged.coef, "tanh", 0.0, groups)
    column = norm.column_sum(Operand(y), groups)
    return [merged.coef, merged.stats, running.mean, running.var, running.batches, gy, gcoef,
            column]  # fmt: skip


def by_convolutions(groups, transposed, g, family):
    """Of a convolution's result: statistics, both sums; also where a value's sum is in parts."""
    draw, found = Draw(torch.float32), []
    to, of = draw.sides(g)[:: -1 if transposed else 1]
    source, weight = draw.operand(of, groups, "none", "none"), draw.weight(g)
    for kind in ("statistics", "gradient"):
        for split in (1, 2):
            epilogue = draw.epilogue(to, groups, kind, "relu")
            result = family.convolve(
                source, weight, g, transposed=transposed, tile=Tile(16, 16, 16, split),
                epilogue=epilogue, groups=groups,
            )  # fmt: skip
            merged = epilogue.merged
            found += [result.value, merged.coef if kind == "statistics" else merged.out]
    return found


RUNS = {
    "by rows": by_rows,
    "down": lambda groups: by_convolutions(groups, False, layer(8, 2, 5, 20, 3), conv_pointers),
    "up": lambda groups: by_convolutions(groups, True, layer(4, 2, 3, 3, 20), conv_pointers),
    "from an image": lambda groups: by_convolutions(
        groups, False, layer(8, 2, 5, 20, 3), conv_image
    ),
    "to an image": lambda groups: by_convolutions(groups, True, layer(4, 5, 6, 5, 3), conv_image),
}


def rows_made(launch):
    """Of partials, of all groups."""
    given = launch.named
    makes = given.get("EPILOGUE", "gradient") in ("statistics", "gradient")
    return given["end_partials"][0, ..., 0].numel() if makes and "end_partials" in given else 0


@GROUPS
@pytest.mark.parametrize("run", RUNS)
def test_who_comes_last_is_in_no_bit(run, groups, monkeypatch, taken):
    """And each launch leaves the tickets as it found them."""
    first, rows = RUNS[run](groups), []
    assert taken
    for order in (reversed_order, other_order):
        with monkeypatch.context() as patch:
            in_order(patch, order)
            with watching(lambda launch: rows.append(rows_made(launch))):
                other = RUNS[run](groups)
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)
    assert max(rows) > 3


@GROUPS
@pytest.mark.parametrize("family", [conv_pointers, conv_image])
@pytest.mark.parametrize("kind", ["statistics", "gradient"])
def test_a_launch_of_its_own_merges_the_same(kind, family, groups):
    """Where the launch that made the rows left them."""
    draw, g = Draw(torch.float32), layer(8, 2, 5, 40, 3)
    small, large = draw.sides(g)
    source, weight = draw.operand(large, groups, "none", "none"), draw.weight(g)
    epilogue = draw.epilogue(small, groups, kind, "relu")
    given = {"transposed": False, "tile": Tile(16, 16, 32), "groups": groups}
    family.convolve(source, weight, g, epilogue=epilogue, **given)
    result = family.convolve(source, weight, g, epilogue=replace(epilogue, merged=None), **given)
    if kind == "gradient":
        again = norm.merged_sums(epilogue.coef)
        partials.merge(result.partials, None, again)
        close(again.out, epilogue.merged.out.double())
    else:
        again = norm.merged_statistics(weight, groups, 40, None, None, EPS)
        partials.merge(result.partials, result.counts[0], again)
        close(again.coef, epilogue.merged.coef.double())
        close(again.stats, epilogue.merged.stats.double())


@GROUPS
@pytest.mark.parametrize("rows", [1, 300, 1000])
def test_many_rows_are_one(rows, groups):
    """More than a program holds at once, some of no values, far from 0: in float64."""
    draw = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 9, (groups, rows), generator=draw, dtype=torch.float64) + 1
    counts[:, 1::7] = 0
    of_rows = torch.randn(2, groups, rows, 24, generator=draw, dtype=torch.float64)
    of_rows = torch.stack([100 + of_rows[0], of_rows[1].square()]).float().double()
    means, m2, weight = of_rows[0], of_rows[1], counts[:, :, None]
    n = weight.sum(1)
    mean = (weight * means).sum(1) / n
    var = (m2 + weight * (means - mean[:, None]).square()).sum(1) / n

    merged = norm.merged_statistics(torch.zeros(1), groups, 24, None, None, EPS)
    partials.merge(of_rows.float(), counts.float(), merged)
    found = merged.stats.double()
    torch.testing.assert_close(found[0], mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(found[1], var, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(found[2], n.expand_as(mean), rtol=0, atol=0)

    out = torch.full((groups, 24), torch.nan)
    partials.merge(of_rows[:1].float(), None, partials.MergedSums(out, (), ()))
    torch.testing.assert_close(out.double(), means.sum(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("batch", [128, 1024])
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_at_most_two_rows_a_multiprocessor(target, batch):
    """Of all layers, each way; and no launch of its own merges them."""
    most, seen = 2 * targets.TARGETS[target].multiprocessors, 0
    for layer_and_pass, launch in launches(target, "bf16", batch):
        rows = rows_made(launch)
        assert rows <= most, layer_and_pass
        seen = max(seen, rows)
        assert launch.kernel.fn.__name__ != "merge_rows" or "step" in layer_and_pass
    assert seen == most


def test_groups_share_the_rows():
    device = torch.device("cpu")
    assert [partials.rows_of(100, groups, device) for groups in (1, 2, 4, 7)] == [4, 2, 1, 1]
    assert partials.rows_of(2, 1, device) == 2


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as tickets go."""
    state = SimpleNamespace(stream=1, capturing=False)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(partials, "_pools", {})
    monkeypatch.setattr(
        partials._Pool, "_make", lambda self: torch.zeros(partials.POOL, dtype=torch.int32)
    )
    return state


def places(tensor):
    start = tensor.storage_offset()
    return set(range(start, start + tensor.numel()))


def test_no_two_launches_that_may_run_at_one_time_have_the_same_tickets(gpu):
    def take(n=8, **now):
        vars(gpu).update(now)
        return places(partials.from_pool(torch.device("cuda"), n))

    mine = take()
    assert take() == mine, "a stream runs one launch after the other"
    assert take(3) < mine
    other = take(stream=2)
    assert not other & mine
    captured = [take(capturing=True, stream=stream) for stream in (1, 2, 1)]
    together = set().union(*captured)
    assert len(together) == 3 * 8, "a graph runs beside any stream, and beside another graph"
    assert not together & (mine | other)
    assert take(capturing=False, stream=1) == mine
    assert partials.from_pool(torch.device("cuda", 0), 8).sum() == 0


def test_where_the_pool_has_none_left_or_is_not_there_they_are_made_for_the_launch(gpu):
    device = torch.device("cuda")
    gpu.capturing = True
    assert partials.from_pool(device, 8) is None, "no memory is made for good inside a capture"
    gpu.capturing = False
    assert partials.from_pool(device, partials.OF_STREAM + 1) is None
    assert partials.from_pool(device, 8) is not None
    gpu.capturing = True
    assert partials.from_pool(device, partials.POOL) is None
    assert not partials.tickets(torch.device("cpu"), 5).any()
    meta = partials.tickets(torch.device("meta"), 5)
    assert (meta.shape, meta.dtype) == ((5,), torch.int32)


PRINT_ORDER = """
import json, re
from fastdcgan_kernels.inspect import assembly
from fastdcgan_kernels.inspect.compiling import build, order_of
from fastdcgan_kernels.inspect.launches import launches
found, wanted = {{}}, [{names}]
for arch in ("sm_80", "sm_90"):
    for layer, launch in launches(arch, "bf16"):
        name = launch.kernel.fn.__name__
        kind = launch.arguments.get("EPILOGUE", "gradient")
        key = f"{{arch}} {{name}} {{kind}}"
        if name in wanted and kind in ("statistics", "gradient") and key not in found:
            built = build(order_of(launch), arch)
            sass = assembly.run_tool("cuobjdump", "-sass", on=built.asm["cubin"])
            found[key] = [built.asm["ptx"], [t for _, t in assembly.instructions_of(sass)]]
print(json.dumps(found))
"""
NAMES = ("gather_pointers", "gather_descriptors", "activation_gradient", "partial_statistics")


def where(lines, *words):
    return [at for at, line in enumerate(lines) if all(word in line for word in words)]


@pytest.mark.timeout(900)
def test_compiled_rows_are_stored_then_counted_then_read_past_the_l1(environment):
    """Read in the PTX: all of a program's rows are stored, all its threads wait for each other, one
    counts (acquire, release, for the whole GPU), all wait for it, and then rows are read from the
    L2. And in the machine's code: what was stored before is there for all before it counts, and no
    line of an L1 is used that is older than the count."""
    script = PRINT_ORDER.format(names=", ".join(map(repr, NAMES)))
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        check=True, timeout=900,
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert {name.split()[1] for name in found} == set(NAMES)
    assert {name.split()[2] for name in found} == {"statistics", "gradient"}
    for name, (ptx, sass) in found.items():
        lines = ptx.splitlines()
        (count,) = where(lines, "atom.")
        assert "atom.global.gpu.acq_rel.add.u32" in lines[count], (name, lines[count])
        stores = [at for at in where(lines, "st.global") if at < count]
        before = [at for at in where(lines, "bar.sync") if at < count]
        assert stores[-1] < before[-1], name
        assert not [at for at in where(lines, "st.global") if before[-1] < at < count], name
        reads = [at for at in where(lines, "ld.global") if at > count]
        after = [at for at in where(lines, "bar.sync") if at > count]
        assert after[0] < reads[0], name
        assert where(lines[count:], "ld.global", ".cg."), name
        (atomic,) = where(sass, "ATOMG")
        assert [at for at in where(sass, "MEMBAR", "GPU") if at < atomic], name
        assert [at for at in where(sass, "CCTL.IVALL") if at > atomic], name
