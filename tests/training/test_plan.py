"""What a run says before it starts: how much of its nets' convolutions are in fused blocks."""

import pytest
import torch

from fastdcgan.training import plan
from fastdcgan.training.config import preset
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.plan import Engine, fused_share
from fastdcgan_kernels.choice import targets


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", ["dcgan", "minutes", "blue-marble", "small-data"])
def test_presets_are_fused_on_a_gpu(name, size):
    config = preset(name, image_size=size, channels=3)
    before = torch.get_rng_state()
    assert fused_share(config, Engine(torch.device("cuda"), torch.bfloat16)) >= 0.99
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("more", [{}, {"r1": 1.0}, {"minibatch_std": True}])
def test_presets_are_fused_on_a_cpu(more, monkeypatch):
    for module in (targets, plan.targets):
        monkeypatch.setattr(module, "target_of", lambda device: None)
    monkeypatch.setattr("fastdcgan_kernels.functional.target_of", lambda device: None)
    config = preset("dcgan", image_size=64, channels=1, ngf=16, ndf=16, **more)
    engine = Engine(torch.device("cpu"), None)
    assert fused_share(config, engine) >= 0.99
    lines = plan.describe(config, engine, Ranks(), source="", epoch_images=None, images="")
    said = "100.0% of the convolutions' multiplications are in fused blocks"
    assert sum(said in line for line in lines) == 1


def test_the_tensorflow_tutorials_nets_are_fused_whole():
    """Their 5x5 kernels, Keras's padding and its BatchNorm."""
    assert fused_share(preset("tf28", channels=1), Engine(torch.device("cuda"), None)) == 1


def test_plain_pytorch_has_no_share():
    config = preset("dcgan", channels=3, impl="reference")
    engine = Engine(torch.device("cpu"), None, impl="reference")
    lines = plan.describe(config, engine, Ranks(), source="", epoch_images=None, images="")
    assert "blocks     plain PyTorch" in lines


@pytest.mark.parametrize(
    ("options", "device", "said"),
    [
        ({"max_minutes": 10.0}, "cpu", "advice     3,000 images, 10 minutes: --preset blue-marble"),
        ({}, "cpu", "advice     for minutes of a CPU: --preset blue-marble"),
        ({"data": "photos"}, "cpu", "advice     for minutes of a CPU: --preset minutes, whose KID"),
        ({"epochs": 3, "seed": 1, "batch_size": 64}, "cpu", "advice     for minutes of a CPU"),
        ({"max_minutes": 60.0}, "cpu", ""),
        ({"ngf": 32}, "cpu", ""),
        ({"lr": 1e-4}, "cpu", ""),
        ({"net_d": "sngan"}, "cpu", ""),
        ({"max_minutes": 10.0}, "meta", ""),
    ],
)
def test_the_recipe_for_minutes_is_advised_beside_the_examples(options, device, said):
    config = preset("dcgan", channels=3, impl="reference", **options)
    engine = Engine(torch.device(device), None, impl="reference")
    lines = plan.describe(
        config, engine, Ranks(), source="", epoch_images=3000, images="3,000 images"
    )
    found = [line for line in lines if line.startswith("advice")]
    assert [line[: len(said)] for line in found] == ([said] if said else [])


def test_advice_ends_where_it_is_taken():
    for name in ("minutes", "blue-marble", "small-data", "r3", "tf28"):
        config = preset(name, channels=3, impl="reference")
        assert plan._advice(config, torch.device("cpu"), "") == []
