"""What `generate` can be asked for: one frozen dataclass, whose fields are the flags and whose
texts are the help. It needs no torch, so that --help does not wait for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdcgan.data.picture import FORMATS
from fastdcgan.data.video import SUFFIXES as VIDEO
from fastdcgan.data.video import check_video
from fastdcgan.data.writers import ARCHIVES
from fastdcgan.errors import InputError

PICTURES = tuple(FORMATS)


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw, and where to."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder (its last generator), a checkpoint of ours, or a generator's .safetensors or
    .pth: the best of a run with evaluations is RUN/netG_best.safetensors."""
    n: int = 64
    """How many images."""
    label: str | None = None
    """Of a run with --classes: draw this class, by its name or number; by default each in turn."""
    out: Path | None = None
    """A picture (.png, .jpg ...: one grid); .npz (array "images", uint8, N x H x W x C); .zip or
    .tar of PNGs, with %06d in the name many of them (WebDataset's shards); .gif or .mp4 with
    --interpolate."""
    each: Path | None = None
    """A folder for one PNG per image."""
    shard: int = 10_000
    """Images in one archive, where --out has %06d in its name."""
    numbered: bool = False
    """Write under each image of a grid its number, by which the next two options know it."""
    interpolate: str | None = None
    """Numbers of two images or more, "3,17,5": walk from one to the next; to a picture (a strip,
    a row from each to the next), .gif, .mp4 or any other --out."""
    arithmetic: str | None = None
    """Numbers of images, as "1,2,3 - 4,5,6 + 7,8,9": calculates with the mean z of each group, as
    in the DCGAN paper's figure 7, and draws a sheet of the parts and the result."""
    curve: Literal["spherical", "linear"] = "spherical"
    """How --interpolate walks: along the sphere on which z lies, or straight through it, where
    images are more typical of the mean."""
    frames: int | None = None
    """Images from one number to the next; by default 8 in a picture, else 48."""
    loop: bool = False
    """Walk back from the last number to the first."""
    fps: float = 25.0
    """Frames a second."""
    scale: int = 1
    """In .gif and .mp4, each pixel becomes so many on a side."""
    seed: int = 0
    """Seed of the latent vectors: the same seed gives the same images, whatever --n and
    --batch-size are."""
    truncation: float | None = None
    """Make images more typical and less diverse: keep each value of z within this."""
    truncate: Literal["resample", "scale"] = "resample"
    """How: resample draws z from N(0, 1) given that every |value| is at most --truncation (other
    images); scale multiplies z by --truncation (the same images, nearer to the mean)."""
    statistics: Literal["running", "batch"] = "running"
    """BatchNorm by running statistics (each image for itself) or, as in training, by those of the
    64 images (0 to 63, 64 to 127 ...) that it is one of."""
    batch_size: int = 256
    """Images computed at a time: memory and speed, not what is drawn."""
    amp: bool = False
    """Compute in bf16 (fp16) where the device has it natively."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    force: bool = False
    """Overwrite what is there."""

    def validate(self) -> None:
        """Raises InputError, naming the flag, where what is asked for cannot be."""
        for flag, value in (
            ("n", self.n),
            ("shard", self.shard),
            ("scale", self.scale),
            ("batch-size", self.batch_size),
            ("frames", 1 if self.frames is None else self.frames),
        ):
            if value < 1:
                raise InputError(f"--{flag} {value} was given; it must be at least 1")
        if self.truncation is not None and not self.truncation > 0:
            raise InputError(f"--truncation {self.truncation} was given; it must be above 0")
        if self.out is None and self.each is None:
            raise InputError("nowhere to write to: give --out FILE (.png or .npz) or --each FOLDER")
        walks = self.interpolate is not None
        if walks and self.arithmetic is not None:
            raise InputError("--interpolate and --arithmetic were given; give one of them")
        if self.statistics == "batch" and (walks or self.arithmetic is not None):
            raise InputError(
                "--statistics batch was given; an image of a walk or sheet would then depend on "
                "its neighbours: leave it out"
            )
        if self.out is None:
            return
        suffix = self.out.suffix.lower()
        known = (*PICTURES, ".npz", *ARCHIVES, *VIDEO)
        if suffix not in known:
            raise InputError(f"cannot write {self.out}: end its name in {', '.join(known)}")
        if self.arithmetic is not None and (suffix not in PICTURES or self.each is not None):
            raise InputError(
                f"--arithmetic draws one picture: give --out with {', '.join(PICTURES)} at its end"
            )
        if suffix in VIDEO:
            if not walks:
                raise InputError(f"cannot write {self.out}: pictures move with --interpolate only")
            check_video(self.out, self.fps)
