"""What is asked of the machine."""

import pytest
import torch

from fastdcgan.hardware import use_allowed_threads


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("100000 100000\n", None, 1),
        ("50000 100000\n", None, 1),
        ("max 100000\n", None, 2),
        ("800000 100000\n", None, 2),
        ("nonsense", None, 2),
        (None, None, 2),
        ("100000 100000\n", "2", 2),
    ],
)
def test_threads_are_those_that_a_container_may_use(tmp_path, monkeypatch, text, given, expected):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    try:
        torch.set_num_threads(2)
        assert use_allowed_threads(tmp_path / "cpu.max") == expected
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
