"""Spaces: what a file may say, what is refused and how, and the grid."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.errors import InputError
from fastdcgan.search.space import Choices, Range, load_space, parse_space, presets
from fastdcgan.training import TrainConfig

BASE = TrainConfig(steps=100, eval_every=10)


def parse(**values):
    return parse_space(values, BASE, name="my.toml")


def test_a_file_fixes_chooses_and_ranges(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        "ema_decay = 0.99\n"
        "updates = ['alternating', 'simultaneous']\n"
        "lr_g = { low = 1e-5, high = 1e-3, log = true }\n"
        "ngf = { low = 16, high = 70, step = 16 }\n"
        "nz = { low = 10, high = 1000, log = true }\n"
        "hflip = ['none', true]\n"
        "beta1 = { low = 0, high = 0.9 }\n"
    )
    space = load_space(str(path), BASE)
    assert space.fixed == {"ema_decay": 0.99}
    assert space.varied == {
        "updates": Choices(("alternating", "simultaneous")),
        "lr_g": Range(1e-5, 1e-3, log=True),
        "ngf": Range(16, 64, step=16),
        "nz": Range(10, 1000, log=True),
        "hflip": Choices((None, True)),
        "beta1": Range(0.0, 0.9),
    }
    assert [d.whole for d in space.varied.values() if isinstance(d, Range)] == [0, 1, 1, 0]
    assert space.at(BASE, {"ngf": 32}) == dataclasses.replace(BASE, ema_decay=0.99, ngf=32)


def test_json_says_the_same_as_toml(tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"lr_d": {"low": 1e-5, "high": 1e-3, "log": true}, "hflip": [null, true]}')
    space = load_space(str(path), BASE)
    assert space.varied == {
        "lr_d": Range(1e-5, 1e-3, log=True),
        "hflip": Choices((None, True)),
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": [1]}, "learning_rate is no field"),
        ({"lr-g": [1e-4]}, "did you mean lr_g?"),
        ({"out": ["a", "b"]}, "out: a search cannot vary it"),
        ({"eval_n": [10, 20]}, "eval_n: a search cannot vary it"),
        ({"lr": "fast"}, 'lr: "fast" was given; it must be a number'),
        ({"lr": [1e-4, True]}, "lr: true was given; it must be a number"),
        ({"lr": [math.nan]}, "lr: nan was given; it must be finite"),
        ({"ngf": [16, 24.5]}, "ngf: 24.5 was given; it must be a whole number"),
        ({"ema": ["yes"]}, 'ema: "yes" was given; it must be true or false'),
        ({"net": ["dcgan", "vgg"]}, 'net: "vgg" was given; it must be one of dcgan, tf28'),
        ({"lr_g": ["slow"]}, "it must be a number or none"),
        ({"ngf": [[16]]}, "ngf: [16] was given"),
        ({"ngf": []}, "ngf: an empty list"),
        ({"ngf": [16, 16]}, "ngf: a value is there twice"),
        ({"lr": {"low": 1e-3, "high": 1e-4}}, "lr: the range from 0.001 to 0.0001 is empty"),
        ({"lr": {"low": 1e-3, "high": 1e-3}}, "is empty"),
        ({"lr": {"low": 0, "high": 1e-3, "log": True}}, "low = 0.0 has no logarithm"),
        ({"lr": {"low": 1e-4}}, "lr: a range needs low and high"),
        ({"lr": {"low": 1e-4, "high": 1e-3, "base": 2}}, "lr: a range has no base"),
        ({"lr": {"low": "a", "high": 1e-3}}, 'lr, low: "a" was given; it must be a number'),
        ({"lr": {"low": 1e-4, "high": 1e-3, "log": 1}}, "lr, log: 1 was given"),
        ({"ngf": {"low": 16, "high": 64.0}}, "ngf, high: 64.0 was given"),
        ({"ngf": {"low": 16, "high": 64, "step": 0}}, "ngf: a step of 0 was given"),
        ({"ngf": {"low": 16, "high": 64, "step": 99}}, "ngf: a step of 99 was given"),
        ({"ngf": {"low": 16, "high": 64, "step": 2, "log": True}}, "ngf: log and step were given"),
        ({"ngf": {"low": 16, "high": 64, "points": 1}}, "points = 1 was given"),
        ({"ema": {"low": 0, "high": 1}}, "ema is no number: give a list"),
        ({"lr": [-1.0, 1e-4]}, "--lr -1.0 was given; it must be above 0"),
        ({"beta1": {"low": 0.5, "high": 1.5}}, "--beta1 1.5 was given"),
        ({"lr": 1e-4}, "nothing varies"),
        ({}, "nothing varies"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_that_names_file_and_field(values, said):
    with pytest.raises(InputError) as raised:
        parse(**values)
    line = str(raised.value)
    assert said in line
    assert "my.toml" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", "lr = ", "not TOML"),
        ("a.toml", "lr = 1\nlr = 2", "not TOML"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"lr": [1], "lr": [2]}', "lr is there twice"),
        ("a.json", "[1]", "not an object"),
        ("a.toml", b"\xff\xfe", "not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said):
        load_space(str(path), BASE)


def test_what_is_neither_file_nor_preset_lists_the_presets():
    with pytest.raises(InputError, match="small-data") as raised:
        load_space("small-dat", BASE)
    assert "quick" in str(raised.value)


@pytest.mark.parametrize("name", presets())
def test_presets_hold_the_reference_recipe(name):
    """So that what is learnt of trial 0 counts for the sampler, too."""
    for size in (32, 64):
        base = dataclasses.replace(BASE, image_size=size)
        point = load_space(name, base).point(base)
        assert point is not None
        assert point["lr_g"] == 2e-4


def test_a_value_that_needs_another_fields_value_is_possible():
    """28 pixels are for tf28 only, which is another field's value."""
    space = parse(net=["dcgan", "tf28"], image_size=[28, 32])
    assert space.varied["image_size"] == Choices((28, 32))
    with pytest.raises(InputError, match="--image-size 28"):
        parse(image_size=[28, 32])


def test_lr_is_the_rate_of_both_nets_also_where_the_recipe_names_a_rate_for_each():
    base = dataclasses.replace(BASE, lr_g=4e-4, lr_d=1e-4)
    both = dataclasses.replace(base, lr=3e-4, lr_g=None, lr_d=None)
    varied = parse_space({"lr": [3e-4, 2e-4]}, base, name="my.toml")
    assert varied.at(base, {"lr": 3e-4}) == both
    assert varied.base(base) == base
    assert varied.point(base) is None
    assert varied.point(both) == {"lr": 3e-4}
    fixed = parse_space({"lr": 3e-4, "ngf": [64]}, base, name="my.toml")
    assert fixed.at(base, {"ngf": 64}) == both
    assert fixed.point(base) is None
    own = parse_space({"lr": [3e-4], "lr_d": [1e-4]}, base, name="my.toml")
    assert own.at(base, {"lr": 3e-4, "lr_d": 1e-4}) == dataclasses.replace(both, lr_d=1e-4)


def test_the_recipe_is_a_point_only_if_all_its_values_are():
    assert parse(lr_g=[1e-4, 2e-4], ngf=[64]).point(BASE) == {"lr_g": 2e-4, "ngf": 64}
    assert parse(lr_g=[1e-4], ngf=[64]).point(BASE) is None
    assert parse(lr_g=[2e-4], ema_decay=0.9).point(BASE) is None, "the recipe has another decay"
    assert parse(ngf={"low": 16, "high": 64, "step": 16}).point(BASE) == {"ngf": 64}
    assert parse(ngf={"low": 15, "high": 65, "step": 16}).point(BASE) is None


def test_a_grid_has_each_point_once_and_its_first_ones_are_spread():
    space = parse(
        ngf={"low": 16, "high": 64, "step": 16},
        lr={"low": 1e-4, "high": 1e-2, "log": True},
        updates=["alternating", "simultaneous"],
    )
    grid = space.grid(seed=0)
    assert len(grid) == 4 * 3 * 2
    assert len({tuple(point.values()) for point in grid}) == len(grid)
    assert sorted({point["lr"] for point in grid}) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert space.grid(seed=0, most=5) == grid[:5]
    assert space.grid(seed=1) != grid
    assert len({point["ngf"] for point in grid[:8]}) > 2


def test_a_grid_too_large_says_so():
    space = parse(nz={"low": 1, "high": 2000, "step": 1})
    with pytest.raises(InputError, match="2,000 points"):
        space.grid(seed=0)
    assert len(space.grid(seed=0, most=10)) == 10


@settings(deadline=None, max_examples=200)
@given(
    low=st.floats(1e-6, 0.4), factor=st.floats(1.01, 2), log=st.booleans(),
    points=st.integers(2, 9), step=st.none() | st.floats(0.01, 1),
)  # fmt: skip
def test_points_of_a_range_are_in_it(low, factor, log, points, step):
    high = low * factor
    value = {"low": low, "high": high, "log": log, "points": points}
    if step is not None:
        value |= {"step": step * (high - low), "log": False}
    space = parse(beta2=value)
    dimension = space.varied["beta2"]
    found = dimension.points()
    assert all(point in dimension for point in found)
    assert list(found) == sorted(set(found))
    assert found[0] == low
    assert found[-1] <= high
    if step is None:
        assert len(found) == points
        assert found[-1] == high
    assert high * 1.001 not in dimension
    assert low * 0.999 not in dimension


@settings(deadline=None, max_examples=200)
@given(low=st.integers(1, 500), width=st.integers(1, 500), data=st.data())
def test_whole_numbers_stay_whole(low, width, data):
    step = data.draw(st.integers(1, width))
    dimension = parse(nz={"low": low, "high": low + width, "step": step}).varied["nz"]
    assert dimension.points() == tuple(range(low, low + width + 1, step))
    assert 0.5 + low not in dimension
    logs = parse(nz={"low": low, "high": low + width, "log": True}).varied["nz"].points()
    assert all(type(point) is int for point in logs)
    assert (logs[0], logs[-1]) == (low, low + width)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["low", "high", "log", "step", "points", "x"]), inner)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), JUNK)
)  # fmt: skip
def test_any_content_is_a_space_or_one_line(values):
    """A space that is read is also one that can be written down, compared and listed."""
    try:
        space = parse(**values)
    except InputError as error:
        if "\n" in str(error):
            raise
        return
    json.loads(space.to_json())
    for dimension in space.varied.values():
        assert all(value in dimension for value in dimension.ends())
