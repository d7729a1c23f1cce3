"""Weights of these nets from anyone's file: reads it without running its code, finds the right
net in it, gives every key its `main.N` name, and loads with an account of each mismatch.
Not here: the state of a training run (optimisers, EMA, random states), which belongs to training.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastdcgan.errors import InputError
from fastdcgan.models.dcgan import Discriminator, Generator, SNGANDiscriminator
from fastdcgan.models.tf28 import TF28Discriminator, TF28Generator

Net = TypeVar("Net", bound=nn.Module)
Source = Mapping[str, Any] | str | os.PathLike[str]

# What holds a net's entries in a file with more than one thing in it: the net's own names (ours
# and ignite's, then lightning's), as a nested mapping or as a key prefix, or a general wrapper.
_NET_NAMES = {"netG": ("netG", "generator"), "netD": ("netD", "discriminator")}
_WRAPPERS = ("state_dict", "model")

# What DataParallel, DDP and torch.compile put into keys, at any depth.
_WRAPPER_PARTS = {"module", "_orig_mod"}

# What a weight is called where torch.nn.utils.parametrize computes it from another tensor.
_NORMALISED = "parametrizations.weight.original"

_LISTED = 3  # mismatches of each kind named in a message; the others are counted


def read_state_dict(source: Source, *, name: str = "netG") -> dict[str, Tensor]:
    """Return one net's state dict with the keys of `Generator` and `Discriminator`: `main.N.*`.

    Reads bare state dicts of the PyTorch example; files that keep them under "state_dict",
    "model", "netG", "generator" and the like; keys with `module.` and `_orig_mod.` at any depth
    and in any order; ignite's `net.N`; lightning-bolts' `generator.gen.B.{0,1}` and
    `discriminator.disc.B.{0,1}`. Unknown keys stay as they are, and entries that are no tensors
    are dropped. A state dict that this function returned comes back the same.

    Args:
        source: a .safetensors file, any other file that `torch.save` wrote, or a mapping already
            in memory. Files are read to the CPU.
        name: the net to take if the source holds more than one: "netG" (default), "netD", or any
            name that stands in the source.

    Returns:
        Tensors in the source's dtypes. Those of a mapping are shared, not copied.

    Raises:
        InputError: if there is no such file, it cannot be read, it needs pickled code, or it
            holds no tensors.
    """
    found = source if isinstance(source, Mapping) else _read(Path(source))
    state = _select(found, name)
    if not state:
        raise InputError(
            f"{_described(source)} holds no tensors for {name}; give a file written by "
            f"torch.save({name}.state_dict(), path), or a .safetensors file"
        )
    return {_canonical(key): tensor for key, tensor in state.items()}


def load_weights(net: nn.Module, source: Source, *, name: str | None = None) -> None:
    """Load a checkpoint into a net, strictly: every key and shape must fit.

    `net` may be wrapped by torch.compile, DataParallel or DDP. Values take the net's dtype, so a
    half-precision file loads into a float32 net. `num_batches_tracked`, which files from before
    PyTorch 0.4.1 lack, is 0 where it is missing.

    Args:
        net: the net to fill, in place; memory format and device stay.
        source: as in `read_state_dict`.
        name: as in `read_state_dict`. Default: "netD" for the discriminators of this package,
            "netG" for anything else.

    Raises:
        InputError: as in `read_state_dict`, or if a key or shape does not fit; the net is then
            unchanged.
    """
    if name is None:
        critics = (Discriminator, TF28Discriminator)
        name = "netD" if any(isinstance(m, critics) for m in net.modules()) else "netG"
    _load(net, read_state_dict(source, name=name), _described(source))


def generator_from(source: Source, *, name: str = "netG") -> Generator | TF28Generator:
    """Build the generator that a checkpoint belongs to, its sizes read from the shapes, and load
    it. The global random state is not touched.

    Args:
        source, name: as in `read_state_dict`.

    Returns:
        The net in float32 on the CPU, in training mode, as a constructor leaves it.

    Raises:
        InputError: as in `load_weights`, or if the shapes are those of no generator here.
    """
    state = read_state_dict(source, name=name)
    kernels = _kernels(state, source)
    first, last = kernels[0].shape, kernels[-1].shape
    classes = _classes(state, source)

    def build() -> Generator | TF28Generator:
        if _dense(state, "main.0.weight"):
            nz = state["main.0.weight"].shape[1]
            return TF28Generator(nz=nz, channels=last[1], classes=classes)
        size, norm = _size(len(kernels)), _norm(state)
        return Generator(size, first[0], last[0], last[1], norm=norm, classes=classes)

    return _filled(build, state, source)


def discriminator_from(source: Source, *, name: str = "netD") -> Discriminator | TF28Discriminator:
    """Build the discriminator that a checkpoint belongs to and load it, as `generator_from` does.

    Args:
        source, name: as in `read_state_dict`.

    Returns:
        The net in float32 on the CPU, in training mode, as a constructor leaves it.

    Raises:
        InputError: as in `load_weights`, or if the shapes are those of no discriminator here.
    """
    state = read_state_dict(source, name=name)
    kernels = _kernels(state, source)
    first, last = kernels[0].shape, kernels[-1].shape
    spectral = any(f".{_NORMALISED}" in key for key in state)
    classes = _classes(state, source)

    def build() -> Discriminator | TF28Discriminator:
        if _dense(state, "main.10.weight") or _dense(state, f"main.10.{_NORMALISED}"):
            return TF28Discriminator(first[1], spectral_norm=spectral, classes=classes)
        if first[-1] == 3:  # two convolutions a side, and one more at the end
            size = _size(len(kernels) // 2)
            return SNGANDiscriminator(size, first[0], first[1], classes=classes)
        size = _size(len(kernels))
        return Discriminator(
            size=size,
            ndf=first[0],
            channels=first[1],
            norm=_norm(state),
            spectral_norm=spectral,
            minibatch_std=last[1] == first[0] * size // 8 + 1,
            classes=classes,
        )

    return _filled(build, state, source)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a checkpoint")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole .safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # Bytes that are no checkpoint fail in many ways (KeyError, EOFError, OSError, RuntimeError).
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(
                f"{path} needs pickled code ({code[1]}), which is not run: if you trust it, load "
                "it with torch.load(path, weights_only=False) and save the net's state_dict() alone"
            ) from error
        raise InputError(
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}): "
            "it is damaged, or a file of another kind; save it again, or give another"
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(
            f"{path} holds a {type(found).__name__}, not a state dict; "
            "save the net's state_dict() instead"
        )
    return found


def _select(found: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Go down to the entries of the net called `name`, and cut what stands before their keys."""
    names = _NET_NAMES.get(name, (name,))
    for key in (*names, *_WRAPPERS):
        if isinstance(found.get(key), Mapping):
            return _select(found[key], name)
    state = {
        _unwrapped(str(key)): value for key, value in found.items() if isinstance(value, Tensor)
    }
    for prefix in names:
        chosen = {
            k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")
        }
        if chosen:
            return chosen
    return state


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_PARTS)


def _canonical(key: str) -> str:
    """Give one key its `main.N` name. The blocks of lightning-bolts (pl_bolts/models/gans/dcgan/
    components.py) are three modules each; its first discriminator block has an Identity in the
    place of BatchNorm, which `main` does not have, and so the later ones move up by one."""
    key = _unwrapped(key)
    block = re.fullmatch(r"(gen|disc)\.(\d+)\.(\d+)\.(.+)", key)
    if block:
        index = 3 * int(block[2]) + int(block[3])
        if block[1] == "disc" and index > 0:
            index -= 1
        return f"main.{index}.{block[4]}"
    return re.sub(r"^net\.(?=\d+\.)", "main.", key)


def _filled(build: Callable[[], Net], state: Mapping[str, Tensor], source: Source) -> Net:
    try:
        with torch.device("meta"):  # no number is drawn there, and none stored
            net = build()
    except InputError as error:
        raise InputError(
            f"{_described(source)} holds another net than asked for, or one that this package "
            f"does not have (read from its shapes: {error})"
        ) from error
    net.to_empty(device="cpu")
    _load(net, state, _described(source))
    return net


def _load(net: nn.Module, state: Mapping[str, Tensor], described: str) -> None:
    own = net.state_dict()
    names = {_canonical(key): key for key in own}
    wrong, missing, loaded = [], [], {}
    for key, own_key in names.items():
        expected = own[own_key].shape
        if key in state:
            loaded[own_key] = state[key]
            if state[key].shape != expected:
                wrong.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(expected)}")
        elif key.endswith(".num_batches_tracked"):
            loaded[own_key] = torch.zeros((), dtype=torch.long)
        else:
            missing.append(f"{key} {tuple(expected)}")
    unexpected = [f"{k} {tuple(tensor.shape)}" for k, tensor in state.items() if k not in names]
    complaints = [
        _listed(heading, items)
        for heading, items in (("", wrong), ("missing ", missing), ("unexpected ", unexpected))
        if items
    ]
    if complaints:
        raise InputError(
            f"{described} does not fit {type(net).__name__}: {'; '.join(complaints)}. "
            "Check that it is this net's file, or let generator_from or discriminator_from "
            "build the net from it"
        )
    net.load_state_dict(loaded)


def _listed(heading: str, items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return heading + ", ".join(items[:_LISTED]) + more


def _kernels(state: Mapping[str, Tensor], source: Source) -> list[Tensor]:
    """The convolution weights in the order of their layers."""
    layers = {
        int(match[1]): tensor
        for key, tensor in state.items()
        if (match := re.fullmatch(rf"main\.(\d+)\.(?:weight|{_NORMALISED})", key))
        and tensor.dim() == 4
    }
    if not layers:
        raise InputError(
            f"{_described(source)} has no convolution weights named main.N.weight (its first key: "
            f"{next(iter(state))}): it is not a net of this package, or of one it can read"
        )
    return [layers[index] for index in sorted(layers)]


def _classes(state: Mapping[str, Tensor], source: Source) -> tuple[str, ...] | None:
    """The names of a net's classes: as the source tells them, in the metadata of a .safetensors
    file or as an entry "classes", else their numbers; None where the net has none."""
    embedding = state.get("embedding.weight", state.get(f"embedding.{_NORMALISED}"))
    if embedding is None:
        return None
    names: Any = None
    if isinstance(source, Mapping):
        names = source.get("classes")
    elif Path(source).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(source, "pt") as file:
            names = json.loads((file.metadata() or {}).get("classes", "null"))
    return tuple(map(str, names or range(len(embedding))))


def _size(layers: int) -> int:
    """The image side of a DCGAN net: one convolution goes between 1x1 and 4x4, each other one
    doubles or halves the side."""
    return 4 << (layers - 1)


def _norm(state: Mapping[str, Tensor]) -> Literal["batch", "none"]:
    return "batch" if any(key.endswith("running_mean") for key in state) else "none"


def _dense(state: Mapping[str, Tensor], key: str) -> bool:
    return key in state and state[key].dim() == 2


def _described(source: Source) -> str:
    return "the given state dict" if isinstance(source, Mapping) else str(source)
