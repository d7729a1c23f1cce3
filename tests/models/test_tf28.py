"""The TensorFlow tutorial's nets against NumPy in float64: every layer from its definition, with
Keras's layouts (NHWC, Keras kernel orders), and no PyTorch in the computation."""

import numpy as np
import pytest
import torch
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.models import TF28Discriminator, TF28Generator

EPS = 1e-3


def same_padding(size, stride, kernel=5):
    """TensorFlow's rule: (output size, pixels before, pixels after)."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return out, total // 2, total - total // 2


def conv(x, kernel, stride):
    """x (B, H, W, CI), kernel (KH, KW, CI, CO)."""
    p, top, bottom = same_padding(x.shape[1], stride)
    q, left, right = same_padding(x.shape[2], stride)
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y = np.zeros((x.shape[0], p, q, kernel.shape[3]))
    for i in range(p):
        for j in range(q):
            window = x[:, i * stride : i * stride + 5, j * stride : j * stride + 5]
            y[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    return y


def conv_transpose(x, kernel, stride):
    """x (B, H, W, CI), kernel (KH, KW, CO, CI): the gradient of `conv` for its input, an image of
    stride times the side, when x is the gradient for its output."""
    batch, h, w, _ = x.shape
    p, top, bottom = same_padding(h * stride, stride)
    q, left, right = same_padding(w * stride, stride)
    assert (p, q) == (h, w)
    padded = np.zeros(
        (batch, top + h * stride + bottom, left + w * stride + right, kernel.shape[2])
    )
    for i in range(h):
        for j in range(w):
            spread = np.einsum("bi,hwoi->bhwo", x[:, i, j], kernel)
            padded[:, i * stride : i * stride + 5, j * stride : j * stride + 5] += spread
    return padded[:, top : top + h * stride, left : left + w * stride]


def leaky(x):
    return np.where(x > 0, x, 0.3 * x)


def batch_norm(x, norm, training):
    """Over the last axis. Returns the output and Keras's new moving mean and variance."""
    axes = tuple(range(x.ndim - 1))
    if training:
        mean, var = x.mean(axes), ((x - x.mean(axes)) ** 2).mean(axes)
        moved = norm["mean"] * 0.99 + mean * 0.01, norm["var"] * 0.99 + var * 0.01
    else:
        mean, var = norm["mean"], norm["var"]
        moved = mean, var
    return (x - mean) / np.sqrt(var + EPS) * norm["gamma"] + norm["beta"], moved


def keras_generator_weights(rng, nz, channels):
    """Dense (in, out) and Conv2DTranspose (kh, kw, out, in), of a size that keeps tanh alive."""

    def norm(features):
        return {
            "gamma": rng.normal(1, 0.2, features),
            "beta": rng.normal(0, 0.2, features),
            "mean": rng.normal(0, 0.3, features),
            "var": rng.uniform(0.5, 2, features),
        }

    return {
        "dense": rng.normal(0, 1 / np.sqrt(nz), (nz, 7 * 7 * 256)),
        "kernels": [
            rng.normal(0, 0.03, (5, 5, 128, 256)),
            rng.normal(0, 0.03, (5, 5, 64, 128)),
            rng.normal(0, 0.05, (5, 5, channels, 64)),
        ],
        "norms": [norm(7 * 7 * 256), norm(128), norm(64)],
    }


def keras_generator(z, weights, training):
    moved = []

    def norm(x, k):
        y, moving = batch_norm(x, weights["norms"][k], training)
        moved.append(moving)
        return leaky(y)

    x = norm(z @ weights["dense"], 0).reshape(-1, 7, 7, 256)
    x = norm(conv_transpose(x, weights["kernels"][0], 1), 1)
    x = norm(conv_transpose(x, weights["kernels"][1], 2), 2)
    return np.tanh(conv_transpose(x, weights["kernels"][2], 2)), moved


def load_keras_generator(net, weights):
    """By transposition alone, as the module's docstring promises."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.from_numpy(weights["dense"]).T)
        for layer, kernel in zip(layers[1:], weights["kernels"], strict=True):
            layer.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        for module, norm in zip(norms, weights["norms"], strict=True):
            module.weight.copy_(torch.from_numpy(norm["gamma"]))
            module.bias.copy_(torch.from_numpy(norm["beta"]))
            module.running_mean.copy_(torch.from_numpy(norm["mean"]))
            module.running_var.copy_(torch.from_numpy(norm["var"]))
    return norms


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
def test_generator_is_keras(training, channels):
    rng = np.random.default_rng(0)
    weights = keras_generator_weights(rng, 9, channels)
    z = rng.normal(size=(3, 9))
    expected, moved = keras_generator(z, weights, training)
    net = TF28Generator(9, channels).double().train(training)
    norms = load_keras_generator(net, weights)
    images = net(torch.from_numpy(z).reshape(3, 9, 1, 1))
    assert 0.05 < expected.std() < 0.9, "the case must be able to show a difference"
    np.testing.assert_allclose(
        images.detach().permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-10
    )
    for module, (mean, var) in zip(norms, moved, strict=True):
        np.testing.assert_allclose(module.running_mean.numpy(), mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(module.running_var.numpy(), var, rtol=0, atol=1e-10)


def test_generator_in_float32_is_keras():
    rng = np.random.default_rng(1)
    weights = keras_generator_weights(rng, 100, 1)
    z = rng.normal(size=(4, 100))
    expected, _ = keras_generator(z, weights, training=True)
    net = TF28Generator()
    load_keras_generator(net, weights)
    images = net(torch.from_numpy(z).float()).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_discriminator_is_keras(channels):
    rng = np.random.default_rng(2)
    kernels = [rng.normal(0, 0.2, (5, 5, channels, 64)), rng.normal(0, 0.05, (5, 5, 64, 128))]
    biases = [rng.normal(size=64), rng.normal(size=128)]
    dense, dense_bias = rng.normal(0, 0.02, (7 * 7 * 128, 1)), rng.normal(size=1)
    x = rng.uniform(-1, 1, (3, 28, 28, channels))

    y = leaky(conv(x, kernels[0], 2) + biases[0])
    y = leaky(conv(y, kernels[1], 2) + biases[1])
    expected = (y.reshape(3, -1) @ dense + dense_bias)[:, 0]

    net = TF28Discriminator(channels).double().eval()
    first, second, last = (m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    with torch.no_grad():
        for layer, kernel, bias in zip((first, second), kernels, biases, strict=True):
            layer.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
            layer.bias.copy_(torch.from_numpy(bias))
        last.weight.copy_(torch.from_numpy(dense).T)
        last.bias.copy_(torch.from_numpy(dense_bias))
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    for given in (images, images.contiguous()):
        logits = net(given).detach()
        assert logits.shape == (3,)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        net.probability(images).detach().numpy(), 1 / (1 + np.exp(-expected)), rtol=0, atol=1e-10
    )


def test_conv_transpose_of_this_file_is_the_gradient_of_its_conv():
    """<conv(u), v> = <u, conv_transpose(v)>: the oracle above is checked too."""
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(5, 5, 2, 3))
    for stride in (1, 2):
        u, v = rng.normal(size=(1, 8, 8, 2)), rng.normal(size=(1, 8 // stride, 8 // stride, 3))
        np.testing.assert_allclose(
            (conv(u, kernel, stride) * v).sum(), (u * conv_transpose(v, kernel, stride)).sum()
        )


def test_gradients_of_training_batch_norm_are_exact():
    torch.manual_seed(0)
    norm = TF28Generator(1).main[10].double()
    x = torch.randn(2, 64, 2, 1, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(norm(x).pow(3).sum(), x)[0],
        torch.autograd.grad(
            (
                (x - x.mean((0, 2, 3), keepdim=True))
                / (x.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
            )
            .pow(3)
            .sum(),
            x,
        )[0],
    )
    assert norm.num_batches_tracked == 1


def test_moving_statistics_do_not_see_uninitialised_memory():
    net = TF28Generator(4)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        net(torch.randn(2, 4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(buffer.isfinite().all() for buffer in net.buffers())


def test_two_forwards_then_both_gradients():
    """The statistics move between a forward and its backward; autograd must not mind."""
    net = TF28Generator(4)
    z = torch.randn(2, 4)
    first, second = net(z), net(z)
    first.sum().backward()
    second.sum().backward()


def test_initialisation_is_keras():
    """Glorot uniform over Keras's fans, biases 0, BatchNorm 1 and 0."""
    for net in (TF28Generator(), TF28Discriminator()):
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                taps = module.weight[0, 0].numel()
                bound = (6 / (taps * sum(module.weight.shape[:2]))) ** 0.5
                assert 0.97 * bound < module.weight.abs().max() <= bound
                assert abs(module.weight.std() - bound / 3**0.5) < 0.05 * bound
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert (module.weight == 1).all()
                assert not module.bias.any()


def test_dropout_is_three_tenths():
    netD = TF28Discriminator()
    assert [m.p for m in netD.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    x = torch.rand(2, 1, 28, 28)
    assert not torch.equal(netD(x), netD(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_memory_format(channels):
    netG, netD = TF28Generator(8, channels), TF28Discriminator(channels)
    images = netG(torch.randn(2, 8))
    assert images.shape == (2, channels, 28, 28)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert netD(images).shape == (2,)
    assert (netG.size, netG.nz, netG.channels) == (28, 8, channels)
    assert (netD.size, netD.channels) == (28, channels)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TF28Generator(0), "nz=0"),
        (lambda: TF28Generator(channels=5), "channels=5"),
        (lambda: TF28Discriminator(channels=5), "channels=5"),
        (lambda: TF28Generator(4)(torch.zeros(1, 4)), "one image was given"),
        (lambda: TF28Generator(4)(torch.zeros(2, 5)), r"shape \(2, 5\)"),
        (lambda: TF28Discriminator()(torch.zeros(2, 1, 32, 32)), r"\(2, 1, 32, 32\)"),
    ],
)
def test_wrong_values_are_one_line(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
