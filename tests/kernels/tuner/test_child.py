"""Work that may never end, in a process of its own: fakes that hang, crash, raise and answer."""

import signal
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from fastdcgan_kernels.choice import persistent
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.choice.types import Task
from fastdcgan_kernels.gpu import blocks
from fastdcgan_kernels.tuner import tuning
from fastdcgan_kernels.tuner.child import Child, Lost
from fastdcgan_kernels.tuner.trying import Tried

CPU = torch.device("cpu")
GEOMETRY = Geometry(8, 4, 4, 64, 8, 8, 64, 2, 1)
TASK = Task("conv_transposed", GEOMETRY, torch.bfloat16, "none", "store", 1)
TILE = Tile(128, 64, 64, 1, 4, 4, "gluon")
FAKE = """
    import os, sys, time
    from fastdcgan_kernels.tuner.child import serve

    def start():
        print("what a library prints", flush=True)
        if {start!r} == "hang":
            time.sleep(600)
        if {start!r} == "fail":
            raise SystemExit("no GPU here")

    def answer(question, prepared):
        if question == "compiles for ever":
            time.sleep(600)
        prepared()
        if question == "hang":
            time.sleep(600)
        if question == "crash":
            print("an illegal address", file=sys.stderr, flush=True)
            os.abort()
        if question == "raise":
            raise ValueError("two\\nlines")
        return question[::-1]

    serve(start, answer)
"""


def child(start="", **more):
    code = textwrap.dedent(FAKE.format(start=start))
    seconds = {"ready": 60, "prepare": 60, "hang": 60} | more
    return Child([sys.executable, "-c", code], **seconds)


@pytest.fixture
def closing():
    made = []
    yield lambda *given, **more: made.append(child(*given, **more)) or made[-1]
    for one in made:
        one.close()


def test_answers_come_from_one_process(closing):
    one = closing()
    assert one.ask("abc") == "cba"
    process = one._process
    assert one.ask("") == ""
    assert one._process is process


def test_a_hang_is_looked_at_killed_and_said(closing):
    seen = []
    one = closing(hang=0.5, look=seen.append)
    process = one.ask("abc") and one._process
    start = time.monotonic()
    with pytest.raises(Lost, match=r"^hung: it had 0 s to run$|^hung: it had 1 s to run$"):
        one.ask("hang")
    assert time.monotonic() - start < 20
    assert seen == [process.pid]
    assert process.returncode == -signal.SIGKILL
    assert one.ask("abc") == "cba", "another process goes on"


def test_after_two_hangs_nothing_more_is_asked(closing):
    one = closing(hang=0.2)
    for _ in range(2):
        with pytest.raises(Lost, match="hung"):
            one.ask("hang")
    with pytest.raises(Lost, match=r"^not tried: 2 hung before$"):
        one.ask("abc")
    assert one._process is None


@pytest.mark.parametrize(
    ("start", "question", "limits", "words"),
    [
        ("hang", "abc", {"ready": 0.5}, "to start"),
        ("", "compiles for ever", {"prepare": 0.5}, "to be prepared"),
        ("fail", "abc", {}, "^its process ended: exit status 1, no GPU here$"),
        ("", "crash", {}, "^its process ended: SIGABRT, an illegal address$"),
        ("", "raise", {}, "^ValueError: two lines$"),
    ],
)
def test_why_there_is_no_answer(closing, start, question, limits, words):
    one = closing(start, **limits)
    with pytest.raises(Lost, match=words):
        one.ask(question)
    if not start:
        assert one.ask("abc") == "cba", "of a process that has not been lost"


def test_look_may_fail(closing):
    def look(pid):
        raise OSError("no cuda-gdb")

    with pytest.raises(Lost, match="hung"):
        closing(hang=0.2, look=look).ask("hang")


# --- The tuner's use of it ------------------------------------------------------------------------


class Answers:
    """A child that answers so."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def ask(self, question):
        self.asked.append(question)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self):
        self.closed = True


def contest(child, tile=TILE):
    """(what won, what ran here, what was said)."""
    default, ran, said = Tile(64, 64, 64), [], []

    class Trial:
        def prepare(self, candidate):
            ran.append(candidate)
            return lambda: candidate

        def wrong(self, raw):
            return ""

    found = tuning.tune_questions(
        [TASK], CPU, again=True, say=said.append,
        timer=lambda run: 1.0 if run().engine == "gluon" else 2.0,
        candidates=lambda asked, target: [default, tile],
        trial_of=lambda asked, device: Trial(), tried=Tried(CPU, child),
    )  # fmt: skip
    return found.get(TASK), ran, said


def test_what_may_hang_runs_here_only_after_it_came_back():
    child = Answers("")
    best, ran, _ = contest(child)
    assert (best, len(ran), len(child.asked), child.closed) == (TILE, 2, 1, True)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Lost("hung: it had 20 s to run"), "hung: it had 20 s to run"),
        ("wrong, RMS error 1", "wrong, RMS error 1"),
    ],
)
def test_what_did_not_come_back_never_runs_here(answer, why):
    best, ran, said = contest(Answers(answer))
    assert best == ran[0]
    assert len(ran) == 1
    assert f": dropped {tuning.words_of(TILE)}: {why}" in said[0]


def test_what_cannot_hang_is_not_tried_first():
    child = Answers("wrong")
    contest(child, Tile(128, 64, 64, 1, 4, 4, "descriptors"))
    assert child.asked == []


def test_the_process_itself():
    """Here in the interpreter, where descriptors run in the place of Gluon: right, and wrong where
    the question cannot be."""
    tried = Tried(CPU)
    try:
        task = replace(TASK, dtype=torch.float32)
        assert tried.why_not(task, TILE) == ""
        why = tried.why_not(replace(task, epilogue="no"), TILE)
        assert "Error" in why
    finally:
        tried.close()


def test_the_tuner_offers_them_where_gluon_is(monkeypatch):
    hopper = TARGETS["sm_90"]
    wanted = persistent.tiles(TASK, hopper)
    assert wanted
    assert tuning.candidates_for(TASK, hopper)[-len(wanted) :] == wanted
    assert not {*tuning.candidates_for(TASK, TARGETS["sm_100"])} & {*wanted}
    monkeypatch.setattr(blocks, "gluon", lambda: None)
    assert not {*tuning.candidates_for(TASK, hopper)} & {*wanted}
