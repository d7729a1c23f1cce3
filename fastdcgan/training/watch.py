"""Watches a run for what GANs fail of: samples that grow alike (mode collapse), and a discriminator
that has won or sees nothing. `Probe` measures, `Watch` says what is an alarm and what to try; what
is then done (`--on-collapse`) is the loop's affair. The page for users is docs/collapse.md."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fastdcgan import models
from fastdcgan.data import Packed
from fastdcgan.data.feeds import cut
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.state import TrainState

EVERY = 50
"""Steps between two measurements, which are made at the next log step. On a CPU that is below 1 %
of training, the blue-marble preset's small batches included."""
SAMPLES = 32
"""Samples of a measurement, of as many fixed latents."""
GROUPS = 4
"""Groups of so many images of the data, whose mean is what samples are compared with."""
SIDE = 8
"""Images are compared as SIDE x SIDE averages of their pixels."""

MIDDLE = {"bce": 0.0, "hinge": 0.0, "lsgan": 0.5}
"""D's output above which it takes an image for real, by `--loss`. Other losses only compare images
with each other; there it is the mean."""

ALIKE = {"diversity": 0.25, "nearest": 0.12}
"""Samples are alike where either distance is below this share of the data's. Healthy runs, once
under way, stay above, and collapsed ones below (docs/collapse.md)."""
CLEAR = 1.5
"""They differ where both are above their levels by this factor."""
TRAVEL = 0.2
"""Until lr * steps comes to this, samples may be alike: Adam moves a weight by no more than lr a
step, and weights begin as N(0, 0.02). Samples that have been above CLEAR may not."""
GROWTH = 1.1
"""Samples that differ so many times more than they ever did are on their way."""
WON_LOSS, WON_STEPS = 0.01, 100
"""A discriminator whose loss stays below this for so many steps has nothing left to teach. (One
below 0 is a Wasserstein critic's, and says nothing of the kind.)"""
BLIND, SEEING = 0.55, 0.65
"""A discriminator right on this share of images or less is as good as guessing."""
GUESSES = 8
"""Measurements in a row after which that is said: more than good runs had (docs/collapse.md)."""

MEASURED = (
    *("diversity", "nearest", "accuracy_real", "accuracy_fake"),
    *("gradient_d", "gradient_g"),
)
"""What a measurement gives. The mean distance of two samples, and that of a sample to the one
nearest to it, each as a share of the same number of the data; the shares of real and of generated
images that D is right about; the norms of D's and G's gradients in the last step."""


class Probe:
    """Measures a run from outside of its steps: nets, buffers and random states are afterwards what
    they were, so a run is the same bits with it and without.

    Distances are those of averaged pixels, because the raw G's samples must have one scale in all
    of a run: D's features have not, as its BatchNorm makes any batch as wide as any other, and
    fixed random convolutions gave what pixels give. Averaged, because noise on the pixels of one
    image makes no other image.

    Args:
        state: of the run.
        packed: its data.
        z: fixed latents; the first `SAMPLES` are used.
        labels: the class of each of its images, where the nets have classes. Samples get those of
            the real images that D is shown beside them.
    """

    def __init__(
        self,
        state: TrainState,
        packed: Packed,
        z: Tensor,
        labels: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    ) -> None:
        self.state, self.z = state, z[:SAMPLES]
        images = _reference(packed).to(state.device, memory_format=torch.channels_last)
        self.real = images[:SAMPLES]
        self.of_real: tuple[Tensor, ...] = ()
        self.of_fake: tuple[Tensor, ...] = ()
        if labels is not None:
            of_real = labels[_chosen(packed)[0][:SAMPLES]]
            self.of_real = (torch.from_numpy(of_real).to(state.device),)
            self.of_fake = (torch.from_numpy(np.resize(of_real, len(self.z))).to(state.device),)
        groups = images[: max(len(images) // SAMPLES, 1) * SAMPLES].split(SAMPLES)
        self.of_data = torch.stack([_distances(group) for group in groups]).mean(0)

    @torch.no_grad()
    def __call__(self, gradients: list[list[Tensor]]) -> dict[str, float]:
        """`MEASURED`, now. Waits for the device.

        Args:
            gradients: G's, and D's, of the last step.
        """
        state = self.state
        fake = models.sample(state.netG, self.z, *self.of_fake, statistics="batch")
        real = _logits(state.netD, self.real, *self.of_real)
        of_fake = _logits(state.netD, fake, *self.of_fake)
        norms = [_norm(each)[None] for each in reversed(gradients)]
        level = MIDDLE.get(state.config.loss, torch.cat([real, of_fake]).mean())
        right = [(real > level).float().mean()[None], (of_fake <= level).float().mean()[None]]
        row = torch.cat([_distances(fake) / self.of_data, *right, *norms]).tolist()
        return dict(zip(MEASURED, row, strict=True))


def new_seed(seed: int, rollback: int) -> int:
    """The seed of a run's noise after its rollback of that number."""
    return int(np.random.SeedSequence([seed % 2**64, rollback]).generate_state(1)[0])


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors, dtype=torch.float32)  # those of 16 bits, too
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _logits(netD: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """D's logits of one batch, as a step has them but for dropout."""
    return models.sample(netD, images, *labels, statistics="batch")


def _chosen(packed: Packed) -> tuple[np.ndarray[Any, Any], np.random.Generator]:
    """Which of the packed images are compared with, and the generator that chose them."""
    margin = packed.window - packed.size
    n = SAMPLES * GROUPS if margin else min(SAMPLES * GROUPS, packed.n)
    random = np.random.default_rng(0)
    # A group is of images from everywhere, also where the data is sorted by class.
    return random.permutation(np.linspace(0, packed.n - 1, n).round().astype(int)), random


def _reference(packed: Packed) -> Tensor:
    """SAMPLES * GROUPS images from all over the data (fewer where it has fewer), (n, C, size, size)
    from -1 to 1, cropped as in training."""
    margin, (rows, random) = packed.window - packed.size, _chosen(packed)
    n = len(rows)
    ramp = torch.arange(packed.size)
    y, x = (ramp + torch.from_numpy(random.integers(margin + 1, size=(n, 1))) for _ in range(2))
    pixels = torch.from_numpy(packed.images[rows])
    return cut(pixels, torch.arange(n), y, x, torch.float32)


def _distances(images: Tensor) -> Tensor:
    """The mean distance between two of these images, and that of each to the one nearest to it:
    (2,)."""
    points = adaptive_avg_pool2d(images, SIDE).flatten(1)
    apart = (points[:, None] - points[None]).square().sum(-1).sqrt()
    others = apart + torch.diag(apart.new_full((len(apart),), math.inf))
    mean = apart.sum() / (len(apart) * (len(apart) - 1))
    return torch.stack([mean, others.min(1).values.mean()])


@dataclass
class _Alarm:
    """One alarm with hysteresis: on after `patience` bad readings in a row, off after `calm` good
    ones, and so said once."""

    patience: int
    calm: int
    on: bool = False
    streak: int = 0
    """Readings in a row that speak for a change."""

    def read(self, bad: bool) -> bool:
        """Takes in one reading; True where it changes the alarm."""
        self.streak = self.streak + 1 if bad != self.on else 0
        changed = self.streak == (self.calm if self.on else self.patience)
        if changed:
            self.on, self.streak = bad, 0
        return changed


@dataclass(frozen=True)
class News:
    """An alarm that began, or ended."""

    kind: str
    """"collapse", "won" or "blind"."""
    began: bool
    step: int
    text: str
    """For people: what was seen, in which step, against which level, and what to try."""


TRY = {
    "collapse": "a lower --lr-d (where it is above --lr-g), --minibatch-std, --diffaugment "
    "color,translation,cutout, --r1 1, --spectral-norm, another --seed",
    "won": "a lower --lr-d, --label-smoothing 0.1, --instance-noise 0.1, --r1 1, --spectral-norm, "
    "--loss hinge, and with few images --diffaugment color,translation,cutout",
    "blind": "a higher --lr-d, or a lower --lr-g",
}
"""Flags against each alarm, in the order in which to try them."""
ROLLBACKS = 3
"""A run goes back no more often than this."""
STOPS = ("collapse", "won")
"""The alarms that `--on-collapse` acts upon."""


class Watch:
    """Judges what is read and measured. Numbers only: no device, no files.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._grace = math.ceil(TRAVEL / (config.lr_g or config.lr))
        self._measured = -EVERY
        self._best = 0.0  # the widest margin so far
        self._alarms = {
            "collapse": _Alarm(patience=3, calm=1),
            "won": _Alarm(patience=WON_STEPS, calm=WON_STEPS),
            "blind": _Alarm(patience=GUESSES, calm=1),
        }
        self.rollbacks = 0
        """How often the run has gone back."""
        self.healthy_step: int | None = None
        """The step of the newest checkpoint that was saved in good health."""

    def due(self, step: int) -> bool:
        """Whether to measure at this log step."""
        return step // EVERY > self._measured // EVERY

    def loss(self, step: int, loss_d: float) -> list[News]:
        """Takes in D's loss of one step; every step's is to be given."""
        won = self._alarms["won"]
        if not won.read(0 <= loss_d < WON_LOSS):
            return []
        if not won.on:
            return [News("won", False, step, f"step {step}: D's loss is above {WON_LOSS} again")]
        seen = (
            f"D's loss has been below {WON_LOSS} for {WON_STEPS} steps: it tells all images apart, "
            "and G no longer learns"
        )
        return [_warning("won", step, seen)]

    def look(self, step: int, measured: dict[str, float]) -> list[News]:
        """Takes in a measurement."""
        self._measured = step
        news = []
        alarm = self._alarms["collapse"]
        changed = alarm.read(self._alike(step, measured))
        self._best = max(self._best, _margin(measured))
        if changed:
            if alarm.on:
                seen = (
                    f"samples are alike (mode collapse): {_shares(measured)}; below "
                    f"{ALIKE['diversity']} or {ALIKE['nearest']} in {alarm.patience} measurements"
                )
                news.append(_warning("collapse", step, seen))
            else:
                seen = f"step {step}: samples differ again: {_shares(measured)}"
                news.append(News("collapse", False, step, seen))
        alarm = self._alarms["blind"]
        right = (measured["accuracy_real"] + measured["accuracy_fake"]) / 2
        guessing = right < (SEEING if alarm.on else BLIND)
        if alarm.read(guessing and not self._by_nature(step)):
            if alarm.on:
                seen = (
                    f"D is right on {right:.2f} of images, not above {BLIND} in {alarm.patience} "
                    "measurements: it is guessing, and G learns noise"
                )
                news.append(_warning("blind", step, seen))
            else:
                seen = f"step {step}: D is right on {right:.2f} of images again"
                news.append(News("blind", False, step, seen))
        return news

    def _alike(self, step: int, measured: dict[str, float]) -> bool:
        margin, enough = _margin(measured), CLEAR if self._alarms["collapse"].on else 1
        return margin < enough and margin < GROWTH * self._best and not self._by_nature(step)

    def _by_nature(self, step: int) -> bool:
        """Whether it is too early to judge: samples begin alike, and D cannot know them."""
        return step <= self._grace and self._best < CLEAR

    def healthy(self, step: int, measured: dict[str, float]) -> bool:
        """Whether a checkpoint of this step may be gone back to: no alarm is on, and samples differ
        in this measurement, which counts for no alarm. A run's first checkpoint may have samples
        that are alike by nature: going back to it is to begin anew."""
        if any(alarm.on for alarm in self._alarms.values()):
            return False
        first = self.healthy_step is None and self._by_nature(step)
        return first or _margin(measured) >= 1

    def rearm(self) -> None:
        """Makes an alarm that is on a new one, if what it is for goes on: a run that was only
        warned may be resumed with an action."""
        for kind in STOPS:
            if self._alarms[kind].on:
                self._alarms[kind].on, self._alarms[kind].streak = False, 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: numbers and dicts."""
        return {
            "measured": self._measured,
            "best": self._best,
            "alarms": {name: [a.on, a.streak] for name, a in self._alarms.items()},
            "rollbacks": self.rollbacks,
            "healthy_step": self.healthy_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._measured, self._best = state["measured"], state["best"]
        for name, (on, streak) in state["alarms"].items():
            self._alarms[name].on, self._alarms[name].streak = on, streak
        self.rollbacks, self.healthy_step = state["rollbacks"], state["healthy_step"]


def _margin(measured: dict[str, float]) -> float:
    """The lesser distance as a multiple of its level; inf where the data itself has no distances to
    compare with."""
    shares = [measured[name] / level for name, level in ALIKE.items()]
    return min((share for share in shares if math.isfinite(share)), default=math.inf)


def _shares(measured: dict[str, float]) -> str:
    return (
        f"their distance is {measured['diversity']:.2f} of the data's, that of the nearest "
        f"{measured['nearest']:.2f}"
    )


def _warning(kind: str, step: int, seen: str) -> News:
    text = f"warning: step {step}: {seen}; try {TRY[kind]} (docs/collapse.md)"
    return News(kind, True, step, text)
