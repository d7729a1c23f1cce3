"""Whole training steps at the default size, 64x64, in images per second: ours and the loop of the
PyTorch example, in one run. `pytest benchmarks/ --benchmark-only`.

The example's loop is written out here as its users run it: NCHW, float32, eager, BCELoss on
probabilities, a host sync for every loss that it prints.
"""

import pytest
import torch
from torch import nn

from fastdcgan import models
from fastdcgan.hardware import amp_dtype, pick_device
from fastdcgan.training import TrainConfig
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step

DEVICE = pick_device("auto")
BATCHES = (16, 64) if DEVICE.type == "cpu" else (64, 128, 256, 1024)


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def example_loop(batch):
    """The example's loop body, on nets with its layers."""
    netG = models.Generator().to(DEVICE)
    netD = nn.Sequential(models.Discriminator(), nn.Sigmoid()).to(DEVICE)
    criterion = nn.BCELoss()
    optD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    images = torch.rand(batch, 3, 64, 64, device=DEVICE) * 2 - 1

    def step():
        netD.zero_grad()
        label = torch.full((batch,), 1.0, device=DEVICE)
        output = netD(images)
        real_loss = criterion(output, label)
        real_loss.backward()
        output.mean().item()
        fake = netG(torch.randn(batch, 100, 1, 1, device=DEVICE))
        label.fill_(0.0)
        output = netD(fake.detach())
        fake_loss = criterion(output, label)
        fake_loss.backward()
        output.mean().item()
        (real_loss + fake_loss).item()
        optD.step()
        netG.zero_grad()
        label.fill_(1.0)
        output = netD(fake)
        loss = criterion(output, label)
        loss.backward()
        output.mean().item()
        optG.step()
        loss.item()

    return step


def our_step(batch, *, amp, compile):
    """Ours, with noise drawn and images laid out as the training loop does."""
    state = TrainState(TrainConfig(channels=3, batch_size=batch), DEVICE)
    autocast = amp_dtype(DEVICE) if amp else None
    train = Step(state, batch_size=batch, autocast=autocast, compile=compile)
    images = torch.rand(batch, 64, 64, 3, device=DEVICE).mul_(2).sub_(1).permute(0, 3, 1, 2)

    def step():
        z = torch.randn(batch, 100, 1, 1, generator=state.generator, device=DEVICE)
        train(images, z)

    return step


VARIANTS = {
    "pytorch example": example_loop,
    "fastdcgan": lambda batch: our_step(batch, amp=False, compile=False),
    "fastdcgan --amp --compile": lambda batch: our_step(batch, amp=True, compile=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_train_step(benchmark, batch, variant):
    step = VARIANTS[variant](batch)

    def timed():
        step()
        wait()

    benchmark.group = f"train step, batch {batch}, {DEVICE.type}"
    benchmark.pedantic(timed, rounds=5, warmup_rounds=2)
    benchmark.extra_info["images_per_second"] = round(batch / benchmark.stats.stats.median, 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
