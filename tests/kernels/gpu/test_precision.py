"""How products of float32 are rounded, and by which loads that is right."""

import pytest
import torch
import triton

from fastdcgan_kernels.choice import measured
from fastdcgan_kernels.choice.geometry import Tile
from fastdcgan_kernels.choice.spec import BlockSpec, Inputs, Need, Saved
from fastdcgan_kernels.choice.targets import TARGETS, assume
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu import blocks, descriptors
from fastdcgan_kernels.gpu.launch import recording

VERSIONS = {"3.6.0": False, "3.7.1": True, "3.10.0+git1": True, "4.0": True, "unknown": False}
SPEC = BlockSpec(transposed=False, stride=2, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "setting"), [
    (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "tf32"),
])  # fmt: skip
def test_tf32_is_loaded_by_descriptors_where_triton_rounds_it(dtype, setting, version, monkeypatch):
    """Forward and both gradients; also where a measured tile asks for descriptors. Float32
    in full precision is loaded by pointers, with any version: by descriptors it would spill."""
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(descriptors, "triton_version", descriptors.triton_version.__wrapped__)
    tile = Tile(64, 64, 32, 1, 8, 2, engine="descriptors")
    monkeypatch.setattr(
        measured, "stored", lambda asked, device: tile if isinstance(asked, Task) else None
    )
    torch.backends.cudnn.conv.fp32_precision = setting

    def image(channels, side):
        return torch.empty(8, channels, side, side, device="meta", dtype=dtype)

    weight = torch.empty(128, 64, 4, 4, device="meta")
    with assume(TARGETS["sm_90"]), recording() as launches:
        out = blocks.conv_act(Inputs(image(64, 16), weight), SPEC)
        saved = Saved(image(64, 16), weight, out=out)
        blocks.conv_act_backward(image(128, 8), saved, SPEC, Need(x=True, weight=True))
    rounded = dtype != torch.float32 or (VERSIONS[version] and setting == "tf32")
    way = "descriptors" if rounded else "pointers"
    kernels = [launch.kernel.fn.__name__ for launch in launches]
    assert kernels == [f"gather_{way}", f"gather_{way}", f"weight_gradient_{way}"]


@pytest.mark.parametrize(
    ("target", "setting", "dtype", "expected"),
    [
        ("sm_90", "tf32", torch.float32, "tf32"),
        ("sm_90", "ieee", torch.float32, "ieee"),
        ("sm_90", "tf32", torch.bfloat16, "ieee"),
        ("gfx950", "tf32", torch.float32, "ieee"),
    ],
)
def test_float32_products_are_as_pytorchs_convolutions_are_told(target, setting, dtype, expected):
    x = torch.empty(2, 16, 8, 8, device="meta", dtype=dtype)
    weight = torch.empty(8, 16, 4, 4, device="meta")
    torch.backends.cudnn.conv.fp32_precision = setting
    with assume(TARGETS[target]), recording() as launches:
        blocks.conv_act(Inputs(x, weight), SPEC)
    assert launches[0].arguments["PRECISION"] == expected
