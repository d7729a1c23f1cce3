"""The loop as a library call: what a run writes, stops at, resumes, and refuses."""

import dataclasses
import itertools
import json
import math
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdcgan import models
from fastdcgan.errors import InputError, RunError
from fastdcgan.training import (
    TrainConfig,
    TrainResult,
    checkpoints,
    folders,
    loop,
    preset,
    train,
    watch,
)
from fastdcgan.training import rates as rates_of_runs
from fastdcgan.training.journal import read_metrics
from fastdcgan.training.whole_step import WholeStep
from tests.training.runs import final_state, same


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """A configuration whose steps take milliseconds: 5 an epoch, the fifth ragged."""
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        data=str(tiny_data),
        image_size=32,
        nz=6,
        ngf=4,
        ndf=4,
        batch_size=8,
        steps=12,
        log_every=4,
        tensorboard=False,
    )


def test_a_run_writes_everything_it_promises(tiny, tmp_path, drawn_plots):
    result = train(dataclasses.replace(tiny, out=tmp_path / "run", tensorboard=True))
    assert isinstance(result, TrainResult)
    assert result.steps == 12
    assert result.images_per_second > 0
    assert math.isfinite(result.loss_d)
    assert math.isfinite(result.loss_g)
    assert not result.interrupted
    out = result.out
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 4, 8, 12]
    assert [row["epoch"] for row in rows] == [1, 1, 2, 3]
    assert rows[-1]["loss_d"] == result.loss_d
    saved = TrainConfig.from_json((out / "config.json").read_text())
    assert saved == dataclasses.replace(tiny, out=out, tensorboard=True, channels=3)
    # The first grid after the first step, then one an epoch of 5 steps, and one at the end.
    names = sorted(p.name for p in (out / "samples").iterdir())
    assert names == [f"step-{n:08d}.png" for n in (1, 5, 10, 12)]
    with Image.open(out / "samples" / names[-1]) as sheet:
        assert sheet.mode == "RGB"
        assert min(sheet.size) >= 8 * 32
    with Image.open(out / "plot.png") as plot:
        assert plot.size == (990, 1584)
        assert np.asarray(plot).std() > 10, "something is drawn"
    events = list((out / "tensorboard").glob("events.*"))
    assert len(events) == 1
    netG, netD = models.build("dcgan", size=32, nz=6, ngf=4, ndf=4, channels=3)
    state = final_state(out)
    for name, net in (("netG", netG), ("netG_ema", netG), ("netD", netD)):
        weights = load_file(out / f"{name}.safetensors")
        net.load_state_dict(weights)
        saved = dict(state["ema" if name == "netG_ema" else name])
        if name == "netG_ema":  # with statistics of its own
            buffers = {key for key in saved if "running_" in key}
            assert not any(torch.equal(weights[key], saved.pop(key)) for key in buffers)
            weights = {key: weights[key] for key in saved}
        assert same(weights, saved)


def test_tensorboard_events_hold_scalars_and_grids(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(dataclasses.replace(tiny, out=tmp_path / "run", tensorboard=True)).out
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"loss_d", "loss_g", "d_real", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss_d")] == [1, 4, 8, 12]
    assert [e.step for e in events.Images("samples")] == [1, 5, 10, 12]


def test_the_same_seed_gives_the_same_run_and_another_another(tiny, tmp_path):
    runs = [
        final_state(train(dataclasses.replace(tiny, out=tmp_path / name, seed=seed)).out)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0]["netG"], runs[2]["netG"])


@pytest.mark.parametrize(
    ("kind", "cut"), [*(("dcgan", cut) for cut in (1, 4, 5, 7, 11)), ("tf28", 7)]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, cut, kind):
    """tf28 adds dropout, which draws from torch's own generator."""
    config = tiny
    if kind == "tf28":
        config = preset("tf28", data=tiny.data, batch_size=8, steps=12, tensorboard=False)
    whole = train(dataclasses.replace(config, out=tmp_path / "whole"))
    part = dataclasses.replace(config, out=tmp_path / "part")
    train(dataclasses.replace(part, steps=cut))
    torch.manual_seed(999)  # another process would have another state
    resumed = train(dataclasses.replace(part, resume="auto"))
    assert resumed.steps == 12
    assert same(final_state(whole.out), final_state(resumed.out))
    assert read_metrics(resumed.out)[-1]["step"] == 12


def test_a_run_with_all_of_it_resumes_bit_for_bit(tiny, tmp_path, capsys):
    """A lazy penalty goes on in its rhythm, noise fades over the run as it began, several updates
    of D take their batches (2 steps of 16 images and a ragged one an epoch); and D loads again."""
    config = dataclasses.replace(
        tiny, loss="hinge", r1=1.0, penalty_every=3, spectral_norm=True, minibatch_std=True,
        diffaugment="color,translation,cutout", instance_noise=0.1, instance_noise_steps=8,
        n_critic=2, lr_d=4e-4,
    )  # fmt: skip
    whole = train(dataclasses.replace(config, out=tmp_path / "whole"))
    printed = capsys.readouterr().out
    assert "R1 1 every 3 steps, D without BatchNorm, spectral norm, minibatch deviation" in printed
    assert "36 images an epoch" in printed
    assert "12 steps (3 an epoch), batch 8 x 2" in printed
    part = dataclasses.replace(config, out=tmp_path / "part")
    train(dataclasses.replace(part, steps=5))
    torch.manual_seed(999)
    resumed = train(dataclasses.replace(part, resume="auto"))
    assert same(final_state(whole.out), final_state(resumed.out))
    with pytest.raises(InputError, match="--loss: hinge -> bce"):
        train(dataclasses.replace(part, resume="auto", loss="bce", steps=20))
    netD = models.discriminator_from(resumed.out / "netD.safetensors")
    assert same(dict(netD.state_dict()), dict(final_state(resumed.out)["netD"]))
    one = dataclasses.replace(config, init_d=resumed.out / "netD.safetensors", steps=1)
    assert train(dataclasses.replace(one, out=tmp_path / "one")).steps == 1
    with pytest.raises(InputError, match=r"a batch of 40 \(for 5 updates of D\)"):
        train(dataclasses.replace(tiny, n_critic=5))


def test_instance_noise_fades_over_the_run_as_it_began(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", instance_noise=0.2, steps=4)
    train(config)
    train(dataclasses.replace(config, resume="auto", steps=6))
    saved = TrainConfig.from_json((tmp_path / "run" / "config.json").read_text())
    assert (saved.steps, saved.instance_noise_steps) == (6, 4)


def test_a_critic_that_is_far_ahead_has_not_won(tiny, tmp_path, capsys, monkeypatch):
    """The loss of wgan-gp is a distance below 0, not a share of mistakes."""
    monkeypatch.setattr(watch, "WON_STEPS", 5)
    config = dataclasses.replace(tiny, out=tmp_path / "run", loss="wgan-gp", lr_d=2e-3, n_critic=2)
    assert train(config).loss_d < 0
    assert "warning" not in capsys.readouterr().out


def test_rows_after_the_resumed_checkpoint_are_dropped(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", checkpoint_every=5, log_every=1)
    train(config)
    newest = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").paths()[-1]
    newest.unlink()  # as if the process had been killed before it wrote this one
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')  # and in the middle of a line
    train(dataclasses.replace(config, resume="auto"))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 13))


def test_auto_without_a_run_starts_afresh_and_then_finds_it(tiny, tmp_path):
    first = train(dataclasses.replace(tiny, resume="auto", steps=3))
    assert first.out == folders.RUNS / "000-tiny-dcgan32"
    again = train(dataclasses.replace(tiny, resume="auto", steps=5))
    assert (again.out, again.steps) == (first.out, 5)
    assert train(dataclasses.replace(tiny, steps=1)).out == folders.RUNS / "001-tiny-dcgan32"


@pytest.fixture
def rates(monkeypatch):
    """The rates (of G, of D) of each step that is made."""
    seen, step = [], WholeStep.__call__

    def watched(self):
        optimisers = self.state.optG, self.state.optD
        seen.append(tuple(o.param_groups[0]["lr"] for o in optimisers))
        return step(self)

    monkeypatch.setattr(WholeStep, "__call__", watched)
    return seen


def test_rates_fall_to_0_at_the_end_and_a_resumed_run_has_the_same(
    tiny, tmp_path, monkeypatch, rates
):
    monkeypatch.setattr(rates_of_runs, "EVERY", 2)
    config = dataclasses.replace(
        tiny, lr_g=1e-3, lr_decay=0.5, checkpoint_every=9, steps=12, out=tmp_path / "whole"
    )
    whole = train(config)
    shares = [1] * 6 + [share for share in (1, 2 / 3, 1 / 3) for _ in range(2)]
    assert [g for g, _ in rates] == pytest.approx([1e-3 * share for share in shares])
    assert [d for _, d in rates] == pytest.approx([2e-4 * share for share in shares])
    expected = rates[9:]
    rates.clear()
    older = config.out / "checkpoints" / "step-00000009.pt"
    again = train(dataclasses.replace(config, resume=str(older), out=tmp_path / "again"))
    assert rates == expected
    assert same(final_state(whole.out), final_state(again.out))


def test_rates_fall_by_the_clock_where_it_ends_the_run(tiny, tmp_path, monkeypatch, rates):
    monkeypatch.setattr(rates_of_runs, "EVERY", 1)
    now = itertools.count(1000.0, 6.0)  # seconds; the clock moves at each look
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(now))
    config = dataclasses.replace(
        tiny, lr_decay=1.0, steps=10_000, max_minutes=10, sample_every=999, out=tmp_path / "run"
    )
    result = train(config)
    assert 10 < result.steps < 100
    found = [d / 2e-4 for _, d in rates]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.95
    assert found[-1] < 0.1
    last = f"step-{result.steps:08d}.png"
    assert sorted(p.name for p in (result.out / "samples").iterdir())[-1] == last


def test_an_older_checkpoint_branches_off_into_another_folder(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", checkpoint_every=4)
    whole = final_state(train(config).out)
    older = tmp_path / "run" / "checkpoints" / "step-00000004.pt"
    with pytest.raises(InputError, match=r"has gone on to step-00000012\.pt"):
        train(dataclasses.replace(config, resume=str(older)))
    branch = train(dataclasses.replace(config, resume=str(older), out=tmp_path / "branch"))
    assert same(final_state(branch.out), whole)
    with pytest.raises(InputError, match="holds a run already"):
        train(dataclasses.replace(config, resume=str(older), out=tmp_path / "branch"))


def test_last_checkpoints_and_all_milestones_are_kept(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, out=tmp_path / "run", checkpoint_every=1, keep=2, milestone_every=4
    )
    train(config)
    kept = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").paths()
    # And the first, as long as no later one is healthy (docs/collapse.md).
    assert [checkpoints.step_of(p) for p in kept] == [1, 4, 8, 11, 12]


def test_a_changed_configuration_is_refused_and_named(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", steps=3)
    train(config)
    changed = dataclasses.replace(config, resume="auto", lr=1e-3, ndf=8, steps=9)
    with pytest.raises(InputError, match=r"--ndf: 4 -> 8; --lr: 0.0002 -> 0.001") as error:
        train(changed)
    assert "--steps" not in str(error.value)
    assert train(dataclasses.replace(config, resume="auto", steps=4)).steps == 4


def test_a_run_is_not_overwritten(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", steps=2)
    train(config)
    with pytest.raises(InputError, match="holds a run already"):
        train(config)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, tmp_path, capsys, damage):
    config = dataclasses.replace(tiny, out=tmp_path / "run", checkpoint_every=5)
    train(config)
    newest = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").paths()[-1]
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 3] ^= 0xFF
    newest.write_bytes(content)
    result = train(dataclasses.replace(config, resume="auto", steps=14))
    printed = capsys.readouterr().out
    assert result.steps == 14
    assert f"{newest} is damaged" in printed
    assert "resuming" in printed
    assert "at step 10" in printed
    for path in checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").paths():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the"):
        train(dataclasses.replace(config, resume="auto"))


def test_losses_that_are_not_finite_stop_the_run_and_keep_the_last_good(tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", checkpoint_every=4)
    train(config)
    state = checkpoints.load(tmp_path / "run" / "checkpoints" / "step-00000012.pt")
    state["netG"]["main.0.weight"][:] = float("nan")
    torch.save(state, tmp_path / "run" / "checkpoints" / "step-00000012.pt")
    with pytest.raises(RunError, match=r"losses of step 13 are not finite; likely cause") as error:
        train(dataclasses.replace(config, resume="auto", steps=20))
    assert "step-00000012.pt" in str(error.value)


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    """The losses are those before the update, so the update itself may be what breaks the nets."""
    config = dataclasses.replace(
        tiny, out=tmp_path / "run", lr=1e38, lr_d=1e-9, steps=1, checkpoint_every=1
    )
    with pytest.raises(RunError, match=r"not finite.*learning rate is high"):
        train(config)
    assert checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").paths() == []


def test_a_discriminator_that_has_won_is_reported_while_running(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(watch, "WON_STEPS", 20)
    monkeypatch.setattr(watch, "WON_LOSS", 0.2)
    config = dataclasses.replace(tiny, out=tmp_path / "run", steps=120, lr_d=2e-3, lr_g=1e-6)
    train(config)
    printed = capsys.readouterr().out
    assert printed.count("D's loss has been below 0.2 for 20 steps") >= 1
    assert printed.index("warning:") < printed.index("[24/24]"), "while it runs, not at its end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny, tmp_path, capsys, number):
    config = dataclasses.replace(tiny, out=tmp_path / "run", steps=100_000)

    def interrupt():
        while not (tmp_path / "run" / "samples" / "step-00000005.png").exists():
            time.sleep(0.01)
        signal.raise_signal(number)

    before = signal.getsignal(number)
    # raise_signal in a thread is handled by the main thread, which is the one that trains.
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = train(config)
    thread.join()
    assert signal.getsignal(number) is before
    assert result.interrupted
    assert 5 <= result.steps < 100_000
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert final_state(result.out)["step"] == result.steps
    more = train(dataclasses.replace(config, resume=str(result.out), steps=result.steps + 2))
    assert not more.interrupted


def test_samples_come_from_the_average_and_leave_the_nets_alone(tiny, tmp_path):
    seen = dataclasses.replace(tiny, sample_every=1)
    unseen = dataclasses.replace(tiny, sample_every=100)
    states = [
        final_state(train(dataclasses.replace(c, out=tmp_path / name)).out)
        for name, c in (("seen", seen), ("unseen", unseen))
    ]
    assert same(states[0], states[1])
    without = train(dataclasses.replace(tiny, out=tmp_path / "plain", ema=False))
    assert not (without.out / "netG_ema.safetensors").exists()
    assert same(final_state(without.out)["netG"], states[0]["netG"])


def test_initial_weights_are_taken_over(tiny, tmp_path):
    first = train(dataclasses.replace(tiny, out=tmp_path / "a"))
    second = dataclasses.replace(
        tiny,
        out=tmp_path / "b",
        init_g=first.out / "netG.safetensors",
        init_d=first.out / "netD.safetensors",
        lr=1e-12,
        steps=1,
    )
    state = final_state(train(second).out)
    for name in ("netG", "netD"):
        before = load_file(first.out / f"{name}.safetensors")
        weights = [k for k, v in before.items() if v.dim() == 4]
        assert weights
        for key in weights:
            torch.testing.assert_close(state[name][key], before[key], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match=r"main\.0\.weight is \(6, 16, 4, 4\), expected"):
        train(dataclasses.replace(second, out=tmp_path / "c", ngf=8))


def test_a_batch_larger_than_the_data_is_refused(tiny):
    with pytest.raises(InputError, match=r"a batch of 37 .* has 36 images"):
        train(dataclasses.replace(tiny, batch_size=37))
    assert train(dataclasses.replace(tiny, batch_size=36, steps=1)).steps == 1


def test_grey_data_gives_grey_nets(tiny, tmp_path):
    np.save(tmp_path / "grey.npy", np.zeros((8, 32, 32), np.uint8))
    config = dataclasses.replace(tiny, data=str(tmp_path / "grey.npy"), steps=1)
    out = train(config).out
    assert json.loads((out / "config.json").read_text())["channels"] == 1
    with Image.open(out / "samples" / "step-00000001.png") as sheet:
        assert sheet.mode == "L"


def test_two_processes_do_not_train_in_one_folder(tiny, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(InputError, match="another process is training"),
    ):
        train(dataclasses.replace(tiny, out=tmp_path / "run"))


def test_a_dry_run_writes_nothing(tiny, tmp_path, capsys):
    result = train(dataclasses.replace(tiny, dry_run=True, steps=None))
    printed = capsys.readouterr().out
    assert result.steps == 0
    assert "125 steps (5 an epoch), batch 8" in printed
    assert "dry run: nothing was trained" in printed
    assert not (tmp_path / "runs").exists()
