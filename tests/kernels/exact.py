"""What the tests of single kernels share: random operands, the same work in plain PyTorch, and how
far from it a kernel may be. Not here: any test.

Operands lie between NaNs and results start as NaN, so that a value read from outside or never
written is seen.

Tolerances, as errors against PyTorch in float64 on the same inputs, relative to the RMS of what is
expected:
    float32  RMS 2e-6 and maximum 2e-5: sums of up to 8192 products, each rounded at 6e-8, whose
             errors add up like a random walk of the blocks that are summed.
    16 bits  1.5 times what PyTorch's own op in that dtype is off, RMS and maximum alike: both sum
             in float32 and round once, at the end; 1.5 is for the luck of roundings.
"""

import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.gpu import batchnorm
from fastdcgan_kernels.gpu.tile import Epilogue, Operand

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROLOGUES = ["none", "activate", "normgrad", "actgrad"]
EPILOGUES = ["store", "statistics", "gradient", "actgrad"]
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "none", "sigmoid", "elu"]
OF_INPUT = ["silu", "gelu"]  # no derivative from the output: there is no actgrad of these
EVERY = [*ACTIVATIONS, *OF_INPUT]
SLOPE, EPS = 0.2, 1e-3
TILE = Tile(rows=32, columns=32, depth=64)  # the interpreter is slow: few of them for small shapes


@contextlib.contextmanager
def results_start_as_nan():
    """torch.empty fills with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def convolve(x, weight, g, transposed):
    """PyTorch's convolution of a layer, padded and cut by hand: as the formula of geometry.py has
    it, without PyTorch's own padding."""
    up, left = g.pad, g.left
    if transposed:
        y = F.conv_transpose2d(x, weight, None, g.stride)
        y = F.pad(y, (0, max(0, left + g.W - y.shape[3]), 0, max(0, up + g.H - y.shape[2])))
        return y[:, :, up : up + g.H, left : left + g.W]
    reach = [(side - 1) * g.stride + g.kernel for side in (g.P, g.Q)]
    x = F.pad(x, (left, max(0, reach[1] - left - g.W), up, max(0, reach[0] - up - g.H)))
    return F.conv2d(x[:, :, : reach[0], : reach[1]], weight, None, g.stride)


def layer(n, p, q, cs, cl, stride=2):
    """Geometry of a 4x4 layer: stride 2 with padding 1, or stride 1 between 1x1 and 4x4 pixels."""
    if stride == 1:
        return Geometry(n, 1, 1, cs, 4, 4, cl, 1, 0)
    return Geometry(n, p, q, cs, 2 * p, 2 * q, cl, 2, 1)


class Draw:
    """Random tensors in one dtype, all different."""

    def __init__(self, dtype, seed=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype=None, spread=1.0, offset=0.0):
        """Contiguous, or channels_last where it has four dimensions, with NaN on both sides."""
        values = torch.randn(shape, generator=self.generator) * spread + offset
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
        return self.normal(g.CS, g.CL, g.kernel, g.kernel, spread=0.1)

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
        """Its partials are merged by the launch that makes them."""
        bias = self.normal(shape[1]) if kind in ("store", "statistics") else None
        if kind == "actgrad":
            aux = self.normal(*shape)
            aux.copy_(act(aux.clone(), activation))
            return Epilogue(kind, bias, aux, None, activation, SLOPE)
        if kind == "gradient":
            aux, coef = self.normal(*shape), self.coef(groups, shape[1])
            merged = batchnorm.merged_sums(coef)
            return Epilogue(kind, bias, aux, coef, activation, SLOPE, merged)
        if kind == "statistics":
            merged = batchnorm.merged_statistics(bias, groups, shape[1], None, None, EPS)
            return Epilogue(kind, bias, slope=SLOPE, merged=merged)
        return Epilogue(kind, bias, activation=activation, slope=SLOPE)


def act(z, activation):
    if activation in ("leaky_relu", "elu"):
        return getattr(F, activation)(z, SLOPE)
    return z.clone() if activation == "none" else getattr(F, activation)(z)


def act_backward(grad, o, activation):
    """PyTorch's own derivatives, which take the output; of silu and gelu the input."""
    aten = torch.ops.aten
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(grad, o, SLOPE, True)
    if activation == "elu":
        return aten.elu_backward(grad, SLOPE, 1, 1, True, o)
    if activation == "relu":
        return aten.threshold_backward(grad, o, 0)
    return grad if activation == "none" else getattr(aten, f"{activation}_backward")(grad, o)


def planes(coef, n):
    """mean, scale and shift as [N, C, 1, 1]: each image has those of its group."""
    each = coef[:3].repeat_interleave(n // coef.shape[1], dim=1)
    return each[..., None, None].unbind(0)


def prepared(operand, dtype):
    """The operand after its prologue, worked out in `dtype`."""
    value = operand.value.to(dtype)
    if operand.prologue == "actgrad":
        return act_backward(value, operand.aux.to(dtype), operand.activation)
    if operand.prologue == "none":
        return value
    mean, scale, shift = planes(operand.coef.to(dtype), value.shape[0])
    if operand.prologue == "activate":
        return act(scale * (value - mean) + shift, operand.activation)
    return value + (scale * (operand.aux.to(dtype) - mean) + shift)


def seen(operand):
    """What a kernel multiplies, in float64: by contract the prologue's result is rounded to the
    storage dtype, from float32; in float32 nothing is rounded here."""
    dtype = operand.value.dtype
    if dtype == torch.float32:
        return prepared(operand, torch.float64)
    return prepared(operand, torch.float32).to(dtype).double()


def finish(result, epilogue, dtype):
    """(stored value, partials or None) of a convolution's result; `dtype` is the one to work in."""
    if epilogue.bias is not None:
        result = result + epilogue.bias.to(dtype)[:, None, None]
    if epilogue.kind == "actgrad":
        return act_backward(result, epilogue.aux.to(dtype), epilogue.activation), None
    if epilogue.kind != "gradient":
        return act(result, epilogue.activation), None
    mean, scale, shift = planes(epilogue.coef.to(dtype), result.shape[0])
    apart = epilogue.aux.to(dtype) - mean
    z, activation = scale * apart + shift, epilogue.activation
    dz = act_backward(result, z if activation in OF_INPUT else act(z, activation), activation)
    sums = torch.stack([dz, dz * apart]).unflatten(1, (epilogue.coef.shape[1], -1)).sum((2, 4, 5))
    return scale * dz, sums


def errors(ours, truth):
    """(RMS, maximum) of the difference, relative to the RMS of the truth."""
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    apart = ours.double() - truth
    size = truth.square().mean().sqrt() + 1e-30
    return (apart.square().mean().sqrt() / size).item(), (apart.abs().max() / size).item()


def close(ours, truth, eager=None):
    """Within the tolerances above; `eager` is PyTorch's result in the 16-bit dtype."""
    rms, most = errors(ours, truth)
    limit_rms, limit_most = (
        (2e-6, 2e-5) if eager is None else (1.5 * e for e in errors(eager, truth))
    )
    assert rms <= limit_rms, f"RMS error {rms}, of {limit_rms} allowed"
    assert most <= limit_most, f"maximum error {most}, of {limit_most} allowed"


def check_merged_statistics(merged, y, groups):
    """What became of the statistics of y: no gamma, no beta."""
    y = y.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    mean, var = y.mean(2), y.var(2, correction=0)
    close(merged.stats[0], mean)
    close(merged.stats[1], var)
    assert (merged.stats[2] == y.shape[2]).all()
    assert torch.equal(merged.coef[0], merged.stats[0])
    close(merged.coef[1], (var + EPS).rsqrt())
    assert (merged.coef[2] == 0).all()
    assert torch.equal(merged.coef[1], merged.coef[3])
    assert torch.equal(merged.coef[4], merged.stats[2])


def check_statistics(result, groups):
    """Partials merged by Chan's formula are the moments of the stored values."""
    assert torch.equal(result.counts, result.counts[:1].expand_as(result.counts))
    (mean, m2), count = result.partials.double(), result.counts[0].double()[..., None]
    y = result.value.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    assert torch.equal(count.sum((1, 2)), torch.full((groups,), float(y.shape[2])).double())
    total = (count * mean).sum(1) / count.sum(1)
    close(total, y.mean(2))
    close(
        (m2 + count * (mean - total[:, None]).square()).sum(1), y.var(2, correction=0) * y.shape[2]
    )


def check_gather(
    run,
    transposed,
    g,
    dtype,
    prologue,
    epilogue,
    activations,
    groups=1,
    tile=TILE,
    seed=0,
    bias=True,
):
    """One launch of a convolution, or of a transposed one, by `run` (called as
    `conv_pointers.convolve` is) against PyTorch; `activations` are those of the prologue and of the
    epilogue."""
    draw = Draw(dtype, seed)
    to, of = draw.sides(g)[:: -1 if transposed else 1]
    source = draw.operand(of, groups, prologue, activations[0])
    finishing = draw.epilogue(to, groups, epilogue, activations[1])
    if not bias:
        finishing = replace(finishing, bias=None)
    weight = draw.weight(g)
    result = run(
        source, weight, g, transposed=transposed, tile=tile, epilogue=finishing, groups=groups
    )
    assert result.value.dtype == dtype
    assert result.value.is_contiguous(memory_format=torch.channels_last)
    x = seen(source)
    truth = convolve(x, weight.double(), g, transposed)
    truth, sums = finish(truth, finishing, torch.float64)
    eager = None
    if dtype != torch.float32:
        eager = convolve(x.to(dtype), weight, g, transposed).float()
        eager = finish(eager, finishing, torch.float32)[0].to(dtype)
    close(result.value, truth, eager)
    if epilogue == "statistics":
        check_statistics(result, groups)
        check_merged_statistics(finishing.merged, result.value, groups)
    if epilogue == "gradient":
        close(result.partials.double().sum(2), sums)
        scale = finishing.coef[1].double()
        close(finishing.merged.out, torch.stack([-scale * sums[0], sums[1], sums[0]]))
    return result


def check_pair(run, transposed, g, prologue, epilogue, tile):
    """`check_gather`; over all pairs also every dtype, 1 and 2 groups, 1 and 3 parts of the sum
    with each of them, and every activation on either side."""
    p, e = PROLOGUES.index(prologue), EPILOGUES.index(epilogue)
    activations = ACTIVATIONS[(p + e) % 4], ACTIVATIONS[(p + e // 2) % 4]
    check_gather(
        run, transposed, g, DTYPES[(p + e) % 3], prologue, epilogue, activations,
        1 + (p // 2 + e) % 2, replace(tile, split=1 + 2 * ((p + e // 2) % 2)),
    )  # fmt: skip


def check_weight_gradient(
    run, g, dtype, prologues, activations, groups=1, tile=TILE, out_dtype=torch.float32, seed=0
):
    """One weight gradient by `run` (called as `conv_weight.weight_gradient` is) against PyTorch;
    prologues and activations are those of the small side and of the large side."""
    draw = Draw(dtype, seed)
    small, large = (
        draw.operand(shape, groups, prologue, activation)
        for shape, prologue, activation in zip(draw.sides(g), prologues, activations, strict=True)
    )
    ours = run(small, large, g, tile=tile, dtype=out_dtype, groups=groups)
    assert ours.dtype == out_dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(g.CS, g.CL, g.kernel, g.kernel, dtype=torch.float64, requires_grad=True)
    y = convolve(seen(large), weight, g, False)
    (truth,) = torch.autograd.grad(y, weight, seen(small))
    # Sums of exact products in float32, whatever the operands; rounded where the result is.
    close(ours, truth, None if out_dtype == torch.float32 else truth.to(out_dtype))
    return ours
