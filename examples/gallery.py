"""The gallery from Python, asked for samples as a program asks it:

    python examples/gallery.py runs/000-blue-marble-dcgan64 samples.png

The command that serves it to people is `python -m fastdcgan.gallery --from RUN`.
"""

import shutil
import sys
from pathlib import Path

from gradio_client import Client

from fastdcgan.browsing.serving import serve
from fastdcgan.browsing.studio import Studio


def main(run: Path, out: Path) -> None:
    """Serves the run's page at a free port for as long as it takes to draw 16 samples."""
    with serve(Studio(run)) as url:
        client = Client(url, verbose=False, analytics_enabled=False)
        picture = client.predict(seed=3, n=16, truncation=0.8, api_name="/draw")
    shutil.copy(picture, out)
    print(f"drawn by {url}: {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
