"""Drawing until enough pass: which images, how many were looked at, going on, and the bound."""

import numpy as np
import pytest

from fastdcgan.latent.draw import latents
from fastdcgan.synthetic_data.drawing import Drawn, begun_in, draw_passing, forget, keep
from fastdcgan.synthetic_data.screening import BAD, COPY, KEPT

NOTHING = Drawn(np.empty((0, 1, 1, 2), np.uint8), 0, 0, 0)


def sample(z):
    """Two numbers of z as an image."""
    return (z[:, :2, 0, 0].numpy() * 40 + 128).clip(0, 255).astype(np.uint8)[:, None, None]


class Odd:
    """Images whose first number is odd are bad, those that end in 4 copies."""

    def judge(self, images):
        first = images[:, 0, 0, 0]
        return np.where(first % 2 == 1, BAD, np.where(first % 10 == 4, COPY, KEPT))


def drawn(begun=NOTHING, *, n=200, most=10_000, seed=3):
    told = []
    found = draw_passing(sample, Odd(), begun, n=n, most=most, nz=3, seed=seed, advance=told.append)
    assert sum(told) == len(found.images) - len(begun.images)
    return found


def test_the_first_that_pass_are_kept_and_each_is_counted():
    found = drawn()
    seed = np.concatenate([sample(z) for z in latents(2000, 3, seed=3)])
    verdicts = Odd().judge(seed)
    passing = np.flatnonzero(verdicts == KEPT)[:200]
    assert np.array_equal(found.images, seed[passing])
    assert found.drawn == passing[-1] + 1
    seen = verdicts[: found.drawn]
    assert (found.copies, found.bad) == ((seen == COPY).sum(), (seen == BAD).sum())
    assert found.drawn == len(found.images) + found.copies + found.bad
    assert not np.array_equal(drawn(seed=4).images, found.images)


@pytest.mark.parametrize("first", [1, 37, 199])
def test_going_on_is_the_same_as_at_once(first):
    again, once = drawn(drawn(n=first)), drawn()
    assert np.array_equal(again.images, once.images)
    assert (again.drawn, again.copies, again.bad) == (once.drawn, once.copies, once.bad)


def test_the_bound_holds_to_the_image_and_may_be_raised():
    short = drawn(most=300)
    assert short.drawn == 300
    assert 0 < len(short.images) < 200
    assert np.array_equal(drawn(short).images, drawn().images)
    assert drawn(most=0).drawn == 0


def test_what_is_kept_is_found_by_its_key_only(tmp_path):
    held, shape = drawn(), (1, 1, 2)
    keep(tmp_path / "drawn", "a", "key", held)
    found = begun_in(tmp_path / "drawn", "a", "key", shape)
    assert np.array_equal(found.images, held.images)
    assert (found.drawn, found.copies, found.bad) == (held.drawn, held.copies, held.bad)
    for folder, name, key in (("drawn", "a", "other"), ("drawn", "b", "key"), ("no", "a", "key")):
        nothing = begun_in(tmp_path / folder, name, key, shape)
        assert (nothing.images.shape, nothing.drawn) == ((0, 1, 1, 2), 0)
    (tmp_path / "drawn" / "a.json").write_text("{")
    assert begun_in(tmp_path / "drawn", "a", "key", shape).drawn == 0
    forget(tmp_path / "drawn", ["a", "b"])
    assert not (tmp_path / "drawn").exists()
