"""Drawing: the same images whatever the batch, truncation of both kinds, fused or not."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.latent import draw
from fastdcgan.latent.draw import Sampler, fast_sampler, latents, latents_numbered, rebatched
from fastdcgan_kernels import fuse


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = models.Generator(size=32, nz=6, ngf=4)
    net(torch.randn(16, 6))
    return net.to(memory_format=torch.channels_last).eval()


def together(images):
    return np.concatenate(list(images))


@pytest.mark.parametrize("sizes", [[256, 256, 3], [1], [5, 5, 5, 5]])
@pytest.mark.parametrize("size", [1, 4, 5, 100, 300])
def test_rebatching_keeps_rows_and_order(sizes, size):
    rows = torch.arange(float(sum(sizes)))[:, None]
    found = list(rebatched(rows.split(sizes), size))
    assert torch.equal(torch.cat(found), rows)
    assert {len(batch) for batch in found[:-1]} <= {size}
    assert 1 <= len(found[-1]) <= size


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_images_do_not_depend_on_batch_or_number(net, statistics):
    sampler = Sampler(net)
    whole = together(sampler.draw(300, statistics=statistics, batch_size=300))
    assert whole.shape == (300, 32, 32, 3)
    for n, batch_size in ((1, 256), (70, 7), (300, 64)):
        images = together(sampler.draw(n, statistics=statistics, batch_size=batch_size))
        apart = np.abs(images.astype(int) - whole[:n]).max()
        assert apart <= 1, "rounding"


def test_batch_statistics_are_those_of_64_images(net):
    z = torch.empty(256, 6, 1, 1).normal_(generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = net.train()(z[64:128])
    net.eval()
    drawn = together(Sampler(net).draw(100, seed=5, statistics="batch"))[64:]
    expected = ((expected[:36] + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn - expected).max() <= 1


def test_each_class_in_turn_or_those_that_are_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)
    net = models.Generator(size=32, nz=6, ngf=4, classes=("a", "b", "c"))
    for _ in range(20):
        net(torch.randn(16, 6), torch.arange(16) % 3)
    with torch.no_grad():
        net.main[-2].weight.mul_(20)  # so that images differ
    net = net.to(memory_format=torch.channels_last).eval()
    z = torch.empty(256, 6, 1, 1).normal_(generator=torch.Generator().manual_seed(0))
    asked = torch.randint(3, (100,))
    for labels, given in ((torch.arange(100) % 3, None), (asked, asked)):
        with torch.no_grad():
            expected = ((net(z[:100], labels) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        for draws in (Sampler(net).draw, fast_sampler(net).draw):
            images = together(draws(100, labels=given, batch_size=7))
            assert np.abs(images - expected).max() <= 1
    few = together(Sampler(net).draw(5, labels=asked[:5], statistics="batch"))
    assert few.shape == (5, 32, 32, 3)
    with pytest.raises(InputError, match=r"labels from 0 to 3 were given; .* from 0 to 2"):
        together(draw.draw(net, 4, labels=torch.arange(4)))
    with pytest.raises(InputError, match="for 3 images"):
        together(draw.draw(net, 3, labels=torch.arange(2)))


def test_labels_are_for_nets_of_classes(net):
    with pytest.raises(InputError, match="a generator without classes"):
        together(draw.draw(net, 2, labels=torch.zeros(2, dtype=torch.int64)))


def test_numbers_name_the_same_vectors():
    every = torch.cat(list(latents(600, 3, seed=2))).flatten(1)
    numbers = [599, 0, 255, 256, 0]
    assert torch.equal(latents_numbered(numbers, 3, seed=2), every[numbers])


def test_both_truncations():
    plain, scaled, cut = (
        torch.cat(list(latents(2048, 8, seed=0, truncation=t, truncate=how))).flatten().double()
        for t, how in ((None, "scale"), (0.5, "scale"), (0.5, "resample"))
    )
    assert torch.equal(scaled, plain / 2)
    assert cut.abs().max() <= 0.5
    assert stats.kstest(cut.numpy(), stats.truncnorm(-0.5, 0.5).cdf).pvalue > 0.01
    assert stats.kstest(plain.numpy(), stats.norm.cdf).pvalue > 0.01


def test_a_fast_sampler_draws_the_same(net, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plain = together(Sampler(net).draw(20))
    said = []
    fast = fast_sampler(net, say=said.append)
    assert said == []
    assert type(net.main).__name__ == "FusedSequential"
    assert np.abs(together(fast.draw(20)).astype(int) - plain).max() <= 1
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def wrong_numbers(net):
    fuse(net)
    with torch.no_grad():
        net.main[0].weight.mul_(1.5)
    return net


def no_compiler(net):
    raise RuntimeError("no compiler\nmore")


@pytest.mark.parametrize(
    ("broken", "said"), [(wrong_numbers, "images are"), (no_compiler, "RuntimeError: no compiler")]
)
def test_blocks_that_do_not_work_are_left_out_aloud(net, monkeypatch, broken, said):
    monkeypatch.setattr(draw, "fuse", broken)
    lines = []
    fast_sampler(net, say=lines.append)
    (line,) = lines
    assert said in line
    assert "\n" not in line
    assert type(net.main) is torch.nn.Sequential


def test_amp_is_said_where_it_cannot_be_and_near_where_it_can(net, monkeypatch):
    lines = []
    monkeypatch.setattr(draw, "amp_dtype", lambda device: None)
    assert fast_sampler(net, amp=True, say=lines.append).autocast is None
    assert "--amp" in lines[0]
    plain = together(Sampler(net).draw(8)).astype(int)
    half = together(Sampler(net, torch.bfloat16).draw(8))
    assert 0 < np.abs(half - plain).max() < 20
