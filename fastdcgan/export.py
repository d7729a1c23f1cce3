"""`python -m fastdcgan.export`: a trained net as files that run elsewhere. The options are
`ExportConfig`'s fields."""

import sys
from collections.abc import Sequence

from fastdcgan import command
from fastdcgan.exporting.config import ExportConfig

DESCRIPTION = """Export a trained net, checked against PyTorch, with a model card.

Examples:

  python -m fastdcgan.export --from runs/000-blue-marble-dcgan64 --to onnx --fold

  python -m fastdcgan.export --from RUN --to safetensors onnx --license mit --push USER/NAME
"""


def _export(args: Sequence[str]) -> None:
    config = command.parse(
        ExportConfig, prog="python -m fastdcgan.export", description=DESCRIPTION, args=args
    )
    config.validate()
    from fastdcgan.exporting.folder import export

    for line in export(config):
        print(line)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_export, args)


if __name__ == "__main__":
    sys.exit(main())
