"""An exported folder: the net in the formats asked for, each checked before it gets its name, with
config.json, samples and a model card, as the Hugging Face Hub expects them."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdcgan import models
from fastdcgan.errors import InputError, RunError
from fastdcgan.exporting.card import card, facts_of, sizes_of
from fastdcgan.exporting.config import ExportConfig
from fastdcgan.exporting.formats import BATCHES, FORMATS, check
from fastdcgan.exporting.samples import save_samples
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.latent.draw import fast_sampler, load_discriminator, load_generator
from fastdcgan.training.checkpoints import Checkpoints, load, step_of

TRACED = 3
"""Images in the batch by which a net is traced: neither 1, which tracers take for a constant, nor
any number that it is checked with."""


def export(config: ExportConfig) -> list[str]:
    """Exports what `config` says; returns a line on each file.

    Args:
        config: see its fields.

    Raises:
        InputError: something cannot be: the message says what, why, and what to do.
        RunError: a file's numbers are not PyTorch's, or the Hub refused it; then nothing, or
            nothing online, was written.
    """
    config.validate()
    hub = _hub()
    place = pick_device(config.device)
    use_allowed_threads()
    name = "generator" if config.net == "g" else "discriminator"
    run = _run_of(config.source)
    out = config.out or _beside(config.source, run) / f"export-{name}"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not config.force):
        raise InputError(f"{out} exists already: choose another --out, or --force")
    plain = _loaded(config)
    sizes = sizes_of(plain)
    subject = models.fold(plain) if config.fold else plain
    facts = facts_of(
        run,
        license=config.license,
        license_name=config.license_name,
        license_link=config.license_link,
        steps=_steps_of(config.source, run),
        folded=config.fold,
    )
    inputs = _inputs(plain, max(*BATCHES, TRACED), config.seed)
    lines = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            for to in dict.fromkeys(config.to):
                form = FORMATS[to]
                form.write(subject, inputs[:TRACED], work / form.file)
                off = check(form.read(work / form.file), plain, inputs)
                size = (work / form.file).stat().st_size
                lines.append(
                    f"{out / form.file}: {size / 2**20:.1f} MiB, at most {off:.1g} from PyTorch"
                )
            (work / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")
            if config.net == "g":
                drawn: Any = load_generator(config.source, ema=config.ema, device=str(place))
                save_samples(
                    plain, work, sampler=fast_sampler(drawn, amp=config.amp), seed=config.seed
                )
            files = sorted(p.name for p in work.iterdir())
            (work / "README.md").write_text(card(plain, facts, files), encoding="utf-8")
            out.mkdir(exist_ok=True)
            for file in work.iterdir():
                os.replace(file, out / file.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or out}: {error.strerror or error}"
        ) from None
    lines.append(f"{out}: with a model card, as the Hugging Face Hub expects it")
    if config.push is not None:
        lines.append(_push(hub, config.push, out, config.private))
    return lines


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("export needs more packages: pip install 'fastdcgan[export]'") from None
    return huggingface_hub


def _push(hub: Any, repository: str, folder: Path, private: bool) -> str:
    try:
        api = hub.HfApi()
        full = api.create_repo(repo_id=repository, private=private, exist_ok=True).repo_id
        return f"{api.upload_folder(repo_id=full, folder_path=folder)}"
    except Exception as error:  # of the network, of the Hub's answer, of the repository's name
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"--push {repository}: {first}; {folder} is written: log in (hf auth login) and upload "
            f"it with: hf upload {repository} {folder}"
        ) from None


def _loaded(config: ExportConfig) -> nn.Module:
    """The net on the CPU in the memory format that other programs expect."""
    net: Any = (
        load_generator(config.source, ema=config.ema)
        if config.net == "g"
        else load_discriminator(config.source)
    )
    return net.to(memory_format=torch.contiguous_format).float().eval()  # type: ignore[no-any-return]


def _inputs(net: Any, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if hasattr(net, "nz"):
        return torch.randn(n, net.nz, generator=generator)
    shape = (n, net.channels, net.size, net.size)
    return torch.rand(shape, generator=generator) * 2 - 1


def _run_of(source: Path) -> Path | None:
    """The run that a folder, a checkpoint in it, or weights in it belong to."""
    for folder in (source, source.parent, source.parent.parent):
        if (folder / "metrics.jsonl").is_file():
            return folder
    return None


def _beside(source: Path, run: Path | None) -> Path:
    return run or (source if source.is_dir() else source.parent)


def _steps_of(source: Path, run: Path | None) -> int | None:
    """After how many steps the weights are what they are."""
    if source.suffix == ".pt":
        try:
            return int(load(source)["step"])
        except InputError:
            return None
    weights = source / "netG.safetensors" if source.is_dir() else source
    if weights.suffix == ".safetensors" and weights.is_file():
        from safetensors import safe_open

        with safe_open(weights, "pt") as file:
            step = (file.metadata() or {}).get("step", "")
        return int(step) if step.isdecimal() else None
    paths = [] if run is None else Checkpoints(run / "checkpoints").paths()
    return step_of(paths[-1]) if source.is_dir() and paths else None
