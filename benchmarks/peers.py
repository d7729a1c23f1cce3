"""What fastdcgan is measured against, written out in plain PyTorch (and Keras) and using nothing of
fastdcgan: the PyTorch example as its users run it, the same tuned by every means PyTorch has, and
the TensorFlow tutorial."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import Unavailable, Workload

NZ, SIZE = 100, 64


# --- the nets of the PyTorch example --------------------------------------------------------------


def generator_layers() -> list[list[nn.Module]]:
    """The example's generator for 64 pixels, block by block."""
    widths = [NZ, 512, 256, 128, 64]
    blocks: list[list[nn.Module]] = []
    for i, (CI, CO) in enumerate(pairwise(widths)):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        blocks.append(
            [
                nn.ConvTranspose2d(CI, CO, 4, stride, padding, bias=False),
                nn.BatchNorm2d(CO),
                nn.ReLU(True),
            ]
        )
    blocks.append([nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()])
    return blocks


def discriminator_layers() -> list[list[nn.Module]]:
    """The example's discriminator without its Sigmoid, block by block."""
    widths = [3, 64, 128, 256, 512]
    blocks: list[list[nn.Module]] = []
    for i, (CI, CO) in enumerate(pairwise(widths)):
        norm = [nn.BatchNorm2d(CO)] if i else []
        blocks.append([nn.Conv2d(CI, CO, 4, 2, 1, bias=False), *norm, nn.LeakyReLU(0.2, True)])
    blocks.append([nn.Conv2d(512, 1, 4, 1, 0, bias=False)])
    return blocks


def net(blocks: list[list[nn.Module]], *more: nn.Module) -> nn.Sequential:
    """One net of the blocks, with the example's initial weights."""
    whole = nn.Sequential(*(layer for block in blocks for layer in block), *more)
    for module in whole.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return whole


# --- the PyTorch example: NCHW, float32, eager ----------------------------------------------------


def example_step(device: torch.device, batch: int) -> Workload:
    """The example's loop body: BCELoss on probabilities, a host sync for every loss it prints."""
    netG = net(generator_layers()).to(device)
    netD = net(discriminator_layers(), nn.Sigmoid()).to(device)
    criterion = nn.BCELoss()
    optD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    images = torch.rand(batch, 3, SIZE, SIZE, device=device) * 2 - 1

    def step() -> None:
        netD.zero_grad()
        label = torch.full((batch,), 1.0, device=device)
        output = netD(images).view(-1)
        real_loss = criterion(output, label)
        real_loss.backward()
        output.mean().item()
        fake = netG(torch.randn(batch, NZ, 1, 1, device=device))
        label.fill_(0.0)
        output = netD(fake.detach()).view(-1)
        fake_loss = criterion(output, label)
        fake_loss.backward()
        output.mean().item()
        optD.step()
        netG.zero_grad()
        label.fill_(1.0)
        output = netD(fake).view(-1)
        loss = criterion(output, label)
        loss.backward()
        output.mean().item()
        optG.step()
        (real_loss + fake_loss).item()
        loss.item()

    return Workload(step, batch)


def example_sampling(device: torch.device, batch: int) -> Workload:
    """As the example draws: netG(fixed_noise) in training mode, without gradients."""
    netG = net(generator_layers()).to(device)
    z = torch.randn(batch, NZ, 1, 1, device=device)

    def draw() -> None:
        with torch.no_grad():
            netG(z)

    return Workload(draw, batch)


def example_discriminator(device: torch.device, batch: int, *, backward: bool) -> Workload:
    """D on one batch of images, with its loss and, if asked for, the gradients of its weights."""
    netD = net(discriminator_layers(), nn.Sigmoid()).to(device)
    images = torch.rand(batch, 3, SIZE, SIZE, device=device) * 2 - 1
    label = torch.full((batch,), 1.0, device=device)
    criterion = nn.BCELoss()

    def run() -> None:
        netD.zero_grad()
        loss = criterion(netD(images).view(-1), label)
        if backward:
            loss.backward()

    return Workload(run, batch)


def example_feed(folder: Path, batch: int) -> Callable[[], Iterator[Tensor]]:
    """The example's DataLoader on a folder of pictures; a call begins an epoch."""
    return _loader(folder, batch, num_workers=2)


# --- another net than a DCGAN's: SNGAN's critic, eager --------------------------------------------


def critic() -> nn.Sequential:
    """The standard critic of SNGAN for 32 pixels (Miyato et al. 2018, table 3)."""
    layers: list[nn.Module] = []
    for CI, CO, kernel, stride in (
        (3, 64, 3, 1), (64, 64, 4, 2), (64, 128, 3, 1), (128, 128, 4, 2), (128, 256, 3, 1),
        (256, 256, 4, 2), (256, 512, 3, 1),
    ):  # fmt: skip
        conv = nn.Conv2d(CI, CO, kernel, stride, padding=1)
        layers += [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.1)]
    last = nn.utils.parametrizations.spectral_norm(nn.Linear(512 * 4 * 4, 1))
    return nn.Sequential(*layers, nn.Flatten(), last)


def critic_step(
    device: torch.device, batch: int, *, form: torch.memory_format = torch.contiguous_format,
    change: Callable[[nn.Module], object] | None = None,
) -> Workload:  # fmt: skip
    """One update of SNGAN's critic, on a batch of real and one of generated images.

    Args:
        form: of the images and the weights.
        change: what is done to the net first.
    """
    net = critic().to(device, memory_format=form)
    if change is not None:
        change(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))
    real, fake = (
        (torch.rand(batch, 3, 32, 32, device=device) * 2 - 1).contiguous(memory_format=form)
        for _ in range(2)
    )

    def step() -> None:
        optimizer.zero_grad()
        loss = (1 - net(real)).relu().mean() + (1 + net(fake)).relu().mean()
        loss.backward()
        optimizer.step()

    return Workload(step, batch)


# --- PyTorch tuned: channels_last, AMP, fused Adam, torch.compile, on CUDA one graph of the step --


def tuned_step(device: torch.device, batch: int, amp: torch.dtype | None) -> Workload:
    """The example's step by PyTorch's own means. No gradient scaling where AMP is float16, which
    flatters it."""
    netG, netD = (
        _last(net(blocks), device) for blocks in (generator_layers(), discriminator_layers())
    )
    G, D = _compiled_generator(netG), _compiled_discriminator(netD)
    criterion = nn.BCEWithLogitsLoss()
    optD, optG = (
        torch.optim.Adam(
            n.parameters(),
            lr=2e-4,
            betas=(0.5, 0.999),
            fused=True,
            capturable=device.type == "cuda",
        )
        for n in (netD, netG)
    )
    images = _last(torch.rand(batch, 3, SIZE, SIZE) * 2 - 1, device)
    real, fake_label = torch.ones(batch, device=device), torch.zeros(batch, device=device)

    def step() -> None:
        optD.zero_grad(set_to_none=True)
        with autocast(device, amp):
            loss_real = criterion(D(images).flatten().float(), real)
        loss_real.backward()
        with autocast(device, amp):
            fake = G(torch.randn(batch, NZ, 1, 1, device=device))
            loss_fake = criterion(D(fake.detach()).flatten().float(), fake_label)
        loss_fake.backward()
        optD.step()
        optG.zero_grad(set_to_none=True)
        netD.requires_grad_(False)
        with autocast(device, amp):
            loss = criterion(D(fake).flatten().float(), real)
        loss.backward()
        netD.requires_grad_(True)
        optG.step()

    return Workload(_graphed(step, device), batch)


def _compiled_generator(netG: nn.Module) -> Callable[[Tensor], Tensor]:
    """All but the first convolution compiled, for the reason below."""
    first, *layers = netG.children()
    body = torch.compile(nn.Sequential(*layers), dynamic=False)
    return lambda z: body(first(z))


def _compiled_discriminator(netD: nn.Module) -> Callable[[Tensor], Tensor]:
    """All but the last layer compiled. Of a convolution from or to 1x1 pixels torch.compile of
    PyTorch 2.11 expects gradients in channels_last, where cuDNN on an H200 gave another format: an
    assertion of the compiled code ended the step. Eagerly it is the same convolution, by cuDNN."""
    *layers, last = netD.children()
    body = torch.compile(nn.Sequential(*layers), dynamic=False)
    return lambda x: last(body(x))


def tuned_sampling(device: torch.device, batch: int, amp: torch.dtype | None) -> Workload:
    """netG(z) in evaluation mode."""
    netG = torch.compile(_last(net(generator_layers()), device).eval(), dynamic=False)
    z = torch.randn(batch, NZ, 1, 1, device=device)

    def draw() -> None:
        with torch.inference_mode(), autocast(device, amp):
            netG(z)

    return Workload(_graphed(draw, device), batch)


def tuned_discriminator(
    device: torch.device, batch: int, amp: torch.dtype | None, *, backward: bool
) -> Workload:
    """D on one batch of images, with its loss and, if asked for, the gradients of its weights."""
    netD = _last(net(discriminator_layers()), device)
    D = _compiled_discriminator(netD)
    images = _last(torch.rand(batch, 3, SIZE, SIZE) * 2 - 1, device)
    label = torch.ones(batch, device=device)
    criterion = nn.BCEWithLogitsLoss()

    def run() -> None:
        netD.zero_grad(set_to_none=True)
        with autocast(device, amp):
            loss = criterion(D(images).flatten().float(), label)
        if backward:
            loss.backward()

    return Workload(_graphed(run, device), batch)


def tuned_feed(folder: Path, batch: int, device: torch.device) -> Callable[[], Iterator[Tensor]]:
    """The DataLoader with its workers kept alive, one a CPU, and pinned memory."""
    return _loader(
        folder,
        batch,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def _last(of: "nn.Module | Tensor", device: torch.device):  # type: ignore[no-untyped-def]
    return of.to(device=device, memory_format=torch.channels_last)


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None, cache_enabled=False)


def _graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On CUDA one graph of the whole call, by PyTorch's recipe: warm up on a side stream, then
    capture."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _loader(folder: Path, batch: int, **options: object) -> Callable[[], Iterator[Tensor]]:
    try:
        from torchvision import datasets, transforms
    except ImportError:
        raise Unavailable("torchvision is not installed: pip install torchvision") from None
    dataset = datasets.ImageFolder(
        str(folder),
        transforms.Compose(
            [
                transforms.Resize(SIZE),
                transforms.CenterCrop(SIZE),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        ),
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True, **options)
    return lambda: (images for images, _ in loader)


# --- the TensorFlow tutorial ----------------------------------------------------------------------


def keras_step(batch: int) -> Workload:
    """The step of the TensorFlow DCGAN tutorial: 28x28x1, both updates from the same weights."""
    try:
        import tensorflow as tf
    except ImportError:
        raise Unavailable("tensorflow is not installed: pip install 'fastdcgan[peers]'") from None
    keras, layers = tf.keras, tf.keras.layers
    up = {"padding": "same", "use_bias": False}
    netG = keras.Sequential(
        [
            keras.Input((NZ,)),
            layers.Dense(7 * 7 * 256, use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Reshape((7, 7, 256)),
            layers.Conv2DTranspose(128, 5, strides=1, **up),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Conv2DTranspose(64, 5, strides=2, **up),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Conv2DTranspose(1, 5, strides=2, activation="tanh", **up),
        ]
    )
    netD = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(64, 5, strides=2, padding="same"),
            layers.LeakyReLU(),
            layers.Dropout(0.3),
            layers.Conv2D(128, 5, strides=2, padding="same"),
            layers.LeakyReLU(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    bce = keras.losses.BinaryCrossentropy(from_logits=True)
    optG, optD = keras.optimizers.Adam(1e-4), keras.optimizers.Adam(1e-4)
    optG.build(netG.trainable_variables)
    optD.build(netD.trainable_variables)

    @tf.function
    def train_step(images):  # type: ignore[no-untyped-def]
        noise = tf.random.normal([batch, NZ])
        with tf.GradientTape() as tapeG, tf.GradientTape() as tapeD:
            fake = netG(noise, training=True)
            real_logits, fake_logits = netD(images, training=True), netD(fake, training=True)
            lossG = bce(tf.ones_like(fake_logits), fake_logits)
            lossD = bce(tf.ones_like(real_logits), real_logits) + bce(
                tf.zeros_like(fake_logits), fake_logits
            )
        for tape, loss, model, optimiser in (
            (tapeG, lossG, netG, optG),
            (tapeD, lossD, netD, optD),
        ):
            gradients = tape.gradient(loss, model.trainable_variables)
            optimiser.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return lossG

    images = tf.random.uniform([batch, 28, 28, 1], -1, 1)
    # The loss is read, so that the call is over when the step is.
    return Workload(lambda: train_step(images).numpy(), batch)
