"""Two batches in one memory: who writes where, and when it is a copy after all."""

import pytest
import torch

from fastdcgan.training.config import TrainConfig
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan_kernels import placing
from fastdcgan_kernels.gpu.crop import squares
from tests.training.steps import batches

CPU = torch.device("cpu")
SHAPE = (2, 3, 4, 6)


def pair(dtype=torch.float32):
    first, second = placing.side_by_side(*SHAPE, dtype, CPU)
    for at, one in enumerate((first, second)):
        one.copy_(torch.randn(SHAPE) + at)
    return first, second


def one_memory(*tensors):
    return len({t.untyped_storage().data_ptr() for t in tensors}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_one_without_a_copy(dtype):
    first, second = pair(dtype)
    both = placing.joined(first, second)
    assert torch.equal(both, torch.cat([first, second]))
    assert both.is_contiguous(memory_format=torch.channels_last)
    assert one_memory(both, first)
    assert first._base is second._base is None  # no views: autograd may give each its own history


def test_what_is_not_side_by_side_is_copied():
    first, second = pair()
    for one, other in (
        (second, first),
        (first.clone(), second),
        (first.bfloat16(), second),
        (first[:1], second),
        (first, second[:, :, :, 1:]),
        (first.contiguous(), second.contiguous()),
    ):
        if one.shape[1:] != other.shape[1:]:
            continue
        both = placing.joined(one, other)
        assert both.dtype == other.dtype
        assert torch.equal(both, torch.cat([one.to(other.dtype), other]))
        assert not one_memory(both, first)


def test_a_part_of_the_first_is_joined_from_where_it_ends():
    first, second = pair()
    both = placing.joined(first[1:], second)
    assert torch.equal(both, torch.cat([first[1:], second]))
    assert one_memory(both, first)


def test_a_place_is_for_one_result_like_it():
    place, _ = pair()
    like = torch.empty(1)
    assert placing.place_for(*SHAPE, like) is None
    with placing.placed(place):
        assert placing.place_for(2, 3, 4, 5, like) is None
        assert placing.place_for(*SHAPE, like, torch.bfloat16) is None
        assert placing.place_for(*SHAPE, like.to("meta")) is None
        assert placing.place_for(*SHAPE, like) is place
        assert placing.place_for(*SHAPE, like) is None
    with placing.placed(None):
        assert placing.place_for(*SHAPE, like) is None
    assert placing._places == []


def test_crops_are_written_where_they_are_wanted():
    images = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    rows = torch.tensor([4, 0])
    place, _ = placing.side_by_side(2, 3, 8, 8, torch.float32, CPU)
    with placing.placed(place):
        assert squares(images, rows, 8, torch.float32) is place
        other = squares(images, rows, 8, torch.float32)
    assert other is not place
    assert torch.equal(other, place)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, True),
        ({"instance_noise": 0.1, "instance_noise_steps": 9}, False),  # D is shown something else
        ({"diffaugment": "color"}, False),
        ({"n_critic": 2}, False),  # two pairs a step
        ({"updates": "simultaneous"}, False),  # two passes
        ({"impl": "reference"}, False),
    ],
)
def test_a_steps_two_batches_are_side_by_side_where_d_takes_both(monkeypatch, options, where):
    """And the step is the same to the bit."""
    config = TrainConfig(
        **{"image_size": 32, "channels": 3, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 2,
           "impl": "triton"} | options
    )  # fmt: skip
    joined, seen = placing.joined, []

    def watched(first, second):
        both = joined(first, second)
        seen.append(one_memory(both, first, second))
        return both

    monkeypatch.setattr("fastdcgan.training.step.joined", watched)
    results = []
    for placed in (True, False):
        torch.manual_seed(0)
        state = TrainState(config, CPU)
        step = Step(state, batch_size=config.batch_size)
        ((images, z),) = batches(config, 1)
        images, z = (t.repeat(config.n_critic, 1, 1, 1) for t in (images, z))
        first, behind = step.side_by_side(config.batch_size)
        assert (first is not None) == where
        if first is not None and placed:
            images = first.copy_(images)
        row = step(images, z, behind=behind if placed else None)
        results.append([row, *state.netG.state_dict().values(), *state.netD.state_dict().values()])
    assert all(map(torch.equal, *results))
    if where:
        assert seen == [True, False]
