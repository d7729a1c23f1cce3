"""Moving pictures out: GIF by Pillow, MP4 (H.264) by imageio with its own ffmpeg (extra `video`).
Not here: which frames there are."""

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.data.picture import Pixels, atomic_write
from fastdcgan.errors import InputError

SUFFIXES = (".gif", ".mp4")


def check_video(path: Path, fps: float) -> None:
    """Says what cannot be written before anything is drawn.

    Raises:
        InputError: the speed is none, or what writes MP4 is not installed.
    """
    if not 1 <= fps <= 100:
        raise InputError(f"--fps {fps:g} was given; give 1 to 100 frames a second")
    if path.suffix.lower() == ".mp4":
        try:
            import imageio.v2  # noqa: F401
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise InputError(
                f"cannot write {path} without ffmpeg: pip install 'fastdcgan[video]', or end its "
                "name in .gif"
            ) from None


def save_video(path: Path, frames: Pixels, fps: float, scale: int = 1) -> None:
    """Writes frames as .gif (which repeats for ever; its clock counts hundredths of a second) or
    .mp4; the file is whole or, if that fails, as it was before.

    Args:
        path: its folder must exist.
        frames: (N, H, W, C), uint8; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA. Alpha becomes black.
        fps: frames a second.
        scale: each pixel becomes so many on a side.

    Raises:
        InputError, OSError: it cannot be written.
    """
    check_video(path, fps)
    frames = _opaque(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    if path.suffix.lower() == ".gif":
        from PIL import Image

        first, *others = (Image.fromarray(frame) for frame in frames)
        atomic_write(
            path,
            lambda file: first.save(
                file, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0
            ),
        )
        return
    import imageio.v2

    # ffmpeg wants a file's name, and knows the format by its end.
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.mp4")
    try:
        beside.touch()  # raises what ffmpeg would say in many lines
        writer: Any = imageio.v2.get_writer(
            beside, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2
        )
        with writer as video:
            for frame in frames:
                video.append_data(frame)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _opaque(frames: Pixels) -> Pixels:
    """Any number of channels as RGB, over black."""
    channels = frames.shape[-1]
    colour = frames[..., :3] if channels > 2 else frames[..., :1].repeat(3, axis=-1)
    if channels in (2, 4):
        colour = (colour * (frames[..., -1:] / 255)).round().astype(np.uint8)
    return colour
