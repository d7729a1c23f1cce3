"""`python -m fastdcgan.train`: trains the DCGAN. The options are `TrainConfig`'s fields."""

import dataclasses
import sys
from collections.abc import Sequence

from fastdcgan import command
from fastdcgan.training.config import PRESETS, TrainConfig, giving_way, preset
from fastdcgan.training.example_flags import translate

DESCRIPTION = f"""Train the standard DCGAN on your own images.

Examples:

  python -m fastdcgan.train --amp --compile
      trains on the built-in photographic map of the Earth

  python -m fastdcgan.train --data path/to/photos --image-size 128 --out runs/photos
      trains on a folder of images; with --resume auto it goes on after a stop

--preset {{{",".join(PRESETS)}}} chooses the recipe whose values stand for flags that are not given:
dcgan (where --data is given) is the PyTorch example's, blue-marble (where it is not) one for nine
minutes of a CPU and the built-in data, minutes the same for any data, r3 R3GAN's (a paired loss,
two penalties, no norm), small-data one for few images and little time, tf28 the TensorFlow
tutorial's (Fashion-MNIST).
The flags of the PyTorch example (--dataroot, --batchSize, --niter, --outf, --netG ...) work too.
"""


def options(args: Sequence[str]) -> TrainConfig:
    """The configuration that a command line asks for.

    Flags that are not given take the values of --preset; with --resume, those of the run that is
    resumed.
    """
    rest = translate(args)
    given = command.fields(rest)
    name = command.take(rest, "--preset")
    recipe = preset(name or ("dcgan" if "data" in given else "blue-marble"))
    default = giving_way(recipe, given)

    def parse(default: TrainConfig) -> TrainConfig:
        return command.parse(
            TrainConfig,
            prog="python -m fastdcgan.train",
            description=DESCRIPTION,
            args=rest,
            default=default,
        )

    config = parse(default)
    config.validate()
    if config.resume is not None:
        from fastdcgan.training.folders import resolve_resume, run_folder

        target = resolve_resume(config.resume, config.out)
        if target is not None and (run_folder(target) / "config.json").is_file():
            before = (run_folder(target) / "config.json").read_text(encoding="utf-8")
            resumed = dataclasses.replace(
                TrainConfig.from_json(before), out=run_folder(target), resume=config.resume
            )
            if "epochs" in given:
                resumed = dataclasses.replace(resumed, steps=None)  # epochs are counted again
            config = parse(resumed)
            if config.resume == "auto":
                config = dataclasses.replace(config, resume=str(target))
    return config


def _train(args: Sequence[str]) -> None:
    config = options(args)
    from fastdcgan.training.loop import train

    train(config)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_train, args)


if __name__ == "__main__":
    sys.exit(main())
