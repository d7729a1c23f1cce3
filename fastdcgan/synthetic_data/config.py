"""What `augment` can be asked for: one frozen dataclass, whose fields are the flags and whose texts
are the help; how generators are trained is a `TrainConfig` inside it. It needs no torch, so that
--help does not wait for it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastdcgan.command import without_flags
from fastdcgan.errors import InputError
from fastdcgan.training.config import TrainConfig

DECIDED = ("out", "resume", "dry_run")
"""Fields of a generator's training that the command itself decides."""

if TYPE_CHECKING:
    Training = TrainConfig
else:
    Training = without_flags(TrainConfig, DECIDED, "Training", __name__)


@dataclass(frozen=True)
class AugmentConfig:
    """How many images of each class, how they are chosen, and where to."""

    per_class: int
    """Synthetic images of each class."""
    out: Path
    """Folder of the set and its manifest.json; it appears when all of it is there."""
    to: Literal["folder", "npz", "webdataset"] = "folder"
    """folder: a PNG each, in a subfolder for each class (torchvision's ImageFolder). npz:
    images.npz with `images` (N x H x W x C), `labels` and `classes`. webdataset: 000000.tar and on,
    each image a .png and a .cls, the classes mixed."""
    source: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Draw from these and train nothing: one run that was trained with --classes, or a run for each
    class, in the order of the classes unless the runs' folders have just their names."""
    reject: Literal["d", "density", "none"] = "d"
    """Which images are dropped as bad. d: the --reject-share that the discriminator finds least
    real. density: those in no real image's ball of --nearest neighbours, which may be nearly all.
    none."""
    reject_share: float = 0.2
    """Share of the images that --reject d drops."""
    nearest: int = 5
    """k: the ball around a real image reaches to the k-th nearest other one of its class."""
    duplicate_quantile: float = 0.01
    """Images nearer to a real one than this quantile of the real images' own nearest distances are
    dropped as copies; 0 keeps them."""
    features: str = "lite0"
    """Network by whose features distances are taken: lite0, inception:FILE or a TorchScript
    file."""
    max_draws: int = 20
    """Draw at most so many images for each that is wanted."""
    shard: int = 10_000
    """Images in one .tar."""
    runs: Path | None = None
    """Folder of the generators' runs, and of what is drawn until all is there; by default OUT-runs.
    The same command goes on with what is there."""
    force: bool = False
    """Replace the set in --out."""
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=Training)
    """The source of the images, and how a generator is trained."""

    def validate(self) -> None:
        """Raises InputError, naming the flag, where a value cannot be."""
        for flag, value in (
            ("per-class", self.per_class),
            ("nearest", self.nearest),
            ("max-draws", self.max_draws),
            ("shard", self.shard),
        ):
            if value < 1:
                raise InputError(f"--{flag} {value} was given; it must be at least 1")
        for flag, share in (
            ("reject-share", self.reject_share),
            ("duplicate-quantile", self.duplicate_quantile),
        ):
            if not 0 <= share < 1:
                raise InputError(f"--{flag} {share} was given; it must be in [0, 1)")
        if not self.out.name:
            raise InputError(f"--out {self.out} was given; give a folder by its name")
        self.train_config().validate()

    def train_config(self) -> TrainConfig:
        """The configuration of a generator's training, but for its images and folders."""
        fields = dataclasses.fields(TrainConfig)
        return TrainConfig(**{f.name: getattr(self.training, f.name) for f in fields})

    def runs_folder(self) -> Path:
        """What `runs` comes to."""
        return self.runs or self.out.with_name(f"{self.out.name}-runs")
