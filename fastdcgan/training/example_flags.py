"""Reads a command line written for the PyTorch example (dcgan/main.py) as one of ours.

Flags that only change their name are marked in `TrainConfig`; here are those that change their
meaning. Nothing of ours is described here.
"""

import dataclasses
from collections.abc import Sequence

from fastdcgan.errors import InputError
from fastdcgan.training.config import TrainConfig

_TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "lsun": "LSUN", "fake": "FakeData"}
_FOLDERS = ("folder", "imagenet", "lfw")


def translate(args: Sequence[str]) -> list[str]:
    """The command line `args` with the example's flags replaced by ours.

    Handles --batchSize, --imageSize, --niter, --outf, --manualSeed, --netG, --netD (new names),
    --dataset with --dataroot and --classes (one --data), --ngpu, --cuda, --mps, --accel (one
    --device), in the forms "--flag value" and "--flag=value". A bare --resume means --resume auto,
    and a bare --classes, which the example does not have, is ours.

    Raises:
        InputError: an unknown --dataset, a --dataset that needs a --dataroot without one.
    """
    renamed = {
        "--" + f.metadata["example"]: "--" + f.name.replace("_", "-")
        for f in dataclasses.fields(TrainConfig)
        if f.metadata["example"]
    }
    taken = {"--dataset", "--dataroot", "--classes", "--ngpu"}
    switches = {"--cuda": "cuda", "--mps": "mps", "--accel": "auto"}
    found: dict[str, str] = {}
    result: list[str] = []
    rest = list(args)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        bare = not equals and (not rest or rest[0].startswith("-"))
        if flag in taken and not (bare and flag == "--classes"):
            if not equals:
                if not rest:
                    raise InputError(f"{flag} was given without a value")
                value = rest.pop(0)
            found[flag] = value
        elif flag in switches:
            result += ["--device", switches[flag]]
        elif flag == "--resume" and bare:
            result += ["--resume", "auto"]
        else:
            result.append(renamed.get(flag, flag) + equals + value)
    if "--dataset" in found or "--dataroot" in found:
        result += ["--data", _source(found)]
    elif "--classes" in found:
        raise InputError(
            f"--classes {found['--classes']} was given without --dataset lsun; to train by class, "
            "give --classes without a value"
        )
    if found.get("--ngpu", "1") not in ("0", "1"):
        raise InputError(
            f"--ngpu {found['--ngpu']} was given; start one process per GPU instead: "
            f"torchrun --nproc-per-node={found['--ngpu']} -m fastdcgan.train ..."
        )
    return result


def _source(found: dict[str, str]) -> str:
    kind = found.get("--dataset", "folder").lower()
    root = found.get("--dataroot")
    if kind in _FOLDERS:
        if root is None:
            raise InputError(f"--dataset {kind} was given without --dataroot FOLDER")
        return root
    if kind not in _TORCHVISION:
        known = ", ".join((*_FOLDERS, *_TORCHVISION))
        raise InputError(f"--dataset {kind} was given; the example knows {known}")
    source = f"torchvision:{_TORCHVISION[kind]}" + (f":{root}" if root else "")
    if kind == "lsun":
        classes = found.get("--classes", "bedroom").split(",")
        source += "?classes=" + ",".join(f"{name}_train" for name in classes)
    return source
