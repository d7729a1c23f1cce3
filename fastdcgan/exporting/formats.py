"""The formats in which a net runs without this package: how each is written, and how it is read
again to be checked. Files hold no path of the machine that wrote them. Not here: folders and cards.
"""

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.errors import InputError, RunError

Run: TypeAlias = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4
"""How far any value may be from PyTorch's: absolute for images in [-1, 1], relative to the largest
for logits above 1."""

BATCHES = (1, 2, 5)
"""Each file is checked with batches of these sizes; none is the 3 that it is traced with."""


@dataclass(frozen=True)
class Format:
    """One format."""

    file: str
    """Name of the file in an exported folder."""
    write: Callable[[nn.Module, Tensor, Path], None]
    """Writes a net, given an example of its input, in which only the batch may be another."""
    read: Callable[[Path], Run]
    """The net in a file, as a function."""


def check(run: Run, net: nn.Module, inputs: Tensor) -> float:
    """The largest difference between `run` and `net`, over batches of several sizes.

    Args:
        run: what `Format.read` gave.
        net: in eval mode, float32, on the CPU.
        inputs: at least as many as the largest of `BATCHES`.

    Returns:
        max |run(x) - net(x)| / max(1, max |net(x)|).

    Raises:
        RunError: it is above `TOLERANCE`, or a shape is another.
    """
    worst = 0.0
    for size in BATCHES:
        with torch.no_grad():
            expected = net(inputs[:size])
        found = run(inputs[:size])
        if found.shape != expected.shape:
            raise RunError(
                f"for a batch of {size} the file gives {tuple(found.shape)}, PyTorch "
                f"{tuple(expected.shape)}; nothing was written"
            )
        off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        worst = max(worst, off)
        if not off <= TOLERANCE:
            raise RunError(
                f"the file's values are {off:.2g} away from PyTorch's, {TOLERANCE:g} is allowed; "
                "nothing was written"
            )
    return worst


# ---- ONNX ----------------------------------------------------------------------------------------


def _write_onnx(net: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("ONNX needs more packages: pip install 'fastdcgan[export]'") from None
    images = isinstance(net, models.Discriminator | models.TF28Discriminator)
    with _quiet():
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images" if images else "z"],
            output_names=["logits" if images else "images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")  # where in which source file it came from
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))


def _read_onnx(path: Path) -> Run:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "checking ONNX needs its runtime: pip install 'fastdcgan[export]'"
        ) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# ---- PyTorch's own -------------------------------------------------------------------------------


def _write_torchscript(net: nn.Module, example: Tensor, path: Path) -> None:
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(net, example, check_trace=False)
        content = io.BytesIO()
        torch.jit.save(traced, content)
    # Records of which source line did what are of use to a debugger on this machine only.
    with zipfile.ZipFile(content) as full, zipfile.ZipFile(path, "w") as lean:
        for entry in full.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                lean.writestr(zipfile.ZipInfo(entry.filename), full.read(entry))


def _read_torchscript(path: Path) -> Run:
    with _quiet():
        loaded = torch.jit.load(str(path), map_location="cpu")
    return partial(_without_gradients, loaded)


def _write_torch_export(net: nn.Module, example: Tensor, path: Path) -> None:
    with _quiet():
        program = torch.export.export(
            net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        for node in program.graph_module.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)


def _read_torch_export(path: Path) -> Run:
    with _quiet():
        loaded = torch.export.load(path).module()
    return partial(_without_gradients, loaded)


def _write_safetensors(net: nn.Module, example: Tensor, path: Path) -> None:
    save_file(net.state_dict(), path, metadata={"format": "pt"})


def _read_safetensors(path: Path) -> Run:
    try:
        net: Any = models.generator_from(path)
    except InputError:
        net = models.discriminator_from(path)
    return partial(_without_gradients, net.eval())


def _without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(x)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's notes on its own formats and tracers (that a net's checks of shapes are not
    traced, that TorchScript is no longer developed) are not about what the user does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _read_onnx),
    "torchscript": Format("model.pt", _write_torchscript, _read_torchscript),
    "torch-export": Format("model.pt2", _write_torch_export, _read_torch_export),
    "safetensors": Format("model.safetensors", _write_safetensors, _read_safetensors),
}
