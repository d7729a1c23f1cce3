"""What tests of training steps share: batches, how far two nets are apart, and a mode in which the
host may not wait for a device. Not here: any test."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("bag", "boot", "coat")
SMALL_WITH_CLASSES = {
    "image_size": 32, "channels": 1, "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 4, "classes": True,
}  # fmt: skip


def batches(config, steps, *, dtype=torch.float32, ragged=None):
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        rows = ragged if ragged and step % 4 == 3 else config.batch_size
        size = config.image_size
        images = torch.rand(rows, config.channels, size, size, generator=generator) * 2 - 1
        z = torch.randn(rows, config.nz, 1, 1, generator=generator)
        yield images.to(dtype, memory_format=torch.channels_last), z.to(dtype)


def largest_difference(ours, plain):
    """Over all parameters and buffers, in order (the keys differ in their prefix only)."""
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    return max(((a.double() - b.double()).abs().max().item()) for a, b in pairs)


class NoSync(TorchDispatchMode):
    """Raises where an operation would make the host wait for a device."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "is_nonzero",
        "item",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or name.startswith("_unique"):
            raise AssertionError(f"host sync: {name}")
        if name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device):
            raise AssertionError("host sync: copy between devices")
        return func(*args, **(kwargs or {}))
