"""What stands in for training in the tests of a search: scores that are a known function of the
configuration, at once; and some ways to go wrong. Workers import it by name."""

import dataclasses
import math
import os
import sys
import time
from pathlib import Path

from fastdcgan.errors import RunError
from fastdcgan.search import SearchConfig, search
from fastdcgan.search.config import Base
from fastdcgan.training import TrainConfig, TrainResult

BEST_LR_G, BEST_LR_D = 3e-4, 1e-4
BASE = Base(steps=100, eval_every=50, device="cpu")  # on which workers need no torch


def score(config):
    """A bowl in log(lr_g) and log(lr_d), and 0.3 more where beta1 is not 0.5."""
    lr_g, lr_d = config.lr_g or config.lr, config.lr_d or config.lr
    bowl = math.log(lr_g / BEST_LR_G) ** 2 + math.log(lr_d / BEST_LR_D) ** 2
    return 0.02 + 0.1 * bowl + 0.3 * (config.beta1 != 0.5)


def train(config, on_evaluation):
    """Evaluations that come down to the score; leaves config.json and its process in `out`."""
    (config.out / "config.json").write_text(config.to_json())
    (config.out / "process").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    best = None
    for step in range(config.eval_every, config.steps + 1, config.eval_every):
        kid = score(config) * (2 - step / config.steps)
        row = {"step": step, "kid": kid, "fid": 1000 * kid, "kid_floor": 0.001, "fid_floor": 9.0}
        best = row if best is None or kid < best["kid"] else best
        if on_evaluation(row):
            break
    return TrainResult(step, 1.0, config.out, 1.0, 1.0, interrupted=False, best=best)


def train_together(config, on_evaluation):
    """Trials 0 and 1 each wait until the other has begun."""
    number = int(config.out.name)
    if number < 2:
        other = config.out.with_name(f"{1 - number:04d}")
        deadline = time.monotonic() + 60
        while not other.exists():
            if time.monotonic() > deadline:
                raise RunError("alone")
            time.sleep(0.05)
    return train(config, on_evaluation)


def train_slowly(config, on_evaluation):
    """Trials 3 and 4 never end."""
    result = train(config, on_evaluation)
    if config.out.name in ("0003", "0004"):
        time.sleep(1000)
    return result


def die_once(config, on_evaluation):
    """Trial 1 takes its process with it."""
    if config.out.name == "0001":
        os._exit(9)
    return train(config, on_evaluation)


def trained(out: Path):
    """The configurations that were trained in `out`, by trial."""
    return {
        int(path.parent.name): TrainConfig.from_json(path.read_text())
        for path in sorted(out.glob("trials/*/config.json"))
    }


if __name__ == "__main__":  # a search that a test kills: FOLDER SPACE SAMPLER WORKERS
    folder, space, sampler, workers = sys.argv[1:]
    killed = SearchConfig(
        out=Path(folder), space=space, sampler=sampler, workers=int(workers), base=BASE, trials=8
    )
    import tests.search.quick as importable

    search(dataclasses.replace(killed), train=importable.train_slowly, heartbeat=1)
