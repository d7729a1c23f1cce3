"""Training: the configuration, the step, the loop, and everything a run writes.

Importing this room does not import torch; `train` loads it when it is first used.
"""

from typing import TYPE_CHECKING, Any

from fastdcgan.training.config import TrainConfig, TrainResult, preset

if TYPE_CHECKING:
    from fastdcgan.training.loop import train

__all__ = ["TrainConfig", "TrainResult", "preset", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from fastdcgan.training.loop import train

        return train
    raise AttributeError(f"module 'fastdcgan.training' has no attribute {name!r}")
