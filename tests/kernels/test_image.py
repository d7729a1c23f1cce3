"""The kernels of the layers with an image side (in the interpreter) against plain PyTorch in
float64: every prologue, epilogue and dtype, 1 to 4 image channels, odd shapes, groups and splits.

Operands lie between NaNs and results start as NaN, so that a value read from outside or never
written is seen.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan_kernels import image
from fastdcgan_kernels.convolution import Epilogue, Operand
from fastdcgan_kernels.geometry import Geometry, Tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROLOGUES = ["none", "activate", "normgrad", "actgrad"]
EPILOGUES = ["store", "statistics", "gradient"]
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "none"]
SLOPE = 0.2


@pytest.fixture(autouse=True, scope="module")
def results_start_as_nan():
    """torch.empty fills with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(n, p, q, cs, cl):
    return Geometry(n, p, q, cs, 2 * p, 2 * q, cl, 2, 1)


SMALL = layer(2, 3, 5, 7, 3)
TILE = Tile(rows=32, columns=32, depth=64)  # SMALL is one of them: the interpreter is slow


class Draw:
    """Random tensors in one dtype, all different."""

    def __init__(self, dtype, seed=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype=None, spread=1.0):
        """Contiguous, or channels_last where it has four dimensions, with NaN on both sides."""
        values = torch.randn(shape, generator=self.generator) * spread
        memory = torch.full((values.numel() + 256,), torch.nan, dtype=dtype or self.dtype)
        inner = memory[128:-128]
        if len(shape) == 4:
            n, c, h, w = shape
            return inner.view(n, h, w, c).permute(0, 3, 1, 2).copy_(values)
        return inner.view(shape).copy_(values)

    def coef(self, groups, channels):
        return self.normal(3, groups, channels, dtype=torch.float32)

    def sides(self, g):
        return (g.N, g.CS, g.P, g.Q), (g.N, g.CL, g.H, g.W)

    def weight(self, g):
        return self.normal(g.CS, g.CL, 4, 4, spread=0.1)

    def operand(self, shape, groups, prologue, activation):
        value = self.normal(*shape)
        aux = coef = None
        if prologue == "actgrad":
            aux = self.normal(*shape)
            aux.copy_(act(aux.clone(), activation))
        elif prologue == "normgrad":
            aux = self.normal(*shape)
        if prologue in ("activate", "normgrad"):
            coef = self.coef(groups, shape[1])
        return Operand(value, prologue, aux, coef, activation, SLOPE)

    def epilogue(self, shape, groups, kind, activation):
        bias = None if kind == "gradient" else self.normal(shape[1])
        if kind == "gradient":
            aux, coef = self.normal(*shape), self.coef(groups, shape[1])
            return Epilogue(kind, bias, aux, coef, activation, SLOPE)
        return Epilogue(
            kind, bias, activation=activation if kind == "store" else "none", slope=SLOPE
        )


def act(z, activation):
    if activation == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    return {"relu": torch.relu, "tanh": torch.tanh, "none": torch.clone}[activation](z)


def act_backward(grad, o, activation):
    """PyTorch's own derivatives, which take the output."""
    aten = torch.ops.aten
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(grad, o, SLOPE, True)
    if activation == "relu":
        return aten.threshold_backward(grad, o, 0)
    return aten.tanh_backward(grad, o) if activation == "tanh" else grad


def planes(coef, n):
    """mean, scale and shift as [N, C, 1, 1]: each image has those of its group."""
    each = coef.repeat_interleave(n // coef.shape[1], dim=1)
    return each[..., None, None].unbind(0)


def seen(operand):
    """What a kernel multiplies, in float64: by contract the prologue's result is rounded to the
    storage dtype, from float32; in float32 nothing is rounded here."""
    dtype = operand.value.dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    value = operand.value.to(wide)
    if operand.prologue == "actgrad":
        value = act_backward(value, operand.aux.to(wide), operand.activation)
    elif operand.prologue != "none":
        mean, scale, shift = planes(operand.coef.to(wide), value.shape[0])
        if operand.prologue == "activate":
            value = act(scale * (value - mean) + shift, operand.activation)
        else:
            value = value + scale * (operand.aux.to(wide) - mean) + shift
    return value.double() if wide == torch.float64 else value.to(dtype).double()


def finish(result, epilogue, dtype):
    """(stored value, partials or None) of a convolution's result; `dtype` is the one to work in."""
    if epilogue.bias is not None:
        result = result + epilogue.bias.to(dtype)[:, None, None]
    if epilogue.kind != "gradient":
        return act(result, epilogue.activation), None
    mean, scale, shift = planes(epilogue.coef.to(dtype), result.shape[0])
    apart = epilogue.aux.to(dtype) - mean
    dz = act_backward(result, act(scale * apart + shift, epilogue.activation), epilogue.activation)
    sums = torch.stack([dz, dz * apart]).unflatten(1, (epilogue.coef.shape[1], -1)).sum((2, 4, 5))
    return scale * dz, sums


def errors(ours, truth):
    """(RMS, maximum) of the difference, relative to the RMS of the truth."""
    assert ours.shape == truth.shape
    apart = ours.double() - truth
    size = truth.square().mean().sqrt() + 1e-30
    return (apart.square().mean().sqrt() / size).item(), (apart.abs().max() / size).item()


def close(ours, truth, eager=None):
    """float32: 2e-6 of the RMS, and ten times that at most. 16 bits: 1.5 times what PyTorch's own
    op in that dtype is off; both round once, at the end, and 1.5 is for the luck of roundings."""
    rms, most = errors(ours, truth)
    limit_rms, limit_most = (
        (2e-6, 2e-5) if eager is None else (1.5 * e for e in errors(eager, truth))
    )
    assert rms <= limit_rms, (rms, limit_rms)
    assert most <= limit_most, (most, limit_most)


def check_statistics(result, groups):
    """Partials merged by Chan's formula are the moments of the stored values."""
    (mean, m2), count = result.partials.double(), result.counts.double()[..., None]
    y = result.value.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    assert torch.equal(count.sum((1, 2)), torch.full((groups,), float(y.shape[2])).double())
    total = (count * mean).sum(1) / count.sum(1)
    close(total, y.mean(2))
    close(
        (m2 + count * (mean - total[:, None]).square()).sum(1), y.var(2, correction=0) * y.shape[2]
    )


def check_gather(up, g, dtype, prologue, epilogue, activations, groups=1, tile=TILE, seed=0):
    """One launch of image_up or image_down against PyTorch."""
    draw = Draw(dtype, seed)
    to, of = draw.sides(g)[:: -1 if up else 1]
    source = draw.operand(of, groups, prologue, activations[0])
    finishing = draw.epilogue(to, groups, epilogue, activations[1])
    weight = draw.weight(g)
    run = image.image_up if up else image.image_down
    result = run(source, weight, g, tile=tile, epilogue=finishing, groups=groups)
    assert result.value.dtype == dtype
    assert result.value.is_contiguous(memory_format=torch.channels_last)
    convolve = F.conv_transpose2d if up else F.conv2d
    x = seen(source)
    truth, sums = finish(convolve(x, weight.double(), None, 2, 1), finishing, torch.float64)
    eager = None
    if dtype != torch.float32:
        eager = convolve(x.to(dtype), weight, None, 2, 1).float()
        eager = finish(eager, finishing, torch.float32)[0].to(dtype)
    close(result.value, truth, eager)
    if epilogue == "statistics":
        check_statistics(result, groups)
    if epilogue == "gradient":
        close(result.partials.double().sum(2), sums)
    return result


def check_weight_gradient(
    g, dtype, prologues, activations, groups=1, tile=TILE, out_dtype=torch.float32, seed=0
):
    draw = Draw(dtype, seed)
    small, large = (
        draw.operand(shape, groups, prologue, activation)
        for shape, prologue, activation in zip(draw.sides(g), prologues, activations, strict=True)
    )
    ours = image.image_weight_gradient(small, large, g, tile=tile, dtype=out_dtype, groups=groups)
    assert ours.dtype == out_dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    shape = (g.CS, g.CL, 4, 4)
    truth = torch.nn.grad.conv2d_weight(seen(large), shape, seen(small), 2, 1)
    # Sums of exact products in float32, whatever the operands; rounded where the result is.
    close(ours, truth, None if out_dtype == torch.float32 else truth.to(out_dtype))
    return ours


GATHERS = list(product(PROLOGUES, EPILOGUES, DTYPES))
PAIRS = list(product(PROLOGUES, PROLOGUES))
UP = pytest.mark.parametrize("up", [False, True], ids=["down", "up"])


@UP
@pytest.mark.parametrize("case", range(len(GATHERS)), ids=lambda i: "-".join(map(str, GATHERS[i])))
def test_every_prologue_epilogue_and_dtype(up, case):
    prologue, epilogue, dtype = GATHERS[case]
    activations = ACTIVATIONS[case % 4], ACTIVATIONS[case // 4 % 4]
    check_gather(up, SMALL, dtype, prologue, epilogue, activations)


@UP
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(up, activation):
    for prologue, epilogue in [("activate", "store"), ("actgrad", "gradient")]:
        check_gather(up, SMALL, torch.float32, prologue, epilogue, (activation, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologues", PAIRS, ids="-".join)
def test_weight_gradient_with_every_pair_of_prologues(prologues, dtype):
    case = PAIRS.index(prologues)
    activations = ACTIVATIONS[(case + 1) % 4], ACTIVATIONS[case // 4]
    check_weight_gradient(SMALL, dtype, prologues, activations, out_dtype=dtype)


@pytest.mark.parametrize("cs", [3, 16, 65])
@pytest.mark.parametrize("cl", [1, 2, 3, 4])
def test_channels_of_either_side(cl, cs):
    g = layer(2, 2, 3, cs, cl)
    for up, epilogue in [(False, "statistics"), (False, "gradient"), (True, "statistics")]:
        check_gather(up, g, torch.float32, "activate", epilogue, ("tanh", "leaky_relu"))
    check_weight_gradient(g, torch.float32, ("normgrad", "activate"), ("none", "tanh"))


SHAPES = {
    "one pixel": (1, 1, 1),
    "one column": (1, 6, 1),
    "one row": (1, 1, 6),
    "tall": (1, 9, 2),
    "wide": (3, 2, 9),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pixels(shape):
    """Padding stays 0, though act(shift) is not."""
    for cl in (1, 2, 3, 4):
        g = layer(*shape, 5, cl)
        check_gather(False, g, torch.float32, "activate", "store", ("tanh", "none"))
        check_weight_gradient(g, torch.float32, ("activate", "activate"), ("tanh", "tanh"))
    check_gather(True, g, torch.float32, "activate", "store", ("tanh", "none"))


@UP
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_groups_have_their_own_coefficients_and_tiles(up, epilogue):
    g, tile = layer(4, 3, 3, 6, 3), Tile(16, 16, 16)
    check_gather(up, g, torch.float32, "normgrad", epilogue, ("none", "relu"), 2, tile)


@pytest.mark.parametrize("split", [1, 3, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_and_splits_of_the_weight_gradient(groups, split):
    """Parts that get no pixels add nothing."""
    g, tile = layer(4, 3, 5, 20, 3), Tile(16, 64, 16, split)
    check_weight_gradient(
        g, torch.float32, ("activate", "normgrad"), ("relu", "none"), groups, tile
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layers_of_a_dcgan(dtype):
    """As its two networks run them, 64 features wide."""
    tile = Tile(128, 64, 64, split=3)
    first, last = layer(2, 8, 8, 64, 3), layer(2, 16, 16, 64, 3)
    check_gather(False, last, dtype, "none", "store", ("none", "leaky_relu"), tile=tile)
    check_gather(True, last, dtype, "activate", "store", ("relu", "tanh"), tile=tile)
    check_gather(True, first, dtype, "actgrad", "store", ("leaky_relu", "none"), tile=tile)
    check_gather(False, first, dtype, "actgrad", "gradient", ("tanh", "relu"), tile=tile)
    check_weight_gradient(last, dtype, ("actgrad", "none"), ("leaky_relu", "none"), tile=tile)
    check_weight_gradient(first, dtype, ("activate", "actgrad"), ("relu", "tanh"), tile=tile)


layers = st.builds(
    layer, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 20),
    st.integers(1, 4),
)  # fmt: skip
tiles = st.builds(
    Tile, st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([16, 32]),
    st.integers(1, 4),
)  # fmt: skip
two_activations = st.tuples(*[st.sampled_from(ACTIVATIONS)] * 2)
seeds = st.integers(0, 1000)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.booleans(), layers, st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES), two_activations,
    tiles, st.booleans(), seeds,
)  # fmt: skip
def test_any_gather(up, g, prologue, epilogue, activations, tile, by_image, seed):
    groups = g.N if by_image else 1
    check_gather(up, g, torch.float32, prologue, epilogue, activations, groups, tile, seed)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    layers, st.tuples(*[st.sampled_from(PROLOGUES)] * 2), two_activations, tiles, st.booleans(),
    seeds,
)  # fmt: skip
def test_any_weight_gradient(g, prologues, activations, tile, by_image, seed):
    groups = g.N if by_image else 1
    check_weight_gradient(g, torch.float32, prologues, activations, groups, tile, seed=seed)


@pytest.mark.parametrize("cl", [1, 2, 3, 4])
def test_nan_reaches_only_what_it_meets(cl):
    """Values are loaded in pairs, of which one may be a neighbour's."""
    where = list(product((0, 3), range(8), {0, cl - 1}))
    g = layer(len(where), 2, 4, 5, cl)
    draw = Draw(torch.float32)
    weight = draw.weight(g)
    small, large = (draw.normal(*shape) for shape in draw.sides(g))
    for n, (h, w, channel) in enumerate(where):
        large[n, channel, h, w] = torch.nan
    ours = image.image_down(Operand(large), weight, g, tile=Tile(128, 16, 16)).value
    assert torch.equal(ours.isnan(), F.conv2d(large, weight, None, 2, 1).isnan())
    one = layer(1, 2, 4, 5, cl)
    for n in (0, len(where) - 1):
        x, y = (side[n : n + 1] for side in (large, small))
        ours = image.image_weight_gradient(
            Operand(y), Operand(x), one, tile=TILE, dtype=torch.float32
        )
        assert torch.equal(
            ours.isnan(), torch.nn.grad.conv2d_weight(x, weight.shape, y, 2, 1).isnan()
        )


def test_the_same_bits_twice():
    g, tile = layer(4, 3, 5, 9, 3), Tile(32, 32, 16, 2)
    more = {"tile": tile, "groups": 2}
    found = []
    for draw in (Draw(torch.bfloat16), Draw(torch.bfloat16)):
        shapes, weight = draw.sides(g), draw.weight(g)
        small, large = (draw.operand(shape, 2, "activate", "relu") for shape in shapes)
        down = image.image_down(large, weight, g, epilogue=Epilogue("statistics"), **more)
        up = image.image_up(small, weight, g, epilogue=Epilogue("statistics"), **more)
        gradient = image.image_weight_gradient(small, large, g, dtype=torch.bfloat16, **more)
        found.append([down.value, down.partials, up.value, up.partials, gradient])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
