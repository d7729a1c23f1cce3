"""Runs that learn classes: the loop's files, resume, watch and evaluations; whether the label is
obeyed. Not here: their step (test_classes_step.py)."""

import dataclasses
import gzip
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.data import prepare
from fastdcgan.data.labels import labels
from fastdcgan.data.sources import FASHION_MNIST
from fastdcgan.errors import InputError
from fastdcgan.export import main as export
from fastdcgan.generate import main as generate
from fastdcgan.inpaint import main as inpaint
from fastdcgan.latent.draw import draw, load_discriminator, load_generator
from fastdcgan.training import TrainConfig, preset, train
from fastdcgan.training.journal import read_evaluations
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan.training.watch import Probe
from tests.training.runs import Tiny, final_state, same
from tests.training.steps import NAMES
from tests.training.steps import SMALL_WITH_CLASSES as SMALL

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    """12 pictures in each of three folders, one of them damaged: 4 batches of 8 and 3 images."""
    random = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            coarse = random.integers(0, 80, (4, 4), dtype=np.uint8) + 80 * label
            Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(
                tmp_path / "data" / name / f"{i:02}.png"
            )
    (tmp_path / "data" / "boot" / "03.png").write_text("no picture")
    return tmp_path / "data"


@pytest.fixture
def tiny(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        **{**SMALL, "batch_size": 8, "data": str(folders), "steps": 12, "log_every": 4},
        tensorboard=False,
    )


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, capsys):
    whole = train(dataclasses.replace(tiny, out=tmp_path / "whole"))
    part = dataclasses.replace(tiny, out=tmp_path / "part")
    assert "classes    3: bag, boot, coat" in capsys.readouterr().out
    train(dataclasses.replace(part, steps=6))
    torch.manual_seed(999)
    resumed = train(dataclasses.replace(part, resume="auto"))
    state = final_state(whole.out)
    assert same(state, final_state(resumed.out))
    assert "embedding.weight" in state["netG"]
    assert "embedding.weight" in state["netD"]
    assert not torch.equal(state["ema"]["embedding.weight"], state["netG"]["embedding.weight"])
    with pytest.raises(InputError, match="--classes: True -> False"):
        train(dataclasses.replace(part, resume="auto", classes=False))
    (tmp_path / "data" / "boot").rename(tmp_path / "data" / "shoe")
    with pytest.raises(InputError, match="classes were bag, boot, coat and are now bag, coat, sh"):
        train(dataclasses.replace(part, resume="auto", steps=20))


def test_every_loader_finds_the_names(tiny, tmp_path):
    out = train(dataclasses.replace(tiny, steps=2, out=tmp_path / "run", milestone_every=1)).out
    places = [out, out / "netG.safetensors", out / "checkpoints" / "step-00000001.pt"]
    for place in places:
        assert load_generator(place).classes == NAMES
    assert load_discriminator(out).classes == NAMES
    with Image.open(out / "samples" / "step-00000002.png") as sheet:
        assert sheet.size == (8 * 34 + 2, 9 * 34 + 2), "three rows of eight a class"
    again = dataclasses.replace(tiny, init_g=out / "netG.safetensors", steps=1)
    assert train(dataclasses.replace(again, out=tmp_path / "again")).steps == 1


def test_evaluations_and_the_watch_draw_by_class(tiny, tmp_path):
    torch.manual_seed(5)
    torch.jit.script(Tiny()).save(tmp_path / "tiny.pt")
    more = {"eval_every": 6, "eval_features": str(tmp_path / "tiny.pt"), "on_collapse": "rollback"}
    out = train(dataclasses.replace(tiny, channels=3, out=tmp_path / "run", **more)).out
    assert [row["step"] for row in read_evaluations(out)] == [6, 12]
    assert load_generator(out / "netG_best.safetensors").classes == NAMES
    plain = train(dataclasses.replace(tiny, channels=3, out=tmp_path / "plain")).out
    assert same(final_state(out), final_state(plain)), "looking changes nothing"


def test_the_watch_shows_d_each_image_with_its_label(folders, tiny):
    packed = prepare(str(folders), size=32, channels=1, progress=False)
    state = TrainState(tiny, CPU, classes=NAMES)
    probe = Probe(state, packed, torch.randn(64, 6, 1, 1), labels(packed).numbers)
    (of_real,), (of_fake,) = probe.of_real, probe.of_fake
    shades = (probe.real.mean((1, 2, 3)) + 1) * 127.5  # of class k about 80 k + 40
    assert torch.equal((shades / 80).long(), of_real)
    assert torch.equal(of_fake, of_real[torch.arange(32) % len(of_real)])
    assert set(probe([[torch.ones(1)]] * 2)) >= {"diversity", "nearest", "accuracy_real"}


def test_a_run_trains_on_each_image_with_its_label(tiny, tmp_path, monkeypatch):
    shown, step = [], Step.__call__

    def watched(self, images, z, *labels, **options):
        shown.append((images.mean((1, 2, 3)), *labels))
        return step(self, images, z, *labels, **options)

    monkeypatch.setattr(Step, "__call__", watched)
    train(dataclasses.replace(tiny, out=tmp_path / "run", steps=5))
    shades, given = (torch.cat(each) for each in zip(*shown, strict=True))
    assert torch.equal(((shades + 1) * 127.5 / 80).long(), given)  # of class k about 80 k + 40
    assert given.bincount().tolist() == [12, 11, 12]


def test_data_without_labels_is_refused_in_one_line(tiny_data, tmp_path, command):
    done = command("fastdcgan.train", "--data", tiny_data, "--image-size", 32, "--classes")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"{tiny_data} has no labels: give" in line
    with pytest.raises(InputError, match="blue-marble has no labels"):
        train(TrainConfig(classes=True, dry_run=True))


def test_a_dry_run_names_the_classes_and_decodes_nothing(tiny, capsys, monkeypatch):
    monkeypatch.setattr("fastdcgan.data.decode.decode", pytest.fail)
    train(dataclasses.replace(tiny, dry_run=True))
    assert "classes    3: bag, boot, coat" in capsys.readouterr().out
    train(dataclasses.replace(preset("tf28", data=tiny.data), classes=True, dry_run=True))
    assert "classes    3" in capsys.readouterr().out


# --- Is the label obeyed? -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """1,500 trousers and bags, with labels that are words."""
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    count, values = 7_500, []
    for name, head, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        with gzip.open(FASHION_MNIST / f"train-{name}-ubyte.gz") as file:
            values.append(np.frombuffer(file.read(head + count * size), np.uint8, -1, head))
    images, kinds = values[0].reshape(-1, 28, 28), values[1]
    chosen = np.flatnonzero((kinds == 1) | (kinds == 8))[:1500]
    path = tmp_path_factory.mktemp("two") / "two.npz"
    np.savez(path, images=images[chosen], labels=np.array(["trouser", "bag"])[kinds[chosen] // 8])
    return path


@pytest.fixture(scope="module")
def learnt(two_classes):
    """A run on them, and an independent judge of images: logistic regression on real ones."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    packed = prepare(str(two_classes), size=32, progress=False)
    found = labels(packed)
    assert found.names == ("bag", "trouser")
    pixels = packed.images.reshape(packed.n, -1) / 255
    judge = linear_model.LogisticRegression(max_iter=300).fit(pixels[:1000], found.numbers[:1000])
    assert judge.score(pixels[1000:], found.numbers[1000:]) > 0.97
    config = TrainConfig(
        data=str(two_classes), image_size=32, nz=10, ngf=8, ndf=8, batch_size=32, steps=200,
        lr=2e-3, ema_decay=0.9, classes=True, tensorboard=False, out=two_classes.parent / "run",
    )  # fmt: skip
    return train(config).out, judge


def test_what_has_no_label_to_give_says_so(learnt, two_classes, tmp_path, capsys):
    run, _ = learnt
    sheet = ["--out", str(tmp_path / "a.png")]
    cases = [
        (generate, ["--from", run, "--label", "shoe", *sheet], "the classes bag, trouser (or"),
        (generate, ["--from", run, "--interpolate", "0,1", *sheet], "give --label, one of bag"),
        (inpaint, ["--from", run, "--images", two_classes, "--n", "1", "--sheet", sheet[1]],
         "draws by class"),
    ]  # fmt: skip
    if importlib.util.find_spec("huggingface_hub") is not None:
        cases.append((export, ["--from", run, "--out", tmp_path / "x"], "with --classes"))
    for command, args, message in cases:
        assert command(list(map(str, args))) == 1
        (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("error: "))
        assert message in line
    assert not list(tmp_path.iterdir())
    assert generate(["--from", str(run), "--label", "bag", "--interpolate", "0,1", *sheet]) == 0


def obeyed(judge, images, wanted):
    return float((judge.predict(images.reshape(len(images), -1) / 255) == wanted).mean())


def test_the_drawn_image_is_of_the_class_that_is_asked_for(learnt, tmp_path):
    run, judge = learnt
    net = load_generator(run)
    wanted = torch.tensor([1, 1, 0]).repeat(50)
    images = np.concatenate(list(draw(net, 150, labels=wanted)))
    assert obeyed(judge, images, wanted.numpy()) > 0.9
    in_turn = np.concatenate(list(draw(net, 150)))
    assert obeyed(judge, in_turn, np.arange(150) % 2) > 0.9
    for label, number in (("trouser", 1), ("0", 0)):
        out = tmp_path / f"{label}.npz"
        args = ["--from", str(run), "--n", "20", "--label", label, "--out", str(out)]
        assert generate(args) == 0
        assert obeyed(judge, np.load(out)["images"], np.full(20, number)) > 0.9
