"""From a run and a source of images to filled images, scores and a sheet to look at: what the
command does. Not here: how a hole is filled (filling.py)."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdcgan.data.outputs import check_images, check_picture, write_images, write_sheet
from fastdcgan.data.selection import select
from fastdcgan.errors import InputError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.inpainting import scores
from fastdcgan.inpainting.filling import PRIOR, Filled, fill
from fastdcgan.inpainting.masks import WINDOW, make_mask
from fastdcgan.latent.draw import load_discriminator, load_generator
from fastdcgan.latent.projection import LR, POOL, precision, rounds
from fastdcgan.progress import bar
from fastdcgan.training.compiling import Compiler

ROWS = 16  # of a sheet at most


@dataclass(frozen=True, eq=False)
class Report:
    """What `inpaint` returns."""

    filled: Filled
    scores: dict[str, dict[str, float]]
    """"ours" and each rival -> "psnr" (dB) and "ssim", inside the mask."""
    facts: dict[str, Any]
    """The run, the images, the mask, and how they were filled."""

    def to_json(self) -> str:
        """One object: {"scores": ..., and the facts}."""
        return json.dumps({"scores": self.scores, **self.facts})

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"images  {self.facts['images']}"
        yield f"mask    {self.facts['mask']}: {self.facts['share']:.1%} hidden"
        yield ""
        yield f"{'inside the mask':18}{'PSNR (dB)':>10}{'SSIM':>8}"
        for name, found in self.scores.items():
            yield f"{name:18}{found['psnr']:>10.2f}{found['ssim']:>8.3f}"


def inpaint(
    source: Path,
    images: str,
    mask: str = "center",
    *,
    n: int = 16,
    split: Literal["train", "test"] | None = None,
    share: float | None = None,
    window: int = WINDOW,
    prior: float = PRIOR,
    restarts: int = 8,
    pool: int = POOL,
    steps: int = 150,
    lr: float = LR,
    batch: int = 256,
    combine: Literal["best", "mean"] = "best",
    blending: Literal["poisson", "none"] = "poisson",
    strength: float | None = None,
    sheet: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    ema: bool = True,
    amp: bool = False,
    compile: bool = False,
    device: str = "auto",
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Report:
    """Hides a part of each image and fills it with the generator of a run.

    Args:
        source: a run's folder or checkpoint, see `load_generator`; with `prior` 0 a generator's
            file will do.
        images, n, split, cache, progress: see `select`.
        mask, share, window: see `make_mask`.
        sheet: a picture to write: of each image (the first 16) what is seen, the generator's image,
            the fill, and the image itself.
        out: a .npz or a folder to write the filled images to.
        force: overwrite what is there.
        ema: use the averaged generator where there is one.
        amp: the nets' products in bf16, where the device has it.
        compile: compile the loss with torch.compile.
        the others: see `fill`.

    Raises:
        InputError: something of this is not there, cannot be, or does not fit.
    """
    if sheet is not None:
        check_picture(sheet, force=force)
    if out is not None:
        check_images(out, force=force)
    if not prior >= 0:
        raise InputError(f"--prior {prior} was given; it must be at least 0")
    if strength is not None and not 0 <= strength <= 1:
        raise InputError(f"--strength {strength} was given; it must be from 0 to 1")
    use_allowed_threads()
    place = pick_device(device)
    netG = load_generator(source, ema=ema, device=str(place))
    netD = load_discriminator(source, device=str(place)) if prior else None
    hidden = make_mask(mask, netG.size, share=share, window=window, seed=seed)
    chosen = select(
        images, size=netG.size, channels=netG.channels, n=n, seed=seed, split=split, cache=cache,
        progress=progress,
    )  # fmt: skip
    truth = chosen.images
    others = scores.rivals(truth, hidden)

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr)

    total = rounds(len(truth), restarts=restarts, steps=steps, batch=batch)
    with bar("filling", total, shown=progress) as advance:
        filled = fill(
            netG, netD, truth, hidden, prior=prior, restarts=restarts, pool=pool, steps=steps,
            lr=lr, batch=batch, combine=combine, blending=blending, strength=strength, seed=seed,
            autocast=precision(place, say) if amp else None, wrap=Compiler(compile, say),
            advance=advance,
        )  # fmt: skip
    found = {"ours": scores.inside(filled.images, truth, hidden)}
    found |= {name: scores.inside(other, truth, hidden) for name, other in others.items()}
    if sheet is not None:
        seen = np.where(hidden.hole[None, :, :, None], np.uint8(127), truth)
        if hidden.sees_all:
            f = hidden.factor
            small = truth.reshape(len(truth), netG.size // f, f, netG.size // f, f, -1)
            seen = small.mean((2, 4)).round().astype(np.uint8).repeat(f, 1).repeat(f, 2)
        columns = {"seen": seen, "generated": filled.generated, "filled": filled.images}
        columns |= {"Telea": others["telea"]} if "telea" in others else {}
        columns |= {"truth": truth}
        rows = list(zip(*(images[:ROWS] for images in columns.values()), strict=True))
        write_sheet(sheet, rows, list(columns))
    if out is not None:
        write_images(out, filled.images)
    facts = {
        "run": str(source),
        "images": chosen.described,
        "n": len(truth),
        "mask": mask,
        "share": hidden.share,
        "combine": combine,
        "blending": blending,
        "strength": float(filled.strengths.mean()),
        "loss": float(filled.losses[:, 0].mean()),
        "prior": prior,
        "restarts": restarts,
        "pool": pool,
        "steps": steps,
        "seed": seed,
    }
    return Report(filled, found, facts)
