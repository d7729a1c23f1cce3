"""Draws images from any trained generator: finding its weights, drawing z, writing the files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.data import grid, to_uint8
from fastdcgan.data.picture import atomic_write, save_image
from fastdcgan.errors import InputError
from fastdcgan.hardware import pick_device
from fastdcgan.training.checkpoints import Checkpoints, load

Generator = models.Generator | models.TF28Generator

CHUNK = 256
"""Latent vectors drawn and images made at a time. Fixed, because with it the same seed gives the
same images whatever `n` is."""


def load_generator(source: Path, *, ema: bool = True, device: str = "cpu") -> Generator:
    """The generator in `source`, in channels_last on `device`; its size is read off the weights.

    Args:
        source: a run's folder (its finished netG, else its newest checkpoint), a checkpoint of a
            run, or any state dict that `models.load_weights` reads.
        ema: prefer the averaged generator where there is one.

    Raises:
        InputError: there is no such file, or no DCGAN generator in it.
    """
    place = pick_device(device)
    net = models.generator_from(
        _from_run(source, ema) if source.is_dir() else _from_file(source, ema)
    )
    return net.to(place, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def _from_run(run: Path, ema: bool) -> Path | dict[str, Tensor]:
    names = ("netG_ema.safetensors", "netG.safetensors") if ema else ("netG.safetensors",)
    for name in names:
        if (run / name).is_file():
            return run / name
    newest = Checkpoints(run / "checkpoints").newest()
    if newest is None:
        raise InputError(f"{run} is no run: it has neither {names[-1]} nor checkpoints/")
    return _choose(newest[1], ema)


def _from_file(path: Path, ema: bool) -> Path | dict[str, Tensor]:
    try:
        return _choose(load(path), ema)
    except InputError:
        return path  # not a run's checkpoint: bare weights, which say themselves what is wrong


def _choose(state: dict[str, Any], ema: bool) -> dict[str, Tensor]:
    chosen: dict[str, Tensor] = state["ema"] if ema and "ema" in state else state["netG"]
    return chosen


def latents(n: int, nz: int, *, seed: int, truncation: float | None = None) -> Iterator[Tensor]:
    """`n` latent vectors in chunks of (up to `CHUNK`, nz, 1, 1), float32 on the CPU.

    N(0, 1), or with `truncation` N(0, 1) given that every |value| is at most it.
    """
    if truncation is not None and truncation <= 0:
        raise InputError(f"--truncation {truncation} was given; it must be above 0")
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, CHUNK):
        z = torch.empty(CHUNK, nz, 1, 1)
        if truncation is None:
            z.normal_(generator=generator)
        else:
            nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=generator)
        yield z[: n - start]


def draw(
    net: Generator,
    n: int,
    *,
    seed: int = 0,
    truncation: float | None = None,
    statistics: Literal["running", "batch"] = "running",
) -> Iterator[npt.NDArray[np.uint8]]:
    """`n` images in chunks of (up to `CHUNK`, H, W, C) uint8.

    The first images of a seed are the same for every `n` (with "batch" statistics: of every full
    chunk).
    """
    if n < 1:
        raise InputError(f"--n {n} was given; it must be at least 1")
    device = next(net.parameters()).device
    for z in latents(n, net.nz, seed=seed, truncation=truncation):
        yield to_uint8(models.sample(net, z.to(device), statistics=statistics))


def draw_to_files(
    source: Path,
    *,
    n: int,
    out: Path | None = None,
    each: Path | None = None,
    seed: int = 0,
    truncation: float | None = None,
    statistics: Literal["running", "batch"] = "running",
    ema: bool = True,
    device: str = "auto",
    force: bool = False,
) -> list[str]:
    """Draws `n` images from the generator in `source` into a grid or .npz (`out`), and single
    PNGs (`each`); returns a line on each.

    Raises:
        InputError: there is nothing to write to, something is there already (without `force`), or
            it cannot be written.
    """
    if out is None and each is None:
        raise InputError("nowhere to write to: give --out FILE (.png or .npz) or --each FOLDER")
    for path in (out, each):
        taken = path is not None and path.exists() and (path.is_file() or any(path.iterdir()))
        if taken and not force:
            raise InputError(f"{path} exists already: choose another name, or --force")
    net = load_generator(source, ema=ema, device=device)
    kept: list[npt.NDArray[np.uint8]] = []
    count = 0
    try:
        if each is not None:
            each.mkdir(parents=True, exist_ok=True)
        for images in draw(net, n, seed=seed, truncation=truncation, statistics=statistics):
            if each is not None:
                for image in images:
                    save_image(each / f"{count:06d}.png", image)
                    count += 1
            if out is not None:
                kept.append(images)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            _write(out, np.concatenate(kept))
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or out or each}: {error.strerror}"
        ) from None
    lines = [] if each is None else [f"{count} images in {each}"]
    return lines if out is None else [*lines, f"{n} images in {out}"]


def _write(out: Path, images: npt.NDArray[np.uint8]) -> None:
    if out.suffix.lower() == ".npz":
        atomic_write(out, lambda file: np.savez_compressed(file, images=images))
    else:
        save_image(out, grid(images))
