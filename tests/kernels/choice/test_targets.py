"""Which kernels a device gets, and what FASTDCGAN_IMPL says."""

from types import SimpleNamespace

import pytest
import torch

from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.targets import INTERPRETER, TARGETS


def test_assume_is_for_meta_tensors_alone():
    meta = torch.device("meta")
    assert targets.target_of(meta) is None
    with targets.assume(TARGETS["sm_80"]):
        with targets.assume(TARGETS["gfx950"]):
            assert targets.target_of(meta) == TARGETS["gfx950"]
            assert targets.target_of(torch.device("cpu")) == INTERPRETER
        assert targets.target_of(meta) == TARGETS["sm_80"]
    assert targets.target_of(meta) is None


def test_cpu_has_kernels_in_the_interpreter_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert targets.target_of(torch.device("cpu")) is None


@pytest.mark.parametrize("given", targets.MODES)
def test_mode_is_read_from_the_environment(monkeypatch, given):
    monkeypatch.setenv("FASTDCGAN_IMPL", given)
    assert targets.mode() == given


def test_mode_is_auto_unless_told(monkeypatch):
    monkeypatch.delenv("FASTDCGAN_IMPL", raising=False)
    assert targets.mode() == "auto"
    monkeypatch.setenv("FASTDCGAN_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"FASTDCGAN_IMPL='cuda'.*auto, reference, triton"):
        targets.mode()


@pytest.fixture
def gpu(monkeypatch):
    """target_of(cuda) with a device of these properties."""

    def target(hip=None, **properties):
        targets._cuda_target.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        properties = {"name": "Some GPU", "multi_processor_count": 7, **properties}
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties)
        )
        return targets.target_of(torch.device("cuda", 3))

    yield target
    targets._cuda_target.cache_clear()


@pytest.mark.parametrize(
    ("major", "minor", "known"),
    [(8, 0, "sm_80"), (8, 6, "sm_80"), (8, 9, "sm_89"), (9, 0, "sm_90"), (10, 0, "sm_100"),
     (10, 3, "sm_100"), (12, 0, "sm_120"), (12, 1, "sm_120"), (7, 5, None), (11, 0, None),
     (13, 0, None)],
)  # fmt: skip
def test_capability_takes_the_known_target_below_of_its_family(gpu, major, minor, known):
    target = gpu(major=major, minor=minor)
    assert (target and target.name) == known
    if target:
        assert (target.multiprocessors, target.device) == (7, "Some GPU")
        assert target.shared_bytes == TARGETS[known].shared_bytes


@pytest.mark.parametrize(("has", "may"), [(101_376, 101_376), (1 << 20, 166_912)])
def test_a_device_with_less_shared_memory_says_so(gpu, has, may):
    assert gpu(major=8, minor=6, shared_memory_per_block_optin=has).shared_bytes == may


@pytest.mark.parametrize(
    ("arch", "known"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950"), ("gfx90a", None)],
)
def test_amd_is_known_by_its_architecture(gpu, arch, known):
    target = gpu(hip="7.0", gcnArchName=arch)
    assert (target and (target.name, target.multiprocessors, target.device)) == (
        known and (known, 7, "Some GPU")
    )
