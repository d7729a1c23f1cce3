"""From two sources of images and a run to restyled images, numbers and a sheet to look at: what the
command does. Not here: how an image is restyled (transfer.py)."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdcgan.data.outputs import check_images, check_picture, write_images, write_sheet
from fastdcgan.data.picture import Pixels
from fastdcgan.data.selection import select
from fastdcgan.errors import InputError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.latent.draw import load_discriminator, load_generator
from fastdcgan.latent.projection import precision
from fastdcgan.progress import bar
from fastdcgan.stylisation.gram import discriminator_features, lite0_features
from fastdcgan.stylisation.transfer import Restyled, restyle

ROWS = 8  # of a sheet at most, in each direction

SPACES: dict[str, tuple[Literal["pixels", "latent"], ...]] = {
    "pixels": ("pixels",), "latent": ("latent",), "both": ("pixels", "latent"),
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What one direction in one space came to: means over the content images."""

    content: str
    style: str
    space: Literal["pixels", "latent"]
    gram_before: float
    """`gram_distance` of the content to the style, the mean over layers."""
    gram_after: float
    """That of the result."""
    edges: float
    """`edge_correlation` of the result and the content."""


@dataclass(frozen=True, eq=False)
class Report:
    """What `stylize` returns."""

    results: dict[str, Pixels]
    """By space: the content images in the style's look, (N, H, W, C)."""
    changes: tuple[Change, ...]
    facts: dict[str, Any]

    def to_json(self) -> str:
        """One object: {"changes": [...], and the facts}."""
        changes = [dataclasses.asdict(change) for change in self.changes]
        return json.dumps({"changes": changes, **self.facts})

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{'Gram distance':>16}{'before':>10}{'after':>10}{'fall':>8}{'edges':>8}"
        for c in self.changes:
            fall = f"{c.gram_before / max(c.gram_after, 1e-12):.3g}x"
            yield (
                f"{c.space:16}{c.gram_before:>10.4g}{c.gram_after:>10.4g}{fall:>8}{c.edges:>8.3f}"
                f"  {c.content} -> {c.style}"
            )


def stylize(
    source: Path,
    content: str,
    style: str,
    space: Literal["pixels", "latent", "both"] = "pixels",
    *,
    features: Literal["both", "discriminator", "lite0"] = "both",
    strength: float = 0.8,
    reverse: bool = False,
    n: int = 4,
    steps: int = 300,
    restarts: int = 4,
    sheet: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    ema: bool = True,
    amp: bool = False,
    device: str = "auto",
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Report:
    """Gives the content images the look of the style images, by the networks of a run.

    Args:
        source: the run's folder or checkpoint; for pixels alone, its discriminator's file will do.
        content, style, n, cache, progress: see `select`.
        space: where the image is changed, see `restyle`; "both": in each.
        features: whose features make the look: the run's discriminator's, EfficientNet-Lite0's, or
            both, where the latter's weights are installed.
        strength, steps, restarts, seed: see `restyle`.
        reverse: give the style images the content's look, too.
        sheet: a picture to write: content, style, and the results.
        out: a .npz or a folder for the results; with space "both" those in pixels come first.
        force: overwrite what is there.
        ema: use the averaged generator where there is one.
        amp: the networks' products in bf16, where the device has it.

    Raises:
        InputError: something of this is not there, cannot be, or does not fit.
    """
    if sheet is not None:
        check_picture(sheet, force=force)
    if out is not None:
        check_images(out, force=force)
    if not 0 <= strength <= 1:
        raise InputError(f"--strength {strength} was given; it must be from 0 to 1")
    if steps < 1:
        raise InputError(f"--steps {steps} was given; it must be at least 1")
    use_allowed_threads()
    place = pick_device(device)

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr)

    netD = load_discriminator(source, device=str(place))
    networks = [discriminator_features(netD)] if features != "lite0" else []
    if features != "discriminator":
        try:
            networks.append(lite0_features(place))
        except InputError as error:
            if features == "lite0":
                raise
            say(f"by the discriminator's features alone: {error}")
    spaces = SPACES[space]
    netG = load_generator(source, ema=ema, device=str(place)) if "latent" in spaces else None
    options: Any = {"size": netD.size, "channels": netD.channels, "n": n, "seed": seed,
                    "cache": cache, "progress": progress}  # fmt: skip
    a, b = (select(spec, **options) for spec in (content, style))
    autocast = precision(place, say) if amp else None
    ways = [(a, b), (b, a)] if reverse else [(a, b)]
    changes: list[Change] = []
    results: list[dict[str, Pixels]] = []
    with bar("restyling", len(ways) * len(spaces) * steps, shown=progress) as advance:
        for given, wanted in ways:
            made: dict[str, Pixels] = {}
            for where in spaces:
                found: Restyled = restyle(
                    given.images, wanted.images, networks,
                    netG=netG if where == "latent" else None, device=place, strength=strength,
                    steps=steps, restarts=restarts, seed=seed, autocast=autocast, advance=advance,
                )  # fmt: skip
                made[where] = found.images
                means = (float(x.mean()) for x in (found.before, found.after, found.edges))
                changes.append(Change(given.described, wanted.described, where, *means))
            results.append(made)
    if sheet is not None:
        rows = [
            [given.images[i], wanted.images[i % len(wanted.images)], *(made[s][i] for s in spaces)]
            for (given, wanted), made in zip(ways, results, strict=True)
            for i in range(min(ROWS, len(given.images)))
        ]
        write_sheet(sheet, rows, ["content", "style", *(f"in {where}" for where in spaces)])
    if out is not None:
        write_images(out, np.concatenate([results[0][where] for where in spaces]))
    facts = {"run": str(source), "strength": strength, "steps": steps, "features": features,
             "seed": seed}  # fmt: skip
    return Report(results[0], tuple(changes), facts)
