"""`python -m benchmarks.speedrun` on tiny nets and data: it stops at the target of its table, says
what it measured, and adds it to the table."""

import re

import pytest
import torch

from benchmarks import speedrun
from benchmarks.speedrun import main, target
from tests.training.runs import Tiny

TABLE = "# Speed run\n\nTarget: KID[lite0] {} at n = 2,000.\n\n| a | b |\n|---|---|\n"


@pytest.fixture
def table(tiny_data, tmp_path, monkeypatch):
    """table(target) writes one, for nets and data that take milliseconds a step."""
    torch.manual_seed(5)
    torch.jit.script(Tiny()).save(tmp_path / "tiny.pt")
    recipe = {"data": str(tiny_data), "nz": 6, "ngf": 4, "ndf": 4, "batch_size": 8}
    monkeypatch.setattr(speedrun, "RECIPE", {**recipe, "image_size": 32})
    monkeypatch.setattr(speedrun, "FEATURES", str(tmp_path / "tiny.pt"))
    monkeypatch.setattr(speedrun, "N", 16)

    def write(wanted):
        path = tmp_path / "speedrun.md"
        path.write_text(TABLE.format(wanted))
        return path

    return write


FLAGS = ["--every", "3", "--device", "cpu", "--no-amp", "--no-compile"]


def test_it_stops_at_the_target_and_records_what_it_measured(table, capsys):
    path = table("1000")
    given = [*FLAGS, "--table", str(path), "--record"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    said = r"^KID (\S+) after ([0-9.]+) s of training and 24 images \(3 steps\)"
    found = re.search(said, printed, re.MULTILINE)
    assert found
    row = path.read_text().splitlines()[-1].strip("| ").split(" | ")
    assert [row[2], row[3], row[4], row[5]] == [found[2], "24", "3", found[1]]
    assert row[6] == f"`python -m benchmarks.speedrun {' '.join(given)}`"
    assert torch.__version__ in row[1]
    assert target(path.read_text()) == 1000


def test_it_says_so_where_the_target_is_out_of_reach(table, capsys):
    path = table("0.0")
    before = path.read_text()
    assert main([*FLAGS, "--table", str(path), "--record", "--minutes", "0.01"]) == 1
    assert "not reached in 0.01 minutes" in capsys.readouterr().err
    assert path.read_text() == before


def test_the_committed_table_has_a_target_and_rows():
    text = speedrun.TABLE.read_text()
    assert 0 < target(text) < 1
    rows = [line for line in text.splitlines() if line.startswith("| 20")]
    assert rows
    for row in rows:
        kid = float(row.split(" | ")[5])
        assert kid <= target(text)


def test_a_table_without_a_target_is_one_line(tmp_path):
    (tmp_path / "t.md").write_text("nothing")
    with pytest.raises(SystemExit, match="no line 'Target"):
        main(["--table", str(tmp_path / "t.md")])
