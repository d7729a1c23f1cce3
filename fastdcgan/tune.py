"""`python -m fastdcgan.tune`: searches hyperparameters. The options are `SearchConfig`'s fields,
and `TrainConfig`'s for the configuration that is varied."""

import sys
from collections.abc import Sequence

from fastdcgan import command
from fastdcgan.search.config import Base, SearchConfig
from fastdcgan.search.space import presets
from fastdcgan.training.config import PRESETS, giving_way, preset

DESCRIPTION = f"""Search hyperparameters: train many short runs, drawn from a space, and report the
best beside the recipe that they vary.

Examples:

  python -m fastdcgan.tune --data fashion-mnist --image-size 32 --minutes 3 --eval-every 200
      30 trials of 3 minutes; the same command goes on after a stop; see tune/search/report.html

  python -m fastdcgan.tune --space my.toml --sampler grid --steps 1000 --workers 2 --out tune/grid
      each point of my.toml once, two at a time

--space is a .toml or .json file whose keys are options of fastdcgan.train, each with a value, a
list or a range (docs/search.md), or one of: {", ".join(presets())}.
--preset {{{",".join(PRESETS)}}} chooses the recipe that is varied, as in fastdcgan.train; the base
options change it.
"""


def options(args: Sequence[str]) -> SearchConfig:
    """The search that a command line asks for."""
    rest = list(args)
    given = command.fields(rest)
    name = command.take(rest, "--preset")
    recipe = giving_way(preset(name or ("dcgan" if "data" in given else "blue-marble")), given)
    return command.parse(
        SearchConfig,
        prog="python -m fastdcgan.tune",
        description=DESCRIPTION,
        args=rest,
        default=SearchConfig(base=Base(**vars(recipe))),
    )


def _tune(args: Sequence[str]) -> None:
    config = options(args)
    from fastdcgan.search import search

    search(config)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(_tune, args)


if __name__ == "__main__":
    sys.exit(main())
