"""The generator as it draws, and the discriminator as it judges and learns; another project's net,
fused."""

from functools import partial

import pytest
import torch

from benchmarks import ours, peers
from benchmarks.ours import DEVICE, REPEAT
from benchmarks.timing import repeated
from fastdcgan.hardware import amp_dtype

BATCHES = (64,) if DEVICE.type == "cpu" else (64, 1024)  # the example's sample sheets have 64
ROUNDS = 9
AMP = amp_dtype(DEVICE)
SAMPLING = {
    "pytorch example": peers.example_sampling,
    "pytorch tuned": partial(peers.tuned_sampling, amp=AMP),
    "fastdcgan": partial(ours.sampling, statistics="running"),
    "fastdcgan --amp": partial(ours.sampling, statistics="running", amp=True),
    "fastdcgan, batch statistics": partial(ours.sampling, statistics="batch"),
}
DISCRIMINATOR = {
    "pytorch example": peers.example_discriminator,
    "pytorch tuned": partial(peers.tuned_discriminator, amp=AMP),
    "fastdcgan": ours.discriminator,
    "fastdcgan --amp": partial(ours.discriminator, amp=True),
}
CRITIC = {
    "pytorch": peers.critic_step,
    "pytorch channels_last": partial(peers.critic_step, form=torch.channels_last),
    "fuse(critic)": ours.critic_step,
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", SAMPLING)
def test_sampling(together, batch, variant):
    makers = {
        name: partial(repeated(make, REPEAT), DEVICE, batch) for name, make in SAMPLING.items()
    }
    together("sampling", makers, variant, rounds=ROUNDS, batch=batch)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("variant", DISCRIMINATOR)
def test_discriminator(together, batch, mode, variant):
    makers = {
        name: partial(repeated(make, REPEAT), DEVICE, batch, backward=mode == "both")
        for name, make in DISCRIMINATOR.items()
    }
    together("discriminator", makers, variant, rounds=ROUNDS, mode=mode, batch=batch)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", CRITIC)
def test_sngan_critic_step(together, batch, variant):
    makers = {name: partial(repeated(make, REPEAT), DEVICE, batch) for name, make in CRITIC.items()}
    together("sngan critic step", makers, variant, rounds=ROUNDS, batch=batch)
