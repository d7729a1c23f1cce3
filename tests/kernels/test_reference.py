"""The plain-PyTorch blocks against nn modules in float64: outputs, every gradient, buffers."""

import pytest
import torch
from torch import nn

import fastdcgan_kernels as fk

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "tanh": nn.Tanh(),
    "none": nn.Identity(),
}
BN_OPS = [(fk.conv_bn_act, nn.Conv2d), (fk.conv_transpose_bn_act, nn.ConvTranspose2d)]
PLAIN_OPS = [(fk.conv_act, nn.Conv2d), (fk.conv_transpose_act, nn.ConvTranspose2d)]
# (stride, padding, side): the middle and the ends of the nets; an odd side.
SHAPES = [(2, 1, 8), (1, 0, 4), (2, 1, 7)]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def twin(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def compare(pairs, output, expected):
    """Outputs, and the gradients of every (ours, theirs) pair, from one random upstream."""
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert output.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(expected)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for ours, theirs in pairs:
        if ours is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("stride", "padding", "side"), SHAPES)
@pytest.mark.parametrize(("op", "layer"), BN_OPS, ids=["conv", "conv_transpose"])
def test_blocks_with_norm_are_the_modules(op, layer, stride, padding, side, training, activation):
    torch.manual_seed(0)
    bias = activation == "none"  # one case of each is enough
    conv = layer(3, 5, 4, stride, padding, bias=bias).double()
    norm = nn.BatchNorm2d(5, eps=1e-4, momentum=0.3).double().train(training)
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias, norm.running_mean):
            parameter.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = leaf(4, 3, side, side)
    own = [twin(t) for t in (x, conv.weight, conv.bias, norm.weight, norm.bias)]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    output = op(
        *own,
        mean,
        var,
        stride=stride,
        padding=padding,
        training=training,
        momentum=0.3,
        eps=1e-4,
        activation=activation,
        slope=0.2,
    )
    expected = ACTIVATIONS[activation](norm(conv(x)))
    theirs = (x, conv.weight, conv.bias, norm.weight, norm.bias)
    compare(zip(own, theirs, strict=True), output, expected)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding", "side"), SHAPES)
@pytest.mark.parametrize(("op", "layer"), PLAIN_OPS, ids=["conv", "conv_transpose"])
def test_blocks_without_norm_are_the_modules(op, layer, stride, padding, side, bias, activation):
    torch.manual_seed(0)
    conv = layer(3, 5, 4, stride, padding, bias=bias).double()
    x = leaf(2, 3, side, side)
    own = [twin(t) for t in (x, conv.weight, conv.bias)]
    output = op(*own, stride=stride, padding=padding, activation=activation, slope=0.2)
    theirs = (x, conv.weight, conv.bias)
    compare(zip(own, theirs, strict=True), output, ACTIVATIONS[activation](conv(x)))


@pytest.mark.parametrize(("op", "layer"), BN_OPS, ids=["conv", "conv_transpose"])
def test_norm_without_scale_shift_or_buffers(op, layer):
    conv = layer(3, 5, 4, 2, 1, bias=False).double()
    norm = nn.BatchNorm2d(5, affine=False, track_running_stats=False).double()
    x = leaf(2, 3, 8, 8)
    output = op(
        x,
        conv.weight,
        None,
        None,
        None,
        None,
        None,
        stride=2,
        padding=1,
        training=True,
        momentum=0.1,
        eps=1e-5,
        activation="none",
    )
    torch.testing.assert_close(output, norm(conv(x)), rtol=0, atol=1e-12)


def test_one_value_a_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fk.conv_bn_act(
            torch.zeros(1, 2, 4, 4),
            torch.zeros(3, 2, 4, 4),
            *[None] * 5,
            stride=1,
            padding=0,
            training=True,
            momentum=0.1,
            eps=1e-5,
            activation="relu",
        )


def test_unknown_activation_is_refused():
    for activation, why in (("swish", "activation='swish' was given"), ("elu", "give its alpha")):
        with pytest.raises(ValueError, match=why) as caught:
            fk.conv_act(
                leaf(1, 1, 4, 4), leaf(1, 1, 4, 4), stride=1, padding=0, activation=activation
            )
        assert "\n" not in str(caught.value)


def test_strides_of_the_input_do_not_matter():
    x, weight = leaf(2, 6, 8, 8), leaf(5, 3, 4, 4)
    wide = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    for given in (x[:, ::2], x[:, :3].to(memory_format=torch.channels_last), wide[..., ::2]):
        output = fk.conv_act(given, weight, stride=2, padding=1, activation="relu")
        expected = torch.relu(
            torch.nn.functional.conv2d(given.contiguous(), weight, stride=2, padding=1)
        )
        torch.testing.assert_close(output, expected)
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_second_gradients_exist():
    x, weight, gamma, beta = leaf(3, 2, 4, 4), leaf(2, 2, 4, 4), leaf(2), leaf(2)
    assert torch.autograd.gradgradcheck(
        lambda *args: fk.conv_bn_act(
            args[0],
            args[1],
            None,
            args[2],
            args[3],
            None,
            None,
            stride=2,
            padding=1,
            training=True,
            momentum=0.1,
            eps=1e-3,
            activation="tanh",
        ),
        (x, weight, gamma, beta),
    )
