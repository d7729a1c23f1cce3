"""PyTorch's global settings after a test are those before it."""

import pytest
import torch
from torch import backends

from tests.conftest import restored_settings


def threads():
    torch.set_num_threads(torch.get_num_threads() + 1)


CHANGES = {
    "precision of convolutions": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "precision of cuDNN": lambda: setattr(backends.cudnn, "fp32_precision", "ieee"),
    "precision of products": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "precision of everything": lambda: setattr(backends, "fp32_precision", "ieee"),
    "cuDNN's choice": lambda: setattr(backends.cudnn, "benchmark", not backends.cudnn.benchmark),
    "cuDNN's order": lambda: setattr(backends.cudnn, "deterministic", True),
    "order of sums": lambda: torch.use_deterministic_algorithms(True),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": threads,
}


def settings():
    return (
        backends.fp32_precision, backends.cudnn.fp32_precision,
        backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision,
        backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.get_num_threads(),
    )  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_setting_is_restored(change):
    before = settings()
    with restored_settings():
        change()
        assert settings() != before
    assert settings() == before


def test_every_test_has_its_own_settings(request):
    """Those of tests/gpu, too: the fixture is that of all tests."""
    assert "settings_of_each_test" in request.fixturenames
