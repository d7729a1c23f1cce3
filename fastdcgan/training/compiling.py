"""torch.compile for the parts of a step, and what happens where it does not work."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Compiler:
    """Compiles functions as whole graphs for the shapes that they are first called with. Where that
    fails (no C++ compiler, say), all of them run eagerly from then on.

    Args:
        enabled: whether to compile at all.
        say: is called with one line where compilation failed.
    """

    def __init__(self, enabled: bool, say: Callable[[str], None]) -> None:
        self._enabled, self._say = enabled, say

    def __call__(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, compiled at its first call."""
        if not self._enabled:
            return function
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def call(*args: object) -> Result:
            if not self._enabled:
                return function(*args)
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                # Compiling comes before running, so nothing has happened yet: run it eagerly.
                reason = next(line for line in str(error).splitlines() if line.strip())
                self._say(
                    f"--compile: torch.compile does not work here ({reason}); going on eagerly"
                )
                self._enabled = False
                return function(*args)

        return call
