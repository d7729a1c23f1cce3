"""Compiles what the other phases' steps launch: every kernel of ours, as planned at each batch, and
at the main ones with all blocks one way; meanwhile PyTorch tuned is compiled by PyTorch. Whatever
is not compiled here is compiled at its first call, one after the other. A rehearsal compiles some,
for an H100."""

import subprocess
import sys
import time

import torch

from benchmarks import cost_model, peers
from benchmarks.gpu.compiling import compile_all
from benchmarks.gpu.phase import Items, Setting
from benchmarks.gpu.phases.ways import WAYS
from fastdcgan.hardware import amp_dtype
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.types import Target
from fastdcgan_kernels.gpu.launch import Launch, watching

SPARE_SECONDS = 3.0
REHEARSED = 4
"""Launches."""


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    end = time.monotonic() + setting.limit - SPARE_SECONDS
    size, target = setting.size, targets.target_of(setting.device) or targets.TARGETS["sm_90"]
    wanted = [("default", batch) for batch in size.batches]
    tuned: dict[str, subprocess.Popen[bytes]] = {}
    if not setting.rehearsal:
        wanted += [(way, batch) for way in WAYS for batch in size.main]
        for batch in size.main:
            if to.wants(f"tuned {batch}"):
                command = [sys.executable, "-m", __name__, str(batch)]
                tuned[f"tuned {batch}"] = subprocess.Popen(command)
    for how, batch in wanted:
        item = f"{how} {batch}"
        if to.wants(item):
            with to.item(item) as facts:
                found = launches(how, setting, batch, target)
                found = found[:REHEARSED] if setting.rehearsal else found
                facts |= compile_all(found, target, end - time.monotonic())
    for item, process in tuned.items():
        with to.item(item) as facts:
            try:
                facts["status"] = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:  # the driver ends it with this process
                facts["status"] = None


def launches(how: str, setting: Setting, batch: int, target: Target) -> list[Launch]:
    """Those of a step, as this target would be asked for them."""
    found: list[Launch] = []
    dtype = "fp16" if amp_dtype(setting.device) == torch.float16 else "bf16"
    device = cost_model.DEVICES["h100"]
    with watching(found.append):
        cost_model.our_step(how, device, batch, setting.size.image, dtype, target=target)
    return found


def main() -> None:
    """PyTorch tuned at a batch, once."""
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", 0)
    peers.tuned_step(device, int(sys.argv[1]), amp_dtype(device)).run()


if __name__ == "__main__":
    main()
