"""Hyperparameter search over `TrainConfig` by Optuna: the space that is searched, the study that
trains its points, the report of what was found.

Importing this room loads neither torch nor Optuna; `search` does when it is first used.
"""

from typing import TYPE_CHECKING, Any

from fastdcgan.search.config import SearchConfig
from fastdcgan.search.space import Choices, Range, Space, load_space

if TYPE_CHECKING:
    from fastdcgan.search.study import search

__all__ = ["Choices", "Range", "SearchConfig", "Space", "load_space", "search"]


def __getattr__(name: str) -> Any:
    if name == "search":
        from fastdcgan.search.study import search

        return search
    raise AttributeError(f"module 'fastdcgan.search' has no attribute {name!r}")
