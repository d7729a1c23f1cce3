"""The public ops through the kernels (in the interpreter) against plain PyTorch in float64: every
kind of layer, gradients, autocast, compile, double backward, groups, deferral, and the edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdcgan_kernels as fk
from fastdcgan_kernels import functional, reference
from fastdcgan_kernels.choice import choose
from fastdcgan_kernels.choice.geometry import Geometry
from fastdcgan_kernels.choice.spec import BlockSpec, Inputs
from fastdcgan_kernels.choice.types import Block
from fastdcgan_kernels.gpu.launch import Launch

CL = torch.channels_last
# (transposed, stride, x's shape, weight's shape): the four kinds, and the two three-channel ends.
LAYERS = {
    "down": (False, 2, (3, 6, 8, 4), (5, 6, 4, 4)),
    "up": (True, 2, (3, 6, 4, 2), (6, 5, 4, 4)),
    "collapse": (False, 1, (3, 6, 4, 4), (2, 6, 4, 4)),
    "project": (True, 1, (3, 7, 1, 1), (7, 5, 4, 4)),
    "image_down": (False, 2, (3, 3, 8, 4), (5, 3, 4, 4)),
    "image_up": (True, 2, (3, 6, 4, 2), (6, 3, 4, 4)),
}
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "none"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Everything here runs the kernels, or raises."""
    monkeypatch.setenv("FASTDCGAN_IMPL", "triton")
    torch.manual_seed(0)


@pytest.fixture(params=["hybrid", "materialised", "prologue", "vendor"])
def how(request):
    with choose.override(request.param):
        yield request.param


def leaves(*shapes, dtype=torch.float32, seed=0):
    """Tensors with gradients, the same values for each dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        None
        if shape is None
        else torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def wide(tensors):
    """float64 twins."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def close(ours, theirs, rms=2e-6, most=2e-5):
    """Relative RMS and maximum error against float64; fp32 sums of a few hundred terms."""
    assert ours.shape == theirs.shape
    apart, size = (ours.double() - theirs).detach(), theirs.detach().square().mean().sqrt()
    floor = size + 1e-12
    assert apart.square().mean().sqrt() <= rms * floor, apart.square().mean().sqrt() / floor
    assert apart.abs().max() <= most * floor, apart.abs().max() / floor


def channels(weight, transposed):
    return weight[1] if transposed else weight[0]


def run_bn(op, tensors, buffers, stride, **more):
    options = {
        "stride": stride, "padding": stride - 1, "training": True, "momentum": 0.3, "eps": 1e-4,
        "activation": "leaky_relu", "slope": 0.2,
    }  # fmt: skip
    return op(*tensors, *buffers, **{**options, **more})


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_with_norm_and_their_gradients(layer, activation, how):
    transposed, stride, x, weight = LAYERS[layer]
    c = channels(weight, transposed)
    tensors = leaves(x, weight, None, (c,), (c,))
    twins = wide(tensors)
    buffers, twin_buffers = [[torch.zeros(c, dtype=d), torch.ones(c, dtype=d)]
                             for d in (torch.float32, torch.float64)]  # fmt: skip
    name = "conv_transpose_bn_act" if transposed else "conv_bn_act"
    out = run_bn(getattr(functional, name), tensors, buffers, stride, activation=activation)
    expected = run_bn(getattr(reference, name), twins, twin_buffers, stride, activation=activation)
    close(out, expected)
    assert out.is_contiguous(memory_format=CL)
    for mine, theirs in zip(buffers, twin_buffers, strict=True):
        close(mine, theirs, 1e-5, 1e-4)  # a mean is small beside what it is the mean of
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        if mine is not None:
            close(mine.grad, theirs.grad, 4e-6, 4e-5)  # a gradient through two more sums


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_without_norm_and_their_gradients(layer, activation, how):
    transposed, stride, x, weight = LAYERS[layer]
    tensors = leaves(x, weight, (channels(weight, transposed),))
    twins = wide(tensors)
    name = "conv_transpose_act" if transposed else "conv_act"
    options = {"stride": stride, "padding": stride - 1, "activation": activation, "slope": 0.2}
    out = getattr(functional, name)(*tensors, **options)
    expected = getattr(reference, name)(*twins, **options)
    close(out, expected)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        close(mine.grad, theirs.grad, 4e-6, 4e-5)


NORMS = ["no norm", "batch", "instance", "instance affine"]
# (transposed, stride, padding, x's shape, weight's shape)
SHAPES = {
    "conv": (False, 1, 1, (3, 6, 5, 4), (5, 6, 3, 3)),
    "transposed": (True, 2, 1, (3, 6, 3, 2), (6, 5, 4, 4)),
}


def plain(x, weight, bias, gamma, beta, shape, norm, activation):
    """A block by torch.nn.functional alone."""
    transposed, stride, padding, *_ = shape
    y = (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, stride, padding)
    if norm == "batch":
        y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-4)
    elif norm != "no norm":
        y = F.instance_norm(y, weight=gamma, bias=beta, eps=1e-4)
    act = {
        "none": lambda z: z, "leaky_relu": lambda z: F.leaky_relu(z, 0.7),
        "elu": lambda z: F.elu(z, 0.7),
    }.get(activation) or getattr(F, activation)  # fmt: skip
    return act(y)


def fused(x, weight, bias, gamma, beta, shape, norm, activation, defer=False):
    transposed, stride, padding, *_ = shape
    kind = "conv_transpose" if transposed else "conv"
    options = {"stride": stride, "padding": padding, "activation": activation, "slope": 0.7}
    if norm == "no norm":
        return getattr(fk, f"{kind}_act")(x, weight, bias, defer=defer, **options)
    return getattr(fk, f"{kind}_bn_act")(
        x, weight, bias, gamma, beta, None, None, training=True, momentum=0.1, eps=1e-4,
        stat_groups=1 if norm == "batch" else x.shape[0], defer=defer, **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_behind_every_norm_and_both_orders_of_gradient(activation, norm, shape):
    shape = SHAPES[shape]
    affine = (5,) if norm in ("batch", "instance affine") else None
    tensors = leaves(*shape[3:], (5,), affine, affine)
    twins = wide(tensors)
    own, theirs = ([t for t in ts if t is not None] for ts in (tensors, twins))
    out, expected = fused(*tensors, shape, norm, activation), plain(*twins, shape, norm, activation)
    close(out, expected)
    upstream = torch.randn(out.shape)
    grads = torch.autograd.grad(out, own, upstream, retain_graph=True)
    right = torch.autograd.grad(expected, theirs, upstream.double(), create_graph=True)
    noise = right[1].abs().max()  # beside it the bias's gradient in front of a norm, 0, has none
    for mine, truth in zip(grads, right, strict=True):
        if truth.detach().abs().max() > 1e-6 * noise:
            close(mine, truth, 4e-6, 4e-5)
        else:
            assert mine.abs().max() <= 1e-5 * noise
    found = []
    for ts, value in ((own, out), (theirs, expected)):
        (gx,) = torch.autograd.grad(value, ts[0], upstream.to(value.dtype), create_graph=True)
        unused = {"allow_unused": True, "materialize_grads": True}
        found.append(torch.autograd.grad(gx.square().sum(), ts, **unused))
    for mine, truth in zip(*found, strict=True):
        if truth.abs().max() > 1e-9 * found[1][1].abs().max():
            close(mine, truth, 2e-5, 2e-4)  # fp32 through two backward passes
        else:
            assert mine.abs().max() <= 1e-4 * found[1][1].abs().max()


@pytest.mark.parametrize("penalty", [False, True])
def test_a_chain_of_blocks_with_different_groups(penalty, how):
    """Without a norm, InstanceNorm twice, BatchNorm: what one leaves to the next is taken where
    both have the same groups, and materialised elsewhere."""
    found = []
    shapes = [(3, 3, 8, 8), (6, 3, 4, 4), (5, 6, 3, 3), (5, 5, 3, 3), (4, 5, 3, 3), (2, 4, 3, 3)]
    tensors = leaves(*shapes, (5,), (5,), (4,), (4,))
    kinds = [("no norm", "silu"), ("instance affine", "gelu"), ("instance", "elu"),
             ("batch", "sigmoid"), ("no norm", "none")]  # fmt: skip
    for own, op in ((tensors, fused), (wide(tensors), plain)):
        h, *rest = own
        weights, norms = rest[:5], [(None, None), rest[5:7], (None, None), rest[7:], (None, None)]
        for weight, affine, (norm, activation) in zip(weights, norms, kinds, strict=True):
            shape = (False, 2 if h is own[0] else 1, 1)
            more = {"defer": activation != "none"} if op is fused else {}
            h = op(h, weight, None, *affine, shape, norm, activation, **more)
            if op is fused and how != "reference" and activation != "none":
                assert isinstance(h, functional.Deferred)
        loss = h.square().sum()
        if penalty:
            loss = torch.autograd.grad(loss, own[0], create_graph=True)[0].square().sum()
        found.append([h, *torch.autograd.grad(loss, own)])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 5e-5 if penalty else 1e-5, 5e-4 if penalty else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["no norm", "instance affine"])
@pytest.mark.parametrize("activation", ["sigmoid", "elu", "silu", "gelu"])
def test_new_activations_in_16_bits_are_as_exact_as_pytorchs(activation, norm, dtype):
    shape = (False, 1, 1)
    tensors = leaves((4, 16, 8, 8), (16, 16, 3, 3), None, (16,), (16,))
    tensors[1].data *= 0.1
    rivals = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    twins = wide(tensors)
    if norm == "no norm":
        tensors[3:] = rivals[3:] = twins[3:] = [None, None]
    with torch.autocast("cpu", dtype=dtype):
        outs = [fused(*tensors, shape, norm, activation), plain(*rivals, shape, norm, activation)]
    outs.append(plain(*twins, shape, norm, activation))
    upstream = torch.randn(outs[0].shape)
    for out in outs:
        out.backward(upstream.to(out.dtype))
    triples = [outs, *zip(*([t.grad for t in ts if t is not None]
                            for ts in (tensors, rivals, twins)), strict=True)]  # fmt: skip
    for ours, theirs, exact in triples:
        error, rival = ((v.double() - exact).square().mean().sqrt() for v in (ours, theirs))
        assert error <= 1.5 * rival, (error / rival).item()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_without_a_norm_silu_and_gelu_keep_their_input_alone(activation, launched):
    """With a way back in a pass of their own; without one in the convolution's launch."""
    x, weight = leaves((2, 6, 8, 8), (7, 6, 4, 4))
    options = {"stride": 2, "padding": 1, "activation": activation}
    assert saved_elements(lambda: fk.conv_act(x, weight, **options)).count(2 * 7 * 4 * 4) == 1
    launched.clear()
    with torch.no_grad():
        out = fk.conv_act(x, weight, defer=True, **options)
    assert launched == ["gather_pointers"]
    close(out, getattr(F, activation)(F.conv2d(x.double(), weight.double(), None, 2, 1)))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_without_a_norm_small_values_keep_their_digits(activation):
    """The coefficients that stand for no norm are exact."""
    x, weight = leaves((2, 6, 8, 8), (7, 6, 4, 4))
    x.data *= 1e-6
    out = fk.conv_act(x, weight, stride=2, padding=1, activation=activation)
    close(out, getattr(F, activation)(F.conv2d(x.double(), weight.double(), None, 2, 1)))


def chain(op, x, weights, norms, **options):
    """Three blocks up; the first two may leave their activation to the next."""
    defer = options.pop("defer", False)
    for weight, (gamma, beta) in zip(weights, norms, strict=True):
        more = {"defer": defer and weight is not weights[-1]} if op is not None else {}
        call = op or reference.conv_transpose_bn_act
        x = call(
            x, weight, None, gamma, beta, None, None, stride=2, padding=1, training=True,
            momentum=0.1, eps=1e-5, activation="relu", **more, **options,
        )  # fmt: skip
    return x


@pytest.mark.parametrize("groups", [1, 2])
def test_a_chain_that_defers_its_activations_is_the_chain(groups, how):
    """The next block normalises and activates as it loads; its backward sums for this one's."""
    shapes = [(4, 5, 2, 3), (5, 6, 4, 4), (6, 4, 4, 4), (4, 3, 4, 4)]
    tensors = leaves(*shapes, *[(6,), (6,), (4,), (4,), (3,), (3,)])
    twins = wide(tensors)
    results = []
    for (x, *rest), op in ((tensors, fk.conv_transpose_bn_act), (twins, None)):
        weights, norms = rest[:3], list(zip(rest[3::2], rest[4::2], strict=True))
        if op is not None:
            out = chain(op, x, weights, norms, defer=True, stat_groups=groups)
        else:
            out = torch.cat([chain(op, part, weights, norms) for part in x.chunk(groups)])
        results.append(out)
    close(*results, 4e-6, 4e-5)
    upstream = torch.randn(results[0].shape)
    results[0].backward(upstream)
    results[1].backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        close(mine.grad, theirs.grad, 1e-5, 1e-4)  # three blocks of fp32 sums


def from_image(x, first, second, gamma, beta, op=functional, groups=1, activation="leaky_relu"):
    """Two blocks down from an image; of ours, the second undoes the first's activation."""
    more, options = {"defer": True} if op is functional else {}, {"stride": 2, "padding": 1}
    h = op.conv_act(x, first, activation=activation, slope=0.2, **options, **more)
    if op is functional:
        return run_bn(op.conv_bn_act, (h, second, None, gamma, beta), (None, None), 2,
                      stat_groups=groups)  # fmt: skip
    return torch.cat([run_bn(op.conv_bn_act, (part, second, None, gamma, beta), (None, None), 2)
                      for part in h.chunk(groups)])  # fmt: skip


FIRST_TWO = [(4, 3, 12, 8), (8, 3, 4, 4), (6, 8, 4, 4), (6,), (6,)]


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run."""
    names, run = [], Launch.run
    monkeypatch.setattr(
        Launch, "run", lambda self, d: names.append(self.kernel.fn.__name__) or run(self, d)
    )
    return names


LEFT = {"hybrid", "prologue"}  # ways in which a block without a norm leaves its activation


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize(
    "needs", [(0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)], ids=["D", "first", "G", "all"]
)
def test_a_block_without_a_norm_leaves_its_activation_to_the_next(
    needs, activation, groups, how, launched
):
    tensors = leaves(*FIRST_TWO)
    for tensor, need in zip(tensors, needs, strict=False):
        tensor.requires_grad_(bool(need))
    twins = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    out = from_image(*tensors, groups=groups, activation=activation)
    launched.clear()
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected = from_image(*twins, op=reference, groups=groups, activation=activation)
    close(out, expected)
    expected.backward(upstream.double())
    for mine, theirs in zip(tensors, twins, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            close(mine.grad, theirs.grad, 1e-5, 1e-4)
    of_first = ["image_up"] * needs[0] + ["image_weight_gradient"] * needs[1]
    of_second = ["gather_pointers"] + ["weight_gradient_pointers"] * needs[2]
    passes = {"hybrid": 1, "prologue": 0}.get(how)
    if passes is not None:  # but that through the second's norm
        norm = ["activation_gradient"] + ["apply_prologue"] * passes
        assert launched == [*norm, *of_second, *of_first]


WAYS = ["hybrid", "materialised", "prologue", "vendor", "reference"]


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_neighbours_may_run_in_different_ways(first, second):
    """Two blocks and a number, each way beside each: with a norm behind and in front of them, and
    without one."""
    tensors = leaves((4, 3, 16, 8), (8, 3, 4, 4), (6, 8, 4, 4), (6, 5, 4, 4), (8,), (6,), (6,))
    hows = {
        Block(False, Geometry(4, 8, 4, 8, 16, 8, 3, 2, 1), torch.float32, False, 1): first,
        Block(False, Geometry(4, 4, 2, 6, 8, 4, 8, 2, 1), torch.float32, True, 1): second,
        Block(True, Geometry(4, 4, 2, 6, 8, 4, 5, 2, 1), torch.float32, False, 1): first,
    }
    found = []
    with choose.override(hows):
        for own, op in ((tensors, functional), (wide(tensors), reference)):
            x, one, two, three, bias, gamma, beta = own
            more, options = {"defer": True} if op is functional else {}, {"stride": 2, "padding": 1}
            h = op.conv_act(x, one, bias, activation="leaky_relu", slope=0.2, **options, **more)
            if op is functional:
                assert isinstance(h, functional.Activated) == (first in LEFT)
            h = run_bn(op.conv_bn_act, (h, two, None, gamma, beta), (None, None), 2, **more)
            if op is functional:
                assert isinstance(h, functional.Deferred) == (second != "reference")
            out = op.conv_transpose_act(h, three, None, activation="tanh", **options)
            out.square().sum().backward()
            found.append([out, *(t.grad for t in own)])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)


@pytest.mark.parametrize("back", ["vendor", "prologue", "materialised"])
def test_a_block_that_was_hybrid_may_go_back_in_another_way(back):
    """A choice is asked for on each way; what the way there kept serves any way back."""
    found = []
    tensors = leaves((4, 5, 8, 4), (6, 5, 4, 4), (4, 6, 4, 4), (6,), (6,))
    for own, op in ((tensors, functional), (wide(tensors), reference)):
        x, one, two, gamma, beta = own
        more = {"defer": True} if op is functional else {}
        h = run_bn(op.conv_bn_act, (x, one, None, gamma, beta), (None, None), 2, **more)
        out = op.conv_act(h, two, stride=2, padding=1, activation="none")
        with choose.override(back):
            out.square().sum().backward()
        found.append([t.grad for t in own])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)


def saved_elements(run):
    """Elements of each 4D tensor that the backward pass of what `run` gives holds on to."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.numel()) or t if t.dim() == 4 else t, lambda t: t
    ):
        run()
    return seen


@pytest.mark.parametrize(
    ("op", "weight", "stride", "kept"),
    [
        ("conv_act", (5, 6, 4, 4), 2, 1), ("conv_transpose_act", (6, 5, 4, 4), 2, 1),
        ("conv_act", (17, 6, 4, 4), 1, 1), ("conv_act", (16, 6, 4, 4), 1, 0),
        ("conv_transpose_act", (6, 3, 4, 4), 2, 0),
    ],
)  # fmt: skip
def test_a_hybrid_block_keeps_activated_values_for_its_weights_gradient_alone(
    op, weight, stride, kept
):
    """And not where it reads each value once, to an image or to a few numbers."""
    found = []
    tensors = leaves((4, 3, 8, 8), (6, 3, 4, 4), weight, (6,), (6,))
    y = 4 * 6 * 4 * 4

    def run(own, room, **more):
        x, first, second, gamma, beta = own
        h = run_bn(room.conv_bn_act, (x, first, None, gamma, beta), (None, None), 2, **more)
        options = {"stride": stride, "padding": stride - 1, "activation": "none"}
        return getattr(room, op)(h, second, **options)

    def ours():
        return run(tensors, functional, defer=True)

    for own, room, more in ((tensors, functional, {"defer": True}), (wide(tensors), reference, {})):
        out = run(own, room, **more)
        out.square().sum().backward()
        found.append([out, *(t.grad for t in own)])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)
    assert saved_elements(ours).count(y) == 2 + kept  # y twice: the first's, and the second's x
    tensors[2].requires_grad_(False)
    assert saved_elements(ours).count(y) == 2
    with torch.no_grad():
        assert saved_elements(ours) == []


def test_a_hybrid_backward_may_be_run_twice_and_inside_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    found = []
    tensors = leaves(*FIRST_TWO)

    def twice(*own):
        return from_image(*own)

    for run in (twice, lambda *own: checkpoint(twice, *own, use_reentrant=False)):
        out = run(*tensors)
        grads = [torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)]
        if run is twice:
            grads.append(torch.autograd.grad(out.square().sum(), tensors))
        found += grads
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_two_hybrid_blocks_and_another_module_take_the_same_output():
    """Gradients of y and coef by all ways add up."""
    found = []
    tensors = leaves((4, 3, 8, 8), (5, 3, 4, 4), (4, 5, 4, 4), (6, 5, 4, 4), (5,), (5,))
    for own, op in ((tensors, functional), (wide(tensors), reference)):
        x, first, one, two, gamma, beta = own
        more = {"defer": True} if op is functional else {}
        h = run_bn(op.conv_bn_act, (x, first, None, gamma, beta), (None, None), 2, **more)
        outs = [op.conv_act(h, w, stride=2, padding=1, activation="none") for w in (one, two)]
        outs.append(functional.materialise(h) if op is functional else h)
        sum(out.square().sum() for out in outs).backward()
        found.append([t.grad for t in own])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_a_block_without_a_norm_whose_output_others_take(activation, backend):
    """Materialised, it is the tensor with its own gradients, of every order."""
    x, first = leaves(*FIRST_TWO[:2])
    twins = wide((x, first))
    options = {"stride": 2, "padding": 1, "activation": activation, "slope": 0.2}

    def ours(x, first):
        h = fk.conv_act(x, first, defer=True, **options)
        return fk.materialise(h).square().sum()

    if backend != "eager":
        torch.compile(ours, backend=backend, fullgraph=True)(x, first).backward()
    else:
        assert isinstance(fk.conv_act(x, first, defer=True, **options), fk.Activated)
        ours(x, first).backward()
        own = x.grad, first.grad
        x.grad = first.grad = None
        loss = ours(x, first)
        slopes = torch.autograd.grad(loss, (x, first), create_graph=True)
        for slope, grad in zip(slopes, own, strict=True):
            close(slope, grad.double(), 4e-6, 4e-5)
        slopes[0].square().sum().backward()
    loss = reference.conv_act(*twins, **options).square().sum()
    if backend != "eager":
        loss.backward()
    else:
        torch.autograd.grad(loss, twins[0], create_graph=True)[0].square().sum().backward()
    close(x.grad, twins[0].grad, 1e-5, 1e-4)
    close(first.grad, twins[1].grad, 1e-5, 1e-4)
    with torch.no_grad():
        h = fk.conv_act(x, first, defer=True, **options)
        assert isinstance(h, torch.Tensor)  # there will be no gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["hybrid", "prologue"])
def test_a_layer_from_an_image_under_autocast(how, dtype):
    """No further from float64 than by themselves."""
    tensors = leaves((4, 3, 16, 16), (16, 3, 4, 4), (16, 16, 4, 4), (16,), (16,))
    rivals = [t.detach().clone().requires_grad_() for t in tensors]
    twins = wide(tensors)
    with torch.autocast("cpu", dtype=dtype):
        with choose.override(how):
            ours = from_image(*tensors)
        with choose.override("materialised"):
            theirs = run_bn(
                fk.conv_bn_act,
                (fk.conv_act(rivals[0], rivals[1], stride=2, padding=1, activation="leaky_relu",
                             slope=0.2), rivals[2], None, *rivals[3:]),
                (None, None), 2,
            )  # fmt: skip
    exact = from_image(*twins, op=reference)
    upstream = torch.randn(ours.shape)
    for out in (ours, theirs, exact):
        out.backward(upstream.to(out.dtype))
    for mine, rival, twin in zip(tensors, rivals, twins, strict=True):
        error, other = ((t.grad.double() - twin.grad).square().mean().sqrt()
                        for t in (mine, rival))  # fmt: skip
        assert error <= 1.5 * other, (error / other).item()
        assert mine.grad.dtype == torch.float32


def test_two_batches_in_one_launch_move_the_buffers_one_after_the_other():
    x, weight, gamma, beta = leaves((6, 3, 8, 8), (5, 3, 4, 4), (5,), (5,))
    own, theirs = [[torch.zeros(5), torch.ones(5)] for _ in range(2)]
    run_bn(fk.conv_bn_act, (x, weight, None, gamma, beta), own, 2, stat_groups=2)
    norm = nn.BatchNorm2d(5, momentum=0.3)
    for part in x.chunk(2):
        norm(F.conv2d(part, weight, None, 2, 1))
    torch.testing.assert_close(own[0], norm.running_mean)
    torch.testing.assert_close(own[1], norm.running_var)
    with pytest.raises(ValueError, match="stat_groups=4 does not divide a batch of 6"):
        run_bn(fk.conv_bn_act, (x, weight, None, gamma, beta), theirs, 2, stat_groups=4)


def test_running_var_is_unbiased_and_the_normalisation_biased():
    """4 values a channel, where n / (n - 1) is far from 1."""
    x, weight = leaves((1, 2, 4, 4), (3, 2, 4, 4))
    mean, var = torch.zeros(3), torch.zeros(3)
    out = run_bn(
        fk.conv_bn_act, (x, weight, None, None, None), (mean, var), 2, momentum=1.0,
        activation="none", eps=0.0,
    )  # fmt: skip
    y = F.conv2d(x, weight, None, 2, 1)
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=1))
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(3))


@pytest.mark.parametrize("transposed", [False, True])
def test_evaluation_folds_the_norm_and_is_differentiable(transposed):
    x, weight, bias, gamma, beta = leaves((2, 4, 4, 4), (4, 4, 4, 4), (4,), (4,), (4,))
    tensors = [x, weight, bias, gamma, beta]
    twins = wide(tensors)
    buffers = [torch.randn(4), torch.rand(4) + 0.5]
    name = "conv_transpose_bn_act" if transposed else "conv_bn_act"
    out = run_bn(getattr(fk, name), tensors, buffers, 2, training=False)
    expected = run_bn(
        getattr(reference, name), twins, [b.double() for b in buffers], 2, training=False
    )
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(tensors, twins, strict=True):
        close(mine.grad, theirs.grad, 4e-6, 4e-5)


def test_one_value_a_channel_is_refused_in_training():
    x, weight = leaves((1, 2, 4, 4), (3, 2, 4, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_bn(fk.conv_bn_act, (x, weight, None, None, None), (None, None), 1)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs, monkeypatch):
    """No weight gradient of a frozen net, no input gradient of a first layer."""
    from fastdcgan_kernels.gpu import blocks

    calls = []
    for name in ("convolve", "weight_gradient"):
        whole = getattr(blocks, name)
        monkeypatch.setattr(
            blocks, name, lambda *a, _n=name, _w=whole, **k: calls.append(_n) or _w(*a, **k)
        )
    x, weight, gamma, beta = leaves((2, 5, 4, 4), (6, 5, 4, 4), (6,), (6,))
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    out = run_bn(fk.conv_bn_act, (x, weight, None, gamma, beta), (None, None), 2)
    calls.clear()
    out.sum().backward()
    assert calls == (["convolve"] if needs[0] else ["weight_gradient"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_own_dtype_and_leaves_gradients_in_the_parameters(dtype):
    tensors = leaves((4, 32, 8, 8), (32, 32, 4, 4), None, (32,), (32,))
    twins = wide(tensors)
    rivals = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = {}
    with torch.autocast("cpu", dtype=dtype):
        out["ours"] = run_bn(fk.conv_bn_act, tensors, (None, None), 2)
        out["theirs"] = run_bn(reference.conv_bn_act, rivals, (None, None), 2)
    out["exact"] = run_bn(reference.conv_bn_act, twins, (None, None), 2)
    assert out["ours"].dtype == dtype
    upstream = torch.randn(out["ours"].shape)
    for value in out.values():
        value.backward(upstream.to(value.dtype))
    for ours, theirs, exact in zip(
        [out["ours"], *(t.grad for t in tensors if t is not None)],
        [out["theirs"], *(t.grad for t in rivals if t is not None)],
        [out["exact"], *(t.grad for t in twins if t is not None)],
        strict=True,
    ):
        error, rival = ((v.double() - exact).square().mean().sqrt() for v in (ours, theirs))
        assert error <= 1.5 * rival, (error / rival).item()
    for tensor in tensors[1:]:
        assert tensor is None or tensor.grad.dtype == torch.float32


def test_penalties_on_the_gradient_are_plain_pytorchs():
    """R1 and WGAN-GP: the gradient of a function of the gradient, all the way to the weights."""
    for kind in ("r1", "gp"):
        found = []
        tensors = leaves((3, 3, 8, 8), (6, 3, 4, 4), (4, 6, 4, 4), (4,), (4,))
        for own, op in ((tensors, functional), (wide(tensors), reference)):
            x, first, second, gamma, beta = own
            h = op.conv_act(x, first, stride=2, padding=1, activation="leaky_relu", slope=0.2)
            h = run_bn(op.conv_bn_act, (h, second, None, gamma, beta), (None, None), 2)
            (gx,) = torch.autograd.grad(h.sigmoid().sum(), x, create_graph=True)
            norm = gx.square().sum((1, 2, 3))
            (norm.mean() if kind == "r1" else (norm.sqrt() - 1).square().mean()).backward()
            found.append([t.grad for t in (first, second, gamma)])
        for mine, theirs in zip(*found, strict=True):
            close(mine, theirs, 1e-5, 1e-4)  # fp32 through two backward passes


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_a_penalty_through_a_layer_that_leaves_its_activation_to_the_next(activation, how):
    found = []
    tensors = leaves(*FIRST_TWO)
    for own, op in ((tensors, functional), (wide(tensors), reference)):
        h = from_image(*own, op=op, activation=activation)
        (gx,) = torch.autograd.grad(h.sigmoid().sum(), own[0], create_graph=True)
        gx.square().sum().backward()
        found.append([t.grad for t in own[:4]])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)


@pytest.mark.parametrize("penalty", [False, True])
def test_three_layers_from_an_image_to_a_number(penalty, how):
    """Each leaves its activation to the next."""
    found = []
    tensors = leaves((3, 3, 16, 16), (8, 3, 4, 4), (5, 8, 4, 4), (1, 5, 4, 4), (5,), (5,))
    for own, op in ((tensors, functional), (wide(tensors), reference)):
        x, first, second, last, gamma, beta = own
        more = {"defer": True} if op is functional else {}
        h = op.conv_act(x, first, stride=2, padding=1, activation="relu", **more)
        h = run_bn(op.conv_bn_act, (h, second, None, gamma, beta), (None, None), 2, **more)
        out = op.conv_act(h, last, stride=1, padding=0, activation="none")
        loss = out.sigmoid().sum()
        if penalty:
            loss = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        loss.backward()
        found.append([out, *(t.grad for t in own[:5])])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-5, 1e-4)


def test_second_gradients_of_the_reference_pieces():
    x, coef, weight, gamma, beta = (
        t.detach().double().requires_grad_()
        for t in leaves((3, 2, 4, 4), (3, 1, 2), (3, 2, 4, 4), (3,), (3,))
    )

    def pieces(x, coef, weight, gamma, beta):
        spec = BlockSpec(stride=2, padding=(1, 1, 1, 1), eps=1e-3, x_activation="tanh")
        y, c = reference.conv_bn(Inputs(x, weight, coef, gamma=gamma, beta=beta), spec)
        return reference.activate(y, c, "tanh", 0.0)

    assert torch.autograd.gradcheck(pieces, (x, coef, weight, gamma, beta))
    assert torch.autograd.gradgradcheck(pieces, (x, coef, weight, gamma, beta))


def small_net(x, weights, norm, op):
    h = op.conv_act(x, weights[0], stride=2, padding=1, activation="leaky_relu", slope=0.2)
    return run_bn(op.conv_bn_act, (h, weights[1], None, *norm), (None, None), 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_takes_the_blocks_whole(backend):
    tensors = leaves((2, 3, 8, 8), (5, 3, 4, 4), (6, 5, 4, 4), (6,), (6,))
    twins = wide(tensors)

    def step(x, first, second, gamma, beta):
        return small_net(x, (first, second), (gamma, beta), functional)

    out = torch.compile(step, backend=backend, fullgraph=True)(*tensors)
    x, first, second, gamma, beta = twins
    expected = small_net(x, (first, second), (gamma, beta), reference)
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(tensors, twins, strict=True):
        close(mine.grad, theirs.grad, 4e-6, 4e-5)


def test_compile_takes_blocks_that_leave_their_activations_to_the_next(how):
    tensors = leaves(*FIRST_TWO)
    twins = wide(tensors)
    out = torch.compile(from_image, backend="aot_eager", fullgraph=True)(*tensors)
    out.square().sum().backward()
    expected = from_image(*twins, op=reference)
    close(out, expected)
    expected.square().sum().backward()
    for mine, theirs in zip(tensors, twins, strict=True):
        close(mine.grad, theirs.grad, 1e-5, 1e-4)


def test_compiled_once_for_the_batches_of_a_bucket_where_each_image_is_a_group():
    (x, weight), compiled = leaves((8, 3, 8, 8), (16, 3, 4, 4)), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def run(x):
        return fused(x, weight, None, None, None, (False, 2, 1), "instance", "silu")

    torch._dynamo.reset()
    step = torch.compile(run, backend=backend, fullgraph=True)
    for n in (5, 6, 7, 8):
        part = x[:n].detach().clone()
        torch._dynamo.mark_dynamic(part, 0)
        expected = F.silu(F.instance_norm(F.conv2d(part, weight, None, 2, 1), eps=1e-4))
        torch.testing.assert_close(step(part), expected, rtol=1e-5, atol=1e-5)
    assert len(compiled) == 1


def test_fakes_run_forward_and_backward_on_the_meta_device():
    tensors = [t.detach().to("meta").requires_grad_()
               for t in leaves((2, 3, 8, 8), (5, 3, 4, 4), (6, 5, 4, 4), (6,), (6,))]  # fmt: skip
    x, first, second, gamma, beta = tensors
    out = small_net(x, (first, second), (gamma, beta), functional)
    assert out.shape == (2, 6, 2, 2)
    assert out.is_contiguous(memory_format=CL)
    out.sum().backward()
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.contiguous(),
        lambda x: x.to(memory_format=CL),
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.transpose(2, 3),
    ],
    ids=["nchw", "channels_last", "sliced", "expanded", "transposed"],
)
def test_strides_of_input_and_gradient_do_not_matter(given):
    (x,) = leaves((3, 6, 4, 4))
    (weight,) = leaves((5, 6, 4, 4), seed=1)
    x = given(x.detach()).requires_grad_()
    out = fk.conv_act(x, weight, stride=2, padding=1, activation="relu")
    x64, w64 = wide([x, weight])
    expected = F.conv2d(x64, w64, None, 2, 1).relu()
    close(out, expected)
    out.sum().backward()  # an upstream gradient of stride 0
    expected.sum().backward()
    close(x.grad, x64.grad, 4e-6, 4e-5)
    close(weight.grad, w64.grad, 4e-6, 4e-5)


def test_a_float32_weight_meets_a_16_bit_input():
    x, weight, bias = leaves((2, 6, 4, 4), (5, 6, 4, 4), (5,))
    half = x.detach().bfloat16().requires_grad_()
    out = fk.conv_act(half, weight, bias, stride=2, padding=1, activation="none")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert (half.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip


UNSUPPORTED = {
    "kernels are square": ((2, 3, 8, 8), (5, 3, 3, 4), 2, 1, torch.float32),
    "1x1 to 7x7": ((2, 3, 9, 9), (5, 3, 8, 8), 1, 1, torch.float32),
    "stride 3": ((2, 3, 8, 8), (5, 3, 3, 3), 3, 1, torch.float32),
    "torch.float64": ((2, 3, 8, 8), (5, 3, 4, 4), 2, 1, torch.float64),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_no_kernel_takes_goes_to_plain_pytorch_or_raises(why, monkeypatch):
    x, weight, stride, padding, dtype = UNSUPPORTED[why]
    x, weight = leaves(x, weight, dtype=dtype)
    options = {"stride": stride, "padding": padding, "activation": "relu"}
    with pytest.raises(ValueError, match=f"FASTDCGAN_IMPL=triton.*{why}"):
        fk.conv_act(x, weight, **options)
    for mode in ("auto", "reference"):
        monkeypatch.setenv("FASTDCGAN_IMPL", mode)
        out = fk.conv_act(x, weight, **options)
        torch.testing.assert_close(out, F.conv2d(x, weight, None, stride, padding).relu())


def test_the_same_bits_twice():
    found = []
    for _ in range(2):
        tensors = leaves((4, 9, 8, 8), (7, 9, 4, 4), None, (7,), (7,))
        out = run_bn(fk.conv_bn_act, tensors, (None, None), 2)
        out.square().sum().backward()
        found.append([out, *(t.grad for t in tensors if t is not None)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_nan_stays_nan():
    x, weight = leaves((1, 3, 4, 4), (2, 3, 4, 4))
    x.data[0, 0, 0, 0] = float("nan")
    for activation in reference.ACTIVATIONS:
        out = fk.conv_act(x, weight, stride=2, padding=1, activation=activation, slope=0.2)
        assert out[0, :, 0, 0].isnan().all(), activation
        with torch.no_grad():
            out = fk.conv_act(x, weight, stride=2, padding=1, activation=activation, slope=0.2)
        assert out[0, :, 0, 0].isnan().all(), activation
