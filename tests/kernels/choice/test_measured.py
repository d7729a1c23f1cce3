"""The file of measurements, which processes share."""

import json
import multiprocessing
import warnings
from dataclasses import asdict, replace

import pytest
import torch
import triton
from torch import nn

from fastdcgan_kernels import ConvBlock
from fastdcgan_kernels.choice import choose, measured
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.choice.types import Block, Choice, Task

GPU = "Some GPU (80 GB)"
MID = Geometry(4, 4, 2, 6, 8, 4, 5, 2, 1)
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


def write(text):
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    measured._table.cache_clear()
    return path


def stored():
    return json.loads(measured.cache_file(GPU).read_text())


def test_what_is_stored_is_found_in_this_process_and_the_next():
    assert measured.stored(TASK, GPU) is None
    measured.store({TASK: TILE, BLOCK: "vendor"}, GPU)
    for _ in range(2):
        assert measured.stored(TASK, GPU) == TILE
        assert measured.stored(BLOCK, GPU) == "vendor"
        measured._table.cache_clear()
    assert measured.stored(TASK, "Other GPU") is None
    assert measured.stored(replace(TASK, dtype=torch.float16), GPU) is None
    assert stored()["device"] == GPU
    assert list(stored()["entries"]) == [f"torch {torch.__version__}, triton {triton.__version__}"]


def test_the_file_is_read_once_and_a_missing_one_is_no_news(monkeypatch):
    reads, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda path: reads.append(path) or read(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert measured.stored(TASK, GPU) is None
            assert measured.stored(BLOCK, GPU) is None
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
        assert measured.stored(TASK, GPU) is None
    measured.store({TASK: replace(TILE, rows=64)}, GPU)
    assert measured.stored(TASK, GPU).rows == 64
    assert len(stored()["entries"]) == 2


GOOD = json.dumps(asdict(TILE))
KEY = json.dumps(measured._key(TASK))
VERSIONS = json.dumps(measured._versions())
USELESS = {
    "empty": "",
    "truncated": '{"format": 2, "entries": {',
    "no object": "[1, 2]",
    "no text": "\udcff",
    "deep": "[" * 100_000,
    "another format": '{"format": 99, "entries": {}}',
    "entries missing": '{"format": 2}',
    "entries no object": '{"format": 2, "entries": [1]}',
    "rows no object": f'{{"format": 2, "entries": {{{VERSIONS}: 3}}}}',
    "no question": f'{{"format": 2, "entries": {{{VERSIONS}: {{"x": {GOOD}}}}}}}',
    "no tile": f'{{"format": 2, "entries": {{{VERSIONS}: {{{KEY}: {{"rows": 16}}}}}}}}',
    "tile of words": f'{{"format": 2, "entries": {{{VERSIONS}: {{{KEY}: {{"rows": "a"}}}}}}}}',
    "tile of tomorrow": f'{{"format": 2, "entries": {{{VERSIONS}: {{{KEY}: '
    f"{GOOD[:-1]}, "
    '"warp_groups": 2}}}}',
    "tile no object": f'{{"format": 2, "entries": {{{VERSIONS}: {{{KEY}: "vendor"}}}}}}',
}


@pytest.mark.parametrize("text", USELESS.values(), ids=USELESS)
def test_a_useless_file_is_one_warning_and_is_replaced(text):
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert measured.stored(TASK, GPU) is None
        assert measured.stored(BLOCK, GPU) is None
    assert len(caught) == 1
    assert "are ignored" in str(caught[0].message)
    assert str(path) in str(caught[0].message)
    measured.store({BLOCK: "prologue", TASK: TILE}, GPU)
    measured._table.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.stored(BLOCK, GPU) == "prologue"
        assert measured.stored(TASK, GPU) == TILE


def test_a_choice_that_is_none_is_refused():
    measured.store({BLOCK: "vendor"}, GPU)
    write(measured.cache_file(GPU).read_text().replace('"vendor"', '"cudnn"'))
    with pytest.warns(UserWarning, match="'cudnn' is not a choice"):
        assert measured.stored(BLOCK, GPU) is None


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
        assert measured.stored(TASK, GPU) is None


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
    target = replace(TARGETS["sm_80"], device=GPU)

    def of(batch, asked):
        return replace(asked, geometry=replace(asked.geometry, N=batch))

    measured.store({of(256, TASK): TILE, of(256, BLOCK): "vendor"}, GPU)
    for batch in (129, 200, 256):
        assert choose.tile_for(of(batch, TASK), target) == TILE
        assert choose.choose(of(batch, BLOCK), target) == Choice("vendor", measured=True)
    for batch in (128, 257):
        assert choose.tile_for(of(batch, TASK), target) != TILE
        assert not choose.choose(of(batch, BLOCK), target).measured


def test_the_shipped_targets_have_no_measured_choices():
    """inspect compiles the same tiles on every machine."""
    assert not any(target.device for target in TARGETS.values())
    assert measured.stored(TASK, "") is None
    assert measured.stored(BLOCK, "") is None


def test_a_file_that_another_process_keeps_is_given_up(monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(measured, "PATIENCE", 0.05)
    path = measured.cache_file(GPU)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"), pytest.raises(OSError, match="lock"):
        measured.store({TASK: TILE}, GPU)
    assert measured.stored(TASK, GPU) == TILE  # in this process
