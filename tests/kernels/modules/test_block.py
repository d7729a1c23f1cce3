"""ConvBlock, and whole nets: the PyTorch example's generator and discriminator, fused in one line
and trained beside their plain twins."""

import copy

import pytest
import torch
from torch import nn

from fastdcgan_kernels import ConvBlock, KerasBatchNorm2d, findings, fuse, unfuse
from fastdcgan_kernels.modules.block import stat_groups


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Blocks run the kernels (in the interpreter), or raise."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    torch.manual_seed(0)


PARTS = {
    "down": (nn.Conv2d(3, 4, 4, 2, 1), (3, 3, 8, 6)),
    "up": (nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False), (3, 3, 2, 4)),
    "collapse": (nn.Conv2d(3, 4, 4, 1, 0), (3, 3, 4, 4)),
    "project": (nn.ConvTranspose2d(3, 4, 4, 1, 0), (3, 3, 1, 1)),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "norm",
    [None, nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.InstanceNorm2d(4, affine=True)],
)
@pytest.mark.parametrize("act", [nn.LeakyReLU(0.2), nn.SiLU(), nn.ELU(0.5)])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_is_its_parts_in_order(name, norm, act, training):
    conv, shape = PARTS[name]
    if name == "collapse" and isinstance(norm, nn.InstanceNorm2d):
        return  # single pixels have no statistics: PyTorch refuses them
    parts = [copy.deepcopy(m) for m in (conv, norm, act)]
    block = ConvBlock(*parts).train(training)
    twin = copy.deepcopy(nn.Sequential(*(m for m in parts if m is not None))).double()
    twin.train(training)
    assert set(block.state_dict()) == {
        f"{child}.{key}" for child, m in block.named_children() for key in m.state_dict()
    }
    for _ in range(2):
        x = torch.randn(shape)
        out, expected = block(x), twin(x.double())
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((nn.Conv2d(3, 4, 8),), "its kernel is 8x8; blocks have square ones, 1x1 to 7x7"),
        ((nn.Conv2d(3, 4, (3, 5)),), "its kernel is 3x5"),
        ((nn.Conv2d(3, 4, 3, 3),), "its stride is"),
        ((nn.Conv2d(3, 4, 3, (2, 1)),), "its stride is"),
        ((nn.ConvTranspose2d(3, 4, 3, output_padding=1),), "its output_padding is"),
        ((nn.Conv2d(3, 4, 4, 2, 1, groups=1, dilation=2),), "dilation"),
        ((nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(5)), "the norm has 5 features"),
        (
            (nn.Conv2d(3, 4, 4, 2, 1), nn.InstanceNorm2d(4, track_running_stats=True)),
            "blocks have no InstanceNorm2d",
        ),
        ((nn.Conv2d(3, 4, 4, 2, 1), None, nn.Softplus()), "blocks have no Softplus"),
        ((nn.Conv2d(3, 4, 4, 2, 1), None, nn.LeakyReLU(-1.0)), "blocks have no LeakyReLU"),
    ],
)
def test_parts_that_are_no_block_are_refused(parts, why):
    with pytest.raises(ValueError, match=f"no fused block of .*{why}"):
        ConvBlock(*parts)


def test_hooks_on_a_part_see_what_it_does():
    block = ConvBlock(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    x, seen = torch.randn(2, 3, 8, 8), []
    expected = copy.deepcopy(block)(x)
    block.norm.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(seen[0], block.conv(x))
    assert next(str(f) for f in findings(fuse(block))).startswith("left  conv")


# The nets of PyTorch's DCGAN example (examples/dcgan/main.py), as plain layers.
NZ, WIDTH = 100, 8


def generator():
    return nn.Sequential(
        nn.ConvTranspose2d(NZ, WIDTH * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(WIDTH * 8),
        nn.ReLU(True),
        nn.ConvTranspose2d(WIDTH * 8, WIDTH * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(WIDTH * 4, WIDTH * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(WIDTH * 2, WIDTH, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(True),
        nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def discriminator():
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(WIDTH, WIDTH * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH * 2),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(WIDTH * 2, WIDTH * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH * 4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(WIDTH * 4, WIDTH * 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH * 8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(WIDTH * 8, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
    )


def example_weights(module):
    """The example's weights_init."""
    if "Conv" in type(module).__name__:
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif "BatchNorm" in type(module).__name__:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Example:
    """The example's training: real, fake, then the generator, with Adam and BCE."""

    def __init__(self, g, d, dtype):
        self.g, self.d, self.dtype = g.to(dtype), d.to(dtype), dtype
        self.adams = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (g, d)]
        self.losses = []

    def step(self, real, z):
        real, z, bce = real.to(self.dtype), z.to(self.dtype), nn.BCELoss()

        def loss(images, label):
            out = self.d(images).view(-1)
            return bce(out, torch.full_like(out, label))

        self.d.zero_grad()
        fake = self.g(z)
        losses = [loss(real, 1.0), loss(fake.detach(), 0.0)]
        for part in losses:
            part.backward()
        self.adams[1].step()
        self.g.zero_grad()
        losses.append(loss(fake, 1.0))
        losses[-1].backward()
        self.adams[0].step()
        self.losses += [part.item() for part in losses]


def nearest_kink(run, real, z):
    """How near to 0 any ReLU's input comes in this step, in standard deviations."""
    run, found = copy.deepcopy(run), []

    def look(module, args):
        found.append(args[0].abs().min() / args[0].std())

    for module in (*run.g, *run.d):
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.register_forward_pre_hook(look)
    run.step(real, z)
    return min(found)


def test_the_examples_nets_fused_in_one_line_and_trained():
    """Against float64, and no further from it than three times what plain PyTorch is in float32.
    Batches are drawn until no ReLU's input is within rounding of 0: there the derivative, and with
    it Adam's first steps, would be a matter of luck in either."""
    g, d = generator().apply(example_weights), discriminator().apply(example_weights)
    exact = Example(copy.deepcopy(g), copy.deepcopy(d), torch.float64)
    plain = Example(copy.deepcopy(g), copy.deepcopy(d), torch.float32)
    ours = Example(fuse(g), fuse(d), torch.float32)
    assert sum(f.fused for f in (*findings(g), *findings(d))) == 10
    assert findings(d)[-1].names == ("11", "12")  # the sigmoid, too
    for _ in range(3):
        batch = None
        while batch is None or nearest_kink(exact, *batch) < 1e-5:
            batch = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, NZ, 1, 1)
        for run in (exact, plain, ours):
            run.step(*batch)

    def check(name, mine, rival, true):
        mine, rival, true = (torch.as_tensor(v).double() for v in (mine, rival, true))
        error, allowed = ((v - true).square().mean().sqrt() / true.square().mean().sqrt()
                          for v in (mine, rival))  # fmt: skip
        assert error <= 3 * allowed + 1e-6, (name, error.item(), allowed.item())

    check("losses", ours.losses, plain.losses, exact.losses)
    for nets in ((ours.g, plain.g, exact.g), (ours.d, plain.d, exact.d)):
        mine, rival, true = (net.state_dict() for net in nets)
        assert list(mine) == list(true)
        for name, value in mine.items():
            check(name, value, rival[name], true[name])
    twin = discriminator()
    twin.load_state_dict(ours.d.state_dict())
    assert [type(m) for m in unfuse(ours.d).modules()] == [type(m) for m in twin.modules()]


def test_stat_groups_do_not_matter_to_norms_of_single_images():
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.GELU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.InstanceNorm2d(4, affine=True), nn.ELU(),
    )  # fmt: skip
    grouped = fuse(copy.deepcopy(plain))
    plain.double()
    x = torch.randn(6, 3, 8, 8)
    with stat_groups(2):
        got = grouped(x)
    expected = torch.cat([plain(x[:3].double()), plain(x[3:].double())])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for out in (got, expected):
        out.square().sum().backward()
    for mine, theirs in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_stat_groups_are_a_call_for_each_batch(momentum, monkeypatch):
    """Also through modules that are in no block, and that write over their input."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")  # in float64
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16, momentum=momentum),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(True),
    ).double()  # fmt: skip
    grouped = fuse(copy.deepcopy(plain))
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    with stat_groups(2):
        got = grouped(x)
    expected = torch.cat([plain(x[:3]), plain(x[3:])])
    for out in (got, expected):
        out.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(grouped.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_kerass_norm_is_kerass():
    """moving += 0.01 (new - moving), with the variance that is sum (x - mean)^2 / n."""
    norm, x = KerasBatchNorm2d(3, 1e-3, 0.01), torch.randn(4, 3, 5, 2) * 2 + 1
    out = norm(x)
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    expected = (wide - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(norm.running_mean.double(), 0.01 * mean, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), 0.99 + 0.01 * var, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
