"""What tests of single checks share: the built-in data, packed once."""

import pytest
import torch

from fastdcgan.diagnosis import data


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    return data.open_data(tmp_path_factory.mktemp("packed"))
