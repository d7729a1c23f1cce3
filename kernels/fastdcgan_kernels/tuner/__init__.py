"""Measures on the user's own GPU how blocks run best: `tune`, or
`python -m fastdcgan_kernels.tuner`. Imports nothing until `tune` is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tuning import tune

__all__ = ["tune"]


def __getattr__(name: str) -> Any:
    if name != "tune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tuning import tune

    return tune
