"""Learning rates that fall to 0 by the end of a run. Not here: what a rollback makes of D's."""

from fastdcgan.training import distributed
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.state import TrainState

EVERY = 10
"""Steps between two changes of the rates."""


def share_left(decay: float, done: float) -> float:
    """What is left of the rates where `done` of the run is over, 0 to 1, and they fall to 0 in a
    line over its last `decay`."""
    return 1.0 if decay == 0 else min(1.0, max(0.0, 1 - done) / decay)


class Rates:
    """The rates of a run with `lr_decay`; without, it leaves them alone.

    Args:
        config: of the run.
        total: its steps.
    """

    def __init__(self, config: TrainConfig, total: int) -> None:
        self.config, self.total = config, total
        self.known = False
        """Whether the optimisers have the rates of these steps. Set it to False after a jump."""

    def set(self, state: TrainState, *, seconds: float, rollbacks: int) -> None:
        """Before a step.

        Args:
            seconds: since this process's first step, which `max_minutes` are counted from.
            rollbacks: each halves D's rate.
        """
        config, step = self.config, state.step
        if not config.lr_decay or (self.known and step % EVERY):
            return
        done = step // EVERY * EVERY / self.total
        if config.max_minutes is not None:
            # By the first process's clock: all must have the same rates.
            done = max(done, distributed.from_first(seconds / (60 * config.max_minutes)))
        share = share_left(config.lr_decay, done)
        for optimiser, rate in (
            (state.optG, config.lr_g or config.lr),
            (state.optD, (config.lr_d or config.lr) / 2**rollbacks),
        ):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
        self.known = True
