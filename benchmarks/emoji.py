"""`python -m benchmarks.emoji OUT.zip`: the bitmaps of the font Noto Color Emoji as a zip of PNGs,
a small colour data set that needs no download (SIL Open Font License; Debian's package
fonts-noto-color-emoji). About 3,900 images of 136x128 with alpha."""

import argparse
import zipfile
from pathlib import Path

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def bitmaps(font: Path) -> dict[str, bytes]:
    """The PNGs of a font's colour bitmaps, by the name of their glyph."""
    from fontTools.ttLib import TTFont

    (strike,) = TTFont(font)["CBDT"].strikeData
    return {name: glyph.imageData for name, glyph in sorted(strike.items())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("out", type=Path, help="the zip to write")
    parser.add_argument("--font", type=Path, default=FONT, help=f"default {FONT}")
    given = parser.parse_args(arguments)
    if not given.font.is_file():
        parser.error(f"there is no {given.font}: install fonts-noto-color-emoji, or give --font")
    found = bitmaps(given.font)
    with zipfile.ZipFile(given.out, "w", zipfile.ZIP_STORED) as archive:
        for name, png in found.items():
            archive.writestr(f"{name}.png", png)
    print(f"{len(found):,} images in {given.out}")


if __name__ == "__main__":
    main()
