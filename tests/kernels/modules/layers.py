"""Layers that blocks have, as the tests of modules use them."""

from torch import nn


def down(ci, co, bias=False):
    """To half the sides."""
    return nn.Conv2d(ci, co, 4, 2, 1, bias=bias)


def up(ci, co, bias=False):
    """To twice the sides."""
    return nn.ConvTranspose2d(ci, co, 4, 2, 1, bias=bias)
