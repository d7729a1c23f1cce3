"""Draws images from any trained generator: finding its weights, drawing z, computing the images.
Not here: files and pictures of them (generation.py)."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.data.picture import Pixels, quantise
from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype, pick_device
from fastdcgan.models.conditional import check_labels, in_turn
from fastdcgan.training.checkpoints import Checkpoints, load
from fastdcgan.training.ema import settled
from fastdcgan_kernels import fuse, unfuse

Generator = models.Generator | models.TF28Generator
Discriminator = models.Discriminator | models.TF28Discriminator
Statistics = Literal["running", "batch"]
Truncate = Literal["resample", "scale"]

CHUNK = 256
"""Latent vectors drawn at a time. Fixed, because with it the same seed gives the same images
whatever `n` and the batch size are."""

STATISTICS_BATCH = 64
"""Images that share their batch statistics: the PyTorch example's batch."""

FUSED_ERROR = {None: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}
"""How far images by fused blocks may be from those by plain PyTorch, RMS relative to the images, by
the dtype of the products: a few times what rounding (TF32 included) does to them."""


# ---- nets ----------------------------------------------------------------------------------------


def load_generator(source: Path, *, ema: bool = True, device: str = "cpu") -> Generator:
    """The generator in `source`, in channels_last on `device`; its size is read off the weights,
    and its `classes` are the names that it was trained with.

    Args:
        source: a run's folder (its finished netG, else its newest checkpoint), an exported folder
            with a model.safetensors, a checkpoint of a run, or any state dict that
            `models.load_weights` reads.
        ema: prefer the averaged generator where there is one.

    Raises:
        InputError: there is no such file, or no DCGAN generator in it.
    """
    return load_generator_at(source, ema=ema, device=device)[0]


def load_generator_at(
    source: Path, *, ema: bool = True, device: str = "cpu"
) -> tuple[Generator, int | None]:
    """As `load_generator`, with the step of training that it is of, where its file says so."""
    names = ("netG_ema", "netG", "model") if ema else ("netG", "model")
    keys = ("ema", "netG") if ema else ("netG",)
    weights, step, averaged = _weights(source, names, keys)
    net = _placed(models.generator_from(weights), device)
    found: Generator = cast(Generator, settled(net)) if averaged else net
    return found, step


def load_discriminator(source: Path, *, device: str = "cpu") -> Discriminator:
    """The discriminator in `source`, as `load_generator` finds a generator.

    Raises:
        InputError: there is no such file, or no DCGAN discriminator in it.
    """
    found, _, _ = _weights(source, ("netD", "model"), ("netD",))
    net: Discriminator = _placed(models.discriminator_from(found), device)
    return net


class _Found(NamedTuple):
    """Weights in a file."""

    weights: Path | dict[str, Any]
    """The file, where it holds nothing else."""
    step: int | None
    averaged: bool = False
    """Whether they are a running average's, with the statistics that were averaged along."""


def _weights(source: Path, names: tuple[str, ...], keys: tuple[str, ...]) -> _Found:
    if source.is_dir():
        for name in names:
            if (source / f"{name}.safetensors").is_file():
                return _bare(source / f"{name}.safetensors")
        newest = Checkpoints(source / "checkpoints").newest()
        if newest is None:
            raise InputError(
                f"{source} is no run: it has neither {names[-2]}.safetensors nor checkpoints/"
            )
        return _chosen(newest[1], keys)
    try:
        return _chosen(load(source), keys)
    except InputError:
        return _bare(source)  # not a run's checkpoint; weights say themselves what is wrong


def _bare(path: Path) -> _Found:
    """With the step that `save_weights` writes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            step = (file.metadata() or {}).get("step")
    except (OSError, SafetensorError):
        step = None
    return _Found(path, None if step is None else int(step))


def _chosen(state: dict[str, Any], keys: tuple[str, ...]) -> _Found:
    key = next(key for key in keys if key in state)
    weights: dict[str, Any] = state[key]
    # The names of the classes go with the weights: `models.generator_from` finds them there.
    if "classes" in state:
        weights = {**weights, "classes": state["classes"]}
    return _Found(weights, state["step"], averaged=key == "ema")


def _placed(net: Any, device: str) -> Any:
    return net.to(pick_device(device), memory_format=torch.channels_last).eval()


# ---- latent vectors ------------------------------------------------------------------------------


def latents(
    n: int,
    nz: int,
    *,
    seed: int,
    truncation: float | None = None,
    truncate: Truncate = "resample",
) -> Iterator[Tensor]:
    """`n` latent vectors in chunks of (up to `CHUNK`, nz, 1, 1), float32 on the CPU.

    N(0, 1); with `truncation` N(0, 1) given that every |value| is at most it ("resample"), or
    N(0, 1) times it ("scale").
    """
    if truncation is not None and truncation <= 0:
        raise InputError(f"--truncation {truncation} was given; it must be above 0")
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, CHUNK):
        z = torch.empty(CHUNK, nz, 1, 1)
        if truncation is None or truncate == "scale":
            z.normal_(generator=generator).mul_(1.0 if truncation is None else truncation)
        else:
            nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=generator)
        yield z[: n - start]


def latents_numbered(
    numbers: Sequence[int],
    nz: int,
    *,
    seed: int,
    truncation: float | None = None,
    truncate: Truncate = "resample",
) -> Tensor:
    """The latent vectors of the samples with these numbers, shape (len(numbers), nz): those that
    `latents` gives to any n above them."""
    wanted: dict[int, Tensor] = {}
    drawn = latents(max(numbers) + 1, nz, seed=seed, truncation=truncation, truncate=truncate)
    for chunk, z in enumerate(drawn):
        for number in numbers:
            if chunk * CHUNK <= number < chunk * CHUNK + len(z):
                wanted[number] = z[number - chunk * CHUNK].flatten()
    return torch.stack([wanted[number] for number in numbers])


def rebatched(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in the same order, `size` at a time; the last may be fewer."""
    held: list[Tensor] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(map(len, held)) >= size:
            *full, rest = torch.cat(held).split(size)
            if len(rest) == size:
                full, rest = [*full, rest], rest[:0]
            yield from full
            held = [rest] if len(rest) else []
    if held:
        yield torch.cat(held)


# ---- images --------------------------------------------------------------------------------------


class Sampler:
    """Draws images from a generator, many at a time.

    Args:
        net: on its device.
        autocast: the dtype of its products; None: that of its weights.
    """

    def __init__(self, net: Generator, autocast: torch.dtype | None = None) -> None:
        self.net = net
        self.device = next(net.parameters()).device
        self.autocast = autocast

    def images(
        self, z: Tensor, statistics: Statistics = "running", labels: Tensor | None = None
    ) -> Tensor:
        """`models.sample` in this sampler's precision: (N, C, H, W) float32 on its device."""
        given = (z,) if labels is None else (z, labels)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return models.sample(
                self.net, *(each.to(self.device) for each in given), statistics=statistics
            )

    def pixels(
        self,
        batches: Iterable[Tensor],
        statistics: Statistics = "running",
        labels: Tensor | None = None,
    ) -> Iterator[Pixels]:
        """The images of each batch of latent vectors, (N, H, W, C) uint8; `labels` are those of all
        batches, one after the other. On CUDA the next batch is computed while the caller uses this
        one."""
        ahead: Callable[[], Pixels] | None = None
        done = 0
        for z in batches:
            own = None if labels is None else labels[done : done + len(z)]
            done += len(z)
            now = _to_host(quantise(self.images(z, statistics, own)))
            if ahead is not None:
                yield ahead()
            ahead = now
        if ahead is not None:
            yield ahead()

    def draw(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        truncation: float | None = None,
        truncate: Truncate = "resample",
        statistics: Statistics = "running",
        batch_size: int = CHUNK,
    ) -> Iterator[Pixels]:
        """The first `n` images of a seed, (up to `batch_size`, H, W, C) uint8 at a time.

        `labels`, (n,) int64 on any device, are their classes, for a net that has some; by default
        each class in turn: image i is of class i % K.

        They are the same for every `n` and batch size but for the rounding of sums, which a library
        may do in another order for another batch. Batch statistics are those of images 0 to 63, 64
        to 127 and so on, in batches of that size.

        Raises:
            InputError: `n`, `batch_size`, `truncation` or `labels` cannot be.
        """
        for flag, value in (("n", n), ("batch-size", batch_size)):
            if value < 1:
                raise InputError(f"--{flag} {value} was given; it must be at least 1")
        whole = n
        if statistics == "batch":
            batch_size = STATISTICS_BATCH
            whole = -(-n // batch_size) * batch_size
        z = latents(whole, self.net.nz, seed=seed, truncation=truncation, truncate=truncate)
        labels = self._labels(n, labels, whole)
        for images in self.pixels(rebatched(z, batch_size), statistics, labels):
            yield images[:n]
            n -= len(images)

    def _labels(self, n: int, labels: Tensor | None, whole: int) -> Tensor | None:
        """The labels of `whole` images, the first `n` of which are wanted."""
        classes = self.net.classes
        if labels is None:
            return None if classes is None else in_turn(whole, classes)
        check_labels("generator", classes, labels, n)
        assert classes is not None
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(
                f"labels from {int(labels.min())} to {int(labels.max())} were given; this "
                f"generator's are from 0 to {len(classes) - 1}"
            )
        return labels[torch.arange(whole, device=labels.device) % n]


def fast_sampler(
    net: Generator,
    *,
    amp: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Sampler:
    """A sampler of `net`, which it fuses in place, in 16 bits if that is wished and can be.

    Where fused blocks draw other images than plain PyTorch, or none, the net stays plain.

    Args:
        net: on its device, in channels_last.
        amp: compute in bf16, or fp16, where the device does so natively.
        say: is called with one line for each of these that cannot be; by default it goes to stderr.
    """
    device = next(net.parameters()).device
    autocast = amp_dtype(device) if amp else None
    if amp and autocast is None:
        say(f"--amp: this {device.type} has no native bf16 arithmetic; drawing in float32")
    sampler = Sampler(net, autocast)
    z = torch.randn(8, net.nz, generator=torch.Generator().manual_seed(0))
    labels = None if net.classes is None else in_turn(len(z), net.classes)
    plain = sampler.images(z, labels=labels)
    try:
        fuse(net)
        images = sampler.images(z, labels=labels)
        off = float((images - plain).norm() / plain.norm().clamp(min=1e-30))
        why = "" if off <= FUSED_ERROR[autocast] else f"their images are {off:.2g} away"
    except Exception as error:  # whatever a compiler or a driver may raise
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if why:
        unfuse(net)
        say(f"fused blocks do not work here ({why}); drawing in plain PyTorch")
    return sampler


def draw(
    net: Generator,
    n: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    truncation: float | None = None,
    statistics: Statistics = "running",
) -> Iterator[Pixels]:
    """`Sampler(net).draw`: `n` images of a net in (up to `CHUNK`, H, W, C) uint8 at a time."""
    return Sampler(net).draw(
        n, labels=labels, seed=seed, truncation=truncation, statistics=statistics
    )


def _to_host(pixels: Tensor) -> Callable[[], Pixels]:
    """Begins to copy from the device; what it returns waits for the end."""
    if pixels.device.type != "cuda":
        return lambda: pixels.cpu().numpy()
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(pixels.device))

    def wait() -> Pixels:
        copied.synchronize()
        return host.numpy()

    return wait
