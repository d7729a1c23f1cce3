"""Layers of every kernel size, stride and padding, by name."""

import torch

from fastdcgan_kernels.choice.geometry import geometry_of, sides_of


def layer(
    kernel, stride, padding, sides=(6, 4), transposed=False, output_padding=0, *, cs=16, cl=24, n=2
):
    """Its Geometry on images of these sides."""
    x = torch.empty(n, cs if transposed else cl, *sides, device="meta")
    weight = torch.empty(cs, cl, kernel, kernel, device="meta")
    return geometry_of(x, weight, transposed, stride, sides_of(padding, output_padding))


GEOMETRIES = {
    "1x1": layer(1, 1, 0),
    "1x1, stride 2": layer(1, 2, 0),
    "1x1, stride 2, transposed": layer(1, 2, 0, (3, 2), True, 1),
    "1x1, padded": layer(1, 1, 2),
    "2x2": layer(2, 2, 0),
    "3x3": layer(3, 1, 1),
    "3x3, odd sides": layer(3, 1, 1, (5, 3)),
    "3x3, stride 2": layer(3, 2, 1),
    "3x3, stride 2, odd sides": layer(3, 2, 1, (5, 7)),
    "3x3, stride 2, up": layer(3, 2, 1, (3, 2), True, 1),
    "3x3, stride 2, up to odd sides": layer(3, 2, 1, (3, 2), True),
    "4x4": layer(4, 1, 1),
    "4x4, same": layer(4, 1, (1, 1, 2, 2)),
    "4x4, odd sides": layer(4, 2, 1, (7, 5)),
    "4x4, wide padding": layer(4, 2, (3, 0)),
    "4x4 to 1x1": layer(4, 1, 0, (4, 4)),
    "1x1 to 3x3": layer(3, 1, 0, (1, 1), True),
    "1x1 to 5x5, cut": layer(5, 1, (0, 0, 1, 2), (1, 1), True),
    "5x5": layer(5, 1, 2),
    "5x5, stride 2": layer(5, 2, 2, output_padding=0),
    "5x5, Keras's same": layer(5, 2, (1, 1, 2, 2)),
    "5x5, Keras's same, up": layer(5, 2, (1, 1, 2, 2), (3, 2), True),
    "5x5, up": layer(5, 2, 2, (3, 2), True, 1),
    "6x6, stride 2": layer(6, 2, 2),
    "7x7": layer(7, 1, 3),
    "7x7, stride 2, one row": layer(7, 2, 3, (1, 9)),
}
