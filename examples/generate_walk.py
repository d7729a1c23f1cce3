"""A walk through the latent space of a trained generator, from Python:

    python examples/generate_walk.py runs/000-blue-marble-dcgan64

The command for the same is `python -m fastdcgan.generate --from RUN --interpolate 0,1,2 --loop
--scale 4 --out walk.gif`.
"""

import sys
from pathlib import Path

import numpy as np

from fastdcgan.data.video import save_video
from fastdcgan.latent.draw import fast_sampler, latents_numbered, load_generator
from fastdcgan.latent.interpolation import walk


def main(run: Path, out: Path, steps: int = 48) -> None:
    """Walks from sample 0 over 1 and 2 back to 0 and writes the way to `out`, .gif or .mp4."""
    net = load_generator(run, device="auto")
    samples = latents_numbered([0, 1, 2], net.nz, seed=0)
    way = walk(samples, steps, curve="spherical", loop=True)
    frames = np.concatenate(list(fast_sampler(net).pixels(way.split(64))))
    save_video(out, frames, fps=25, scale=4)
    print(f"{len(frames)} frames in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "walk.gif"))
