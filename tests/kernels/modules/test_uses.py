"""What people do with models, done with a fused one and with its plain twin: memory formats,
results that are no tensors, function transforms, tracing, checkpoints, reparametrisations. The
numbers of single models are in test_fusion.py.

Each test runs with the kernels of Triton, in its interpreter, and with those of the CPU."""

import collections
import copy
import cProfile
import functools
import io
import logging
import os
import pstats
import random
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastdcgan_kernels import findings, fuse, share, unfuse, unfused
from fastdcgan_kernels.cpu.blocks import is_there
from fastdcgan_kernels.modules import block
from tests.kernels.modules.layers import down, up


@pytest.fixture(autouse=True, params=["triton", "cpu"])
def implementation(request, monkeypatch):
    """Blocks run by Triton's kernels, or by the CPU's where these take them."""
    if request.param == "triton":
        monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    else:
        from fastdcgan_kernels.choice import targets

        assert is_there(), "the CPU's kernels need a C++ compiler"
        monkeypatch.setattr(targets, "target_of", lambda device: None)
        monkeypatch.setattr("fastdcgan_kernels.functional.target_of", lambda device: None)
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def kernels_run(implementation, monkeypatch):
    """How many forward operators of ours were called."""
    calls = []
    names = ("conv_bn", "conv_act", "cpu_conv_norm", "cpu_conv_act")

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastdcgan" and func._opname in names:
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Counted():
        yield calls


def picture(n=2, c=3, side=16):
    return torch.randn(n, c, side, side)


def twins(model):
    return model, fuse(copy.deepcopy(model))


def close(mine, theirs):
    """float32 through a few layers, forth and back."""
    assert mine.shape == theirs.shape
    size = theirs.double().square().mean().sqrt().clamp(min=1e-6)
    assert (mine.double() - theirs.double()).abs().max() <= 1e-4 * size


class Critic(nn.Module):
    """By attributes, with a functional activation, a list of features and a head on `.view`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = down(3, 16, True), nn.LeakyReLU(0.2)
        self.conv2, self.bn2, self.act2 = down(16, 16), nn.BatchNorm2d(16), nn.ReLU()
        self.conv3, self.bn3 = down(16, 16), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x):
        x = self.act1(self.conv1(x))
        x = self.act2(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(x.reshape(len(x), -1))


class Block(nn.Module):
    def __init__(self, ci=3, co=16):
        super().__init__()
        self.conv, self.bn, self.act = down(ci, co), nn.BatchNorm2d(co), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def chain():
    return nn.Sequential(
        down(3, 16, True), nn.LeakyReLU(0.2), down(16, 32), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Sequential(up(32, 16), nn.BatchNorm2d(16), nn.ReLU()), up(16, 3), nn.Tanh(),
    )  # fmt: skip


class CycleGAN(nn.Module):
    """Of its generator: to half the sides, a residual block, and back."""

    def __init__(self, affine=False):
        super().__init__()

        def norm():
            return nn.InstanceNorm2d(16, affine=affine)

        def padded(ci, side):
            return nn.ReflectionPad2d(1), nn.Conv2d(ci, 16, side, bias=False)

        self.down = nn.Sequential(
            *padded(3, 4), norm(), nn.ReLU(True), down(16, 16), norm(), nn.ReLU(True)
        )
        self.residual = nn.Sequential(*padded(16, 3), norm(), nn.ReLU(True), *padded(16, 3), norm())
        self.up, self.norm, self.act = up(16, 16), norm(), nn.ReLU()
        self.last = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(16, 3, 3), nn.Tanh())

    def forward(self, x):
        h = self.down(x)
        h = h + self.residual(h)
        return self.last(self.act(self.norm(self.up(h))))


MODELS = {
    "cyclegan": CycleGAN,
    "cyclegan affine": lambda: CycleGAN(True),
    "other activations": lambda: nn.Sequential(
        down(3, 16, True), nn.SiLU(), down(16, 16), nn.BatchNorm2d(16), nn.GELU(), up(16, 16),
        nn.BatchNorm2d(16), nn.ELU(0.5), up(16, 3), nn.Sigmoid(),
    ),
    "conv act": lambda: nn.Sequential(down(3, 16), nn.ReLU()),
    "conv": lambda: nn.Sequential(down(3, 16)),
    "chain": chain,
    "critic": Critic,
    "blocks": lambda: nn.Sequential(Block(3, 16), Block(16, 32)),
    "grey": lambda: nn.Sequential(down(1, 16), nn.ReLU(), up(16, 1), nn.Tanh()),
    "to one pixel": lambda: nn.Sequential(down(3, 16), nn.ReLU(), down(16, 16), nn.BatchNorm2d(16),
                                          nn.ReLU(), nn.Conv2d(16, 1, 4)),
    "others between": lambda: nn.Sequential(down(3, 16), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(),
                                            down(16, 16), nn.BatchNorm2d(16)),
}  # fmt: skip


class Whole(nn.Module):
    """Calls an nn.Sequential."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.gain = nn.Sequential(*layers), 1

    def forward(self, x):
        return self.layers(x if self.gain == 1 else x * self.gain)


class Net(nn.Module):
    """Modules of every kind, one after the other."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Block(3, 16), Whole(down(16, 16), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.act = down(16, 32, True), nn.LeakyReLU(0.2)
        self.three = nn.Sequential(Whole(up(32, 16), nn.ReLU()), Whole(Whole(up(16, 16))))
        self.option = True

    def forward(self, x):
        h = self.act(self.conv(self.two(self.one(x))))
        return self.three(h if self.option else h + 1)


HOUSES = {
    "blocks": lambda: nn.Sequential(Block(3, 16), Block(16, 16), Block(16, 32)),
    "wholes": lambda: nn.Sequential(
        Whole(down(3, 16), nn.ReLU()), Whole(Whole(down(16, 16))), Whole(Block(16, 16))
    ),
    "net": Net,
    "nets": lambda: Whole(
        Whole(Block(3, 16), nn.Sequential(Block(16, 16))), nn.Sequential(up(16, 16), nn.Tanh())
    ),
}


# --- Memory formats -------------------------------------------------------------------------------


def wide(value):
    return value.to(memory_format=torch.channels_last)


def formats(tensor):
    return tensor.is_contiguous(), tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("images", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_lie_in_memory_as_the_plain_models(
    name, images, weights, create_graph, kernels_run
):
    plain, fused = twins(MODELS[name]())
    if weights == "channels_last":
        plain, fused = wide(plain), wide(fused)
    x = picture(c=1 if name == "grey" else 3)
    x = wide(x) if images == "channels_last" else x
    found = []
    for model in (plain, fused):
        given = x.clone().requires_grad_()
        out = model(given)
        wanted = (given, *model.parameters())
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + out.exp().mean()
        grads = torch.autograd.grad(loss, wanted, create_graph=create_graph)
        found.append([out, *grads])
    assert kernels_run
    for at, (theirs, mine) in enumerate(zip(*found, strict=True)):
        close(mine, theirs)
        if at < 2:  # the output and the gradient of the input
            assert mine.dim() != 4 or formats(mine) == formats(theirs)
        elif images == weights == "contiguous":
            mine.view(-1)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_and_no_grad_keep_the_format(name):
    plain, fused = twins(MODELS[name]().eval())
    x = picture(c=1 if name == "grey" else 3)
    with torch.no_grad():
        for given in (x, wide(x)):
            out, expected = fused(given), plain(given)
            close(out, expected)
            assert out.dim() != 4 or formats(out) == formats(expected)


def test_images_of_one_channel_lie_so_that_what_follows_is_contiguous():
    """Both formats are one for them, and a convolution goes by the strides."""
    plain, fused = twins(nn.Sequential(down(1, 16), nn.ReLU(), up(16, 1)))
    after = nn.Conv2d(1, 8, 3)
    x = picture(c=1)
    for given in (x, x.clone(memory_format=torch.channels_last)):
        out, expected = after(fused(given)), after(plain(given))
        close(out, expected)
        assert formats(out) == formats(expected)


def test_a_gram_matrix_by_view():
    plain, fused = twins(chain()[:5])

    def gram(model, x):
        h = model(x)
        n, c, height, width = h.shape
        flat = h.view(n, c, height * width)
        return flat @ flat.transpose(1, 2)

    x = picture()
    close(gram(fused, x), gram(plain, x))


def test_inside_a_chain_activations_stay_channels_last(monkeypatch):
    """No block but the first is given anything else, so no other converts."""
    seen, whole = [], block.run_block

    def run(conv, norm, activation, x, defer, *more, **others):
        seen.append(x if isinstance(x, torch.Tensor) else x[0])
        return whole(conv, norm, activation, x, defer, *more, **others)

    monkeypatch.setattr(block, "run_block", run)
    for build in (chain, Critic, *HOUSES.values()):
        seen.clear()
        plain, fused = twins(build())
        out, expected = fused(picture()), plain(picture())
        assert out.dim() != 4 or formats(out) == formats(expected)
        assert len(seen) >= 3
        wide = [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
        assert wide == [False] + [True] * (len(seen) - 1)
        assert not block._calls


CHANGES = {
    "nothing": lambda m: None,
    "a hook that looks": lambda m: m.one.register_forward_hook(
        lambda m, a, out: seen_by_hooks(out)
    ),
    "a pre-hook": lambda m: m.two.register_forward_pre_hook(lambda m, a: seen_by_hooks(*a)),
    "a hook inside": lambda m: m.conv.register_forward_hook(lambda m, a, out: seen_by_hooks(*a)),
    "an option": lambda m: setattr(m, "option", False),
    "a child's option": lambda m: setattr(m.two, "gain", 2),
    "another taker": lambda m: setattr(m, "conv", nn.Conv2d(16, 32, 3, 2, 1)),
    "a taker of old": lambda m: nn.utils.spectral_norm(m.conv) and None,
    "dropout": lambda m: m.three.insert(0, nn.Dropout(0.5)),
    "a forward": lambda m: setattr(m.two, "forward", m.two.layers.forward),
    "hooks cleared": lambda m: [x._forward_hooks.clear() for x in m.modules()],
    "pre-hooks cleared": lambda m: [x._forward_pre_hooks.clear() for x in m.modules()],
}


def seen_by_hooks(x):
    """What hooks see lies in memory as it does in the plain model."""
    x.view(-1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["net"])
def test_models_of_modules_of_blocks(name, change):
    """Values, gradients and formats, also if what follows a block changes, or somebody looks."""
    plain, fused = twins(HOUSES[name]())
    x, found = picture(), []
    for model in (plain, fused):
        torch.manual_seed(3)
        CHANGES[change](model)
        given = x.clone().requires_grad_()
        torch.manual_seed(3)
        out = model(given)
        out.exp().mean().backward()
        found.append([out, given.grad, *(p.grad for p in model.parameters())])
    for theirs, mine in zip(*found, strict=True):
        close(mine, theirs)
        assert mine.dim() != 4 or formats(mine) == formats(theirs)
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


def test_dropout_of_a_seed_hides_what_it_hid():
    model = nn.Sequential(
        down(3, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5),
        down(16, 16), nn.Dropout2d(0.5), up(16, 16), nn.LeakyReLU(0.1), nn.Dropout(0.3),
    )  # fmt: skip
    plain, fused = twins(model)
    x, outs = picture(), []
    for net in (plain, fused):
        torch.manual_seed(5)
        outs.append(net(x))
    assert torch.equal(outs[0] == 0, outs[1] == 0)
    close(outs[1], outs[0])


# --- What is no tensor, and what changes it in place ----------------------------------------------


class Split(nn.Module):
    def forward(self, x):
        return x, {"twice": x * 2}


class Join(nn.Module):
    def forward(self, pair):
        x, more = pair
        return x + more["twice"]


class Listed(nn.Module):
    def forward(self, x):
        return [x, x + 1]


def test_tuples_and_dicts_pass_through_a_sequential():
    for model in (
        nn.Sequential(down(3, 16), nn.ReLU(), Split(), Join(), down(16, 16), nn.BatchNorm2d(16)),
        nn.Sequential(Split(), Join(), down(3, 16), nn.ReLU()),
        nn.Sequential(nn.Sequential(down(3, 16), Listed()), nn.Identity()),
        nn.Sequential(down(3, 16), nn.ReLU(), Split()),
    ):
        plain, fused = twins(model)
        x = picture()
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_what_a_convolution_refuses_it_refuses_in_the_same_words(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    plain, fused = twins(nn.Sequential(down(3, 16), nn.ReLU()))
    for given in ((picture(), picture()), None, "picture", torch.ones(2, 3, 8, 8, dtype=torch.int)):
        messages = []
        for model in (plain, fused):
            with pytest.raises(Exception) as caught:
                model(given)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1]


class Tagged(torch.Tensor):
    """A subclass that hands its class on, as those of torchvision and fastai do."""


def test_a_subclass_of_tensor_stays_one():
    plain, fused = twins(nn.Sequential(down(3, 16), nn.ReLU()))
    x = picture().as_subclass(Tagged)
    assert type(fused(x)) is type(plain(x)) is Tagged
    close(fused(x).as_subclass(torch.Tensor), plain(x).as_subclass(torch.Tensor))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_a_layer_that_writes_over_a_blocks_output(memory):
    """The block has saved its output for the way back."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.drop = down(3, 16), nn.LeakyReLU(0.2), nn.Dropout(0.5, True)

        def forward(self, x):
            h = self.drop(self.act(self.conv(x)))
            h += 1
            return h

    class Residual(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            h = self.layers(x)
            h += 1
            return h.mul_(2)

    class Leaky(Net):
        def forward(self, x):
            return self.act(self.conv(x))

    class Listed(Net):
        def forward(self, x):
            h, self.features = self.act(self.conv(x)), []
            self.features.append(h)
            total = self.drop(h)
            self.features[0] += 1
            return total

    for model in (
        nn.Sequential(down(3, 16), nn.LeakyReLU(0.2), nn.Dropout(0.5, inplace=True)),
        nn.Sequential(down(3, 16), nn.LeakyReLU(0.2), nn.ReLU6(inplace=True), nn.SiLU(True)),
        *(
            nn.Sequential(down(3, 16), *norm, act(), nn.Dropout(0.5, inplace=True))
            for act in (nn.ELU, nn.SiLU, nn.GELU)
            for norm in ([], [nn.InstanceNorm2d(16)])
        ),
        Net(),
        Residual(nn.Sequential(down(3, 16), nn.LeakyReLU(0.2))),
        Residual(Leaky()),
        Listed(),
    ):
        plain, fused = twins(model)
        x = picture()
        if memory == "channels_last":
            plain, fused, x = wide(plain), wide(fused), wide(x)
        for net in (plain, fused):
            torch.manual_seed(1)
            net(x).square().sum().backward()
        for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
            close(mine.grad, theirs.grad)


# --- fuse leaves no trace of its reading ----------------------------------------------------------

SEEN, COUNTS = [], {"calls": 0, "deep": {"calls": 0}}


class Noisy(Block):
    """Writes to whatever a forward can write to."""

    def __init__(self):
        super().__init__(3, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("flag", torch.tensor(True))
        self.scale = nn.Parameter(torch.ones(16))
        self.h, self.features, self.named = None, [], {}

    def forward(self, x):
        self.calls += 1
        self.average.mul_(0.9)
        for p in self.parameters():
            p.data.clamp_(-0.1, 0.1)
        SEEN.append(x)
        COUNTS["last"] = x
        print("shape", x.shape)
        logging.getLogger("noisy").error("forward")
        h = self.conv(x)
        noise = torch.randn(1) + torch.rand(3).sum()
        self.h = h = self.act(self.bn(h)) + noise * 0
        self.features.append(h)
        self.named["h"] = h
        return h * self.scale[:, None, None]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_reading_leaves_no_trace(capsys, caplog):
    model = Noisy()
    state, attributes = snapshot(model), {n: v for n, v in vars(model).items() if n[0] != "_"}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    generators = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    fuse(model)
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == generators[0]
    assert (np.random.get_state()[1] == generators[1]).all()  # noqa: NPY002
    assert sum(f.fused for f in findings(model)) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {n: v for n, v in vars(model).items() if n[0] != "_"} == attributes
    assert model.h is None
    assert (model.features, model.named, SEEN) == ([], {}, [])
    assert COUNTS == {"calls": 0, "deep": {"calls": 0}}
    assert capsys.readouterr().out == ""
    assert caplog.text == ""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = picture()
    with torch.no_grad():
        plain = unfuse(copy.deepcopy(model))
        for _ in range(2):
            out, expected = loaded(x), plain(x)
            close(out, expected)
    assert loaded.calls == 2
    SEEN.clear()
    COUNTS.pop("last")


class Shared:
    calls = 0
    seen: tuple = ()


@functools.cache
def grid(n):
    return torch.arange(n * 1.0)


class Class(Block):
    """Counts in a class, and caches a tensor."""

    calls = 0

    @functools.lru_cache  # noqa: B019
    def ramp(self, n):
        return torch.arange(n * 1.0)

    def forward(self, x):
        Class.calls += 1
        Shared.seen = (*Shared.seen, x)
        return super().forward(x) + grid(16)[:, None, None] + self.ramp(16)[:, None, None]


def test_reading_leaves_no_trace_in_classes_and_caches():
    plain, fused = twins(Class())
    assert (Class.calls, Shared.seen) == (0, ())
    (reason,) = {f.reason for f in findings(fused)}  # another call may count and go another way
    assert "changes Class.calls, and looks at it" in reason
    x = picture()
    close(fused(x), plain(x))
    Class.calls, Shared.seen = 0, ()
    grid.cache_clear()


class Kept(nn.Module):
    """Keeps what lies between two blocks, for others to look at."""

    def __init__(self, where):
        super().__init__()
        self.one, self.act, self.two = down(3, 16), nn.ReLU(), down(16, 16)
        self.where, self.h, self.features = where, None, []

    def forward(self, x):
        h = self.act(self.one(x))
        if self.where == "attribute":
            self.h = h
        else:
            (self.features if self.where == "list" else SEEN).append(h)
        return self.two(h)


@pytest.mark.parametrize("where", ["attribute", "list", "global list"])
def test_what_a_forward_keeps_lies_in_memory_as_it_did(where):
    plain, fused = twins(Kept(where))
    x, found = picture(), []
    for model in (plain, fused):
        model(x)
        found.append({"attribute": [model.h], "list": model.features}.get(where, SEEN)[-1])
    assert formats(found[1]) == formats(found[0])
    found[1].view(-1)
    close(found[1], found[0])
    SEEN.clear()


class Counting(Block):
    """Goes another way in every other call, by a count of its own, or by one elsewhere."""

    where = "attribute"

    def __init__(self):
        super().__init__(3, 16)
        self.count = 0

    def forward(self, x):
        if self.where == "attribute":
            self.count += 1
            odd = self.count % 2
        elif self.where == "global":
            COUNTS["calls"] += 1
            odd = COUNTS["calls"] % 2
        else:
            odd = random.random() < 0.5 if self.where == "random" else np.random.rand() < 0.5  # noqa: NPY002
        h = self.conv(x)
        return self.act(self.bn(h) if odd else h)


@pytest.mark.parametrize("where", ["attribute", "global", "random", "numpy"])
def test_a_forward_that_counts_or_throws_dice_runs_as_it_did(where):
    class Net(Counting):
        pass

    Net.where = where
    outs, x = [], picture()
    for model in twins(Net()):
        COUNTS["calls"] = 0
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(0)
        outs.append([model(x) for _ in range(6)])
        states = COUNTS["calls"], model.count
        assert states == ({"global": 6}.get(where, 0), {"attribute": 6}.get(where, 0))
    for mine, theirs in zip(*outs, strict=True):
        close(mine, theirs)
    COUNTS["calls"] = 0


# --- Options that change after fuse ---------------------------------------------------------------

SETTINGS = {"norm": True}
CONFIG = types.SimpleNamespace(model=types.SimpleNamespace(norm=True))
NORM = True


class Config:
    norm = True


class Options:
    def __init__(self):
        self.norm = True
        self.more = {"layers": ["norm"]}


class ByOption(Block):
    def __init__(self):
        super().__init__(3, 16)
        self.options = {"norm": True, "names": ["a"]}
        self.config = Options()
        self.own = {"deep": [{"norm": True}]}
        self.best = float("nan")

    def forward(self, x):
        h = self.conv(x)
        return self.act(self.bn(h) if self.norms() else h)


def by(test, change):
    return type("By", (ByOption,), {"norms": test}), change


closed = {"norm": True}


def closure():
    options = {"norm": True}
    return by(lambda self: options["norm"], lambda m: options.update(norm=False))


OPTIONS = {
    "dict": lambda: by(lambda self: self.options["norm"], lambda m: m.options.update(norm=False)),
    "list in a dict": lambda: by(
        lambda self: "b" not in self.options["names"], lambda m: m.options["names"].append("b")
    ),
    "NaN": lambda: by(lambda self: self.best != self.best, lambda m: setattr(m, "best", 0.5)),
    "key": lambda: by(lambda self: "off" not in self.options, lambda m: m.options.update(off=1)),
    "object": lambda: by(lambda self: self.config.norm, lambda m: setattr(m.config, "norm", False)),
    "list in an object": lambda: by(
        lambda self: "norm" in self.config.more["layers"],
        lambda m: m.config.more["layers"].clear(),
    ),
    "nested": lambda: by(
        lambda self: self.own["deep"][0]["norm"], lambda m: m.own["deep"][0].update(norm=False)
    ),
    "global dict": lambda: by(lambda self: SETTINGS["norm"], lambda m: SETTINGS.update(norm=False)),
    "global object": lambda: by(
        lambda self: CONFIG.model.norm, lambda m: setattr(CONFIG.model, "norm", False)
    ),
    "global": lambda: by(lambda self: NORM, lambda m: globals().update(NORM=False)),
    "class": lambda: by(lambda self: Config.norm, lambda m: setattr(Config, "norm", False)),
    "closure": closure,
    "another module's": lambda: by(lambda self: self.bn.use, lambda m: setattr(m.bn, "use", False)),
    "a child's mode": lambda: by(
        lambda self: self.bn.training == self.training, lambda m: m.bn.eval()
    ),
    "a property": lambda: by(
        lambda self: type(self).flag.fget(self), lambda m: m.options.update(norm=False)
    ),
}


@pytest.fixture
def settings():
    yield
    SETTINGS.update(norm=True)
    CONFIG.model.norm = Config.norm = True
    globals().update(NORM=True)


ELSEWHERE = ("global", "global dict", "global object", "class", "closure")


def with_option(name):
    """(plain, fused, what changes the option of both)."""
    build, change = OPTIONS[name]()
    build.flag = property(lambda self: self.options["norm"])
    model = build()
    model.bn.use = True
    plain, fused = twins(model)
    assert [len(f.names) for f in findings(fused)] == [3]
    return plain, fused, lambda: [change(m) for m in (plain, fused)[name in ELSEWHERE :]]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_changes_after_fuse(name, settings, kernels_run):
    plain, fused, change = with_option(name)
    x = picture()
    close(fused(x), plain(x))
    assert kernels_run
    change()
    kernels_run.clear()
    with pytest.warns(UserWarning, match="changed after fuse"):
        close(fused(x), plain(x))
    assert not kernels_run
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


# PyTorch 2.11 compiles no class's attribute anew, nor does it the plain model.
@pytest.mark.parametrize("name", sorted({*OPTIONS} - {"a child's mode", "object", "class"}))
def test_an_option_that_changes_after_fuse_and_compile(name, settings, monkeypatch):
    calls, whole = [], block.run_block
    monkeypatch.setattr(block, "run_block", lambda *a: calls.append(1) or whole(*a))
    plain, fused, change = with_option(name)
    torch._dynamo.reset()
    run, x = torch.compile(fused, backend="aot_eager", fullgraph=True), picture()
    close(run(x), plain(x))
    assert calls
    change()
    calls.clear()
    close(run(x), plain(x))
    assert not calls
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


# --- Classes that change later --------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = down(3, 16), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)
        self.up, self.tanh = up(16, 3), nn.Tanh()

    def forward(self, x):
        return self.tanh(self.up(self.act(self.bn(self.conv(x)))))


STEPS = {
    "fuse": fuse,
    "unfuse": unfuse,
    "spectral": lambda m: parametrizations.spectral_norm(m.conv) and None,
    "weight norm": lambda m: parametrizations.weight_norm(m.up) and None,
    "orthogonal": lambda m: parametrizations.orthogonal(m.conv) and None,
    "remove": lambda m: [
        parametrize.remove_parametrizations(c, "weight")
        for c in (m.conv, m.up)
        if parametrize.is_parametrized(c, "weight")
    ],
    "old spectral": lambda m: nn.utils.spectral_norm(m.conv) and None,
    "prune": lambda m: prune.l1_unstructured(m.up, "weight", 0.5) and None,
    "sync": lambda m: setattr(m, "bn", nn.SyncBatchNorm.convert_sync_batchnorm(m.bn)),
    "back": lambda m: setattr(m, "bn", nn.BatchNorm2d(16)),
}
ORDERS = [
    "fuse spectral unfuse", "fuse spectral fuse", "spectral fuse unfuse", "spectral fuse remove",
    "fuse spectral unfuse remove", "fuse spectral remove unfuse",
    "spectral fuse unfuse remove fuse",
    "fuse weight norm spectral unfuse fuse remove unfuse", "fuse orthogonal unfuse",
    "fuse old spectral unfuse fuse", "fuse prune unfuse fuse", "prune fuse", "fuse sync back fuse",
    "weight norm fuse remove fuse spectral unfuse remove",
]  # fmt: skip


def steps(order):
    words, at = order.split(), 0
    while at < len(words):
        two = " ".join(words[at : at + 2])
        name = two if two in STEPS else words[at]
        at += len(name.split())
        yield name


@pytest.mark.parametrize("order", ORDERS)
def test_fuse_and_reparametrisations_in_any_order(order):
    plain, fused = Two(), None
    fused = copy.deepcopy(plain)
    x = picture()
    for name in steps(order):
        for model in (plain, fused):
            torch.manual_seed(1)
            if model is fused or name not in ("fuse", "unfuse"):
                STEPS[name](model)
        if name != "sync":  # which does not run on a CPU
            for training in (True, False):
                close(fused.train(training)(x), plain.train(training)(x))
            assert list(fused.state_dict()) == list(plain.state_dict())
            for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
                close(mine, theirs)
        assert type(fused.conv).__name__.replace("Fused", "") == type(plain.conv).__name__
        assert isinstance(fused.conv, nn.Conv2d)
    unfuse(fused)
    kinds = [[type(m).__mro__[-3:] for m in model.modules()] for model in (plain, fused)]
    assert kinds[0] == kinds[1]
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_parametrised_attributes_are_fused_and_their_vector_moves_once_a_call(kernels_run):
    plain, fused = Two(), None
    parametrizations.spectral_norm(plain.conv)
    fused = fuse(copy.deepcopy(plain))
    assert [len(f.names) for f in findings(fused)] == [3, 2]
    x = picture()
    for _ in range(3):
        close(fused(x), plain(x))
    assert len(kernels_run) == 6
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


# --- Function transforms --------------------------------------------------------------------------

TRANSFORMED = {"sequential": lambda: chain()[:5], "attributes": Two}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_function_transforms(name):
    plain, fused = twins(TRANSFORMED[name]().eval())
    x, v = picture(), picture()
    calls = {
        "jvp": lambda m: torch.func.jvp(m, (x,), (v,)),
        "grad": lambda m: torch.func.grad(lambda x: m(x).square().sum())(x),
        "vjp": lambda m: torch.func.vjp(m, x)[1](torch.ones_like(m(x))),
        "vmap": lambda m: torch.func.vmap(m)(torch.stack([x, v])),
        "of parameters": lambda m: torch.func.grad(
            lambda p: torch.func.functional_call(m, p, (x,)).square().sum()
        )(dict(m.named_parameters())),
        "of each sample": lambda m: torch.func.vmap(
            torch.func.grad(
                lambda p, x: torch.func.functional_call(m, p, (x[None],)).square().sum()
            ),
            (None, 0),
        )({n: p.detach() for n, p in m.named_parameters()}, x),
        "hvp": lambda m: torch.func.jvp(torch.func.grad(lambda x: m(x).square().sum()), (x,), (v,)),
        "jacrev": lambda m: torch.func.jacrev(lambda s: m(x * s).mean((1, 2, 3)))(torch.ones(())),
        "jacfwd": lambda m: torch.func.jacfwd(lambda s: m(x * s).mean((1, 2, 3)))(torch.ones(())),
        "linearize": lambda m: torch.func.linearize(m, x)[1](v),
        "batched gradients": lambda m: torch.autograd.functional.jacobian(
            lambda s: m(x * s).mean((1, 2, 3)), torch.ones(()), vectorize=True
        ),
        "forward mode": lambda m: _dual(m, x, v),
        "forward mode of weights": lambda m: _dual_weights(m, x),
        "double backward": lambda m: torch.autograd.functional.hvp(
            lambda x: m(x).square().sum(), x, v
        ),
    }
    for what, call in calls.items():
        mine, theirs = call(fused), call(plain)
        leaves = [torch.utils._pytree.tree_leaves(found) for found in (mine, theirs)]
        assert len(leaves[0]) == len(leaves[1])
        for own, other in zip(*leaves, strict=True):
            close(own, other), what


def _dual(model, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent


def _dual_weights(model, x):
    given = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, given[n]) for n, p in model.named_parameters()}
        return forward_ad.unpack_dual(torch.func.functional_call(model, duals, (x,))).tangent


def test_transforms_of_the_blocks_as_functions():
    from fastdcgan_kernels import conv_act, conv_bn_act

    weight, gamma, beta = torch.randn(16, 3, 4, 4), torch.rand(16), torch.rand(16)
    options = {"stride": 2, "padding": 1, "activation": "relu"}

    def mine(x):
        h = conv_act(x, weight, None, **options)
        return conv_bn_act(
            h, weight.new_ones(16, 16, 4, 4), None, gamma, beta, None, None, training=True,
            momentum=0.1, eps=1e-5, **options,
        )  # fmt: skip

    def theirs(x):
        h = F.conv2d(x, weight, None, 2, 1).relu()
        y = F.conv2d(h, weight.new_ones(16, 16, 4, 4), None, 2, 1)
        return F.batch_norm(y, None, None, gamma, beta, True).relu()

    x, v = picture(), picture()
    for a, b in zip(torch.func.jvp(mine, (x,), (v,)), torch.func.jvp(theirs, (x,), (v,)),
                    strict=True):  # fmt: skip
        close(a, b)
    close(torch.func.vmap(mine)(x[None]), torch.func.vmap(theirs)(x[None]))


# --- Modes inside a block -------------------------------------------------------------------------


class Modes(Block):
    """Its convolution in one mode, its norm in another."""

    def __init__(self, mode):
        super().__init__(3, 16)
        self.mode = mode

    def forward(self, x):
        with self.mode():
            h = self.conv(x)
        return self.act(self.bn(h.clone() if self.mode is torch.inference_mode else h))


class Frozen(Block):
    def forward(self, x):
        with torch.set_grad_enabled(not self.training):
            h = self.conv(x)
        return self.act(self.bn(h))


def cast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Modes(torch.no_grad),
        lambda: Modes(cast),
        lambda: Modes(torch.inference_mode),
        Frozen,
    ],
    ids=["no_grad", "autocast", "inference_mode", "set_grad_enabled"],
)
def test_a_block_runs_in_one_mode(build):
    plain, fused = twins(build())
    x = picture()
    for model in (plain, fused):
        model(x).sum().backward()
    close(fused(x), plain(x))
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-3)


# --- Recomputation --------------------------------------------------------------------------------

CHECKPOINTED = {
    "sequential": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "in parts": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_checkpoints_move_the_buffers_as_they_did(how, momentum):
    model = nn.Sequential(
        down(3, 16), nn.BatchNorm2d(16, momentum=momentum), nn.ReLU(),
        down(16, 32), nn.BatchNorm2d(32, momentum=momentum), nn.LeakyReLU(0.2),
    )  # fmt: skip
    plain, fused = twins(model)
    x = picture()
    for net in (plain, fused):
        for _ in range(2):
            CHECKPOINTED[how](net, x.clone().requires_grad_()).square().sum().backward()
    for (name, mine), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        close(mine, theirs), name
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)


class Inside(nn.Module):
    """Checkpoints parts of its own forward, which are called again without the rest of it."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.act = down(3, 16), nn.BatchNorm2d(16), nn.ReLU()
        self.block, self.how = Block(16, 16), how

    def forward(self, x):
        if self.how == "one module":
            h = self.act(self.bn(checkpoint(self.conv, x, use_reentrant=False)))
        elif self.how == "a lambda":
            h = checkpoint(lambda x: self.act(self.bn(self.conv(x))), x, use_reentrant=False)
        elif self.how == "reentrant":
            h = checkpoint(lambda x: self.act(self.bn(self.conv(x))), x, use_reentrant=True)
        else:
            with torch.autograd.graph.save_on_cpu():
                h = self.conv(x)
            h = self.act(self.bn(h))
        return checkpoint(self.block, h, use_reentrant=False)


@pytest.mark.parametrize("how", ["one module", "a lambda", "reentrant", "save on cpu"])
def test_checkpoints_inside_a_forward(how):
    plain, fused = twins(Inside(how))
    assert any(f.fused for f in findings(fused))
    x = picture()
    for net in (plain, fused):
        net(x.clone().requires_grad_()).square().sum().backward()
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)


def test_two_backward_passes_through_one_forward():
    plain, fused = twins(chain())
    x = picture()
    for model in (plain, fused):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)


# --- Tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Two, chain, lambda: nn.Sequential(Block(3, 16))])
def test_symbolic_traces_are_those_of_the_plain_model(build):
    plain, fused = twins(build())
    graphs = []
    for model in (plain, fused):
        traced = fx.symbolic_trace(model)
        graphs.append([(n.op, str(n.target)) for n in traced.graph.nodes])
        x = torch.ones(2, 3, 16, 16)
        close(traced(x), plain(x))
    assert graphs[0] == graphs[1]


def test_torchvisions_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    for build, nodes in ((Two, ["bn", "up"]), (chain, ["1", "5.1"])):
        plain, fused = twins(build().eval())
        assert get_graph_node_names(fused) == get_graph_node_names(plain)
        x = picture()
        mine, theirs = (create_feature_extractor(m, nodes)(x) for m in (fused, plain))
        assert mine.keys() == theirs.keys()
        for name in mine:
            close(mine[name], theirs[name])


@pytest.mark.parametrize("build", [Two, chain])
def test_torchscript_and_export_hold_no_operator_of_ours(build, tmp_path):
    plain, fused = twins(build().eval())
    x = picture()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(fused, x)
    assert "fastdcgan::" not in str(traced.inlined_graph)
    close(traced(x), plain(x))
    for strict in (False, True):
        program = torch.export.export(fused, (x,), strict=strict)
        assert "fastdcgan" not in str(program.graph)
        close(program.module()(x), plain(x))
    made = torch.fx.experimental.proxy_tensor.make_fx(fused)(x)
    assert "fastdcgan" not in str(made.graph)
    close(made(x), plain(x))
    close(fused(x), plain(x))


def test_onnx():
    import onnxruntime

    plain, fused = twins(Two().eval())
    x, file = picture(), io.BytesIO()
    torch.onnx.export(fused, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(out), plain(x))


def test_torch_jit_script():
    """A fused nn.Sequential is compiled as the plain one; a module whose attributes are fused has
    hooks that cannot be compiled, so it is unfused for as long."""
    plain, fused = twins(chain().eval())
    x = picture()
    close(torch.jit.script(fused)(x), plain(x))
    assert findings(fused)
    close(fused(x), plain(x))
    plain, fused = twins(Two().eval())
    with unfused(fused) as model:
        scripted = torch.jit.script(model)
    close(scripted(x), plain(x))
    assert [len(f.names) for f in findings(fused)] == [3, 2]


def test_what_asks_for_classes_sees_the_plain_ones_unfused():
    fused = fuse(nn.ModuleDict({"a": Two(), "b": chain()}))
    kinds = [type(m) for m in fused.modules()]
    with unfused(fused) as model:
        assert model is fused
        assert sum(type(m) is nn.Conv2d for m in model.modules()) == 3
        assert sum(type(m) is nn.Sequential for m in model.modules()) == 2
    assert [type(m) for m in fused.modules()] == kinds
    with unfused(fused["a"]) as part:
        assert type(part.conv) is nn.Conv2d
        assert type(fused["b"]) is kinds[[*fused.modules()].index(fused["b"])]
    assert [type(m) for m in fused.modules()] == kinds
    plain = nn.Sequential(nn.Linear(2, 2))
    with unfused(plain):
        pass
    assert findings(plain) == ()


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training_is_the_plain_models_or_an_error():
    from torch.ao import quantization

    plain, fused = twins(chain())
    x, outs = picture(), []
    for model in (plain, fused):
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        prepared = quantization.prepare_qat(model)
        outs.append(prepared(x))
        assert type(prepared[0]).__module__.startswith("torch.ao")
    close(outs[1], outs[0])
    fused = fuse(Two())
    fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with pytest.raises(TypeError, match="unfuse"):
        quantization.prepare_qat(fused)
    with unfused(fused) as model:
        prepared = quantization.prepare_qat(model)
    assert type(prepared.conv).__module__.startswith("torch.ao")
    assert prepared(x).shape == x.shape


def test_an_interrupted_forward_leaves_nothing_behind():
    class Interrupted(Two):
        interrupt = False

        def forward(self, x):
            h = self.conv(x)
            self.pause(h)
            return self.tanh(self.up(self.act(self.bn(h))))

        def pause(self, h):
            pass

    plain, fused = twins(Interrupted())

    def interrupt(h):
        raise KeyboardInterrupt

    x = picture()
    fused.bn.register_forward_pre_hook(lambda m, args: interrupt(None))
    with pytest.raises(KeyboardInterrupt):
        fused(x)
    fused.bn._forward_pre_hooks.clear()
    close(fused.conv(x), plain.conv(x))
    close(fused(x), plain(x))
    assert not block._calls
    close(fused.conv(x), plain.conv(x))


class Recursive(Block):
    """Calls itself between its convolution and its norm."""

    def forward(self, x):
        h = self.conv(x)
        if x.shape[0] > 1:
            h = h + self(x[:1]).mean() * 0
        return self.act(self.bn(h))


class Nested(Block):
    def __init__(self, inner=None):
        super().__init__(3, 16)
        self.inner = [inner]

    def forward(self, x):
        h = self.act(self.bn(self.conv(x)))
        return h + self.inner[0](x) if self.inner[0] is not None else h


def test_forwards_that_call_each_other():
    plain, fused = twins(Nested(Nested()))
    fuse(fused.inner[0])
    x = picture()
    close(fused(x), plain(x))
    plain, fused = twins(Recursive())
    close(fused(x), plain(x))


# --- Forwards that look at, or change, what lies inside a block -----------------------------------


class Spy(Block):
    """Does something between its modules, as the class attribute says."""

    def __init__(self):
        super().__init__(3, 16)
        self.kept, self.listed, self.named = None, [], {}
        self.gain = nn.Parameter(torch.rand(16))
        self.mask, self.call = np.ones(2), no_change
        self.generator = random.Random(3)

    def forward(self, x):
        h = self.between(self.conv(x))
        return self.act(self.bn(h))

    def between(self, h):
        return h


def no_change(h):
    return h


def spy(between, forward=None):
    body = {"between": between} | ({"forward": forward} if forward else {})
    return type("Spying", (Spy,), body)


def kept_by(store):
    def between(self, h):
        store(self, h)
        return h

    return spy(between)


def conv_and_norm_apart(self, x):
    h = checkpoint(self.conv, x, use_reentrant=True)
    return self.act(checkpoint(self.bn, h, use_reentrant=True))


def norm_again(self, x):
    return checkpoint(lambda h: self.act(self.bn(h)), self.conv(x), use_reentrant=False)


def argument_keeps(self, x):
    h = x.kept = self.conv(x)
    return self.act(self.bn(h))


def half(self, h):
    return h * 0.5 if self.generator.random() < 0.5 else h


def dice(self, h):
    return h * 0.5 if torch.rand(1, device="cpu").item() < 0.5 else h


def new_weight(self, h):
    self.bn.weight.data = self.gain * 2
    return h


def clamped(self, h):
    with torch.no_grad():
        self.bn.weight.clamp_(0.9, 0.95)
    return h


def frozen(self, x):
    h = self.conv(x)
    self.bn.eval()
    h = self.bn(h)
    self.bn.train(self.training)
    return self.act(h)


def without_gradients(self, h):
    if not torch.is_grad_enabled():
        self.kept = h
    return h


SPIES = {
    "attribute": kept_by(lambda self, h: setattr(self, "kept", h)),
    "list": kept_by(lambda self, h: self.listed.append(h)),
    "dict": kept_by(lambda self, h: self.named.update(h=h)),
    "global list": kept_by(lambda self, h: SEEN.append(h)),
    "argument": spy(Spy.between, argument_keeps),
    "two checkpoints": spy(Spy.between, conv_and_norm_apart),
    "the norm again": spy(Spy.between, norm_again),
    "own dice": spy(half),
    "dice of torch": spy(dice),
    "new weight": spy(new_weight),
    "clamped": spy(clamped),
    "frozen": spy(Spy.between, frozen),
    "without gradients": spy(without_gradients),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SPIES)
def test_forwards_that_look_inside_a_block(name, grad):
    plain, fused = twins(SPIES[name]())
    x, found = picture(), []
    for model in (plain, fused):
        SEEN.clear()
        torch.manual_seed(2)
        for _ in range(3):
            given = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                out = model(given)
            if grad and name != "clamped":
                out.exp().mean().backward()
        kept = [model.kept, *model.listed, *model.named.values(), *SEEN, vars(given).get("kept")]
        found.append([out, given.grad, *kept, *(p.grad for p in model.parameters())])
    for theirs, mine in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            close(mine, theirs)
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)
    SEEN.clear()


def skips(self, x):
    h = self.conv(x)
    return self.act(self.bn(h)) + h


def by_mask(self, h):
    return h if self.mask[0] else h * 3


def by_call(self, h):
    return self.call(h)


def by_environment(self, h):
    return h * 3 if os.environ.get("TRIPLE") else h


def by_many(self, h):
    return h * 3 if 7 in self.listed else h


LATER = {
    "forward of the instance": (Spy, lambda m, p: setattr(m, "forward", skips.__get__(m))),
    "forward of the class": (
        spy(Spy.between), lambda m, p: p.setattr(type(m), "forward", skips),
    ),
    "method": (spy(Spy.between), lambda m, p: p.setattr(type(m), "between", lambda s, h: h * 3)),
    "method of the instance": (
        spy(Spy.between), lambda m, p: setattr(m, "between", lambda h: 3 * h),
    ),
    "array": (spy(by_mask), lambda m, p: m.mask.fill(0)),
    "function": (spy(by_call), lambda m, p: setattr(m, "call", lambda h: h * 3)),
    "global function": (
        spy(lambda self, h: no_change(h)),
        lambda m, p: p.setitem(globals(), "no_change", lambda h: 3 * h),
    ),
    "environment": (spy(by_environment), lambda m, p: p.setenv("TRIPLE", "1")),
    "many values": (spy(by_many), lambda m, p: m.listed.extend(range(3000))),
    "compiled norm": (Spy, lambda m, p: m.bn.compile(backend="eager")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:attributes of")
@pytest.mark.parametrize("name", LATER)
def test_what_changes_later_changes_the_fused_model_too(name, monkeypatch):
    build, change = LATER[name]
    plain, fused = twins(build())
    x = picture()
    close(fused(x), plain(x))
    before = plain(x), fused(x)
    for model in (plain, fused):
        change(model, monkeypatch)
    out, expected = fused(x), plain(x)
    close(out, expected)
    assert name == "compiled norm" or not torch.allclose(expected, before[0])
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


REGISTRY = []


class Registered(Spy):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY.append(cls)


class Elsewhere(Registered):
    """Writes to state of many kinds."""

    def forward(self, x):
        QUEUE.append(x)
        TENSOR.add_(1)
        ARRAY.__iadd__(1)
        noise = NUMPY.random() * 0 + torch.rand(1, generator=TORCH).item() * 0
        cached(4, {})
        return super().forward(x) + noise


QUEUE, TENSOR, ARRAY = collections.deque(), torch.zeros(2), np.zeros(2)
NUMPY, TORCH = np.random.default_rng(0), torch.Generator()


def cached(n, key, cache={}):  # noqa: B006
    return cache.setdefault(n, torch.arange(n))


def test_reading_leaves_no_trace_in_what_is_shared():
    model = Elsewhere()
    states = str(NUMPY.bit_generator.state), TORCH.get_state().clone()
    fuse(model)
    assert [kind.__name__ for kind in REGISTRY] == ["Elsewhere"]
    assert not Elsewhere.__subclasses__()
    assert not QUEUE
    assert not TENSOR.any()
    assert not ARRAY.any()
    assert not cached.__defaults__[0]
    assert str(NUMPY.bit_generator.state) == states[0]
    assert torch.equal(TORCH.get_state(), states[1])
    with cProfile.Profile() as profile:
        assert any(f.fused for f in findings(fuse(Two())))
        Two()(picture())
    names = {key[2] for key in pstats.Stats(profile).stats}
    assert "conv2d" in str(names)


@pytest.mark.parametrize("change", [
    lambda out: out.sigmoid_(), lambda out: out.clamp_(-1, 1), lambda out: out.view(-1).mul_(2),
])  # fmt: skip
def test_outputs_of_one_pixel_and_one_channel_may_be_changed_in_place(change):
    to_grey = lambda: nn.Sequential(down(1, 16), nn.ReLU(), up(16, 1))  # noqa: E731
    for build, x in ((MODELS["to one pixel"], picture()), (to_grey, picture(c=1))):
        plain, fused = twins(build())
        for model in (plain, fused):
            change(model(x)).sum().backward()
        for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
            close(mine.grad, theirs.grad)


def test_tensors_of_other_layouts():
    plain, fused = twins(nn.Sequential(down(3, 16), nn.ReLU()).eval())
    x = picture()
    with torch.no_grad():
        close(fused(x.to_mkldnn()).to_dense(), plain(x.to_mkldnn()).to_dense())


# --- How much runs fused --------------------------------------------------------------------------


def direct(conv, pixels):
    """Multiplications of a convolution: each weight meets each of these pixels."""
    return conv.weight.numel() * pixels


def test_share_and_findings_count_multiplications(capsys):
    model = nn.Sequential(
        down(3, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 2, 2),
        up(16, 16), nn.BatchNorm2d(16), nn.Tanh(),
    )  # fmt: skip
    x = picture()
    state = snapshot(model)
    counts = [direct(model[at], 2 * 8 * 8) for at in (0, 3, 4)]
    assert share(model, x) == 0
    fuse(model, verbose=True, example=x)
    expected = 1 - counts[1] / sum(counts)
    assert share(model, x) == pytest.approx(expected)
    parts = {f.names[0]: f.part for f in findings(model)}
    assert parts == pytest.approx(dict(zip("034", (n / sum(counts) for n in counts), strict=True)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"fused kernels do {expected:.1%} of the convolutions' multiplications on this input"
    )
    assert f"({parts['3']:.1%}): dilation, groups" in "".join(lines)
    assert {n: v.tolist() for n, v in model.state_dict().items()} == {
        n: v.tolist() for n, v in state.items()
    }
    with pytest.raises(RuntimeError, match="channels"):
        fuse(model, example=picture(c=5))
    assert [f.part for f in findings(model)] == [None] * 3
    close(model(x), unfuse(copy.deepcopy(model))(x))
    with pytest.raises(ValueError, match="runs no convolution"):
        share(nn.Linear(3, 3), torch.ones(2, 3))


def test_share_leaves_no_trace(implementation):
    model = fuse(Noisy())
    state = snapshot(model)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert share(model, picture()) == 1
    picture()
    torch.manual_seed(1)
    share(model, torch.ones(2, 3, 16, 16))
    assert torch.equal(torch.rand(2), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.h is None
    assert not model.features
    SEEN.clear()
    COUNTS.pop("last")


def test_what_no_kernel_takes_is_not_counted_as_fused(monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    model = fuse(nn.Sequential(down(3, 16), nn.ReLU()))
    wide = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert share(model.double(), wide) == 0
    close(model(wide), unfuse(copy.deepcopy(model))(wide))
