"""Fills the middle of ten held-out images with a trained run:

python examples/inpaint.py runs/000-blue-marble-dcgan64 blue-marble filled.png
"""

import sys
from pathlib import Path

from fastdcgan.inpainting.files import inpaint

run, images, sheet = sys.argv[1:4]
report = inpaint(Path(run), images, "center", n=10, sheet=Path(sheet), force=True)
print(*report.lines(), sep="\n")
