"""fastdcgan: the standard DCGAN, trained at the speed the hardware allows.

Importing this package does not import torch; the names below load it when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdcgan.models import Discriminator, Generator

__version__ = "0.1.0"
__all__ = ["Discriminator", "Generator", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Discriminator", "Generator"):
        from fastdcgan import models

        return getattr(models, name)
    raise AttributeError(f"module 'fastdcgan' has no attribute {name!r}")
