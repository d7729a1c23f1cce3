"""How sections are shown."""

import json

from fastdcgan.diagnosis import report
from fastdcgan.diagnosis.rows import Row, Section

SECTIONS = [
    Section(
        "First", [Row("one", "ok", "fine [bold]as is", values={"ratio": float("nan"), "n": 3})]
    ),
    Section("Second", [Row("two", "failed", "broken", "mend it"), Row("three", "warning", "hm")]),
]


def test_json_is_one_object_and_strict():
    text = report.to_json(SECTIONS, device="cpu", seconds=1.234)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found["failed"] == ["two"]
    assert found["seconds"] == 1.2
    first, second = found["sections"]
    assert first["rows"][0]["values"] == {"ratio": None, "n": 3}
    assert second["rows"][0] == {
        "name": "two", "verdict": "failed", "detail": "broken", "advice": "mend it", "values": {},
    }  # fmt: skip


def test_tables_are_printed_as_sections_come(capsys, monkeypatch):
    """In any width, with nothing taken for markup."""
    printed = []

    def coming():
        for section in SECTIONS:
            printed.append(capsys.readouterr().out)
            yield section

    monkeypatch.setenv("COLUMNS", "60")
    assert report.print_tables(coming()) == SECTIONS
    assert "fine [bold]as is" in printed[1]
    rest = capsys.readouterr().out
    assert "-> mend it" in rest
    assert rest.splitlines()[-1].strip() == "1 ok, 1 warning, 1 failed"
    assert max(map(len, (printed[1] + rest).splitlines())) <= 60
