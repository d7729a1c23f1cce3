"""Checkpoints of a run: written whole or not at all, found again, and checked before they are
trusted. What is in one is `TrainState`'s affair."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdcgan.data.picture import atomic_write
from fastdcgan.errors import InputError

_NAME = re.compile(r"step-(\d{8})\.pt")


class Checkpoints:
    """The checkpoints in `folder`: the last `keep`, and for good every `milestone_every` steps."""

    def __init__(self, folder: Path, *, keep: int = 3, milestone_every: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.milestone_every = milestone_every

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is, or would be."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, state: dict[str, Any], *, spare: int | None = None) -> Path:
        """Writes `state` as the checkpoint of its step and removes those no longer kept.

        The file appears under its name only when all of it is on the disk.

        Args:
            state: what `load` is to give.
            spare: the step of one more checkpoint that is kept.

        Raises:
            OSError: the disk is full, or the folder cannot be written; older checkpoints stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(state["step"])
        try:
            atomic_write(path, lambda file: torch.save(state, file), fsync=True)
        except (OSError, RuntimeError) as error:
            # torch.save may complain of a position of its own; why the write failed stands behind.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
        recent = self.paths()[-self.keep :]
        for old in self.paths():
            spared = step_of(old) == spare or self._is_milestone(old)
            if old not in recent and not spared:
                old.unlink()
        return path

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        for path in self.paths():
            if step_of(path) > step:
                path.unlink()

    def _is_milestone(self, path: Path) -> bool:
        return self.milestone_every is not None and step_of(path) % self.milestone_every == 0

    def newest(self, say: Any = print) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, with its content; None where there is none at all.

        Args:
            say: is called with one line for each damaged checkpoint passed over.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load(path)
            except InputError as error:
                say(f"{error}; trying the one before it")
        if paths:
            raise InputError(f"none of the {len(paths)} checkpoints in {self.folder} is whole")
        return None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def load(path: Path) -> dict[str, Any]:
    """The content of one checkpoint, on the CPU.

    Raises:
        InputError: there is no such file, it is damaged, or it is no checkpoint of a run.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        # torch.load does not compare checksums; the zip around its tensors has them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"checkpoint {path} is damaged ({damaged} has a wrong checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # zipfile and torch.load raise many kinds for damaged bytes
        raise InputError(f"checkpoint {path} is damaged ({_first_line(error)})") from None
    if not isinstance(state, dict) or not {"step", "config", "netG", "optG"} <= state.keys():
        raise InputError(f"{path} is no checkpoint of a run (bare weights start one: --init-g)")
    return state


def save_weights(net: nn.Module, path: Path, *, step: int, **more: str) -> None:
    """Writes a net's parameters and buffers as safetensors; its metadata are its name, which is
    the file's, the step, the names of its classes, as JSON, where it has any, and what more there
    is."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    metadata = {"fastdcgan": path.stem, "step": str(step), **more}
    classes = getattr(net, "classes", None)
    if classes is not None:
        metadata["classes"] = json.dumps(classes)
    content = save(tensors, metadata=metadata)
    atomic_write(path, lambda file: file.write(content))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
