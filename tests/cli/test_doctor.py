"""`python -m fastdcgan.doctor` as users run it: on this machine, on a broken one, wrongly."""

import json
import os
import time

from fastdcgan.doctor import main

VERDICTS = {"ok", "warning", "failed", "not possible here"}
SECTIONS = ["This machine", "What training runs here", "Plan", "Blocks", "Data", "Training steps",
            "Compilers"]  # fmt: skip


def test_help_answers_at_once_and_without_torch(command):
    start = time.perf_counter()
    done = command("fastdcgan.doctor", "--help")
    assert time.perf_counter() - start < 1.5
    assert done.returncode == 0
    assert "--quick" in done.stdout


def test_this_machine_in_json(command):
    done = command("fastdcgan.doctor", "--quick", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == []
    assert found["device"] == "cpu"
    sections = {section["title"]: section["rows"] for section in found["sections"]}
    for title, start in zip(sections, SECTIONS, strict=True):
        assert title.startswith(start)
    rows = {row["name"]: row for rows in sections.values() for row in rows}
    assert {row["verdict"] for row in rows.values()} <= VERDICTS
    checked = ["G1", "D5", "built-in data", "cache folder", "step on meta", "host syncs",
               "training", "torch.compile", "Triton kernels", "Triton compiler"]  # fmt: skip
    assert {name: rows[name]["verdict"] for name in checked} == dict.fromkeys(checked, "ok")
    assert rows["CUDA graph"]["verdict"] == "not possible here"
    assert len(rows["Triton kernels"]["values"]["kernels"]) == 12
    assert rows["CPU kernels"]["verdict"] == "ok"
    plan, blocks = ({row["name"]: row for row in sections[title]} for title in list(sections)[2:4])
    assert "C++" in plan["G3"]["detail"]
    assert blocks["G3"]["values"]["ways"][0] == "C++"


def test_a_broken_machine_is_a_table_and_status_1(command, environment, tmp_path):
    """No C++ compiler, a Triton that cannot be imported, a cache that cannot be written: each is a
    failed line, and what does not need them goes on."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is gone')\n")
    (tmp_path / "file").write_text("")
    paths = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    env = {
        "CXX": "/nonexistent", "PATH": "", "FASTDCGAN_CACHE": f"{tmp_path}/file/cache",
        "PYTHONPATH": paths,
    }  # fmt: skip
    done = command("fastdcgan", "doctor", "--quick", "--device", "cpu", env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    failed = {"Triton", "cache folder", "torch.compile"}
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: failed: ")
    assert set(said.removeprefix("error: failed: ").split(", ")) == failed
    lines = done.stdout.splitlines()
    assert any("libtriton.so is gone" in line for line in lines)
    for name in failed:
        assert any(line.startswith(name) and " failed " in line for line in lines)
    assert any(line.startswith("training ") and " ok " in line for line in lines)


def test_a_wrong_device_is_one_line(capsys):
    assert main(["--json", "--device", "cuda:77"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --device cuda:77 was given")
    assert len(err.splitlines()) == 1
