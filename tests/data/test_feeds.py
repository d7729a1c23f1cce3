"""Order and feeds: every image in its turn, the right pixels, the same for any number of ranks."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.data import Feed, Order, Packed, make_feed

Make = Callable[..., Packed]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def feed_of(packed: Packed, batch: int = 8, **options: Any) -> Feed:
    order = options.pop("order", None) or Order(packed.n, packed.epoch_images, batch, seed=3)
    return make_feed(packed, **{"order": order, "device": "cpu", "hflip": False, **options})


# ---- Order ---------------------------------------------------------------------------------------


@given(n=st.integers(1, 50), batch=st.integers(1, 60), seed=st.integers(-5, 2**70))
@settings(max_examples=100, deadline=None)
def test_an_epoch_takes_every_image_once(n: int, batch: int, seed: int) -> None:
    order = Order(n, n, batch, seed)
    assert order.steps_per_epoch == -(-n // batch)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.indices(step) for step in steps]
        assert {order.epoch(step) for step in steps} == {epoch}
        assert [len(b) for b in batches] == [order.batch_size(step) for step in steps]
        assert all(len(b) == batch for b in batches[:-1])
        assert sorted(torch.cat(batches).tolist()) == list(range(n))


@given(n=st.integers(1, 30), epoch_images=st.integers(1, 100), batch=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_longer_epoch_takes_images_again_in_turn(n: int, epoch_images: int, batch: int) -> None:
    order = Order(n, epoch_images, batch, seed=0)
    taken = torch.cat([order.indices(step) for step in range(order.steps_per_epoch)]).tolist()
    assert len(taken) == epoch_images
    counts = Counter(taken)
    assert max(counts.values()) - min(counts[i] for i in range(n)) <= 1


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    straight, jumping = Order(100, 100, 7, seed=5), Order(100, 100, 7, seed=5)
    batches = {step: straight.indices(step).clone() for step in range(60)}
    for step in (59, 0, 31, 14, 15, 2):
        assert torch.equal(jumping.indices(step), batches[step])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(Order(20, 20, 20, seed).indices(epoch).tolist())
        for seed in (-1, 0, 1, 2)
        for epoch in range(5)
    ]
    assert len(set(orders)) == len(orders)
    first = Counter(order[0] for order in orders)
    assert len(first) > 5


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_shape_and_layout(packed_of: Make, channels: int, dtype: torch.dtype) -> None:
    packed = packed_of(noise(20, 6, 6, channels))
    feed = feed_of(packed, dtype=dtype)
    batch = feed.batch(1)
    assert batch.shape == (8, channels, 6, 6)
    assert batch.dtype == dtype
    assert batch.is_contiguous(memory_format=torch.channels_last)
    pixels = packed.images[feed.order.indices(1).numpy()].transpose(0, 3, 1, 2)
    wide = np.float64 if dtype == torch.float64 else np.float32
    expected = torch.from_numpy(pixels.astype(wide) / wide(127.5) - wide(1))
    assert torch.equal(batch, expected.to(dtype))  # rounded to dtype once, at the end


@pytest.mark.parametrize("resident", [True, False])
def test_without_margin_and_flips_nothing_is_drawn(packed_of: Make, resident: bool) -> None:
    generator = seeded()
    before = generator.get_state()
    with feed_of(packed_of(noise(20, 6, 6, 3)), resident=resident) as feed:
        feed.batch(0, generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("margin", [0, 3])
def test_every_batch_image_is_a_crop_or_its_mirror(
    packed_of: Make, margin: int, hflip: bool
) -> None:
    packed = packed_of(noise(10, 5 + margin, 5 + margin, 3), size=5)
    feed = feed_of(packed, batch=10, hflip=hflip)
    generator = seeded()
    seen = Counter[tuple[int, int, bool]]()
    for step in range(100):
        batch = ((feed.batch(step, generator) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        for image, index in zip(batch.numpy(), feed.order.indices(step), strict=True):
            found = [
                (y, x, flip)
                for y in range(margin + 1)
                for x in range(margin + 1)
                for flip in (False, True)
                if np.array_equal(
                    image,
                    packed.images[index, y : y + 5, x : x + 5][:, :: -1 if flip else 1],
                )
            ]
            assert len(found) == 1
            seen.update(found)
    ways = (margin + 1) ** 2 * (2 if hflip else 1)
    assert len(seen) == ways
    # all ways alike: 1000 draws, five standard deviations of the binomial
    expected = 1000 / ways
    assert all(abs(count - expected) <= 5 * expected**0.5 for count in seen.values())


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("margin", [0, 4])
def test_stream_gives_the_bits_of_resident(packed_of: Make, margin: int, hflip: bool) -> None:
    packed = packed_of(noise(30, 6 + margin, 6 + margin, 3), size=6, epoch=37)
    one, other = seeded(), seeded()
    resident = feed_of(packed, hflip=hflip, resident=True)
    with feed_of(packed, hflip=hflip, resident=False) as stream:
        assert type(resident) is not type(stream)
        for step in [*range(12), 40, 41, 3, 4, 4, 90]:  # epochs end, runs are continued
            assert torch.equal(resident.batch(step, one), stream.batch(step, other))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_see_what_one_rank_alone_sees(
    packed_of: Make, world: int, resident: bool
) -> None:
    packed = packed_of(noise(33, 9, 9, 3), size=6)
    options = {"batch": 12, "hflip": True, "resident": resident}
    feeds = [feed_of(packed, rank=rank, world=world, **options) for rank in range(world)]
    alone = feed_of(packed, **options)
    draws = [seeded() for _ in feeds]
    whole = seeded()
    for step in range(6):  # steps 2 and 5 are ragged: 9 images
        expected = alone.batch(step, whole).tensor_split(world)
        for feed, generator, part in zip(feeds, draws, expected, strict=True):
            assert torch.equal(feed.batch(step, generator), part)
    for feed in (*feeds, alone):
        feed.close()


@pytest.mark.parametrize("resident", [True, False])
def test_nothing_waits_for_the_device(packed_of: Make, resident: bool) -> None:
    """On "meta" there are no values: whatever would read one back, or choose by one, raises."""
    packed = packed_of(noise(20, 9, 9, 3), size=6)
    with feed_of(
        packed, device="meta", hflip=True, dtype=torch.bfloat16, resident=resident
    ) as feed:
        batch = feed.batch(2)
    assert batch.device.type == "meta"
    assert batch.shape == (4, 3, 6, 6)
    assert batch.dtype == torch.bfloat16
    assert batch.is_contiguous(memory_format=torch.channels_last)


# ---- the streaming thread ------------------------------------------------------------------------


def test_stream_reads_ahead_of_its_time_and_stops_there(
    packed_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with feed_of(packed_of(noise(80, 6, 6, 3)), resident=False) as feed:
        read = []
        original = feed._read
        monkeypatch.setattr(feed, "_read", lambda step: (read.append(step), original(step))[1])
        feed.batch(5)
        deadline = time.monotonic() + 10
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert read == [5, 6, 7, 8]


def test_an_error_in_the_thread_reaches_the_caller_in_its_turn(
    packed_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with feed_of(packed_of(noise(80, 6, 6, 3)), resident=False) as feed:
        original = feed._read

        def read(step: int) -> torch.Tensor:
            if step == 2:
                raise OSError("the disk is gone")
            return original(step)

        monkeypatch.setattr(feed, "_read", read)
        feed.batch(0)
        feed.batch(1)
        with pytest.raises(OSError, match="the disk is gone"):
            feed.batch(2)
        feed.batch(3)


def test_close_ends_the_thread(packed_of: Make) -> None:
    before = threading.active_count()
    feed = feed_of(packed_of(noise(80, 6, 6, 3)), resident=False)
    feed.batch(0)
    assert threading.active_count() == before + 1
    feed.close()
    feed.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        feed.batch(9)


# ---- choices -------------------------------------------------------------------------------------


def test_resident_on_the_cpu_copies_nothing(packed_of: Make) -> None:
    packed = packed_of(noise(20, 6, 6, 3))
    feed = feed_of(packed)
    packed.images[:] = 255
    assert (feed.batch(0) == 1).all()


@pytest.mark.parametrize(("free", "kind"), [(5400, "ResidentFeed"), (5300, "StreamFeed")])
def test_a_gpu_keeps_what_fits_in_two_fifths_of_its_free_memory(
    packed_of: Make, monkeypatch: pytest.MonkeyPatch, free: int, kind: str
) -> None:
    from fastdcgan.data import feeds

    made = []
    for name in ("ResidentFeed", "StreamFeed"):
        monkeypatch.setattr(feeds, name, lambda *args, name=name, **options: made.append(name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000))
    packed = packed_of(noise(20, 6, 6, 3))  # 2,160 bytes
    make_feed(packed, order=Order(20, 20, 8, 0), device="cuda", hflip=False)
    assert made == [kind]


@pytest.mark.parametrize("resident", [True, False])
def test_labels_are_those_of_the_images(packed_of: Make, resident: bool) -> None:
    """Over epochs, ragged batches, two ranks and a jump: image i is all i, and its label 2 i."""
    packed = packed_of(np.arange(21, dtype=np.uint8).repeat(12).reshape(21, 2, 2, 3))
    options = {"resident": resident, "labels": 2 * np.arange(21), "world": 2}
    feeds = [feed_of(packed, rank=rank, **options) for rank in range(2)]
    for step in (0, 1, 2, 3, 4, 9, 5):
        for feed in feeds:
            images, labels = (feed.batch(step) + 1) * 127.5, feed.labels(step)
            assert labels is not None
            assert labels.dtype == torch.int64
            assert labels.tolist() == (2 * images[:, 0, 0, 0].round()).tolist()
    assert feed_of(packed, resident=resident).labels(0) is None
    for feed in feeds:
        feed.close()


def test_mistakes_in_a_call_are_refused(packed_of: Make) -> None:
    packed = packed_of(noise(20, 6, 6, 3))
    with pytest.raises(ValueError, match="19 images for 20"):
        feed_of(packed, order=Order(19, 19, 8, 0))
    with pytest.raises(ValueError, match="19 labels for 20"):
        feed_of(packed, labels=np.arange(19))
    with pytest.raises(ValueError, match="rank 2"):
        feed_of(packed, rank=2, world=2)
    with pytest.raises(ValueError, match="positive"):
        Order(0, 1, 1, 0)


def test_a_batch_costs_little_beside_a_training_step(packed_of: Make) -> None:
    """A step of batch 64 at 64x64 takes 1.3 s on two cores: the feed must stay far below 3 %."""
    feed = feed_of(packed_of(noise(128, 128, 128, 3), size=64), batch=64, hflip=True)
    generator = seeded()
    times = []
    for step in range(20):
        start = time.perf_counter()
        feed.batch(step, generator)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.030
