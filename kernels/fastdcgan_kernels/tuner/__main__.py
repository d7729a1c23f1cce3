"""The command `python -m fastdcgan_kernels.tuner`. Imports torch only when it has read its
arguments."""

from __future__ import annotations

import argparse
import sys

from .. import dcgan


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    sizes = {f"dcgan{size}": size for size in dcgan.SIZES}
    parser = argparse.ArgumentParser(
        prog="python -m fastdcgan_kernels.tuner",
        description="Measure on this GPU which kernels, tiles and implementations are right and "
        "fastest for the layers of a DCGAN, and store it for every later run.",
        epilog="Example: python -m fastdcgan_kernels.tuner --batch 256 --dtype bf16",
    )
    add = parser.add_argument
    add("--net", default="dcgan64", choices=sizes, help="default dcgan64")
    add("--batch", type=int, default=128, help="images, counted as a power of two; default 128")
    dtypes = ("bf16", "fp16", "fp32")
    add("--dtype", default="bf16", choices=dtypes, help="of autocast; default bf16")
    add("--again", action="store_true", help="also what was measured before")
    given = parser.parse_args(arguments)
    if given.batch < 1:
        parser.error(f"--batch {given.batch} was given; give 1 or more")

    import torch

    from ..choice import measured, targets
    from ..modules.block import stat_groups
    from ..modules.fusion import fuse
    from .tuning import tune

    if not torch.cuda.is_available() or targets.target_of(torch.device("cuda")) is None:
        print("nothing to tune: PyTorch sees no GPU that the kernels run on", file=sys.stderr)
        return 2
    device, size = torch.device("cuda", torch.cuda.current_device()), sizes[given.net]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]
    generator, discriminator = (fuse(net.to(device)) for net in dcgan.nets(size))
    images = torch.randn(given.batch, 3, size, size, device=device)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        tune(generator, torch.randn(given.batch, dcgan.NZ, 1, 1, device=device), again=given.again)
        tune(discriminator, images, again=given.again)
        with stat_groups(2):  # in its own step: real and generated images in one pass
            tune(discriminator, torch.cat([images, images]), again=given.again)
    print(f"stored in {measured.cache_file(torch.cuda.get_device_name(device))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
