"""Images from a generator, which is left bit for bit as it was found: one function for training's
sample sheets, `generate` and `evaluate`. It draws no latents and writes no files."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdcgan.errors import InputError


def sample(
    netG: nn.Module,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    statistics: Literal["running", "batch"] = "running",
) -> Tensor:
    """Return netG(z), or netG(z, labels), without gradients and without Dropout.

    Parameters, buffers and training flags are afterwards what they were before, also after an
    error. The flags differ while it runs, so no other thread may use the net meanwhile.

    Args:
        netG: a generator: any module that maps latents to images.
        z: latent vectors in a shape, dtype and device that netG takes, (B, nz) or (B, nz, 1, 1).
        labels: the class of each, (B,) int64, for a net that has classes; None: it has none.
        statistics: what BatchNorm normalises with. "running" (default): its running buffers, as
            in eval mode (the TensorFlow tutorial). "batch": the statistics of this batch, as in
            training mode (the PyTorch example's sample sheets); an image then depends on its
            neighbours.

    Returns:
        Images in [-1, 1], float32, shape (B, C, H, W), in netG's memory format.

    Raises:
        InputError: if `statistics` is neither, or netG refuses `z` or the labels.
    """
    if statistics not in ("running", "batch"):
        raise InputError(f'statistics={statistics!r} was given; give "running" or "batch"')
    batch = statistics == "batch"
    # Training mode writes to the running buffers: let it write to copies.
    buffers = {name: buffer.clone() for name, buffer in netG.named_buffers()} if batch else {}
    flags = [(module, module.training) for module in netG.modules()]
    try:
        for module, _ in flags:
            module.training = batch and not isinstance(module, nn.modules.dropout._DropoutNd)
        with torch.no_grad():
            given = (z,) if labels is None else (z, labels)
            images: Tensor = functional_call(netG, buffers, given)
    finally:
        for module, training in flags:
            module.training = training
    return images.float()
