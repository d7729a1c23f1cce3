"""`fastdcgan COMMAND ...`: the same as `python -m fastdcgan.COMMAND ...`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("fastdcgan.train", "train the DCGAN on your images"),
    "generate": ("fastdcgan.generate", "draw images from a trained generator"),
    "export": ("fastdcgan.export", "turn a trained net into ONNX and other files"),
    "evaluate": ("fastdcgan.evaluate", "score generated images beside real ones"),
    "tune": ("fastdcgan.tune", "search hyperparameters"),
    "inpaint": ("fastdcgan.inpaint", "fill hidden parts of images with a generator"),
    "stylize": ("fastdcgan.stylize", "give images the look of others"),
    "gallery": ("fastdcgan.gallery", "look at a run in the browser"),
    "augment": ("fastdcgan.augment", "draw a balanced synthetic set for a classifier"),
    "doctor": ("fastdcgan.doctor", "say what this machine can do, and prove it"),
    "data": ("fastdcgan.data.__main__", "prepare and describe a source of images"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print("usage: fastdcgan COMMAND [--help] ...\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:10}{purpose}")
        return 0
    if given[0] == "--version":
        from fastdcgan import __version__

        print(f"fastdcgan {__version__}")
        return 0
    if given[0] not in COMMANDS:
        print(
            f"error: unknown command {given[0]!r}; there are: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    status: int = importlib.import_module(COMMANDS[given[0]][0]).main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
