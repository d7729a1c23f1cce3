"""What feeding costs beside what it feeds, on the CPU."""

import statistics
import time

import torch

from fastdcgan.data import Order, make_feed, prepare
from fastdcgan.training import TrainConfig
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step


def seconds(call, repeats):
    times = []
    for n in range(repeats):
        start = time.perf_counter()
        call(n)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_the_feed_costs_under_3_percent_of_a_step():
    """Random crops and flips of the built-in data, the default nets and batch."""
    config = TrainConfig(channels=3)
    state = TrainState(config, torch.device("cpu"))
    packed = prepare("blue-marble", size=64, progress=False)
    order = Order(packed.n, packed.epoch_images, config.batch_size, config.seed)
    with make_feed(packed, order=order, device="cpu", hflip=True) as feed:
        images = feed.batch(0, state.generator)
        step = Step(state, batch_size=config.batch_size)
        z = torch.randn(config.batch_size, config.nz, 1, 1)
        step(images, z)
        feeding = seconds(lambda n: feed.batch(n, state.generator), 15)
        stepping = seconds(lambda n: step(images, z), 3)
    print(f"feed {feeding * 1e3:.1f} ms, step {stepping * 1e3:.0f} ms")
    assert feeding < 0.03 * stepping
