"""From a labelled source of images to a balanced synthetic set: what the command does. The parts
are beside it: generators.py, screening.py, drawing.py, files.py."""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan.data import prepare
from fastdcgan.data.labels import labels
from fastdcgan.data.picture import Pixels
from fastdcgan.errors import InputError, RunError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.latent.draw import Sampler, fast_sampler, load_discriminator, load_generator
from fastdcgan.metrics.features import extract, real_features
from fastdcgan.metrics.networks import FeatureNetwork, load_network
from fastdcgan.progress import bar
from fastdcgan.synthetic_data import drawing, files, generators, screening
from fastdcgan.synthetic_data.config import AugmentConfig
from fastdcgan.synthetic_data.drawing import Drawn
from fastdcgan.synthetic_data.generators import LabelledImages, Origin
from fastdcgan.training.folders import only_writer

PILOT = 1024
"""Images by whose logits --reject d finds its threshold."""


@dataclass(frozen=True)
class SyntheticSet:
    """What `augment` returns."""

    out: Path
    manifest: dict[str, Any]
    """manifest.json."""

    def lines(self) -> Iterator[str]:
        """What was drawn, dropped and kept, for people."""
        yield f"{'class':20}{'real':>9}{'drawn':>9}{'copies':>9}{'rejected':>9}{'kept':>9}"
        for name, counts in self.manifest["counts"].items():
            numbers = (counts[key] for key in ("real", "drawn", "copies", "rejected", "kept"))
            yield f"{name:20}" + "".join(f"{number:>9,}" for number in numbers)
        yield f"{sum(c['kept'] for c in self.manifest['counts'].values()):,} images in {self.out}"


def augment(
    config: AugmentConfig, *, command: str | None = None, progress: bool = True
) -> SyntheticSet:
    """Makes the set that `config` describes; see its fields.

    Args:
        config: what to make.
        command: the command line, for the manifest.
        progress: show a bar where stderr is a terminal, and say on stderr what is done.

    Raises:
        InputError: something cannot be: the message says what, why, and what to do.
        RunError: it was stopped, or a class's images pass too seldom. What is trained and drawn is
            kept; the same call goes on with it.
    """
    config.validate()
    files.refuse_taken(config.out, force=config.force)
    try:
        return _Making(config, command, progress).go()
    except KeyboardInterrupt:
        raise RunError("stopped; the same command goes on") from None
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or config.out}: {error.strerror or error}"
        ) from None


class _Making:
    """One call of `augment`."""

    def __init__(self, config: AugmentConfig, command: str | None, progress: bool) -> None:
        self.config, self.command, self.progress = config, command, progress
        self.training = config.train_config()
        use_allowed_threads()
        self.device = pick_device(self.training.device)
        self.network: FeatureNetwork | None = None
        if config.duplicate_quantile or config.reject == "density":
            self.network = load_network(config.features, self.device)
        self.real = self._open_data()

    def go(self) -> SyntheticSet:
        config, real, folder = self.config, self.real, self.config.runs_folder()
        origins = generators.find(config.source, real) if config.source else None
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            if origins is None:
                origins = generators.train_each(real, self.training, folder, self.say)
            drawn = self._draw(origins, folder / "drawn")
            manifest = self._manifest(origins, drawn)
            with bar("writing", config.per_class * len(drawn), shown=self.progress) as advance:
                files.write_set(
                    config.out, config.to, [found.images for found, _ in drawn], real.classes,
                    manifest, shard=config.shard, advance=advance,
                )  # fmt: skip
            drawing.forget(folder / "drawn", real.classes)
        if config.source:
            (folder / ".lock").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        return SyntheticSet(config.out, manifest)

    def say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)

    def _open_data(self) -> LabelledImages:
        """The real images, of the size and channels of those to be drawn."""
        config, training = self.config, self.training
        size, channels = training.image_size, training.channels
        if config.source:
            size, channels = generators.shape_of(config.source)
        packed = prepare(
            training.data, size=size, channels=channels, cache=training.cache,
            workers=training.workers, progress=self.progress,
        )  # fmt: skip
        found = labels(packed, training.cache)
        classes = generators.names_for_folders(found.names)
        real = LabelledImages(packed, found.numbers, found.names, classes)
        if not (config.source or training.classes):
            batch = training.batch_size * training.n_critic
            why = f"a batch takes {batch}: lower --batch-size, or add images"
            generators.require_enough(real, batch, why)
        if config.reject == "density":
            k = config.nearest
            why = f"density looks at {k} neighbours (--nearest): lower it, or --reject d or none"
            generators.require_enough(real, k + 1, why)
        generators.require_enough(real, 2, "copies are known by distances between real images")
        return real

    # ---- drawing ---------------------------------------------------------------------------------

    def _draw(self, origins: list[Origin], folder: Path) -> list[tuple[Drawn, dict[str, Any]]]:
        """Of each class what was drawn, and by which seed and thresholds."""
        config, found = self.config, list[tuple[Drawn, dict[str, Any]]]()
        real = self._real_features()
        with bar("drawing", config.per_class * len(origins), shown=self.progress) as advance:
            for label, origin in enumerate(origins):
                found.append(self._draw_class(label, origin, folder, real, advance))
        short = [
            f"{name} has {len(held.images):,} after {held.drawn:,} draws ({held.copies:,} copies, "
            f"{held.bad:,} rejected)"
            for name, (held, _) in zip(self.real.classes, found, strict=True)
            if len(held.images) < config.per_class
        ]
        if short:
            raise RunError(
                f"of {config.per_class:,} images of each class {'; '.join(short)}. All is kept, "
                "and the same command goes on with a larger --max-draws; or train longer "
                "(--steps), take a smaller --per-class, or another --reject"
            )
        return found

    def _draw_class(
        self,
        label: int,
        origin: Origin,
        folder: Path,
        real: Tensor | None,
        advance: Callable[[int], object],
    ) -> tuple[Drawn, dict[str, Any]]:
        config, name = self.config, self.real.classes[label]
        net = load_generator(origin.run, ema=self.training.ema, device=str(self.device))
        seed, pilot_seed = _seeds(self.training.seed, label)
        key = self._key(net, origin, label, seed)
        sampler = fast_sampler(net, amp=self.training.amp, say=self.say)
        screen = self._screen(label, origin, sampler, real, pilot_seed)
        shape = (net.size, net.size, net.channels)
        begun = drawing.begun_in(folder, name, key, shape)
        if len(begun.images) > config.per_class:  # of a call that wanted more: drawn again
            begun = Drawn(begun.images[:0], 0, 0, 0)
        advance(len(begun.images))

        def sample(z: Tensor) -> Pixels:
            own = screening.labels_of(origin.label, len(z))
            return next(sampler.pixels([z], labels=own))

        held = drawing.draw_passing(
            sample, screen, begun, n=config.per_class,
            most=config.per_class * config.max_draws, nz=net.nz, seed=seed, advance=advance,
        )  # fmt: skip
        if held.drawn > begun.drawn:
            drawing.keep(folder, name, key, held)
        return drawing.begun_in(folder, name, key, shape), {"seed": seed, **screen.facts()}

    def _screen(
        self, label: int, origin: Origin, sampler: Sampler, real: Tensor | None, pilot_seed: int
    ) -> screening.Screen:
        config, neighbourhood, opinion = self.config, None, None
        if real is not None:
            place = self.device if self.device.type == "cuda" else torch.device("cpu")
            neighbourhood = screening.Neighbourhood.of(
                real[self.real.rows(label)].to(place),  # MPS has no float64
                quantile=config.duplicate_quantile,
                nearest=config.nearest if config.reject == "density" else None,
            )
        if config.reject == "d":
            netD = load_discriminator(origin.run, device=str(self.device))
            own = screening.labels_of(origin.label, PILOT)
            pilot = np.concatenate(list(sampler.draw(PILOT, labels=own, seed=pilot_seed)))
            logits = screening.logits_by(netD, origin.label)
            opinion = screening.Opinion.of(logits, pilot, config.reject_share)
        return screening.Screen(
            None if self.network is None else self._features, neighbourhood, opinion
        )

    def _features(self, images: Pixels) -> Tensor:
        assert self.network is not None
        return extract([images], self.network, self.device)

    def _real_features(self) -> Tensor | None:
        """(packed.n, D), row by row those of the packed images; None where no rule needs them."""
        if self.network is None:
            return None
        packed = self.real.packed
        with bar(f"features by {self.network.name}", packed.n, shown=self.progress) as advance:
            found, rows = real_features(
                packed, packed.n, self.network, self.device, cache=self.training.cache,
                advance=advance,
            )  # fmt: skip
        return found[torch.from_numpy(np.argsort(rows))]

    def _key(self, net: nn.Module, origin: Origin, label: int, seed: int) -> str:
        """Another one whenever other images would pass."""
        config = self.config
        digest = hashlib.sha256()
        nets = [net] if config.reject != "d" else [net, load_discriminator(origin.run)]
        for tensor in (tensor for net in nets for tensor in net.state_dict().values()):
            digest.update(tensor.cpu().numpy().tobytes())
        identity = None if self.network is None else (self.network.name, self.network.identity)
        rule = (config.reject, config.nearest, config.reject_share, config.duplicate_quantile)
        facts = (
            self.real.packed.sha256,
            label,
            origin.label,
            seed,
            rule,
            identity,
            self.training.amp,
        )
        digest.update(repr(facts).encode())
        return digest.hexdigest()

    # ---- manifest --------------------------------------------------------------------------------

    def _manifest(
        self, origins: list[Origin], drawn: list[tuple[Drawn, dict[str, Any]]]
    ) -> dict[str, Any]:
        config, packed = self.config, self.real.packed
        rule: dict[str, Any] = {"rule": config.reject}
        if config.reject != "none":
            name = "nearest" if config.reject == "density" else "reject_share"
            rule[name] = getattr(config, name)
        counts = {}
        for label, (name, origin) in enumerate(zip(self.real.classes, origins, strict=True)):
            held, facts = drawn[label]
            counts[name] = {
                "real": len(self.real.rows(label)),
                "drawn": held.drawn,
                "copies": held.copies,
                "rejected": held.bad,
                "kept": len(held.images),
                **facts,
                "generator": str(origin.run),
            }
        return {
            "command": self.command,
            "versions": {
                "fastdcgan": fastdcgan.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "source": {"data": packed.source, "split": packed.split, "sha256": packed.sha256},
            "image_size": packed.size,
            "channels": packed.channels,
            "classes": list(self.real.classes),
            "per_class": config.per_class,
            "to": config.to,
            "seed": self.training.seed,
            "features": None if self.network is None else self.network.name,
            "features_weights": None if self.network is None else self.network.identity,
            "duplicate_quantile": config.duplicate_quantile,
            "reject": rule,
            "max_draws": config.max_draws,
            "counts": counts,
            "training": None if config.source else json.loads(self.training.to_json()),
        }


def _seeds(seed: int, label: int) -> tuple[int, int]:
    """Of the images of a class, and of those by which its discriminator's threshold is found."""
    first, second = np.random.SeedSequence([seed % 2**64, label]).generate_state(2)
    return int(first), int(second)
