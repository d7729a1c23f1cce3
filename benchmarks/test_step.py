"""Whole training steps. Ours has its feed in it (index, crop, flip); the baselines are given the
same ready images every time."""

from functools import partial

import pytest

from benchmarks import ours, peers
from benchmarks.ours import DEVICE, REPEAT
from benchmarks.timing import repeated
from fastdcgan.hardware import amp_dtype

CPU = DEVICE.type == "cpu"
# The example's layers cost the CPU a second at 64, and each compilation half a minute: there the
# compiled ones are measured at that batch only.
BATCHES = (16, 64) if CPU else (64, 128, 256, 1024)
EAGER = {
    "pytorch example": peers.example_step,
    "fastdcgan": ours.step,
    "fastdcgan --amp": partial(ours.step, amp=True),
}
COMPILED = {
    "pytorch tuned": partial(peers.tuned_step, amp=amp_dtype(DEVICE)),
    **(
        {"pytorch tuned, float32": partial(peers.tuned_step, amp=None)}
        if CPU and amp_dtype(DEVICE) is not None
        else {}
    ),
    "fastdcgan --compile": partial(ours.step, compile=True),
    "fastdcgan --amp --compile": partial(ours.step, amp=True, compile=True),
}
TF28 = {
    "keras tutorial": lambda device, batch: peers.keras_step(batch),
    "fastdcgan": ours.tf28_step,
    "fastdcgan --amp": partial(ours.tf28_step, amp=True),
}


@pytest.mark.parametrize(
    ("batch", "variant"),
    [(b, v) for b in BATCHES for v in (EAGER if CPU and b < 64 else EAGER | COMPILED)],
)
def test_step(together, batch, variant):
    variants = EAGER if CPU and batch < 64 else EAGER | COMPILED
    makers = {
        name: partial(repeated(make, REPEAT), DEVICE, batch) for name, make in variants.items()
    }
    together("step", makers, variant, rounds=5 if CPU else 20, batch=batch)


@pytest.mark.skipif(not CPU, reason="the Keras baseline is one of the CPU")
@pytest.mark.parametrize("variant", TF28)
def test_tf28_step(together, variant):
    batch = 256  # the tutorial's
    makers = {name: partial(repeated(make, REPEAT), DEVICE, batch) for name, make in TF28.items()}
    together("tf28 step", makers, variant, rounds=5, batch=batch)
