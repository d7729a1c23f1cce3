"""decode(): the pixels of torchvision's pipeline, for every kind of picture that PIL can open."""

from io import BytesIO

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fastdcgan.data.decode import decode

sides = st.integers(1, 70)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(image: Image.Image, **options: object) -> bytes:
    return file_of(image, "PNG", **options)


def flat(image: bytes | np.ndarray, channels: int) -> list[int]:
    """The one colour of a picture of one colour."""
    pixels = decode(image, 4, channels)
    assert pixels.shape == (4, 4, channels)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


@given(width=sides, height=sides, size=st.integers(1, 50), mode=st.sampled_from(["L", "RGB"]))
@settings(max_examples=150, deadline=None)
def test_resize_and_crop_are_torchvisions(width: int, height: int, size: int, mode: str) -> None:
    channels = len(mode)
    pixels = noise(height, width, channels)
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
    pipeline = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    expected = np.asarray(pipeline(image)).reshape(size, size, channels)
    np.testing.assert_array_equal(decode(pixels, size, channels), expected)


@given(size=sides, channels=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_an_array_of_the_right_size_stays_as_it_is(size: int, channels: int) -> None:
    pixels = noise(size, size, channels)
    np.testing.assert_array_equal(decode(pixels, size, channels), pixels)


def test_grey_becomes_rgb_by_repetition_and_rgb_grey_by_luma() -> None:
    grey, colour = noise(9, 9), noise(9, 9, 3)
    np.testing.assert_array_equal(decode(grey, 9, 3), np.repeat(grey[..., None], 3, axis=2))
    luma = colour.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(decode(colour, 9, 1)[..., 0] - luma).max() <= 1


@pytest.mark.parametrize(
    ("colour", "channels", "expected"),
    [
        ((200, 100, 0, 255), 3, [200, 100, 0]),
        ((200, 100, 0, 0), 3, [255, 255, 255]),
        ((200, 100, 0, 51), 3, [244, 224, 204]),
        ((80, 80, 80, 51), 1, [220]),
        ((200, 100, 0, 51), 4, [200, 100, 0, 51]),
        ((80, 80, 80, 51), 2, [80, 51]),
    ],
)
def test_alpha_is_laid_on_white_unless_it_is_asked_for(
    colour: tuple[int, ...], channels: int, expected: list[int]
) -> None:
    image = Image.new("RGBA", (7, 5), colour)
    assert flat(png(image), channels) == expected
    assert flat(file_of(image, "WEBP", lossless=True, exact=True), channels) == expected
    if colour[0] == colour[1] == colour[2]:
        assert flat(png(image.convert("LA")), channels) == expected


def test_a_transparent_pixels_colour_does_not_bleed_into_its_neighbours() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    pixels = decode(png(image), 5, 3).astype(int)
    assert np.ptp(pixels, axis=2).max() == 0  # black to white, nowhere red


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_transparency_without_an_alpha_channel(mode: str) -> None:
    image = Image.new("RGB", (6, 6), (0, 0, 0)).convert(mode)
    clear = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    data = png(image, transparency=clear)
    assert flat(data, 3) == [255, 255, 255]
    assert flat(data, 1) == [255]
    assert flat(data, 4)[3] == 0
    assert flat(png(image), 4) == [0, 0, 0, 255]


def test_palette_images_get_their_colours() -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 0)).quantize(4)
    assert flat(png(image), 3) == [200, 100, 0]


YCBCR_TIFF = pytest.param(
    *("YCbCr", "TIFF"),
    marks=pytest.mark.skipif(
        int(PIL.__version__.split(".")[0]) < 13,
        reason="Pillow before 13 takes the YCbCr TIFF that it wrote for a truncated RGB one",
    ),
)


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), YCBCR_TIFF, ("LAB", "TIFF")]
)
def test_other_colour_spaces_become_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 40)).convert(mode)
    data = file_of(image, kind)
    assert Image.open(BytesIO(data)).mode == mode
    assert np.abs(np.subtract(flat(data, 3), [200, 100, 40])).max() <= 3
    assert abs(flat(data, 1)[0] - 123) <= 3


@pytest.mark.parametrize("mode", ["HSV", "YCbCr"])
def test_other_colour_spaces_in_memory_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 40)).convert(mode)
    pixels = decode(image, 8, 3)
    assert np.abs(pixels[0, 0].astype(int) - [200, 100, 40]).max() <= 5  # hue has 256 steps


@pytest.mark.parametrize("value", [0, 300, 32768, 65000, 65535])
def test_sixteen_bit_grey_is_scaled_not_clipped(value: int) -> None:
    deep = np.full((6, 6), value, np.uint16)
    expected = [round(value / 257)]
    assert flat(png(Image.fromarray(deep)), 1) == expected
    assert flat(png(Image.fromarray(deep)), 3) == expected * 3
    assert flat(file_of(Image.fromarray(deep), "PPM"), 1) == expected
    big_endian = Image.frombytes("I;16B", (6, 6), deep.astype(">u2").tobytes())
    assert flat(file_of(big_endian, "TIFF"), 1) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 128), (1.0, 255), (200.0, 200), (900.0, 255)]
)
def test_float_grey_is_zero_to_one_or_zero_to_255(value: float, expected: int) -> None:
    image = Image.fromarray(np.full((6, 6), value, np.float32))
    assert flat(file_of(image, "TIFF"), 1) == [expected]


def test_one_bit_images_are_black_and_white() -> None:
    assert flat(png(Image.new("1", (5, 5), 1)), 3) == [255, 255, 255]
    assert flat(png(Image.new("1", (5, 5), 0)), 1) == [0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[:16, :16] = 0  # the dark quarter, top left in the file
    exif = Image.Exif()
    exif[0x112] = orientation
    data = file_of(Image.fromarray(pixels), "JPEG", quality=95, exif=exif)
    quarters = decode(data, 2, 1)[..., 0] < 128
    # where the file's top left corner is shown: EXIF 2.3, tag 274
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    expected = np.zeros((2, 2), bool)
    expected["tb".index(corner[0]), "lr".index(corner[1])] = True
    np.testing.assert_array_equal(quarters, expected)


def test_a_moving_picture_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert flat(data, 3) == [255, 0, 0]


@pytest.mark.parametrize("bad", [b"", b"hello", "a string", noise(4, 4, 5)])
def test_what_is_no_picture_raises(bad: object) -> None:
    with pytest.raises(Exception):  # noqa: B017 - of any type: the caller takes them all
        decode(bad, 4, 3)


def test_a_truncated_jpeg_raises() -> None:
    data = file_of(Image.fromarray(noise(64, 64, 3)), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        decode(data[: len(data) // 2], 8, 3)
