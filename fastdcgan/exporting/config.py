"""What `export` can be asked for: one frozen dataclass, whose fields are the flags and whose texts
are the help. It needs no torch, so that --help does not wait for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdcgan.errors import InputError

FormatName = Literal["onnx", "torchscript", "torch-export", "safetensors"]


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """A run's folder (its last nets), a checkpoint of ours, or a net's .safetensors or .pth: the
    best generator of a run with evaluations is RUN/netG_best.safetensors."""
    to: tuple[FormatName, ...] = ("safetensors",)
    """One or more of: onnx (model.onnx), torchscript (model.pt), torch-export (model.pt2),
    safetensors (model.safetensors, which from_pretrained reads)."""
    out: Path | None = None
    """A folder, laid out as the Hugging Face Hub expects; by default export-generator or
    export-discriminator in the run's folder."""
    net: Literal["g", "d"] = "g"
    """The generator (latent vectors to images) or the discriminator (images to logits)."""
    fold: bool = False
    """Make each BatchNorm a part of the weights before it: fewer operations, the same numbers."""
    ema: bool = True
    """Use the averaged generator, where there is one."""
    license: str = "unknown"
    """For the model card: the licence of the weights, by the Hub's name for it (mit, cc-by-4.0,
    other ...). It is yours to choose, and depends on the images."""
    license_name: str | None = None
    """The licence's own name, with --license other."""
    license_link: str | None = None
    """Where its text stands, with --license other."""
    push: str | None = None
    """Then upload the folder to this repository on the Hub, USER/NAME (made if need be)."""
    private: bool = False
    """Make that repository a private one."""
    seed: int = 0
    """Seed of the card's samples, and of what the files are checked with."""
    amp: bool = False
    """Draw the card's samples in bf16 (fp16); the files are float32 in any case."""
    device: str = "auto"
    """Where the samples are drawn: auto, cpu, cuda, cuda:N or mps. Files are made and checked on
    the CPU, and run anywhere."""
    force: bool = False
    """Overwrite what is there."""

    def validate(self) -> None:
        """Raises InputError, naming the flag, where what is asked for cannot be."""
        if not self.to:
            raise InputError("--to was given without a format")
        if self.fold and "safetensors" in self.to:
            raise InputError(
                "--fold was given with --to safetensors, which holds the net as it is trained: "
                "fold one of the other formats"
            )
        named = self.license_name is not None and self.license_link is not None
        if (self.license == "other") != named:
            raise InputError(
                "--license other needs --license-name and --license-link, and they need it"
            )
