"""The standard DCGAN's list of layers, and the nets made of it."""

import pytest
import torch
from torch import nn

from fastdcgan_kernels import dcgan, findings, fuse
from fastdcgan_kernels.choice.geometry import geometry_of, sides_of


@pytest.mark.parametrize("size", dcgan.SIZES)
def test_the_nets_are_the_dcgan_and_fuse_whole(size):
    with torch.device("meta"):
        generator, discriminator = dcgan.nets(size)
        images = generator(torch.empty(2, dcgan.NZ, 1, 1))
        assert images.shape == (2, 3, size, size)
        assert discriminator(images).shape == (2, 1, 1, 1)
    for model in (generator, discriminator):
        found = findings(fuse(model))
        assert len(found) == size.bit_length() - 2
        assert all(one.fused for one in found)


@pytest.mark.parametrize("size", dcgan.SIZES)
def test_layers_have_the_shapes_that_the_nets_give_them(size):
    layers = iter(dcgan.layers(size))
    with torch.device("meta"):
        for net, x in zip(
            dcgan.nets(size), (torch.empty(6, dcgan.NZ, 1, 1), torch.empty(6, 3, size, size)),
            strict=True,
        ):  # fmt: skip
            for module in net:
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    layer, transposed = next(layers), isinstance(module, nn.ConvTranspose2d)
                    geometry = geometry_of(
                        x,
                        module.weight,
                        transposed,
                        module.stride[0],
                        sides_of(module.padding[0]),
                    )
                    assert layer.geometry(6) == geometry
                    assert layer.transposed == transposed
                    assert tuple(x.shape) == (6, layer.ci, layer.side, layer.side)
                x = module(x)
    assert not list(layers)
