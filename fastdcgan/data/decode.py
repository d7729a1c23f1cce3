"""One picture of any kind -> one square uint8 array, by the rule of the PyTorch DCGAN example.

Not here: which pictures there are (sources/), where the arrays are kept (cache.py), random crops
and flips (feeds.py).
"""

from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

Picture: TypeAlias = bytes | Image.Image | np.ndarray[Any, Any]

# Stands in the cache's key: change it whenever decode() would give other bytes.
RULE = "shorter side to size (PIL bilinear, antialiased), centre crop; alpha on white; 16 bit / 257"

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode(picture: Picture, size: int, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture resized and cropped to (size, size, channels), as
    `Compose([Resize(size), CenterCrop(size)])` of torchvision does it.

    Args:
        picture: a file's bytes, a PIL image, or a uint8 array of shape (H, W) or
            (H, W, C) with C in 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA). Of a moving picture
            the first frame counts. An EXIF orientation is applied.
        size: pixels on a side of the result.
        channels: 1 grey (ITU-R 601 luma of colours), 2 grey + alpha, 3 RGB, 4 RGBA. Alpha is
            composited on white where the result has none.

    Returns:
        A uint8 array of shape (size, size, channels).

    Raises:
        Exception: of any type that the decoder of a damaged file can think of.
    """
    if isinstance(picture, bytes):
        with Image.open(BytesIO(picture)) as file:
            return decode(file, size, channels)
    if isinstance(picture, np.ndarray):
        grey = picture.ndim == 3 and picture.shape[2] == 1
        picture = Image.fromarray(picture[..., 0] if grey else picture)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"not a picture but a {type(picture).__name__}")
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    image = _resize_and_crop(_to_mode(picture, channels), size)
    return np.asarray(image).reshape(size, size, channels)


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in the PIL mode of `channels`, before it is resized: palette entries cannot be
    averaged, and the colour under a transparent pixel must not bleed into its neighbours."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels in (1, 3):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # LAB has no other way to grey
    return image.convert(MODES[channels])


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey -> "L". Integers are taken as 16 bit, 0..65535; floats as 0..1 if none is above 1,
    else as 0..255. PIL's own convert() would clip all of them at 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode != "F":
        values /= 257
    elif values.max() <= 1:
        values *= 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    resized = (size, long) if width <= height else (long, size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    # Python's rounding of halves to even, as torchvision has it
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))
