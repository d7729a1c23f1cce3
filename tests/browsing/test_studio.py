"""What the page asks of a run, without a page."""

import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan import models
from fastdcgan.browsing.studio import Sample, Studio
from fastdcgan.data.decode import decode
from fastdcgan.errors import InputError
from fastdcgan.training import TrainConfig, train
from fastdcgan.training.checkpoints import save_weights


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("studio") / "run"
    sizes = {"image_size": 32, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8, "steps": 2}
    return train(TrainConfig(data=str(tiny_data), out=out, tensorboard=False, **sizes)).out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def layer(hidden):
    """What an editor gives of paint on these pixels."""
    return np.where(hidden[..., None], np.uint8(255), np.uint8(0)).repeat(4, -1)


def test_the_nets_are_used_by_one_thread_at_a_time(run):
    studio = Studio(run)
    inside, most = [0], [0]

    def enter(*_):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)

    def leave(*_):
        inside[0] -= 1

    studio._sampler.net.register_forward_pre_hook(enter)
    studio._sampler.net.register_forward_hook(leave)
    hole = np.zeros((32, 32), bool)
    hole[:8] = True
    calls = [
        lambda: studio.draw(0, 4, 1.0),
        lambda: studio.move(Sample(), [1.0]),
        lambda: studio.walk(Sample(), Sample(1), 2),
        lambda: studio.fill(studio.picture(0), hole, steps=2, seed=0).images,
    ]
    alone = [call() for call in calls]
    found = [None] * len(calls)

    def ask(index):
        for _ in range(3):
            found[index] = calls[index]()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    for one, many in zip(alone, found, strict=True):
        assert np.array_equal(one, many)


def test_a_picture_that_was_enlarged_comes_back_as_it_was(run):
    studio = Studio(run)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    hidden = np.zeros((32, 32), bool)
    hidden[4:9, 10:20] = True
    large = image.repeat(16, 0).repeat(16, 1)
    rgba = np.dstack([large, np.full(large.shape[:2], 255, np.uint8)])
    found, hole = studio.prepare(rgba, [layer(hidden.repeat(16, 0).repeat(16, 1))])
    assert np.array_equal(found, image)
    assert np.array_equal(hole, hidden)


def test_any_other_picture_is_cut_and_shrunk_as_for_training(run):
    studio = Studio(run)
    photo = np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8)
    hidden = np.zeros((70, 96), bool)
    hidden[:35] = True
    found, hole = studio.prepare(photo, [layer(~hidden)[:, :, :], layer(np.zeros_like(hidden))])
    assert np.array_equal(found, decode(photo, 32, 3))
    assert not hole[:15].any()
    assert hole[17:].all()


@pytest.mark.parametrize(("painted", "message"), [(0, "paint over"), (255, "everything")])
def test_a_mask_hides_something_but_not_all(run, painted, message):
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(InputError, match=message):
        Studio(run).prepare(image, [np.full((64, 64, 4), painted, np.uint8)])


def test_a_newer_generator_is_taken_and_a_damaged_one_is_left(run, capsys):
    studio = Studio(run)
    assert studio.step == 2
    before = studio.draw(0, 2, 1.0)
    (run / "netG_ema.safetensors").write_bytes(b"cut short")
    studio.refresh()
    assert "going on with step 2" in capsys.readouterr().err
    assert np.array_equal(studio.draw(0, 2, 1.0), before)
    torch.manual_seed(5)
    netG, _ = models.build("dcgan", size=32, nz=6, ngf=4, ndf=4, channels=3)
    netG.main[3].weight.data.mul_(50)
    save_weights(netG, run / "netG_ema.safetensors", step=7)
    studio.refresh()
    assert studio.step == 7
    assert not np.array_equal(studio.draw(0, 2, 1.0), before)


def test_a_run_that_still_trains_is_shown_from_its_newest_checkpoint(run):
    for file in run.glob("*.safetensors"):
        file.unlink()
    studio = Studio(run)
    assert studio.step == 2
    assert studio.facts().startswith("step 2 · 32 × 32 pixels · colour · ")


def test_a_file_of_a_run_knows_its_run_and_bare_weights_do_without(run, tmp_path, capsys):
    studio = Studio(run / "netG.safetensors")
    assert (studio.name, studio.folder) == ("run", run.resolve())
    alone = shutil.copy(run / "netG.safetensors", tmp_path / "alone.safetensors")
    studio = Studio(alone)
    assert (studio.name, studio.folder, studio.step) == ("alone.safetensors", None, 2)
    hole = np.zeros((32, 32), bool)
    hole[:, :16] = True
    image = studio.picture(3)
    assert "samples are shown" in capsys.readouterr().err
    assert np.array_equal(image, studio.draw(0, 4, 1.0)[3])
    filled = studio.fill(image, hole, steps=1, seed=0).images[0]
    assert np.array_equal(filled[:, 16:], image[:, 16:])


def test_images_may_be_named(run, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert np.array_equal(Studio(run, images=str(tmp_path / "photo.png")).picture(5),
                          decode(photo, 32, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda studio: studio.draw(-1, 4, 1.0), "seed -1 was given"),
        (lambda studio: studio.draw(0, 0, 1.0), "n 0 was given"),
        (lambda studio: studio.draw(0, 4, 0.0), "truncation 0.0 was given"),
        (lambda studio: studio.move(Sample(0, 10**9), [0.0]), "number 1,000,000,000 was given"),
        (lambda studio: studio.walk(Sample(), Sample(1), 0), "steps 0 was given"),
    ],
)
def test_numbers_out_of_range_are_refused(run, ask, message):
    with pytest.raises(InputError, match=message):
        ask(Studio(run))


def test_a_run_of_classes_is_refused_in_one_line(run):
    save_weights(
        models.Generator(32, 6, 4, 1, classes=("a", "b")), run / "netG_ema.safetensors", step=1
    )
    with pytest.raises(InputError, match="--classes"):
        Studio(run)
