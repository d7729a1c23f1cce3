"""The configuration: defaults, JSON, the example's spelling, and what the machine allows."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdcgan import hardware
from fastdcgan.errors import InputError
from fastdcgan.train import options
from fastdcgan.training import TrainConfig, plan, preset
from fastdcgan.training.config import ENDLESS
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.example_flags import translate


def test_defaults_are_the_examples():
    c = TrainConfig()
    assert (c.image_size, c.nz, c.ngf, c.ndf, c.batch_size, c.epochs) == (64, 100, 64, 64, 64, 25)
    assert (c.lr, c.beta1, c.beta2) == (2e-4, 0.5, 0.999)


def test_tf28_has_the_tutorials_values():
    c = preset("tf28")
    assert (c.image_size, c.nz, c.batch_size, c.epochs, c.updates) == (
        *(28, 100, 256, 50),
        "simultaneous",
    )
    assert (c.lr, c.beta1, c.beta2, c.adam_eps) == (1e-4, 0.9, 0.999, 1e-7)


def test_what_is_given_in_python_replaces_a_recipes_too():
    recipe = preset("blue-marble")
    both = preset("blue-marble", lr=1e-3)
    assert (both.lr, both.lr_g, both.lr_d) == (1e-3, None, None)
    assert preset("small-data", lr=1e-3, lr_d=2e-3).lr_d == 2e-3
    assert preset("blue-marble", steps=10).max_minutes is None
    assert preset("blue-marble", max_minutes=3).epochs == ENDLESS
    assert preset("blue-marble", ngf=8) == dataclasses.replace(recipe, ngf=8)


@given(
    st.builds(
        TrainConfig,
        out=st.none() | st.just(Path("runs/a b")),
        steps=st.none() | st.integers(1, 10**9),
        lr=st.floats(1e-9, 1, exclude_min=True),
        hflip=st.none() | st.booleans(),
        data=st.text(max_size=20),
    )
)
def test_json_gives_the_configuration_back(config):
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"learning": 1}', "{"])
def test_json_that_is_no_configuration_is_refused(text):
    with pytest.raises(InputError, match="configuration"):
        TrainConfig.from_json(text)


@pytest.mark.parametrize(
    "field",
    [{"batch_size": 0}, {"steps": 0}, {"lr_g": -1.0}, {"beta1": 1.0}, {"channels": 5}, {"nz": 0}],
)
def test_a_value_that_cannot_be_is_refused_by_its_flag(field):
    name = next(iter(field)).replace("_", "-")
    with pytest.raises(InputError, match=f"--{name} .* was given"):
        TrainConfig(**field).validate()


def test_every_field_can_be_set_from_the_command_line_and_is_documented(capsys):
    with pytest.raises(SystemExit) as exit:
        options(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--batchSize 8 --imageSize=32 --niter 3",
            {"batch_size": 8, "image_size": 32, "epochs": 3},
        ),
        ("--dataset folder --dataroot pics", {"data": "pics"}),
        ("--dataset lfw --dataroot=pics", {"data": "pics"}),
        ("--dataset cifar10 --dataroot /d", {"data": "torchvision:CIFAR10:/d"}),
        ("--dataset fake", {"data": "torchvision:FakeData"}),
        (
            "--dataset lsun --dataroot d --classes kitchen,church",
            {"data": "torchvision:LSUN:d?classes=kitchen_train,church_train"},
        ),
        ("--dataset mnist --dataroot d", {"data": "torchvision:MNIST:d"}),
        ("--outf o --manualSeed 4", {"out": Path("o"), "seed": 4}),
        ("--netG g.pth --netD d.pth", {"init_g": Path("g.pth"), "init_d": Path("d.pth")}),
        ("--cuda --ngpu 1 --workers 2", {"device": "cuda", "workers": 2}),
        ("--mps", {"device": "mps"}),
        ("--data pics --classes --amp", {"classes": True, "amp": True}),
        ("--data pics --classes", {"classes": True}),
        ("--data pics --no-classes", {"classes": False}),
        ("--accel --dry-run", {"device": "auto", "dry_run": True}),
        ("--lr 0.001 --beta1 0.9 --nz 5 --ngf 6 --ndf 7", {"lr": 0.001, "ngf": 6, "ndf": 7}),
        ("--resume --steps 3 --out nowhere", {"resume": "auto", "steps": 3}),
        ("", {"data": "blue-marble", "batch_size": 16, "lr_d": 1e-4, "init": "resize"}),
        ("", {"epochs": 120, "max_minutes": 9.0}),
        ("--steps 300", {"steps": 300, "max_minutes": None}),
        ("--epochs=3", {"epochs": 3, "max_minutes": None, "lr_g": 4e-4}),
        ("--niter 3", {"epochs": 3, "max_minutes": None}),
        ("--max-minutes 60", {"epochs": ENDLESS, "max_minutes": 60.0}),
        ("--max-minutes 60 --steps 300", {"steps": 300, "max_minutes": 60.0}),
        ("--max_minutes 60", {"epochs": ENDLESS, "max_minutes": 60.0}),
        ("--lr 1e-4", {"lr": 1e-4, "lr_g": None, "lr_d": None, "max_minutes": 9.0}),
        ("--lr 1e-4 --lr-d 3e-4", {"lr": 1e-4, "lr_g": None, "lr_d": 3e-4}),
        ("--data pics --max-minutes 5", {"epochs": 25, "max_minutes": 5.0}),
        ("--preset minutes --data p", {"epochs": ENDLESS, "max_minutes": 9.0, "nz": 100}),
        ("--preset minutes --data p --epochs 3", {"epochs": 3, "max_minutes": None}),
        ("--preset minutes --data p", {"diffaugment": "translation"}),
        ("--amp", {"data": "blue-marble", "diffaugment": "shift"}),
        ("--preset r3 --data pics", {"r1": 1.0, "r2": 1.0, "norm_g": "none", "norm_d": "none"}),
        ("--preset r3 --data pics", {"penalty_form": "exact"}),
        ("--data pics", {"data": "pics", "batch_size": 64}),
        ("--dataroot=pics", {"data": "pics", "batch_size": 64}),
        ("--preset dcgan", {"data": "blue-marble", "batch_size": 64}),
        (
            "--preset small-data --data p --lr-d 1e-4",
            {"spectral_norm": True, "ngf": 32, "lr_g": 5e-4, "lr_d": 1e-4, "batch_size": 32},
        ),
        ("--preset tf28 --batch-size 8", {"net": "tf28", "batch_size": 8, "lr": 1e-4}),
        ("--ema --no-tensorboard", {"ema": True, "tensorboard": False}),
    ],
)
def test_command_lines(line, expected):
    config = options(line.split())
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "line",
    [
        "--dataset folder",
        "--dataset celeba --dataroot d",
        "--dataset",
        "--ngpu 2",
        "--preset",
        "--classes bedroom",
    ],
)
def test_example_lines_that_cannot_be_meant(line):
    with pytest.raises(InputError):
        options(line.split())


def test_translate_leaves_ours_alone():
    ours = ["--data", "x y", "--batch-size=3", "--resume", "runs/1", "--amp"]
    assert translate(ours) == ours


@pytest.mark.parametrize("name", ["abacus", "cuda:77", "meta", "cpu:x"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(InputError, match=f"--device {name}"):
        hardware.pick_device(name)


@pytest.mark.parametrize(
    ("kind", "native", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, None),
        ("mps", False, None),
    ],
)
def test_amp_uses_bf16_only_where_it_is_native(monkeypatch, kind, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: native)
    monkeypatch.setattr(plan.targets, "target_of", lambda device: None)
    device = torch.device(kind)
    assert hardware.amp_dtype(device) == expected
    engine = plan.choose_engine(TrainConfig(amp=True), Ranks(), device)
    assert engine.autocast == expected
    assert bool(engine.notes) == (expected is None)


def test_memory_of_the_default_nets_counts_weights_exactly():
    held, activations = plan.memory_bytes(TrainConfig(channels=3), None)
    # Four copies of all weights (themselves, gradients, two moments) and one average of G's.
    assert held == 4 * (4 * (3_576_704 + 2_765_568) + 3_576_704)
    assert activations > 64 * 64 * 32 * 32 * 4
    assert plan.memory_bytes(TrainConfig(channels=3), torch.bfloat16)[1] == activations // 2
