"""What tests of single checks share: the built-in data, packed once."""

import pytest
import torch


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    # Imports Triton, and may be read before Triton is told of its interpreter (tests/conftest.py).
    from fastdcgan.diagnosis import data

    return data.open_data(tmp_path_factory.mktemp("packed"))
