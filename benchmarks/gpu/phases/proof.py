"""Whether the kernels work on this GPU: the first step at each batch, with FASTDCGAN_IMPL=triton,
compared with plain PyTorch; its CUDA graph, compared with the step run eagerly. The figures are
kept whether they pass or not."""

import os

import torch

from benchmarks.gpu.phase import Items, Setting, line_of
from benchmarks.gpu.step import whole_step


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    os.environ["FASTDCGAN_IMPL"] = "triton"
    for batch in setting.size.batches:
        if not to.wants(str(batch)):
            continue
        with to.item(str(batch)) as facts:
            said: list[str] = []
            whole = whole_step(setting, batch, say=said.append, prove=True)
            try:
                whole()
            except RuntimeError as error:  # figures say more than what was raised
                if not whole.figures:
                    raise
                said.append(line_of(error))
            facts |= {"batch": batch, "impl": "triton", "figures": whole.figures}
            facts |= {"graphed": whole.graphed, "said": said}
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
