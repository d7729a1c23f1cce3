"""The command `python -m fastdcgan_kernels.inspect`. Imports torch only when it has read its
arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    every = ",".join(ARCHS)
    parser = argparse.ArgumentParser(
        prog="python -m fastdcgan_kernels.inspect",
        description="Compile every kernel of the standard DCGAN ahead of time and report "
        "registers, spills, shared memory and instructions. Needs no GPU; measures no speed.",
        epilog="Example: python -m fastdcgan_kernels.inspect --arch sm_90,gfx942 --json",
    )
    add = parser.add_argument
    add("--arch", default=every, help=f"targets, with commas; default {every}")
    add("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="default bf16")
    add("--layer", default="", help='only layers with this in their name: "G2"')
    add("--gluon", action="store_true", help="instead the tuner's tiles for the kernel in Gluon")
    add("--jobs", type=int, help="processes; default: as many as cores")
    add("--json", action="store_true", help="a list of objects, not a table")
    given = parser.parse_args(arguments)
    archs = [arch for arch in given.arch.split(",") if arch]
    if not archs or set(archs) - set(ARCHS):
        parser.error(f"--arch {given.arch} was given; give some of {', '.join(ARCHS)}")
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is left aside: nothing compiles with it", file=sys.stderr)

    from .report import complaints, document, report

    rows = report(archs, given.dtype, given.layer, given.jobs, given.gluon)
    if not rows:
        if given.gluon:
            parser.error(f"--gluon --layer {given.layer} was given; it takes G2 to D4 on sm_90")
        parser.error(f"--layer {given.layer} was given; layers are G1 to G5 and D1 to D5")
    print(json.dumps(rows, indent=1) if given.json else document(rows))
    wrong = complaints(rows)
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
