"""Dropout by Philox on a CPU: the mask against the published generator, everything else against
x times that mask."""

import numpy as np
import pytest
import torch
from torch import nn

from fastdcgan_kernels import Dropout
from fastdcgan_kernels.cpu import build
from fastdcgan_kernels.cpu.dropout import LEVELS, kept_of

SHAPES = [(1,), (127,), (128, 129), (3, 5, 7, 9), (2, 64, 14, 14)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Dropout runs here as it does for users."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTDCGAN_IMPL", raising=False)
    assert build.library() is not None


def philox(counter, key):
    """Philox4x32-10 of counters (4, n) and a key (2,), as its paper's section 3 has it."""
    c, k = [row.astype(np.uint64) for row in counter], [int(word) for word in key]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]), b & low,
             a >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]), a & low]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c)


def mask_of(count, seed, p):
    """What the first elements are multiplied by."""
    counters = np.zeros((4, -(-count // 128) * 16), dtype=np.uint64)
    counters[0] = np.arange(counters.shape[1])
    bits = philox(counters, (seed % 2**32, seed // 2**32)).astype(np.uint32)
    halves = np.stack([bits & 0xFFFF, bits >> 16], axis=1)  # [word, half, counter]
    halves = halves.reshape(8, -1, 16).transpose(1, 0, 2).reshape(-1)[:count]
    kept = kept_of(p)
    return torch.from_numpy(np.where(halves < kept, LEVELS / max(kept, 1), 0)).float()


def drawn():
    """The seed that the next call draws; the generator is left as it was."""
    state = torch.get_rng_state()
    seed = torch.empty((), dtype=torch.int64).random_().item()
    torch.set_rng_state(state)
    return seed


def test_the_generator_is_the_published_one():
    """Known answers of the authors' library, Random123."""
    for word, key, wanted in (
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        found = philox(np.full((4, 1), word, dtype=np.uint64), key)
        assert " ".join(f"{int(w):08x}" for w in found[:, 0]) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, p, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    g, gg = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = mask_of(x.numel(), drawn(), p).view(shape)
    g.requires_grad_()
    out = Dropout(p)(x)
    (dx,) = torch.autograd.grad(out, x, g, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, g, gg)
    for found, given in ((out, x), (dx, g), (ddx, gg)):
        assert found.dtype == dtype
        assert torch.equal(found, (given.float() * mask).to(dtype))


def test_it_is_kept_in_the_share_that_was_asked_for_and_its_mean_stays():
    out = Dropout(0.3)(torch.ones(2_000_000))
    assert abs((out == 0).float().mean().item() - 0.3) < 5 * (0.21 / 2e6) ** 0.5
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=2e-5)
    assert kept_of(0.3) / LEVELS * out.max().double().item() == pytest.approx(1, abs=1e-7)


def test_elements_are_told_by_their_place_in_memory():
    """A gradient in another memory format meets the same mask, for any number of threads."""
    x = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(4, 6, 5, 3)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            torch.manual_seed(5)
            out = Dropout(0.4)(x)
            (dx,) = torch.autograd.grad(out, x, g)
        finally:
            torch.set_num_threads(threads)
        found.append(out)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(dx == 0, out == 0)
    assert torch.equal(*found)


def test_strides_with_gaps_and_a_tensor_in_place():
    x = torch.randn(8, 64)[:, ::2]
    torch.manual_seed(0)
    wanted = Dropout(0.5)(x.contiguous())
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.5)(x), wanted)
    torch.manual_seed(0)
    assert Dropout(0.5, inplace=True)(x) is x
    assert torch.equal(x, wanted)


def test_nan_stays_and_everything_may_be_dropped_or_kept():
    nan = torch.full((100,), float("nan"))
    assert Dropout(0.5)(nan).isnan().all()
    assert Dropout(0.5)(nan.bfloat16()).isnan().all()
    x = torch.randn(100)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(100))
    assert torch.equal(Dropout(1 - 1e-7)(x), torch.zeros(100))
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.5)(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("change", ["reference", "dtype", "vmap"])
def test_elsewhere_it_is_pytorchs(monkeypatch, change):
    x = torch.randn(64, 8)
    if change == "reference":
        monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    if change == "dtype":
        x = x.double()
    found = []
    for module in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(3)
        if change == "vmap":
            found.append(torch.func.vmap(module, randomness="different")(x))
        else:
            found.append(module(x))
    assert torch.equal(*found)
