"""A run is one frozen `TrainConfig`: the command line (its fields are the flags, the text under
each field its help), the argument of `train()`, and the `config.json` beside the checkpoints.

Two marks on a field: `example` is the flag by which the PyTorch example knows it, `free` says that
it may change when a run is resumed, because it does not touch what the run computes.
"""

import dataclasses
import json
import math
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fastdcgan.errors import InputError

ENDLESS = 1_000_000
"""Epochs of a run that the clock ends."""
POLICIES = ("color", "translation", "shift", "cutout")
"""What `diffaugment` may have, in the order of their use."""


def _option(default: Any, *, example: str | None = None, free: bool = False) -> Any:
    return field(default=default, metadata={"example": example, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long. Defaults are the PyTorch example's unless said."""

    data: str = _option("blue-marble")
    """blue-marble, fashion-mnist[:FOLDER], stacked-mnist, a folder, zip or tar of images, an IDX,
    .npy or .npz file, or torchvision:NAME[:ROOT]."""
    net: Literal["dcgan", "tf28"] = _option("dcgan")
    """dcgan: the nets of the PyTorch example. tf28: those of the TensorFlow tutorial (28x28)."""
    net_d: Literal["dcgan", "sngan"] = _option("dcgan")
    """The discriminator beside the generator of dcgan: its own; or that of SNGAN, 3x3 and 4x4
    convolutions under spectral norm, with five times the multiplications."""
    image_size: int = _option(64, example="imageSize")
    """Height and width in pixels: 32, 64, 128 or 256; 28 for tf28."""
    channels: int | None = _option(None)
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; by default what the data has."""
    classes: bool = _option(False)
    """Learn to draw each class of labelled data by its name (docs/using.md): fashion-mnist and
    other IDX files, a .npz with labels, a folder or archive with one subfolder for each class."""
    nz: int = _option(100, example="nz")
    """Length of the latent vector z ~ N(0, 1)."""
    ngf: int = _option(64, example="ngf")
    """Width of the generator: channels before its last layer."""
    ndf: int = _option(64, example="ndf")
    """Width of the discriminator: channels after its first layer."""
    batch_size: int = _option(64, example="batchSize")
    """Images per step and process."""
    epochs: int = _option(25, example="niter", free=True)
    """Passes over the data."""
    steps: int | None = _option(None, free=True)
    """Train exactly this many steps instead of --epochs."""
    lr: float = _option(2e-4, example="lr")
    """Adam's learning rate for both nets; where it is given, it replaces a preset's --lr-g and
    --lr-d."""
    lr_g: float | None = _option(None)
    """The generator's learning rate, where it differs from --lr."""
    lr_d: float | None = _option(None)
    """The discriminator's learning rate, where it differs from --lr."""
    lr_decay: float = _option(0.0)
    """Let both learning rates fall in a line to 0 over this last share of the run, which ends with
    its steps or by the clock, whichever comes first; from 0 (never) to 1 (all along)."""
    beta1: float = _option(0.5, example="beta1")
    """Adam's beta1."""
    beta2: float = _option(0.999)
    """Adam's beta2."""
    adam_eps: float = _option(1e-8)
    """Adam's epsilon."""
    keras_epsilon: bool = _option(False)
    """Add epsilon before the bias correction, as Keras does, and not after it, as PyTorch does."""
    updates: Literal["alternating", "simultaneous"] = _option("alternating")
    """alternating: G learns from the D just updated (PyTorch example). simultaneous: both
    gradients are taken at the same weights (TensorFlow tutorial)."""
    loss: Literal["bce", "hinge", "lsgan", "wgan-gp", "relativistic"] = _option("bce")
    """bce: the example's. hinge. lsgan: least squares. wgan-gp: Wasserstein with gradient penalty.
    relativistic: each real image against the generated one beside it. docs/losses.md says more."""
    n_critic: int = _option(1)
    """Updates of the discriminator, each on a batch of its own, per update of the generator: one
    step takes so many batches. 5 in the paper of wgan-gp."""
    r1: float = _option(0.0)
    """Weight gamma of R1, a penalty on the discriminator's gradient at real images; 0: none."""
    r2: float = _option(0.0)
    """Weight gamma of R2, the same penalty at generated images. --loss relativistic needs both:
    with R1 alone it diverges (R3GAN's paper)."""
    penalty_form: Literal["exact", "difference"] = _option("exact")
    """How R1 and R2 are computed: exact: by second derivatives. difference: from what the
    discriminator says of an image and of the image with a little noise, in fused blocks; it
    trains worse (docs/losses.md)."""
    gradient_penalty: float | None = _option(None)
    """Weight of the penalty of wgan-gp on the discriminator's slope between real and generated
    images; by default 10 with --loss wgan-gp, else none. Strictly for --norm-d none."""
    penalty_every: int = _option(1)
    """Take the penalty at every so many steps only, and so many times as strongly."""
    norm_g: Literal["batch", "none"] = _option("batch")
    """The generator's normalisation: batch: BatchNorm; none: biases instead, and initial weights
    that keep the variance."""
    norm_d: Literal["batch", "none"] | None = _option(None)
    """The discriminator's normalisation: batch: BatchNorm; none: biases instead. By default batch,
    but none with --spectral-norm and --net-d sngan (BatchNorm undoes a weight's scale), and with
    --loss wgan-gp (its penalty is on single images, and BatchNorm mixes those of a batch)."""
    spectral_norm: bool = _option(False)
    """Divide the discriminator's weights by their largest singular values."""
    minibatch_std: bool = _option(False)
    """Show the discriminator's last layer how much the images of a batch differ."""
    label_smoothing: float = _option(0.0)
    """The discriminator is to give real images 1 minus this (bce and lsgan)."""
    diffaugment: str | None = _option(None)
    """Change real and generated images alike at random before the discriminator sees them: some
    of color,translation,shift,cutout. For few images. shift is translation with the image's mirror
    image at the border in place of zeros: for maps and the like."""
    instance_noise: float = _option(0.0)
    """Standard deviation of noise on all images that the discriminator sees, fading to nothing."""
    instance_noise_steps: int | None = _option(None)
    """Steps after which that noise is gone; by default the run's length when it began."""
    hflip: bool | None = _option(None)
    """Mirror images left to right at random; by default only for blue-marble."""
    ema: bool = _option(True)
    """Keep an exponential moving average of the generator and draw samples from it."""
    ema_decay: float = _option(0.999)
    """Decay of that average per step; the first steps use (1 + step) / (10 + step)."""
    amp: bool = _option(False)
    """Mixed precision: bf16 where the device has it natively, else fp16 with gradient scaling."""
    compile: bool = _option(False, free=True)
    """Compile forward and backward with torch.compile; not where fused blocks and a CUDA graph
    leave it nothing to do."""
    impl: Literal["auto", "reference", "triton"] = _option("auto", free=True)
    """auto: fused blocks where they run and plain PyTorch elsewhere. reference: plain PyTorch.
    triton: fused blocks, or an error."""
    cuda_graph: Literal["auto", "on", "off"] = _option("auto", free=True)
    """auto: on CUDA, the whole step is captured as one CUDA graph, compared with a step that is
    not, and replayed; where that fails, a line says so. on: where it fails, the run ends. off."""
    overlap: Literal["auto", "on", "off"] = _option("auto", free=True)
    """With fused blocks on CUDA, weight gradients and the updates by them run in a second stream,
    beside the rest of the way back. auto: in a CUDA graph. On an H200 a step took 0.93 of the
    time."""
    device: str = _option("auto", free=True)
    """auto, cpu, cuda, cuda:N or mps."""
    sync_bn: bool = _option(False)
    """Under torchrun: BatchNorm statistics over the batches of all processes."""
    seed: int = _option(0, example="manualSeed")
    """Seed of weights, order, crops and noise: the same seed gives the same run."""
    init: Literal["normal", "resize"] = _option("normal")
    """The generator's first weights: normal: independent. resize: each layer that doubles the side
    begins as an enlargement and a convolution, without the grid that independent weights leave."""
    init_g: Path | None = _option(None, example="netG", free=True)
    """Start the generator from this checkpoint's weights (ours, or the example's .pth)."""
    init_d: Path | None = _option(None, example="netD", free=True)
    """Start the discriminator from this checkpoint's weights."""
    out: Path | None = _option(None, example="outf", free=True)
    """Folder of the run; by default the next free runs/NNN-DATA-NET."""
    resume: str | None = _option(None, free=True)
    """Go on with a run: auto (the newest checkpoint in --out, or the newest run; a fresh start
    where there is none), or the path of a run or checkpoint."""
    log_every: int = _option(10, free=True)
    """Steps between two readings of the losses."""
    sample_every: int | None = _option(None, free=True)
    """Steps between two sample grids; by default an epoch, at most 500."""
    checkpoint_every: int | None = _option(None, free=True)
    """Steps between two checkpoints; by default two minutes."""
    keep: int = _option(3, free=True)
    """How many of the last checkpoints to keep, beside the last healthy one (docs/collapse.md)."""
    milestone_every: int | None = _option(None, free=True)
    """Keep for good the checkpoints of every so many steps (and write one there)."""
    eval_every: int | None = _option(None, free=True)
    """Steps between two evaluations of the generator against the training data (FID, KID and the
    others of docs/metrics.md, extra `metrics`); the end has one, too. By default there are none."""
    eval_n: int = _option(2000, free=True)
    """Images of each set in an evaluation, at most half of the training data. 2000 of 64x64
    took as long as 18 steps of 64 images on a CPU."""
    eval_features: str = _option("lite0", free=True)
    """Network of an evaluation: lite0, inception:FILE or a TorchScript file."""
    best_by: Literal["kid", "fid"] = _option("kid", free=True)
    """Which score says what generator is the best: it is kept beside the last, as
    netG_best.safetensors and checkpoints/best.pt."""
    patience: int | None = _option(None, free=True)
    """End the run after so many evaluations without a better generator."""
    max_minutes: float | None = _option(None, free=True)
    """End the run after so many minutes, counted from this process's first step, evaluations and
    all else included; --resume goes on."""
    on_collapse: Literal["warn", "rollback", "stop"] = _option("warn", free=True)
    """Where samples grow alike or D has won (docs/collapse.md): warn; rollback: go back to the last
    healthy checkpoint, with other noise and half of D's rate, 3 times at most; stop the run."""
    tensorboard: bool = _option(True, free=True)
    """Write TensorBoard events."""
    workers: int | None = _option(None, example="workers", free=True)
    """Threads that decode images when a source is first packed; by default all cores."""
    cache: Path | None = _option(None, free=True)
    """Where packed images are kept; by default $FASTDCGAN_CACHE or the user's cache folder."""
    dry_run: bool = _option(False, example="dry-run", free=True)
    """Print what would be done (device, precision, nets, data, steps, memory); train nothing."""

    def validate(self) -> None:
        """Raises InputError, naming the flag, where a value cannot be. `train` calls it first."""
        for name in (
            *("batch_size", "epochs", "nz", "ngf", "ndf", "log_every", "keep"),
            *("n_critic", "penalty_every"),
        ):
            _at_least_one(name, getattr(self, name))
        for name in (
            *("steps", "sample_every", "checkpoint_every", "milestone_every", "workers"),
            *("eval_every", "patience", "instance_noise_steps"),
        ):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name in ("lr", "lr_g", "lr_d", "adam_eps", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{_flag(name)} {value} was given; it must be above 0")
        if not 0 <= self.lr_decay <= 1:
            raise InputError(f"--lr-decay {self.lr_decay} was given; it must be from 0 to 1")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{_flag(name)} {getattr(self, name)} was given; it must be in [0, 1)"
                )
        if self.patience is not None and self.eval_every is None:
            raise InputError("--patience was given; it counts evaluations: give --eval-every, too")
        if self.channels is not None and self.channels not in (1, 2, 3, 4):
            raise InputError(f"--channels {self.channels} was given; it must be 1, 2, 3 or 4")
        if self.net == "tf28" and self.sync_bn:
            raise InputError("--sync-bn was given; it is for the nets of dcgan, not those of tf28")
        if self.net == "tf28" and self.image_size != 28:
            raise InputError(
                f"--image-size {self.image_size} was given; the nets of tf28 make 28x28 images "
                "only: use --preset tf28, or --net dcgan"
            )
        if self.net == "dcgan" and self.image_size not in (32, 64, 128, 256):
            raise InputError(
                f"--image-size {self.image_size} was given; the DCGAN nets make images of 32, 64, "
                "128 or 256 pixels"
            )
        self._validate_losses()

    def _validate_losses(self) -> None:
        for name in ("r1", "r2", "gradient_penalty", "instance_noise"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_flag(name)} {value} was given; it must be 0 or above")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"--label-smoothing {self.label_smoothing} was given; it must be in [0, 1)"
            )
        if self.label_smoothing and self.loss not in ("bce", "lsgan"):
            raise InputError(
                f"--label-smoothing was given; --loss {self.loss} has no labels to smooth: "
                "leave it out, or use bce or lsgan"
            )
        if self.loss == "wgan-gp" and self.gradient_penalty == 0:
            raise InputError(
                "--gradient-penalty 0 was given; --loss wgan-gp has no bound without it: "
                "leave it out (it is 10)"
            )
        if self.zero_centred and self.slope_penalty:
            name = "--r1" if self.r1 else "--r2"
            raise InputError(
                f"{name} and a gradient penalty were asked for; they pull the same gradient to 0 "
                f"and to 1: leave {name} out"
                + (", or use another --loss" if self.loss == "wgan-gp" else "")
            )
        if self.penalty_every > 1 and not (self.zero_centred or self.slope_penalty):
            raise InputError(
                f"--penalty-every {self.penalty_every} was given, and no penalty: add --r1, --r2 "
                "or --gradient-penalty"
            )
        if self.penalty_form == "difference" and not self.zero_centred:
            raise InputError(
                "--penalty-form difference was given; it is for R1 and R2: add --r1 or --r2"
            )
        if self.penalty_form == "difference" and (self.norm == "batch" or self.minibatch_std):
            what, way = "BatchNorm", "add --norm-d none"
            if self.minibatch_std:
                what, way = "--minibatch-std", "leave that out"
            raise InputError(
                f"--penalty-form difference was given; with {what} D's answer to an image depends "
                f"on the others of its batch: {way}"
            )
        if (self.zero_centred or self.slope_penalty) and self.sync_bn and self.norm == "batch":
            raise InputError(
                "--sync-bn was given, and a penalty, whose second derivatives synchronised "
                "BatchNorm does not have: leave one of them out, or add --norm-d none"
            )
        unknown = set(self.augmentations) - set(POLICIES)
        if unknown or self.diffaugment == "":
            raise InputError(
                f"--diffaugment {self.diffaugment} was given; give some of "
                f"{','.join(POLICIES)}, with commas between"
            )
        if self.instance_noise_steps is not None and not self.instance_noise:
            raise InputError("--instance-noise-steps was given, and no --instance-noise")
        if self.n_critic > 1 and (self.updates == "simultaneous" or self.keras_epsilon):
            raise InputError(
                f"--n-critic {self.n_critic} was given; it is for --updates alternating and "
                "PyTorch's Adam: leave it out, or give --updates alternating --no-keras-epsilon"
            )
        self._validate_nets()

    def _validate_nets(self) -> None:
        default = TrainConfig()
        if self.net == "tf28":
            for name in ("net_d", "norm_g", "minibatch_std"):
                if getattr(self, name) != getattr(default, name):
                    raise InputError(
                        f"{_flag(name)} was given; it is for the nets of dcgan, not for tf28"
                    )
        if self.norm_d == "batch" and (self.net == "tf28" or self.net_d == "sngan"):
            its = "tf28" if self.net == "tf28" else "--net-d sngan"
            raise InputError(f"--norm-d batch was given; the discriminator of {its} has no norm")
        if self.minibatch_std and self.net_d == "sngan":
            raise InputError("--minibatch-std was given; it is for --net-d dcgan, not for sngan")

    @property
    def zero_centred(self) -> bool:
        """Whether there is a penalty that pulls D's gradient to 0."""
        return self.r1 > 0 or self.r2 > 0

    @property
    def spectral(self) -> bool:
        """Whether D's weights are under spectral norm."""
        return self.spectral_norm or self.net_d == "sngan"

    @property
    def slope_penalty(self) -> float:
        """The weight of WGAN-GP's penalty, 0 where there is none."""
        if self.gradient_penalty is None:
            return 10.0 if self.loss == "wgan-gp" else 0.0
        return self.gradient_penalty

    @property
    def norm(self) -> Literal["batch", "none"]:
        """What `norm_d` comes to."""
        bare = self.spectral or self.loss == "wgan-gp" or self.net == "tf28"
        return self.norm_d or ("none" if bare else "batch")

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The parts of `diffaugment`."""
        return tuple(part.strip() for part in (self.diffaugment or "").split(",") if part.strip())

    def to_json(self) -> str:
        """The configuration as a JSON object, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The inverse of `to_json`. Fields that the text lacks take their default.

        Raises:
            InputError: the text is no configuration, or names a field that does not exist.
        """
        try:
            values = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise InputError(f"not a configuration in JSON: {error}") from None
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"unknown fields in the configuration: {', '.join(sorted(unknown))}")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if value is not None and hints[name] == (Path | None):
                values[name] = Path(value)
        return cls(**values)

    def differences(self, other: "TrainConfig") -> list[str]:
        """The fields that make `other` another run than this one, as "name: this -> other"."""
        return [
            f"{_flag(f.name)}: {getattr(self, f.name)} -> {getattr(other, f.name)}"
            for f in dataclasses.fields(self)
            if not f.metadata["free"] and getattr(self, f.name) != getattr(other, f.name)
        ]


@dataclass(frozen=True)
class TrainResult:
    """What `train()` returns."""

    steps: int
    """Steps the run has made, those before a resume included."""
    images_per_second: float
    """Images trained on per second over all processes, the first steps (and so compilation),
    sampling and checkpoints left out; nan where no step was made."""
    out: Path
    """Folder of the run."""
    loss_d: float
    """The discriminator's loss, mean of the last steps read; nan where no step was made."""
    loss_g: float
    """The generator's loss, likewise."""
    interrupted: bool
    """Whether a signal ended the run before its last step."""
    best: dict[str, Any] | None = None
    """The row of evaluations.jsonl of the best generator; None where none was evaluated, and in
    processes other than the first."""


# Half the width and small batches for three times the steps; a G that begins without a grid and
# learns faster than D; rates that fall to 0; and D is shown each image at another place. The clock
# ends it.
_MINUTES: dict[str, Any] = {
    "batch_size": 16,
    "ngf": 32,
    "ndf": 32,
    "init": "resize",
    "lr_g": 4e-4,
    "lr_d": 1e-4,
    "lr_decay": 0.5,
    "diffaugment": "translation",
    "epochs": ENDLESS,
    "max_minutes": 9.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # pytorch/examples dcgan/main.py: the defaults of TrainConfig.
    "dcgan": {},
    # The most that some minutes of a CPU buy, on any data.
    "minutes": _MINUTES,
    # The same on the built-in data: latent vectors wide enough that the sixteen places of G's first
    # map differ, and D is never shown a border: a map has none. (On clothes KID was worse by both.)
    # It ends with its steps, or by the clock.
    "blue-marble": {
        **_MINUTES,
        "data": "blue-marble",
        "nz": 400,
        "diffaugment": "shift",
        "epochs": 120,
    },
    # R3GAN's loss and penalties on the example's nets: a paired loss, R1 and R2, and no norm. Its
    # rates, its start and its lazy penalties are for minutes (benchmarks/results/recipes/r3.md),
    # and the penalties are exact: by differences it learns far worse.
    "r3": {
        "loss": "relativistic",
        "r1": 1.0,
        "r2": 1.0,
        "penalty_every": 4,
        "norm_g": "none",
        "norm_d": "none",
        "init": "resize",
        "lr": 1e-3,
        "lr_decay": 0.5,
        "beta1": 0.0,
        "beta2": 0.99,
    },
    # For little time or some thousand images, where the example's nets make too few steps or its D
    # knows the images by heart: found by a search; benchmarks/results/recipes says where it is
    # better.
    "small-data": {
        "batch_size": 32,
        "ngf": 32,
        "ndf": 32,
        "lr_g": 5e-4,
        "lr_d": 2e-4,
        "spectral_norm": True,
    },
    # The TensorFlow DCGAN tutorial; Keras's Adam has betas 0.9, 0.999 and epsilon 1e-7.
    "tf28": {
        "data": "fashion-mnist",
        "net": "tf28",
        "image_size": 28,
        "batch_size": 256,
        "epochs": 50,
        "lr": 1e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "adam_eps": 1e-7,
        "keras_epsilon": True,
        "updates": "simultaneous",
    },
}


def preset(name: str, **overrides: Any) -> TrainConfig:
    """The configuration of a recipe, with some fields replaced.

    Args:
        name: "dcgan" (the PyTorch example), "minutes" (the most that some minutes of a CPU buy),
            "blue-marble" (the same for the built-in data), "r3" (R3GAN's loss and penalties, no
            norm), "small-data" (half the width, spectral normalisation) or "tf28" (the TensorFlow
            tutorial).
        **overrides: fields of `TrainConfig`, which replace the recipe's (`giving_way`).
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    recipe = giving_way(TrainConfig(**PRESETS[name]), set(overrides))
    return dataclasses.replace(recipe, **overrides)


def giving_way(recipe: TrainConfig, given: Set[str]) -> TrainConfig:
    """A recipe without what the fields in `given` say in its place.

    `lr` is the rate of both nets. A recipe of epochs and minutes, whichever end first, keeps
    neither where the length is given: what is given is all that ends the run.
    """
    changes: dict[str, Any] = {}
    if "lr" in given:
        changes |= {"lr_g": None, "lr_d": None}
    if recipe.max_minutes is not None:
        if given & {"steps", "epochs"}:
            changes["max_minutes"] = None
        elif "max_minutes" in given:
            changes["epochs"] = ENDLESS
    return dataclasses.replace(recipe, **changes)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{_flag(name)} {value} was given; it must be at least 1")
