"""The nets of the PyTorch example at 64 pixels, written out layer by layer from its published
table: what ours are compared with. Nothing here is imported from the package."""

import pytest
import torch
from torch import nn


def example_init(module: nn.Module) -> None:
    kind = type(module).__name__
    if kind.startswith("Conv"):
        module.weight.data.normal_(0.0, 0.02)
    elif kind.startswith("BatchNorm"):
        module.weight.data.normal_(1.0, 0.02)
        module.bias.data.zero_()


class ExampleGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(True),
            nn.ConvTranspose2d(512, 256, 4, 2, 1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(True),
            nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(True),
            nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(True),
            nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class ExampleDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(128, 256, 4, 2, 1, bias=False),
            nn.BatchNorm2d(256),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(256, 512, 4, 2, 1, bias=False),
            nn.BatchNorm2d(512),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(512, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.main(x).view(-1)


@pytest.fixture
def example_nets():
    """Call with a seed: both nets as the example has them ahead of its first step."""

    def build(seed: int) -> tuple[ExampleGenerator, ExampleDiscriminator]:
        torch.manual_seed(seed)
        netG = ExampleGenerator()
        netG.apply(example_init)
        netD = ExampleDiscriminator()
        netD.apply(example_init)
        return netG, netD

    return build
