"""Ways through the latent space, against scipy's and the published formulas in float64."""

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from fastdcgan.errors import InputError
from fastdcgan.latent.interpolation import lerp, slerp, walk

RANDOM = np.random.default_rng(0)
T = np.linspace(0, 1, 7)


def vectors(nz=5, lengths=(1.0, 1.0)):
    a, b = RANDOM.standard_normal((2, nz))
    return a / np.linalg.norm(a) * lengths[0], b / np.linalg.norm(b) * lengths[1]


def ours(function, a, b, t=T):
    return function(torch.tensor(a), torch.tensor(b), torch.tensor(t)).numpy()


@pytest.mark.parametrize("nz", [2, 5, 100])
def test_unit_vectors_go_along_the_great_circle(nz):
    a, b = vectors(nz)
    np.testing.assert_allclose(ours(slerp, a, b), geometric_slerp(a, b, T), atol=1e-13)


def test_the_published_formula_for_other_lengths():
    a, b = vectors(lengths=(3.0, 7.0))
    omega = np.arccos(a @ b / 21)
    expected = [(np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega) for t in T]
    np.testing.assert_allclose(ours(slerp, a, b), expected, atol=1e-13)


def test_the_same_length_stays_and_a_straight_line_is_shorter():
    a, b = vectors(100, lengths=(10.0, 10.0))
    np.testing.assert_allclose(np.linalg.norm(ours(slerp, a, b), axis=1), 10)
    straight = ours(lerp, a, b)
    np.testing.assert_allclose(straight, [(1 - t) * a + t * b for t in T])
    assert np.linalg.norm(straight[3]) < 9


def test_tiny_angles_are_exact():
    """arccos of a product would be 0 here, or NaN."""
    a, side = vectors()
    side -= side @ a * a
    b = a + 1e-5 * side / np.linalg.norm(side)
    np.testing.assert_allclose(ours(slerp, a, b / np.linalg.norm(b)), ours(lerp, a, b), atol=1e-9)
    np.testing.assert_allclose(ours(slerp, a, a * 2), ours(lerp, a, a * 2), atol=1e-15)


@pytest.mark.parametrize("b", [lambda a: -2 * a, lambda a: 0 * a])
def test_where_there_is_no_arc_it_says_so(b):
    a, _ = vectors()
    with pytest.raises(InputError, match="take the linear curve"):
        ours(slerp, a, b(a))


@pytest.mark.parametrize("curve", ["spherical", "linear"])
def test_walks_pass_through_their_keys(curve):
    keys = torch.tensor(RANDOM.standard_normal((4, 6)))
    way = walk(keys, 5, curve=curve)
    assert way.shape == (16, 6)
    torch.testing.assert_close(way[::5], keys)
    circle = walk(keys, 5, curve=curve, loop=True)
    assert circle.shape == (20, 6)
    torch.testing.assert_close(circle[:15], way[:15])
    between = slerp if curve == "spherical" else lerp
    t = torch.arange(5, dtype=torch.float64) / 5
    torch.testing.assert_close(circle[15:], between(keys[3], keys[0], t))
