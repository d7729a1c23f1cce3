"""The convolutions in Gluon: their own source in an emulator, against plain PyTorch in float64, and
with faults planted in it; their order in the code that is compiled; and what they do not take."""

import json
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.choice.targets import TARGETS, assume
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.gpu.launch import recording
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from fastdcgan_kernels.inspect.assembly import unordered
from tests.kernels import exact
from tests.kernels.exact import layer
from tests.kernels.gluon_emulator import Fault, emulated

TOGETHER = Tile(128, 64, 64, 1, 8, 3, "gluon")
IN_TURN = Tile(128, 64, 64, 1, 4, 4, "gluon")


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    with exact.results_start_as_nan():
        yield


def check(transposed, g, kind, tile, *changes, groups=1, dtype=torch.bfloat16, seed=0, **more):
    """In the emulator; a result that is right."""
    module = emulated(*changes, seed=seed, **more)

    def convolve(*given, **named):
        assert module.takes(*given, **named)
        return module.convolve(*given, **named)

    activation = "none" if kind == "statistics" else ("leaky_relu", "tanh")[seed % 2]
    exact.check_gather(
        convolve, transposed, g, dtype, "none", kind, ("none", activation), groups, tile, seed,
        bias=seed != 2,
    )  # fmt: skip


# A box is of several images, of one, or of rows of one; the last one has images that are not there;
# the layer is not square; two groups; tiles of all sizes; more programs than tiles, and one.
@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
@pytest.mark.parametrize(
    ("g", "kind", "tile", "more"),
    [
        (layer(18, 4, 4, 64, 64), "statistics", TOGETHER, {}),
        (layer(18, 4, 4, 64, 128), "statistics", IN_TURN, {"seed": 2}),
        (layer(9, 4, 4, 64, 64), "gradient", IN_TURN, {"seed": 1, "programs": 1}),
        (layer(4, 8, 8, 64, 64), "gradient", IN_TURN, {"groups": 2, "programs": 1}),
        (layer(4, 8, 8, 128, 64), "statistics", IN_TURN, {"groups": 2, "dtype": torch.float16}),
        (layer(1, 16, 16, 64, 64), "store", TOGETHER, {"seed": 1}),
        (layer(12, 4, 8, 64, 64), "store", IN_TURN, {"programs": 2}),
        (layer(12, 6, 4, 64, 64), "store", replace(TOGETHER, stages=5), {"seed": 2}),
        (layer(16, 4, 4, 128, 128), "gradient", replace(TOGETHER, rows=256, columns=128), {}),
        (layer(16, 4, 4, 128, 128), "store", replace(IN_TURN, columns=128), {"programs": 99}),
    ],
    ids=str,
)
def test_the_source_in_the_emulator(transposed, g, kind, tile, more):
    check(transposed, g, kind, tile, **more)


def test_chance_changes_no_bit():
    """Whoever goes on first, and however many programs share the tiles."""
    draw = exact.Draw(torch.bfloat16)
    g = layer(4, 8, 8, 64, 64)
    source, weight = Operand(draw.normal(4, 64, 8, 8)), draw.weight(g)
    found = []
    for seed, programs in ((0, 1), (1, 3)):
        result = emulated(seed=seed, programs=programs).convolve(
            source, weight, g, transposed=True, tile=IN_TURN, epilogue=Epilogue("statistics")
        )
        found.append([result.value, result.partials, result.counts])
    assert all(map(torch.equal, *found))


DOWN = partial(check, False, layer(24, 4, 4, 64, 64), "store", TOGETHER, programs=1)
UP = partial(check, True, layer(8, 4, 4, 64, 64), "store", TOGETHER, programs=1)
TURNS = partial(check, False, layer(32, 4, 4, 64, 64), "statistics", IN_TURN, programs=1)
AUX = partial(check, True, layer(16, 4, 4, 64, 64), "gradient", IN_TURN, programs=1, groups=2)
TWO = partial(check, False, layer(16, 4, 4, 128, 64), "statistics", IN_TURN, groups=2)
EMPTY = "mbarrier.wait(job.empty.index(ring.stage), ring.turn ^ 1)"
FULL = "mbarrier.wait(job.full.index(ring.stage), ring.turn)"
BYTES = "2 * S.BLOCK_K * (S.BLOCK_M + S.BLOCK_N)"
FAULTS = {
    "the producer's parity": (DOWN, EMPTY, EMPTY.replace(" ^ 1", ""), "deadlock"),
    "a stage filled unasked": (DOWN, EMPTY, "pass", "arrived twice|not read"),
    "a product unasked": (DOWN, FULL, "pass", "not landed"),
    "the consumers' parity": (DOWN, FULL, FULL.replace("turn", "turn ^ 1"), "deadlock|not landed"),
    "a stage freed too early": (
        DOWN, "gl.where(ring.stage == 0, S.STAGES - 1, ring.stage - 1)", "ring.stage",
        "deadlock|not read|twice",
    ),
    "a product not waited for": (DOWN, "warpgroup_mma_wait(1, deps=(acc", "warpgroup_mma_wait(2, "
                                 "deps=(acc", "not read"),
    "the last product not waited for": (DOWN, "mma_wait(0", "mma_wait(1", "in flight|not read"),
    "the last stage not freed": (
        DOWN, "        release(job, ring, S)\n        first", "        first", "deadlock"
    ),
    "too few bytes": (DOWN, BYTES, "2 * S.BLOCK_K * S.BLOCK_M", "deadlock|not landed"),
    "too many bytes": (DOWN, BYTES, f"3 + {BYTES}", "deadlock"),
    "another tap, down": (DOWN, "(th * 4 + tw) * S.CL + c", "(tw * 4 + th) * S.CL + c", "error"),
    "another tap, up": (UP, "kh = 3 - 2 * th - at.r", "kh = 2 * th + at.r", "error"),
    "no fence of what is stored": (
        DOWN, ".store(piece)\n    fence_async_shared()", ".store(piece)", "without a fence"
    ),
    "no fence of the barriers": (
        DOWN, "    fence_async_shared()\n    tiles", "    tiles", "no fence"
    ),
    "a buffer not waited for": (DOWN, "tma.store_wait(0)  #", "pass  #", "store has not read"),
    "stores in flight at the end": (
        DOWN, "tma.store_wait(0)\n\n\n@gluon.jit\ndef piece", "pass\n\n\n@gluon.jit\ndef piece",
        "in flight",
    ),
    "out of turn": (TURNS, "mbarrier.wait(job.order.index(WHO), turn)", "pass",
                    "not read|deadlock|not landed"),
    "a turn given to itself": (
        TURNS, "job.order.index(1 - WHO)", "job.order.index(WHO)", "deadlock"
    ),
    "the parity of turns": (TURNS, "gl.to_tensor(1 ^ WHO)", "gl.to_tensor(0)", "deadlock"),
    "a turn given too early": (
        TURNS, "        for _ in range(1, STEPS):", "        if S.CONSUMERS == 2:\n            "
        "mbarrier.arrive(job.order.index(1 - WHO), count=1)\n        for _ in range(1, STEPS):",
        "deadlock|not read|not landed|twice",
    ),
    "aux not waited for": (AUX, "mbarrier.wait(job.given.index(WHO), came)", "pass", "not landed"),
    "the parity of aux": (AUX, "            came ^= 1\n", "", "not landed|deadlock"),
    "the bytes of aux": (AUX, "2 * S.BLOCK_N * S.BLOCK_M", "S.BLOCK_N * S.BLOCK_M",
                         "not landed|deadlock"),
    "aux where a store reads": (AUX, "tma.store_wait(0)\n    mbarrier.expect", "mbarrier.expect",
                                "store has not read"),
    "coefficients of another group": (
        AUX, "at.n // job.images * S.CO + channel", "channel", "error"
    ),
    "a piece of another place": (AUX, "constexpr = PIECE * (", "constexpr = 0 * (", "stored twice"),
    "images of another group": (TWO, "n = box // boxes * images + own", "n = own", "stored twice"),
    "counts of every channel": (TWO, "    if at.channel == 0:\n", "    if 1:\n", "written twice"),
    "rows of another phase": (AUX, "box * PHASES + phase)", "box)", "written twice"),
    "tiles of both": (TURNS, "S.CONSUMERS * programs):", "programs):", "deadlock|twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name):
    run, old, new, words = FAULTS[name]
    with pytest.raises(AssertionError, match=words):
        run((old, new))


def test_what_is_not_there_counts_nothing():
    """Images past the last one, which a box of the last tile has."""
    with pytest.raises(AssertionError):
        check(False, layer(9, 4, 4, 64, 64), "statistics", TOGETHER, ("if S.RAGGED:", "if False:"))


def test_a_deadlock_is_found_and_named():
    with pytest.raises(Fault, match="deadlock: consume 0, produce 1 wait"):
        DOWN((EMPTY, EMPTY.replace(" ^ 1", "")))


# --- What it is compiled to -----------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("what", "tiles"), [("D3 backward, gradient", 3), ("G4 forward", 2)])
def test_what_it_compiles_to(command, what, tiles):
    """Of what `takes` accepts, a few: all of them by `python -m fastdcgan_kernels.inspect --gluon
    --arch sm_90`."""
    run = command(
        "fastdcgan_kernels.inspect", "--gluon", "--json", "--arch", "sm_90", "--layer", what,
        "--jobs", 1, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == tiles
    for row in rows:
        assert row["spill_bytes"] == row["local_accesses"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"] == 232_448, row
        assert row["matrix_instruction"] == "HGMMA"
        assert row["main_loop"]["per_matrix_instruction"] <= 12, row
        assert row["unordered"] == [], row
        assert {40, 232} <= {*row["setmaxnreg"]}, row
        assert row["resident_blocks"] == 1, row  # its 12 warps and registers fit


ORDERED = """
wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16
wgmma.wait_group.sync.aligned 1;
bar.sync 0, 256;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1], 1;
bar.sync 0, 256;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 1;
cp.async.bulk.wait_group.read 0;
ldmatrix.sync.aligned.m8n8.x4.shared.b16
bar.sync 0, 256;
stmatrix.sync.aligned.m8n8.x4.trans.shared.b16
stmatrix.sync.aligned.m8n8.x4.trans.shared.b16
fence.proxy.async.shared::cta;
bar.sync 0, 256;
@%p2 cp.async.bulk.tensor.4d.global.shared::cta.bulk_group
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (1, "arrive without wait"), (2, "arrive without sync"), (8, "write without sync"),
        (11, "store without fence"), (12, "store without sync"),
    ],
)  # fmt: skip
def test_what_is_out_of_order_is_said(line, said):
    lines = ORDERED.strip().splitlines()
    assert unordered(ORDERED) == []
    assert any(
        said in problem for problem in unordered("\n".join(lines[:line] + lines[line + 1 :]))
    )


def test_a_barrier_of_other_warps_orders_nothing():
    assert unordered(ORDERED.replace("0, 256", "0, 32"))


# --- What it takes, and who runs in its place -----------------------------------------------------

MID = layer(128, 8, 8, 256, 128)
WIDE = Tile(128, 128, 64, 1, 4, 4, "gluon")


def kernel_of(tile, target="sm_90", dtype=torch.bfloat16, **epilogue):
    """The name of what a block would launch."""
    order = torch.channels_last
    x = torch.empty(128, 256, 8, 8, dtype=dtype, device="meta", memory_format=order)
    weight = torch.empty(256, 128, 4, 4, dtype=dtype, device="meta", memory_format=order)
    with assume(TARGETS[target]), recording() as launches:
        blocks.convolve(
            Operand(x), weight, MID, transposed=True, tile=tile, epilogue=Epilogue(**epilogue)
        )
    return launches[0].kernel.fn.__name__


def test_a_tile_says_who_makes_it():
    assert kernel_of(WIDE) == "gather_gluon"
    assert kernel_of(replace(WIDE, engine="descriptors")) == "gather_descriptors"
    assert kernel_of(WIDE, "sm_100") == "gather_descriptors"
    assert kernel_of(WIDE, dtype=torch.float32) != "gather_gluon"
    assert kernel_of(replace(WIDE, split=2)) == "gather_descriptors"


def test_the_interpreter_runs_another():
    draw = exact.Draw(torch.bfloat16)
    g = layer(8, 4, 4, 64, 64)
    with recording() as launches:
        blocks.convolve(
            Operand(draw.normal(8, 64, 4, 4)), draw.weight(g), g, transposed=True, tile=IN_TURN
        )
    assert launches[0].kernel.fn.__name__ == "gather_descriptors"


@pytest.mark.parametrize("how", ["absent", "changed"])
def test_without_gluon_descriptors_run_and_one_line_says_so(how, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastdcgan_kernels.gpu.conv_gluon", raising=False)
    monkeypatch.delattr("fastdcgan_kernels.gpu.conv_gluon", raising=False)
    name = "triton.experimental.gluon"
    if how == "absent":
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.setitem(sys.modules, f"{name}.language.nvidia.hopper", torch)
    blocks.gluon.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [kernel_of(WIDE), kernel_of(WIDE)] == ["gather_descriptors"] * 2
    (one,) = [str(each.message) for each in caught]
    assert one.startswith("descriptors in place of the Gluon kernels, not importable: ")
    assert "\n" not in one
    monkeypatch.undo()
    blocks.gluon.cache_clear()
