"""Gives one set of images the look of another, in pixels and in the latent space:

python examples/stylize.py runs/earth blue-marble@42,15 blue-marble@24,5 out.png
"""

import sys
from pathlib import Path

from fastdcgan.stylisation.files import stylize

run, content, style, sheet = sys.argv[1:5]
report = stylize(Path(run), content, style, "both", sheet=Path(sheet), force=True)
print(*report.lines(), sep="\n")
