"""The report: what it says of a search, a page that stands by itself, a command that trains the
winner."""

import dataclasses
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdcgan.search import SearchConfig, search
from fastdcgan.search.report import train_command
from fastdcgan.train import options
from fastdcgan.training import TrainConfig
from tests.search import quick

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Checks that what is opened is closed; collects tables, headings and what is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.heads, self.loads, self.code = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2"):
            self.heads.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.heads[-1] += data
        if self.open and self.open[-1] == "code":
            self.code += data


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of 12 points, one of which fails, with sheets of samples."""
    folder = tmp_path_factory.mktemp("search")
    space = folder / "space.toml"
    space.write_text(
        "lr_g = { low = 1e-4, high = 9e-4, log = true, points = 4 }\n"
        "ngf = [8, 16, 64]\n"
        "beta1 = 0.5\n"
    )

    def train(config, on_evaluation):
        result = quick.train(config, on_evaluation)
        if config.ngf == 8 and config.lr_g < 2e-4:
            raise ValueError("<b>a|b</b>")
        (config.out / "samples").mkdir()
        Image.new("RGB", (8, 8)).save(config.out / "samples" / "step-00000100.png")
        return result

    config = SearchConfig(
        space=str(space), sampler="grid", out=folder / "a search", base=quick.BASE, pruner="none"
    )
    return search(config, train=train)


@pytest.fixture(scope="module")
def page(found):
    return Page(found.report.with_suffix(".html").read_text())


def test_the_page_needs_nothing_else(page):
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert len(page.loads) == 5, "history, slices, importances, two sheets"


def test_it_puts_the_winner_beside_the_reference(found, page):
    rows = {row[0]: row[1:] for row in page.tables[0]}
    assert rows[""] == ["reference (trial 0)", f"winner (trial {found.best.number})"]
    reference, best = found.reference.value, found.best.value
    assert best < reference
    assert rows["KID"] == [f"{value:.4g} (floor 0.001)" for value in (reference, best)]
    assert rows["FID"] == [f"{1000 * value:.4g} (floor 9)" for value in (reference, best)]
    assert rows["lr_g"] == ["0.0002", f"{found.best.params['lr_g']:.4g}"]
    text = found.report.read_text()
    assert f"The winner's KID is {best / reference:.3g} of the reference's" in text
    assert "luck" in text


def test_it_lists_the_best_trials_and_the_failed_ones(found, page):
    best = page.tables[1]
    assert best[0] == ["trial", "KID", "at step", "lr_g", "ngf"]
    assert len(best) == 11
    scores = [float(row[1]) for row in best[1:]]
    assert scores == sorted(scores)
    assert best[1][0] == str(found.best.number)
    assert sum("(reference)" in row[0] for row in best) == 1
    failed = page.tables[2]
    assert failed[0] == ["trial", "why", "values"]
    assert "ValueError('<b>a|b</b>')" in failed[1][1]
    assert len(failed) == 2
    assert page.tables[3][1:] == [
        ["lr_g", "0.0001 to 0.0009 in the logarithm", "0.0002"],
        ["ngf", "8, 16, 64", "64"],
        ["beta1", "0.5 (fixed)", "0.5"],
    ]


def test_markdown_says_the_same(found, page):
    text = found.report.read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == len(page.tables)
    for lines, rows in zip(tables, page.tables, strict=True):
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        cells = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
        assert [cells[0], *cells[2:]] == rows
    folder = found.report.parent
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(pictures) == 5
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.verify()


def test_the_command_trains_the_winner(found, page):
    words = shlex.split(page.code)
    assert words[:3] == ["python", "-m", "fastdcgan.train"]
    config = options(words[3:])
    trained = quick.trained(found.report.parent)[found.best.number]
    free = {"out": None, "keep": 3, "tensorboard": True, "device": "cpu"}
    assert dataclasses.replace(config, **free) == dataclasses.replace(trained, **free)
    assert config.out == found.report.parent / "winner"


FIELDS = {
    "lr": st.floats(1e-9, 1), "lr_g": st.none() | st.floats(1e-9, 1), "beta1": st.floats(0, 0.99),
    "ngf": st.integers(1, 999), "channels": st.none() | st.integers(1, 4), "ema": st.booleans(),
    "hflip": st.none() | st.booleans(), "updates": st.sampled_from(["alternating", "simultaneous"]),
    "data": st.sampled_from(["blue-marble", "my photos/it's", "a$b"]), "amp": st.booleans(),
    "compile": st.booleans(), "steps": st.none() | st.integers(1, 9), "seed": st.integers(0, 9),
    "max_minutes": st.none() | st.floats(0.1, 9), "best_by": st.sampled_from(["kid", "fid"]),
    "init_g": st.none() | st.just(Path("a b/netG.pth")), "sync_bn": st.booleans(),
}  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_a_command_is_read_as_the_configuration_it_was_made_of(values):
    config = TrainConfig(**values)
    assert options(shlex.split(train_command(config))[3:]) == config


def test_a_search_without_a_winner_says_so(tmp_path):
    def train(config, on_evaluation):
        raise quick.RunError("diverged")

    config = SearchConfig(space="quick", trials=2, out=tmp_path / "s", base=quick.BASE)
    found = search(config, train=train)
    assert found.best is None
    text = found.report.read_text()
    assert "there is no winner" in text
    assert text.count("diverged") == 2
    Page((tmp_path / "s" / "report.html").read_text())
