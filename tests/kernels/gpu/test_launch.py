"""Launches that are compiled ahead, side by side: each is the one that would have been made, and
what fails stays for its launch to tell. Compiled for a GPU that is not here."""

import os
import subprocess
import sys

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdcgan_kernels.gpu.launch import Launch
from fastdcgan_kernels.gpu.tile import Loaded

AHEAD = """
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastdcgan_kernels.choice.targets import TARGETS, assume
from fastdcgan_kernels.gpu.crop import squares
from fastdcgan_kernels.gpu.launch import Launch, compile_ahead, recording

built = []
driver = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device: 0, launcher_cls=lambda src, metadata: built.append(src),
)
triton.runtime.driver.set_active(driver)
META = torch.device("meta")


@triton.jit
def wrong(x):
    tl.store(x, tl.arange(0, 3))


def run():
    with assume(TARGETS["sm_90"]):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            images = torch.empty(4, 8, 8, 3, dtype=torch.uint8, device=META)
            squares(images, torch.empty(2, dtype=torch.int64, device=META), 8, dtype)
    Launch(wrong, (1,), {"x": torch.empty(4, device=META)}).run(META)


compile_ahead(run)
assert len(built) == 2, built
with recording() as launches:
    run()
compiled, compiler = [], triton.runtime.JITFunction._do_compile
triton.runtime.JITFunction._do_compile = lambda *given: compiled.append(given) or compiler(*given)
for launch in launches[:3]:
    assert launch.compile().asm["cubin"]
assert compiled == []
try:
    launches[3].compile().asm
except triton.CompilationError as error:
    assert "power of 2" in str(error.__cause__ or error), error
else:
    raise AssertionError("it compiles")
print("as it should be")
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    script = tmp_path / "ahead.py"  # Triton reads the source of kernels from files
    script.write_text(AHEAD, "utf-8")
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "as it should be\n", run.stderr


def test_a_sketch_holds_no_memory():
    x, y = torch.zeros(2, 3, 4, 5).transpose(2, 3), torch.zeros(8, 16, dtype=torch.bfloat16)
    arguments = {
        "x": Loaded(x, y, ()),
        "w": TensorDescriptor(y, [8, 16], [16, 1], [8, 8]),
        "rows": 3,
    }
    sketch = Launch(None, (1,), arguments).sketch.arguments
    assert sketch["rows"] == 3
    for own, there in ((sketch["x"].value, x), (sketch["x"].aux, y), (sketch["w"].base, y)):
        assert own.device.type == "meta"
        assert (own.shape, own.stride(), own.dtype) == (there.shape, there.stride(), there.dtype)
    assert type(sketch["x"]) is Loaded
    assert sketch["w"].block_shape == [8, 8]
