"""When a block is to be plain PyTorch whatever the device and the setting: under what looks into
PyTorch's own operators, or gives them other meanings. Not here: which shapes kernels take
(functional.py)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

OWN = (Tensor, torch.nn.Parameter, FakeTensor)


def is_traced() -> bool:
    """Whether torch.jit.trace, torch.export (torch.onnx.export with them) or make_fx is recording
    this call: what they make is to run, and to be read, without this package."""
    # Not torch.compiler.is_exporting(), which PyTorch 2.11 takes to be true in all it compiles.
    if torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None:
        return True
    return not torch.compiler.is_compiling() and _makes_fx()


def _makes_fx() -> bool:
    key = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(key) is not None


def is_transformed() -> bool:
    """Whether torch.func (grad, jvp, vmap, ...) or forward-mode differentiation is at work: kernels
    have neither tangents nor rules for batches."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_asked_for(*tensors: Tensor | None) -> bool:
    """Whether any of these holds, or one of the tensors is of a class that gives operators another
    meaning (DTensor, a quantised weight), or of another layout (oneDNN's, a sparse one)."""
    if is_traced() or is_transformed():
        return True
    own = (t is None or (type(t) in OWN and t.layout == torch.strided) for t in tensors)
    return not all(own)
