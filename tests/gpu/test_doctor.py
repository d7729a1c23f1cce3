"""`python -m fastdcgan.doctor` on the GPU: nothing fails, the step is a graph, the plan is that of
the kernels."""

import json

import pytest

pytestmark = pytest.mark.gpu


def test_this_gpu(command):
    done = command("fastdcgan.doctor", "--json", "--device", "cuda", timeout=1200)
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["failed"]
    rows = {
        section["title"].split()[0].rstrip(","): {row["name"]: row for row in section["rows"]}
        for section in found["sections"]
    }
    assert rows["Training"]["CUDA graph"]["verdict"] == "ok"
    assert len(rows["Blocks"]) == 10
    assert all(set(row["values"]["rms_errors"]) >= {"float32", "float16"}
               for row in rows["Blocks"].values())  # fmt: skip
    assert all(row["values"]["how"] != "plain PyTorch" for name, row in rows["Plan"].items()
               if name != "tuner")  # fmt: skip
    assert rows["Timings"]["--amp"]["values"]["images_per_second"] > 0
