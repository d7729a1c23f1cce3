"""What is measured of a run, against SciPy in float64; what is an alarm and what is not; and what
--on-collapse makes of one."""

import copy
import dataclasses
import json
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import pdist, squareform
from torch import nn

from fastdcgan import command, models
from fastdcgan.errors import Collapsed
from fastdcgan.training import TrainConfig, checkpoints, loop, preset, train, watch
from fastdcgan.training.journal import read_metrics
from fastdcgan.training.state import TrainState
from fastdcgan.training.watch import Probe, Watch

CPU = torch.device("cpu")
HEALTHY = {
    **{"diversity": 0.9, "nearest": 1.1, "accuracy_real": 0.9, "accuracy_fake": 0.8},
    **{"gradient_d": 2.0, "gradient_g": 1.0},
}
ALIKE = {**HEALTHY, "nearest": 0.1}


class Fixed(nn.Module):
    """A net whose answer is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def packed(n=150, size=32, window=32):
    """Smooth grey images, sorted by brightness."""
    random = np.random.default_rng(4)
    levels = np.sort(random.integers(0, 256, n))[:, None, None]
    coarse = (levels + random.integers(-30, 31, (n, 4, 4))).clip(0, 255).astype(np.uint8)
    images = np.kron(coarse, np.ones((1, window // 4, window // 4), np.uint8))[..., None]
    return types.SimpleNamespace(images=images, n=n, window=window, size=size)


def probe(generated, data=None, logit=lambda x: x.mean([1, 2, 3]), loss="bce"):
    state = types.SimpleNamespace(
        netG=Fixed(lambda z: generated[: len(z)]), netD=Fixed(logit), device=CPU,
        config=types.SimpleNamespace(loss=loss),
    )  # fmt: skip
    return Probe(state, data or packed(), torch.zeros(64, 5, 1, 1))


def distances(images):
    """The mean and the mean nearest distance, by SciPy in float64."""
    points = images.double().numpy().reshape(len(images), 1, 8, 4, 8, 4).mean((3, 5))
    apart = pdist(points.reshape(len(images), -1))
    return apart.mean(), (squareform(apart) + np.diag([np.inf] * len(images))).min(1).mean()


GRADIENTS = [[torch.full((3, 2), 2.0), torch.full((4,), -1.0)], [torch.full((9,), 3.0)]]


def test_distances_accuracies_and_gradient_norms_are_those_of_an_independent_count():
    generated = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    generated += torch.linspace(-0.5, 0.5, 64).view(-1, 1, 1, 1)
    watched = probe(generated)
    data = watch._reference(packed())
    assert data.shape == (128, 1, 32, 32)
    of_data = np.mean([distances(data[i : i + 32]) for i in range(0, 128, 32)], axis=0)
    got = watched(GRADIENTS)
    expected = np.array(distances(generated[:32])) / of_data
    np.testing.assert_allclose([got["diversity"], got["nearest"]], expected, rtol=1e-5)
    assert got["accuracy_real"] == (data[:32].mean([1, 2, 3]) > 0).double().mean()
    assert got["accuracy_fake"] == (generated[:32].mean([1, 2, 3]) < 0).double().mean()
    assert got["gradient_g"] == pytest.approx((6 * 4 + 4) ** 0.5)
    assert got["gradient_d"] == pytest.approx(9.0)


@pytest.mark.parametrize("loss", ["bce", "hinge", "lsgan", "wgan-gp"])
def test_what_d_takes_for_real_is_a_matter_of_the_loss(loss):
    """Of a D that gives generated images 0.3 to 0.6, and real ones 2."""
    generated = torch.linspace(0.3, 0.6, 32).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    generated = torch.cat([generated, generated])

    def logit(x):
        return torch.where(x.std([1, 2, 3]) < 1e-6, x.mean([1, 2, 3]), 2.0)

    got = probe(generated, logit=logit, loss=loss)(GRADIENTS)
    expected = {"bce": 0, "hinge": 0, "lsgan": (torch.linspace(0.3, 0.6, 32) <= 0.5).float().mean()}
    assert got["accuracy_real"] == 1
    assert got["accuracy_fake"] == pytest.approx(float(expected.get(loss, 1)))


def test_a_generator_that_ignores_z_has_no_diversity_and_one_of_few_images_no_neighbours():
    data = watch._reference(packed())
    rows = torch.arange(32)
    assert probe(data[96:])(GRADIENTS)["diversity"] == pytest.approx(1, abs=0.2)
    alone = probe(data[:1].expand(32, -1, -1, -1))(GRADIENTS)
    assert alone["diversity"] == alone["nearest"] == 0
    few = probe(data[[0, 40, 80]][rows % 3] + 1e-3 * rows.view(-1, 1, 1, 1))(GRADIENTS)
    assert few["diversity"] > 0.3 > 0.1 > few["nearest"]


def test_the_real_generator_without_its_z_is_caught():
    """Its BatchNorm would make any difference as wide as a healthy one's; there must be none."""
    config = TrainConfig(image_size=32, nz=6, ngf=4, ndf=4, channels=1)
    state = TrainState(config, CPU)
    z = torch.randn(64, 6, 1, 1)
    watched = Probe(state, packed(), z)
    with torch.no_grad():  # as in a step: by the statistics of the batch
        healthy = copy.deepcopy(state.netG).train()(z[:32])
    expected = distances(healthy)[0] / float(watched.of_data[0])
    assert watched([[torch.ones(1)]] * 2)["diversity"] == pytest.approx(expected, rel=1e-4)
    state.netG.register_forward_pre_hook(lambda net, args: (torch.zeros_like(args[0]),))
    measured = watched([[torch.ones(1)]] * 2)
    assert max(measured["diversity"], measured["nearest"]) < 1e-3 < expected


def test_images_are_drawn_from_all_of_the_data_and_cropped():
    mean = watch._reference(packed()).mean([1, 2, 3])
    of_all = packed().images.mean() / 127.5 - 1
    for group in mean.split(32):  # sorted, a quarter of them would be dark
        assert abs(group.mean() - of_all) < 0.2
    assert watch._reference(packed(n=20)).shape == (20, 1, 32, 32)
    wide = packed(n=2, window=40)
    cropped = watch._reference(wide)
    assert cropped.shape == (128, 1, 32, 32)
    assert len(cropped.unique(dim=0)) > 60, "one image gives many crops"
    assert not torch.isnan(probe(cropped, wide).of_data).any()


@pytest.mark.parametrize("net", ["dcgan", "tf28"])
def test_measuring_leaves_nets_and_random_numbers_alone(net):
    """tf28 adds dropout, which would draw."""
    config = preset(net, **({"ngf": 4, "ndf": 4, "image_size": 32} if net == "dcgan" else {}))
    state = TrainState(dataclasses.replace(config, channels=1), CPU)
    before = (
        [t.clone() for t in state.tensors()],
        torch.get_rng_state(),
        state.generator.get_state(),
    )
    size = config.image_size
    watched = Probe(state, packed(size=size, window=size), torch.randn(64, config.nz, 1, 1))
    first = watched([[torch.ones(1)]] * 2)
    torch.randn(64, config.nz, 1, 1)
    assert watched([[torch.ones(1)]] * 2) == first
    assert all(map(torch.equal, before[0], state.tensors()))
    assert torch.equal(before[2], state.generator.get_state())
    torch.set_rng_state(before[1])
    watched([[torch.ones(1)]] * 2)
    assert torch.equal(before[1], torch.get_rng_state())


def judged(measurements, every=50, first=5000, **config):
    """The steps and beginnings of what a watch says of these measurements."""
    judge = Watch(TrainConfig(**config))
    news = []
    for index, measured in enumerate(measurements):
        news += judge.look(first + every * index, measured)
    return [(n.kind, n.began, n.step) for n in news], judge


def test_a_collapse_is_said_once_and_its_end_too():
    between = {**HEALTHY, "diversity": 0.3}
    said, _ = judged([HEALTHY, ALIKE, HEALTHY, ALIKE, ALIKE, ALIKE, between, ALIKE, HEALTHY])
    assert said == [("collapse", True, 5250), ("collapse", False, 5400)]
    said, _ = judged([HEALTHY, *[ALIKE] * 2, between, *[ALIKE] * 3, HEALTHY, *[ALIKE] * 3])
    assert [began for _, began, _ in said] == [True, False, True]


def test_a_warning_says_what_where_against_which_level_and_what_to_try():
    judge = Watch(TrainConfig())
    (news,) = [n for step in (2000, 2050, 2100, 2150) for n in judge.look(step, ALIKE)]
    for part in ("step 2150", "0.90", "0.10", "below 0.25 or 0.12", "--minibatch-std", "docs/"):
        assert part in news.text
    (news,) = [n for step in range(1, 101) for n in judge.loss(step, 0.001)]
    for part in ("step 100", "below 0.01", "--lr-d"):
        assert part in news.text


def test_every_flag_that_is_advised_exists():
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    advised = re.findall(r"--([a-z0-9-]+)", " ".join(watch.TRY.values()))
    assert advised
    assert {name.replace("-", "_") for name in advised} <= fields


def test_samples_may_be_alike_in_the_first_steps_and_while_they_spread():
    early = [{**ALIKE, "nearest": 0.1} for _ in range(12)]
    assert judged(early, first=1)[0] == []
    assert judged(early, first=2000)[0] == [("collapse", True, 2150)]
    # A lower rate moves slower.
    assert judged(early, first=1000, lr_g=1e-4)[0] == []
    # But not after they have once been different.
    assert judged([HEALTHY, *early], first=1)[0] == [("collapse", True, 151)]
    growing = [{**ALIKE, "nearest": 0.01 * 1.2**index} for index in range(18)]
    assert judged(growing, first=5000)[0] == []


def test_data_without_distances_is_no_alarm():
    same = {**HEALTHY, "diversity": float("nan"), "nearest": float("inf")}
    assert judged([same] * 9)[0] == []
    twins = {**HEALTHY, "nearest": float("inf"), "diversity": 0.1}  # half of the data is double
    assert judged([HEALTHY, *[twins] * 9])[0] == [("collapse", True, 5150)]


def test_a_discriminator_has_won_when_its_loss_stays_low():
    judge = Watch(TrainConfig())
    said = []
    losses = [0.001] * 99 + [0.5] + [0.001] * 300 + [0.5, 0.001] * 20 + [0.5] * 100
    for step, loss in enumerate(losses, start=1):
        said += [(n.kind, n.began, n.step) for n in judge.loss(step, loss)]
    assert said == [("won", True, 200), ("won", False, 540)]
    critic = Watch(TrainConfig())
    assert not any(critic.loss(step, -3.0) for step in range(300)), "a Wasserstein critic's"


def test_a_discriminator_that_guesses_is_said():
    guess = {**HEALTHY, "accuracy_real": 1.0, "accuracy_fake": 0.05}
    said, _ = judged([HEALTHY, *[guess] * 12, HEALTHY])
    assert said == [("blind", True, 5400), ("blind", False, 5650)]
    assert judged([HEALTHY, *[guess] * 7, HEALTHY, *[guess] * 7])[0] == [], "it caught up"
    assert "blind" not in watch.STOPS, "half of D's rate would be no help"


def test_what_is_saved_in_an_alarm_or_before_one_is_not_healthy():
    judge = Watch(TrainConfig())
    assert judge.healthy(1, ALIKE), "by nature"
    judge.healthy_step = 1
    assert not judge.healthy(2, ALIKE), "but only the first"
    judge.look(5000, HEALTHY)
    assert judge.healthy(5010, HEALTHY)
    assert not judge.healthy(5020, ALIKE)
    judge.look(5050, ALIKE)
    judge.look(5100, ALIKE)
    judge.look(5150, ALIKE)
    assert not judge.healthy(5160, HEALTHY), "the alarm is on"
    judge.look(5200, HEALTHY)
    assert judge.healthy(5210, HEALTHY)
    for step in range(100):
        judge.loss(step, 0.0)
    assert not judge.healthy(5200, HEALTHY)


def test_a_watch_goes_on_from_its_state():
    measurements = [HEALTHY, ALIKE, ALIKE, ALIKE, HEALTHY, ALIKE, ALIKE, ALIKE]
    whole, _ = judged(measurements)
    for cut in range(1, len(measurements)):
        first, judge = judged(measurements[:cut])
        other = Watch(TrainConfig())
        other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
        rest = [
            n for i, m in enumerate(measurements[cut:], cut) for n in other.look(5000 + 50 * i, m)
        ]
        assert first + [(n.kind, n.began, n.step) for n in rest] == whole
        assert not other.due(5000 + 50 * len(measurements) - 1)
        assert other.due(5000 + 50 * len(measurements))


# The loop.


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """Steps of milliseconds, measured every 4. What these nets make is alike from the first step to
    the last, and that counts after step 4: the alarm is at step 16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "EVERY", 4)
    monkeypatch.setattr(watch, "TRAVEL", 4 * 2e-4)
    monkeypatch.setattr(watch, "GROWTH", 10.0)
    return TrainConfig(
        **{"data": str(tiny_data), "image_size": 32, "nz": 6, "ngf": 4, "ndf": 4},
        **{"batch_size": 8, "steps": 24, "log_every": 4, "checkpoint_every": 4},
        **{"tensorboard": False, "out": tmp_path / "run"},
    )


def newest(out):
    return checkpoints.Checkpoints(out / "checkpoints").newest()[1]


def weights(state):
    return {f"{net}.{k}": v for net in ("netG", "netD", "ema") for k, v in state[net].items()}


def test_a_collapse_is_warned_of_once_recorded_and_plotted(tiny, tmp_path, capsys, drawn_plots):
    out = train(dataclasses.replace(tiny, keep=2)).out
    printed = capsys.readouterr().out
    assert printed.count("warning: step 16: samples are alike") == 1
    rows = {row["step"]: row for row in read_metrics(out)}
    assert all(set(watch.MEASURED) <= row.keys() for row in rows.values())
    assert 0 < rows[16]["diversity"] < 0.3
    events = [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in events] == [("collapse", 16)]
    with Image.open(out / "plot.png") as plot:
        r, g, b = np.asarray(plot.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert ((r - g > 80) & (r - b > 80)).any(1).sum() > 300, "a line across the panels"
    # The newest healthy checkpoint is kept beside the last two, which are not.
    paths = checkpoints.Checkpoints(out / "checkpoints").paths()
    assert [checkpoints.step_of(p) for p in paths] == [4, 20, 24]
    assert newest(out)["watch"]["healthy_step"] == 4


def test_a_run_that_is_watched_is_the_same_bits(tiny, tmp_path, monkeypatch):
    watched = newest(train(tiny).out)
    monkeypatch.setattr(Watch, "due", lambda self, step: False)
    monkeypatch.setattr(loop._Run, "_probe", lambda self: HEALTHY)
    alone = newest(train(dataclasses.replace(tiny, out=tmp_path / "alone")).out)
    for part in ("netG", "netD", "ema", "optG", "optD", "rng"):
        torch.testing.assert_close(watched[part], alone[part], rtol=0, atol=0)


def test_rollback_goes_back_with_other_noise_and_half_the_rate_and_gives_up(tiny, capsys):
    config = dataclasses.replace(tiny, on_collapse="rollback", steps=40)
    with pytest.raises(Collapsed, match="3 rollbacks did not help") as error:
        train(config)
    printed = capsys.readouterr().out
    for count, rate in ((1, "0.0001"), (2, "5e-05"), (3, "2.5e-05")):
        assert f"rollback {count} of 3, to the healthy checkpoint of step 1" in printed
        assert f"halved to {rate}" in printed
    for step in (1, 16):
        assert f"step-{step:08d}.pt" in str(error.value)
    saved = newest(config.out)
    assert saved["step"] == 16
    assert saved["optD"]["param_groups"][0]["lr"] == 2e-4 / 8
    assert saved["optG"]["param_groups"][0]["lr"] == 2e-4
    assert saved["watch"]["rollbacks"] == 3
    assert [row["step"] for row in read_metrics(config.out)] == [1, 4, 8, 12, 16]
    assert (config.out / "plot.png").is_file()
    goes_on = train(dataclasses.replace(config, resume="auto", on_collapse="warn"))
    assert goes_on.steps == 40


def test_rollback_halves_a_rate_that_falls(tiny):
    config = dataclasses.replace(tiny, on_collapse="rollback", steps=40, lr_decay=1.0)
    with pytest.raises(Collapsed):
        train(config)
    saved = newest(config.out)
    assert saved["step"] == 16
    # The rates of step 10 hold up to step 20.
    assert saved["optD"]["param_groups"][0]["lr"] == pytest.approx(2e-4 * 0.75 / 8)
    assert saved["optG"]["param_groups"][0]["lr"] == pytest.approx(2e-4 * 0.75)


@pytest.fixture
def scripted(monkeypatch):
    """The collapse ends with the first rollback."""

    def measure(run):
        gone = run.state.step > 4 and run.watch.rollbacks == 0
        if run.watch.rollbacks and run.state.step == scripted.killed_at:
            scripted.killed_at = None
            raise KeyboardInterrupt
        return ALIKE if gone else HEALTHY

    scripted = types.SimpleNamespace(killed_at=None)
    monkeypatch.setattr(loop._Run, "_probe", measure)
    return scripted


def test_a_run_resumed_after_a_rollback_is_the_one_that_was_not_stopped(
    tiny, scripted, tmp_path, capsys
):
    config = dataclasses.replace(tiny, on_collapse="rollback")
    whole = newest(train(config).out)
    assert capsys.readouterr().out.count("rollback 1 of 3") == 1
    assert whole["watch"]["rollbacks"] == 1
    other = dataclasses.replace(config, out=tmp_path / "other")
    for killed_at in (8, 20):  # the newest checkpoint is of four steps before
        scripted.killed_at = killed_at
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(other, resume="auto"))
    resumed = newest(train(dataclasses.replace(other, resume="auto")).out)
    assert capsys.readouterr().out.count("rollback 1 of 3") == 1
    for part in ("netG", "netD", "ema", "optG", "optD", "rng", "watch"):
        torch.testing.assert_close(whole[part], resumed[part], rtol=0, atol=0)
    plain = newest(train(dataclasses.replace(tiny, out=tmp_path / "plain")).out)
    assert not torch.equal(plain["rng"]["run"], whole["rng"]["run"])
    assert plain["optD"]["param_groups"][0]["lr"] == 2e-4


def test_stop_ends_in_good_order_and_rollback_after_a_warning_acts(tiny, capsys):
    config = dataclasses.replace(tiny, on_collapse="stop")
    status = command.run(lambda args: train(config) and None, [])
    assert status == 3
    said = capsys.readouterr().err
    assert said.startswith("error: the run ends at step 16 (collapse: --on-collapse stop)")
    assert len(said.splitlines()) == 1
    assert "--on-collapse warn" in said
    assert newest(config.out)["step"] == 16
    assert (config.out / "plot.png").is_file()
    # Resumed with an action, the alarm that is on counts anew.
    with pytest.raises(Collapsed, match="3 rollbacks"):
        train(dataclasses.replace(config, resume="auto", on_collapse="rollback", steps=40))


def test_there_is_a_checkpoint_to_go_back_to_from_the_first_step(tiny, scripted):
    config = dataclasses.replace(tiny, on_collapse="rollback", checkpoint_every=None)
    out = train(config).out
    events = [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"], e.get("to")) for e in events] == [
        ("collapse", 16, None),
        ("rollback", 16, 1),
    ]
    assert models.generator_from(out / "netG.safetensors").size == 32
