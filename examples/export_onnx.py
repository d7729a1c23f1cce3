"""A trained generator as ONNX, and images from it without PyTorch:

    python examples/export_onnx.py runs/000-blue-marble-dcgan64

The command for the same file is `python -m fastdcgan.export --from RUN --to onnx --fold`.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from fastdcgan.exporting.config import ExportConfig
from fastdcgan.exporting.folder import export


def main(run: Path, out: Path) -> None:
    """Exports the generator of `run` to the folder `out`, and draws one image with it."""
    for line in export(ExportConfig(run, to=("onnx",), out=out, fold=True, force=True)):
        print(line)

    session = onnxruntime.InferenceSession(out / "model.onnx")
    (z,) = session.get_inputs()
    noise = np.random.default_rng(0).standard_normal((1, z.shape[1]), dtype=np.float32)
    (images,) = session.run(None, {z.name: noise})  # (1, channels, size, size) in [-1, 1]

    pixels = np.clip((images[0] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(out / "one.png")
    print(f"{out / 'one.png'}: drawn by ONNX Runtime")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "exported"))
