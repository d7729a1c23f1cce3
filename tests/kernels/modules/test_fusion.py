"""fuse() on the models that people have: whatever they do, the numbers, the gradients, the buffers
and the keys are those of the model that was not fused. The twin is plain PyTorch in float64."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fastdcgan_kernels import KerasBatchNorm2d, findings, functional, fuse, unfuse
from fastdcgan_kernels.modules import block
from tests.kernels.modules.layers import down, up

BLOCKS = (block.FusedSequential, block.FusedConv2d, block.FusedConvTranspose2d)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Blocks run the kernels (in the interpreter), or raise."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    torch.manual_seed(0)


@pytest.fixture
def blocks_run(monkeypatch):
    """How many blocks were run as such."""
    calls = []
    whole = block.run_block
    monkeypatch.setattr(block, "run_block", lambda *a: calls.append(a) or whole(*a))
    return calls


def picture(n=3, c=3, side=8):
    return torch.randn(n, c, side, side)


def close(mine, theirs, what=""):
    """float32 through a few layers, forth and back, against float64. Values are around 1, but for
    gradients that are 0 in exact arithmetic (a bias's before a norm): sums of up to 1000 values."""
    size = theirs.double().square().mean().sqrt()
    size = size if size > 1e-8 else 10.0
    error = (mine.double() - theirs.double()).square().mean().sqrt() / size
    assert error <= 2e-5, (what, error.item())


def same(plain, fused, *inputs, modes=(True, False)):
    """Output, gradients and buffers of a fused model are those of its plain twin."""
    twin = copy.deepcopy(plain).double()
    assert list(fused.state_dict()) == list(plain.state_dict())
    for training in modes:
        for model in (twin, fused):
            model.train(training)
        own = [x.clone().requires_grad_() for x in inputs]
        wide = [x.double().requires_grad_() for x in inputs]
        for model in (fused, twin):
            model.zero_grad()
        out, expected = fused(*own), twin(*wide)
        close(out, expected, "output")
        upstream = torch.randn(out.shape)
        out.backward(upstream)
        expected.backward(upstream.double())
        pairs = list(zip(own, wide, strict=True))
        pairs += zip(fused.parameters(), twin.parameters(), strict=True)
        for mine, theirs in pairs:
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                close(mine.grad, theirs.grad, "gradient")
        for (name, mine), theirs in zip(fused.named_buffers(), twin.buffers(), strict=True):
            close(mine, theirs, name)


def fused_twin(model):
    return model, fuse(copy.deepcopy(model))


# --- Models written as nn.Sequential --------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnConvInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnNormOfImages(nn.InstanceNorm2d):
    def _apply_instance_norm(self, x):
        return super()._apply_instance_norm(x) + 1


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return x.clamp(max=0.5)


def twice_the_same():
    block = nn.Sequential(down(3, 3), nn.BatchNorm2d(3), nn.ReLU())
    return nn.Sequential(block, block)


def one_weight_for_two():
    first, second = down(3, 3), down(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(3))


SEQUENTIALS = {
    # name: (model, blocks that run in one call)
    "conv": (lambda: nn.Sequential(down(3, 4, True)), 1),
    "conv norm act": (lambda: nn.Sequential(down(3, 4), nn.BatchNorm2d(4), nn.ReLU()), 1),
    "up": (lambda: nn.Sequential(up(3, 4), nn.BatchNorm2d(4), nn.Tanh(), up(4, 2), nn.Tanh()), 2),
    "act in place": (
        lambda: nn.Sequential(down(3, 4, True), nn.LeakyReLU(0.2, True), down(4, 2), nn.ReLU(True)),
        2,
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(down(3, 4), nn.Sequential(nn.BatchNorm2d(4))),
            nn.Sequential(nn.ReLU(), nn.Sequential(down(4, 2), nn.Tanh())),
        ),
        2,
    ),
    "twice the same": (twice_the_same, 2),
    "one weight for two": (one_weight_for_two, 2),
    "others between": (
        lambda: nn.Sequential(
            down(3, 4), nn.Identity(), nn.BatchNorm2d(4), nn.GELU(), down(4, 4), nn.ReLU6()
        ),
        2,
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), down(3, 4)), 1),
    "instance norm": (
        lambda: nn.Sequential(
            down(3, 4, True), nn.InstanceNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 5, 3, 1, 1),
            nn.InstanceNorm2d(5, affine=True, eps=0.1), nn.ELU(0.3), up(5, 2), nn.BatchNorm2d(2),
        ),
        3,
    ),
    "instance norm with statistics": (
        lambda: nn.Sequential(down(3, 4), nn.InstanceNorm2d(4, track_running_stats=True)), 1,
    ),
    "another norm": (lambda: nn.Sequential(down(3, 4), nn.GroupNorm(2, 4), nn.ReLU()), 1),
    "activations": (
        lambda: nn.Sequential(
            down(3, 4), nn.SiLU(), down(4, 5), nn.BatchNorm2d(5), nn.GELU(), up(5, 4), nn.ELU(),
            up(4, 4), nn.BatchNorm2d(4), nn.SiLU(True), down(4, 3), nn.Sigmoid(),
        ),
        5,
    ),
    "other activations": (
        lambda: nn.Sequential(
            down(3, 4), nn.Softplus(), up(4, 4), nn.GELU("tanh"), down(4, 4), nn.PReLU(), up(4, 4),
            nn.ELU(-0.5), down(4, 4), nn.CELU(),
        ),
        5,
    ),
    "own conv": (lambda: nn.Sequential(OwnConv(3, 4, 4, 2, 1), nn.BatchNorm2d(4)), 0),
    "own conv inside": (lambda: nn.Sequential(OwnConvInside(3, 4, 4, 2, 1), nn.ReLU()), 0),
    "own norm": (lambda: nn.Sequential(down(3, 4), OwnNorm(4), nn.ReLU()), 1),
    "own norm of images": (lambda: nn.Sequential(down(3, 4), OwnNormOfImages(4), nn.ReLU()), 1),
    "own relu": (lambda: nn.Sequential(down(3, 4), nn.BatchNorm2d(4), OwnReLU()), 1),
    "own forward": (lambda: OwnForward(down(3, 4), nn.BatchNorm2d(4)), 1),
    "3x3": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()), 1),
    "8x8": (lambda: nn.Sequential(nn.Conv2d(3, 4, 8, 2, 4), nn.BatchNorm2d(4), nn.ReLU()), 0),
    "3x4": (lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 4)), nn.BatchNorm2d(4), nn.ReLU()), 0),
    "stride 3": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.BatchNorm2d(4), nn.ReLU()), 0),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU()), 1),
    "two paddings": (lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 2, (2, 0)), nn.ReLU()), 1),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, dilation=2), nn.ReLU()), 0),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1, groups=3), nn.ReLU()), 0),
    "reflecting": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, padding_mode="reflect"), nn.ReLU()), 0,
    ),
    "valid": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="valid"), nn.ReLU()), 1),
    "output padding": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 5, 2, 2, output_padding=(1, 0)), nn.ReLU()),
        1,
    ),
    "zeros before": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((1, 2, 0, 2)), nn.Conv2d(3, 4, 5, 2, bias=True), nn.LeakyReLU(0.2),
            nn.Dropout(0.0), nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(4, 4, 2),
        ), 3,
    ),
    "cut off": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 5, 2, 1), nn.ZeroPad2d((0, -1, -1, -2)), nn.BatchNorm2d(4),
            nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 2), nn.ZeroPad2d((-1, 0, 0, -2)), nn.Tanh(),
        ), 2,
    ),
    "zeros that are none of a block": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((1, -1, 0, 0)), down(3, 4), nn.ZeroPad2d(1), nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 3), nn.ZeroPad2d((1, -1, 0, 0)), nn.ReLU(), nn.ZeroPad2d(2),
        ), 2,
    ),
    "Keras's norm": (
        lambda: nn.Sequential(down(3, 4), KerasBatchNorm2d(4, 1e-3, 0.01), nn.LeakyReLU(0.3)), 1,
    ),
    "Keras's norm, cumulative": (
        lambda: nn.Sequential(down(3, 4), KerasBatchNorm2d(4, momentum=None), nn.ReLU()), 1,
    ),
    "no affine": (lambda: nn.Sequential(down(3, 4), nn.BatchNorm2d(4, affine=False)), 1),
    "no statistics": (
        lambda: nn.Sequential(down(3, 4), nn.BatchNorm2d(4, track_running_stats=False)), 1,
    ),
    "cumulative": (lambda: nn.Sequential(down(3, 4), nn.BatchNorm2d(4, momentum=None)), 1),
    "negative slope": (lambda: nn.Sequential(down(3, 4), nn.LeakyReLU(-0.5)), 1),
    "weight_norm": (
        lambda: nn.Sequential(
            torch.nn.utils.parametrizations.weight_norm(down(3, 4)), nn.LeakyReLU(0.2)
        ),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_sequentials(name, blocks_run):
    build, count = SEQUENTIALS[name]
    plain, fused = fused_twin(build())
    same(plain, fused, picture(3, 3, 8))
    assert len(blocks_run) == 2 * count


@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_of_both_kinds(old):
    """Each forward in training moves its vector once; the old kind is a hook."""
    apply = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(apply(down(3, 4)), nn.LeakyReLU(0.2), apply(down(4, 2)))
    plain, fused = fused_twin(model)
    for training in (True, True, False):
        plain.train(training)
        fused.train(training)
        x = picture()
        close(fused(x), plain(x))
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pruning():
    model = nn.Sequential(down(3, 4), nn.BatchNorm2d(4), nn.ReLU())
    fused = fuse(copy.deepcopy(model))
    for net in (model, fused):
        prune.l1_unstructured(net[0], "weight", 0.5)
    x = picture()
    close(fused(x), model(x))


def test_lazy_modules_before_and_after_they_are_made(blocks_run):
    model = nn.Sequential(nn.LazyConv2d(4, 4, 2, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    fuse(model)
    model(picture())
    assert not blocks_run
    plain, model = fused_twin(model)
    same(plain, model, picture())
    assert len(blocks_run) == 2


# --- Models that call attributes ------------------------------------------------------------------


class Attributes(nn.Module):
    """Most DCGANs on the web, with what else is found in them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = down(3, 4, True), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = down(4, 5), nn.BatchNorm2d(5)
        self.conv3 = up(5, 2)
        self.act, self.tanh = nn.LeakyReLU(0.2, inplace=True), nn.Tanh()
        self.use_norm = True

    def forward(self, x, extra=None, keep=False):
        h = self.act(self.bn1(self.conv1(x)))
        if extra is not None:
            h = h + extra
        h = self.conv2(h)
        h = self.act(self.bn2(h) if self.use_norm else h)
        if keep:
            return h
        return self.tanh(self.conv3(h))

    def features(self, x):
        return self.conv1(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = down(3, 4), nn.BatchNorm2d(4), up(4, 2)

    def forward(self, x):
        return torch.tanh(self.out(F.relu(self.bn(self.conv(x)), inplace=True)))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = down(3, 4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        h = self.conv(x)
        return self.relu(self.bn(h)) + h


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = down(3, 3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(self.relu(self.bn(self.conv(x))))))


class OneReLU(nn.Module):
    """The relu follows a block, and something else, and itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.relu = down(3, 4), down(4, 4), nn.LeakyReLU(0.3)

    def forward(self, x):
        h = self.relu(self.relu(self.conv(x)))
        return self.relu(self.other(h) + 1)


class Images(nn.Module):
    """Norms of single images, and a sigmoid, among attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = down(3, 4), nn.InstanceNorm2d(4, affine=True), nn.SiLU()
        self.up, self.norm2, self.gelu = up(4, 5), nn.InstanceNorm2d(5), nn.GELU()
        self.last, self.sigmoid = down(5, 2, True), nn.Sigmoid()

    def forward(self, x):
        h = self.gelu(self.norm2(self.up(self.act(self.norm(self.conv(x))))))
        return self.sigmoid(self.last(h))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([down(3, 4), down(4, 5)])
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(5)})

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms.values(), strict=True):
            x = norm(conv(x)).relu()
        return x


class Inner(nn.Module):
    def __init__(self, ci, co):
        super().__init__()
        self.conv, self.bn, self.relu = down(ci, co), nn.BatchNorm2d(co), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Outer(nn.Module):
    """Calls one child whole, and the children of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Inner(3, 4), Inner(4, 5)

    def forward(self, x):
        h = self.a(x)
        return self.b.bn(self.b.conv(h))


class OnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = down(3, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.conv(x)
        return self.bn(h) if h.sum() > -1e9 else h


class OnMode(nn.Module):
    """A norm in training alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = down(3, 4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        h = self.conv(x)
        return self.relu(self.bn(h) if self.training else h)


class Between(nn.Module):
    """Something happens in place between the convolution and the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = down(3, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.conv(x)
        h.mul_(2)
        h += 1
        return self.bn(h)


class OutputSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.bn = nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.up(x, output_size=[17, 17]))


class Holder(nn.Module):
    """A Sequential inside an own module, and whole blocks in attributes."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(down(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = down(4, 2)

    def forward(self, x):
        return self.head(self.main(x))


MODULES = {
    # name: (model, blocks that run in one call)
    "attributes": (Attributes, 3),
    "functional": (Functional, 2),
    "skip": (Skip, 1),
    "twice": (Twice, 0),
    "one relu": (OneReLU, 2),
    "images": (Images, 3),
    "lists": (Lists, 2),
    "outer": (Outer, 1),
    "on data": (OnData, 0),
    "on mode": (OnMode, 0),
    "between": (Between, 1),
    "output size": (OutputSize, 0),
    "holder": (Holder, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, blocks_run):
    build, count = MODULES[name]
    plain, fused = fused_twin(build())
    same(plain, fused, picture())
    assert len(blocks_run) == 2 * count
    assert not block._calls, "a call was left open"


def test_a_convolution_called_by_itself_is_itself():
    plain, fused = fused_twin(Attributes())
    x = picture()
    for call in (lambda m: m.features(x), lambda m: m.conv1(x), lambda m: m.bn1(m.conv1(x))):
        torch.testing.assert_close(call(fused), call(plain))
    close(fused(x), plain(x))
    torch.testing.assert_close(fused.features(x), plain.features(x))
    noise = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(fused.bn1(noise), plain.bn1(noise))
    torch.testing.assert_close(fused.act(noise.clone()), plain.act(noise.clone()))


def test_other_arguments_run_as_before():
    plain, fused = fused_twin(Attributes())
    x, extra = picture(), torch.randn(3, 4, 4, 4)
    close(fused(x, extra), plain(x, extra))
    close(fused(x, keep=True), plain(x, keep=True))
    close(fused(x=x), plain(x=x))


def test_changed_attributes_run_as_before_and_say_so():
    plain, fused = fused_twin(Attributes())
    x = picture()
    plain.use_norm = fused.use_norm = False
    with pytest.warns(UserWarning, match="attributes of Attributes changed"):
        torch.testing.assert_close(fused(x), plain(x))
    close(fuse(fused)(x), plain(x))
    plain.use_norm = fused.use_norm = True
    with pytest.warns(UserWarning, match="call fuse again"):
        torch.testing.assert_close(fused(x), plain(x))


class Clock:
    """What no comparison sees: it has no attributes, as a file or a clock."""

    __slots__ = ()
    norm, norm_first = True, True

    def __call__(self):
        return Clock.norm


clock = Clock()


class OnClock(OnMode):
    def forward(self, x):
        h = self.conv(x)
        return self.relu(self.bn(h) if clock() else h)


class OnClocksOrder(OnMode):
    def forward(self, x):
        first, second = (self.bn, self.relu) if clock() else (self.relu, self.bn)
        return second(first(self.conv(x)))


@pytest.mark.parametrize("build", [OnClock, OnClocksOrder])
def test_another_way_that_nothing_foretold_raises(build, monkeypatch):
    """Rather than a wrong number."""
    model = fuse(build())
    model._fuse_reading.seen.clear()
    model(picture())
    monkeypatch.setattr(Clock, "norm", False)
    with pytest.raises(RuntimeError, match="called conv and not relu after it"):
        model(picture())
    monkeypatch.setattr(Clock, "norm", True)
    model(picture())


def test_an_argument_that_leaves_out_the_norm():
    class Optional(OnMode):
        def forward(self, x, norm=True):
            h = self.conv(x)
            return self.relu(self.bn(h) if norm else h)

    plain, fused = fused_twin(Optional())
    x = picture()
    for arguments in ((), (False,), (True,)):
        close(fused(x, *arguments), plain(x, *arguments))
    close(fused(x, norm=False), plain(x, norm=False))


def test_an_error_in_the_forward_leaves_nothing_behind():
    plain, fused = fused_twin(Attributes())
    with pytest.raises(ValueError, match="does not fit the weight"):
        fused(torch.randn(3, 7, 8, 8))
    x = picture()
    torch.testing.assert_close(fused.conv1(x), plain.conv1(x))
    close(fused(x), plain(x))


def test_replaced_attributes_run_as_they_are():
    plain, fused = fused_twin(Attributes())
    for model in (plain, fused):
        torch.manual_seed(1)
        model.bn1 = nn.InstanceNorm2d(4, affine=True)
        model.conv2 = down(4, 5)
    x = picture()
    close(fused(x), plain(x))


def test_threads_do_not_take_each_others_results():
    plain, fused = fused_twin(Attributes().eval())
    inputs = [picture() for _ in range(4)]
    expected = [plain(x) for x in inputs]
    found = [[] for _ in inputs]

    def work(i):
        for _ in range(3):
            found[i].append(fused(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, theirs in zip(found, expected, strict=True):
        assert len(own) == 3
        for out in own:
            close(out, theirs)


# --- Hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Attributes, SEQUENTIALS["nested"][0]])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_see_what_they_saw(build, before):
    """Every kind on every module, set before or after fuse."""
    plain = build()
    fused = copy.deepcopy(plain) if before else fuse(copy.deepcopy(plain))
    seen = {"plain": [], "fused": []}

    def watch(model, into):
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda m, args, n=name: into.append((n, "pre", args[0].detach().clone()))
            )
            module.register_forward_hook(
                lambda m, args, out, n=name: into.append((n, "out", out.detach().clone()))
            )

    watch(plain, seen["plain"])
    watch(fused, seen["fused"])
    if before:
        fuse(fused)
    x = picture()
    close(fused(x), plain(x))
    assert [s[:2] for s in seen["fused"]] == [s[:2] for s in seen["plain"]]
    for mine, theirs in zip(seen["fused"], seen["plain"], strict=True):
        close(mine[2], theirs[2], mine[:2])


@pytest.mark.parametrize("build", [lambda: Inner(3, 4), SEQUENTIALS["conv norm act"][0]])
def test_a_backward_hook_sees_its_own_gradient(build):
    plain, fused = fused_twin(build())
    found, x = [], picture().requires_grad_()
    for model in (plain, fused):
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        norm.register_full_backward_hook(lambda m, gi, go: found.append((gi[0], go[0])))
        model(x).square().sum().backward()
    for theirs, mine in zip(*found, strict=True):
        close(mine, theirs)


def test_global_hooks_see_every_module(blocks_run):
    fused = fuse(Attributes())
    names = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: names.append(type(m).__name__)
    )
    try:
        fused(picture())
    finally:
        handle.remove()
    assert len(names) == 9
    assert not blocks_run
    fused(picture())
    assert len(blocks_run) == 3


@pytest.mark.parametrize("build", [Attributes, SEQUENTIALS["conv norm act"][0]])
def test_a_forward_that_somebody_replaced_is_called(build):
    plain, fused = fused_twin(build())
    for model in (plain, fused):
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        norm.forward = lambda x: x * 3
    x = picture()
    close(fused(x), plain(x))


# --- What happens to models -----------------------------------------------------------------------


def copies(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("build", [Attributes, Holder])
def test_copies_are_fused_and_their_own(how, build, blocks_run):
    plain, fused = fused_twin(build())
    fused(picture())
    plain.load_state_dict(fused.state_dict())
    blocks_run.clear()
    twin = copies(fused, how)
    same(plain, twin, picture())
    assert len(blocks_run) == 2 * sum(f.fused for f in findings(fused))
    for name, value in fused.state_dict().items():  # the original did not move
        torch.testing.assert_close(value, plain.state_dict()[name])


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_state_dicts_go_both_ways(build):
    plain, other = build(), fuse(build())
    other.load_state_dict(plain.state_dict())
    x = picture()
    close(other(x), copy.deepcopy(plain)(x))
    plain.load_state_dict(other.state_dict(), strict=True)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in other.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_half_moves_and_meta(build):
    plain, fused = fused_twin(build())
    fused.to(memory_format=torch.channels_last)
    same(plain, fused, picture())
    plain, fused = fused_twin(build())
    x = picture()
    half = copy.deepcopy(fused).bfloat16()
    out, rival = half(x.bfloat16()), copy.deepcopy(plain).bfloat16()(x.bfloat16())
    exact = copy.deepcopy(plain).double()(x.double())
    errors = [(o.double() - exact).square().mean() for o in (out, rival)]
    assert out.dtype == torch.bfloat16
    assert errors[0] <= 1.5**2 * errors[1]
    assert fused.to("meta")(x.to("meta")).shape == exact.shape


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_double_models_run_in_double(build, monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    plain, fused = fused_twin(build().double())
    x = picture().double()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_weights_init_by_class_name_still_finds_its_layers():
    """As in the PyTorch example."""
    plain, fused = fused_twin(Attributes())
    hit = {"Conv": 0, "BatchNorm": 0}

    def weights_init(m):
        for kind in hit:
            hit[kind] += type(m).__name__.find(kind) != -1

    plain.apply(weights_init)
    expected = dict(hit)
    hit.update(Conv=0, BatchNorm=0)
    fused.apply(weights_init)
    assert hit == expected == {"Conv": 3, "BatchNorm": 2}


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_parts_are_what_they_were_and_unfuse_gives_them_back(build):
    plain, fused = fused_twin(build())
    for own, other in zip(fused.modules(), plain.modules(), strict=True):
        assert isinstance(own, type(other))
    assert any(isinstance(m, BLOCKS) for m in fused.modules())
    assert unfuse(fused) is fused
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    for own, other in zip(fused.modules(), plain.modules(), strict=True):
        assert own.__dict__.keys() == other.__dict__.keys()
        assert not own._forward_hooks
        assert not own._forward_pre_hooks
    assert repr(fused) == repr(plain)
    same(plain, fused, picture())


def test_fuse_twice_and_part_by_part():
    plain, fused = fused_twin(Holder())
    assert fuse(fused) is fused
    fuse(fused.main)
    fuse(fused)
    same(plain, fused, picture())
    assert [str(f) for f in findings(fused)] == ["fused head", "fused main.0 + main.1 + main.2"]


def test_edits_of_a_fused_sequential_are_followed(blocks_run):
    model = fuse(nn.Sequential(down(3, 4), nn.BatchNorm2d(4), nn.ReLU()))
    model[1] = nn.Identity()
    model.append(down(4, 2))
    model.insert(3, nn.Sigmoid())
    plain = unfuse(copy.deepcopy(model))
    same(plain, model, picture())
    assert len(blocks_run) == 2 * 2
    del model[2]
    same(unfuse(copy.deepcopy(model)), model, picture())
    assert len(model[:1](picture()).shape) == 4


def test_findings_and_what_verbose_prints(capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(down(3, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 8, 1, 4))
            self.data, self.hooked = OnData(), nn.Sequential(down(4, 4))
            self.hooked[0].register_forward_hook(lambda *a: None)
            self.loose = down(4, 4)

    net = Net()
    assert findings(net) == ()
    fuse(net, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(f) for f in findings(net)]
    assert {f.names[0]: (f.fused, f.reason.split(" (")[0]) for f in findings(net)} == {
        "main.0": (True, ""),
        "main.2": (False, "its kernel is 8x8; blocks have square ones, 1x1 to 7x7"),
        "data.conv": (False, "its forward cannot be read by torch.fx"),
        "hooked.0": (False, "it has hooks, or a forward of its own"),
        "loose": (False, "its forward cannot be read by torch.fx"),
    }


def test_frozen_norms_and_frozen_parts():
    plain, fused = fused_twin(Holder())
    for model in (plain, fused):
        model(picture())
        model.main[1].eval()
        model.head.requires_grad_(False)
    plain.load_state_dict(fused.state_dict())
    x = picture()
    out, expected = fused(x), plain(x)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(fused.main[0].weight.grad, plain.main[0].weight.grad)
    assert fused.head.weight.grad is None
    assert fused.main[1].num_batches_tracked == 1


def test_evaluation_follows_later_weights_and_statistics():
    plain, fused = fused_twin(Holder())
    x = picture()
    plain.eval()
    fused.eval()
    fused(x)
    for model in (plain, fused):
        torch.manual_seed(3)
        with torch.no_grad():
            model.main[0].weight.normal_()
            model.main[1].running_mean.normal_()
            model.main[1].running_var.uniform_(0.5, 2)
            model.main[1].weight.normal_()
    close(fused(x), plain(x))


def test_statistics_switched_off_and_on():
    plain, fused = fused_twin(Holder())
    for track in (True, False, True):
        for model in (plain, fused):
            model.main[1].track_running_stats = track
        same(plain, fused, picture())
        plain.load_state_dict(fused.state_dict())


def names_of(model):
    return [f.names for f in findings(fuse(model)) if f.fused]


def test_whole_blocks_are_found_and_those_left_that_blocks_have_not():
    assert names_of(Images()) == [
        ("conv", "norm", "act"), ("up", "norm2", "gelu"), ("last", "sigmoid"),
    ]  # fmt: skip
    for act in (nn.Sigmoid(), nn.ELU(2.0), nn.SiLU(), nn.GELU()):
        assert names_of(nn.Sequential(down(3, 4), nn.InstanceNorm2d(4), act)) == [("0", "1", "2")]
        assert names_of(nn.Sequential(down(3, 4), act)) == [("0", "1")]
    statistics = nn.InstanceNorm2d(4, track_running_stats=True)
    others = (nn.Softplus(), nn.PReLU(), nn.GELU("tanh"), nn.ELU(0.0), nn.ELU(-1.0), nn.CELU(),
              nn.Hardtanh(), nn.ReLU6(), nn.Mish(), statistics, nn.GroupNorm(2, 4))  # fmt: skip
    for other in others:
        assert names_of(nn.Sequential(down(3, 4), other)) == [("0",)]


def test_an_instance_norm_of_single_pixels_raises_as_before():
    for norm in (nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True)):
        plain, fused = fused_twin(nn.Sequential(down(3, 4), norm, nn.ReLU()))
        for training in (True, False):
            errors = []
            for model in (plain.train(training), fused.train(training)):
                with pytest.raises(ValueError, match="more than 1 spatial element") as caught:
                    model(picture(2, 3, 2))
                errors.append(str(caught.value))
            assert errors[0] == errors[1]


def test_the_options_of_an_instance_norm_may_change():
    plain, fused = fused_twin(nn.Sequential(down(3, 4), nn.InstanceNorm2d(4), nn.GELU()))
    for model in (plain, fused):
        model[1].eps = 0.5
        model[2].approximate = "tanh"
    same(plain, fused, picture())


def test_one_value_a_channel_raises_as_before():
    plain, fused = fused_twin(nn.Sequential(down(3, 4), nn.BatchNorm2d(4)))
    errors = []
    for model in (plain, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            model(picture(1, 3, 2))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 7, 9), (0, 3, 8, 8)])
def test_inputs_without_a_batch_odd_and_empty(shape, monkeypatch):
    monkeypatch.setenv("FASTDCGAN_IMPL", "auto")
    plain, fused = fused_twin(nn.Sequential(down(3, 4, True), nn.LeakyReLU(0.2)))
    x = torch.randn(shape)
    torch.testing.assert_close(fused(x), plain(x))


# --- What runs models -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_compile_without_a_break(build, blocks_run):
    plain, fused = fused_twin(build())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    plain.double()
    for _ in range(2):
        x = picture()
        out, expected = compiled(x), plain(x.double())
        close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
    assert len(blocks_run) >= len(findings(fused))
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_functional_call_takes_the_given_parameters(build):
    plain, fused = fused_twin(build())
    given = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    x = picture()
    close(torch.func.functional_call(fused, given, x), torch.func.functional_call(plain, given, x))


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_checkpointing_moves_the_buffers_as_before(build):
    plain, fused = fused_twin(build())
    x = picture().requires_grad_()
    plain.double()
    for model, given in ((plain, x.double()), (fused, x)):
        checkpoint(model, given, use_reentrant=False).square().sum().backward()
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_no_grad_inference_mode_and_autocast(build):
    plain, fused = fused_twin(build())
    x = picture()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(fused(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_gradient_penalty_and_accumulation(build):
    plain, fused = fused_twin(build())
    x = picture()
    plain.double()
    for model, dtype in ((plain, torch.float64), (fused, torch.float32)):
        for _ in range(2):
            given = x.to(dtype).requires_grad_()
            (grad,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
            grad.square().sum().backward()
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            close(mine.grad, theirs.grad)


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_replicas_of_data_parallel_use_their_own_parameters(build):
    """What DataParallel does to a module on each device, without the devices."""
    plain, fused = fused_twin(build())
    replica = replicate(fused)
    with torch.no_grad():
        for name, p in fused.named_parameters():
            module, _, leaf = name.rpartition(".")
            setattr(replica.get_submodule(module), leaf, p.detach() * 2)
        for p in plain.parameters():
            p.mul_(2)
    x = picture()
    close(replica(x), plain(x))


def replicate(module):
    """As torch.nn.parallel.replicate: shallow copies, joined as the originals are."""
    twins = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for own, twin in twins.items():
        for name, child in own._modules.items():
            twin._modules[name] = twins[child]
        twin._parameters = {name: None for name, p in own._parameters.items() if p is None}
    return twins[module]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("build", [Attributes, Holder])
def test_converted_to_sync_batch_norm(build, before):
    """In one process it is BatchNorm; the plain one refuses the CPU, so evaluation is compared."""
    plain = build()
    fused = copy.deepcopy(plain)
    if before:
        fused = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(fused))
    else:
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(fused))
    x = picture()
    close(fused.eval()(x), plain.eval()(x))


def test_deferred_results_never_leave(blocks_run):
    from fastdcgan_kernels.choice import choose

    for how in ("hybrid", "prologue"):
        plain, fused = fused_twin(SEQUENTIALS["up"][0]())
        blocks_run.clear()
        with choose.override(how):
            same(plain, fused, picture(2, 3, 4))
            assert isinstance(fused[:2](picture(2, 3, 4)), torch.Tensor)
        assert any(isinstance(call[3], functional.Deferred) for call in blocks_run)
    blocks_run.clear()
    with choose.override("materialised"):
        fused.train()(picture(2, 3, 4))
    assert blocks_run
    assert not any(isinstance(call[3], functional.Deferred) for call in blocks_run)


@pytest.mark.parametrize("build", [Attributes, Holder])
def test_distributed_data_parallel(build):
    """One process of gloo: buckets, hooks on gradients, buffers broadcast."""
    plain, fused = fused_twin(build())
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused)
        plain.double()
        for _ in range(2):
            x = picture()
            wrapped(x).square().sum().backward()
            plain(x.double()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        close(mine, theirs)


def test_of_a_compiled_model_the_checkpoint_has_plain_keys(blocks_run):
    """Compiled in place, as torch.compile does not wrap it then."""
    plain, fused = fused_twin(Holder())
    fused.compile(backend="aot_eager")
    x = picture()
    close(fused(x), plain(x))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert not any("_orig_mod" in key for key in fused.state_dict())
    assert blocks_run
