"""How CUDA graphs are captured, read from the source: no test without a GPU can see it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("fastdcgan", "kernels", "benchmarks", "examples", "tests")


def captures():
    """(where, its capture_error_mode or None) of each `torch.cuda.graph(...)`."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("cuda.graph"):
                    modes = {k.arg: ast.literal_eval(k.value) for k in node.keywords
                             if k.arg == "capture_error_mode"}  # fmt: skip
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    yield where, modes.get("capture_error_mode")


def test_other_threads_do_not_break_a_capture():
    """By default any thread's unsafe call, such as the feed's pinning of memory, does."""
    found = dict(captures())
    assert len(found) >= 5
    assert {where for where, mode in found.items() if mode != "thread_local"} == set()
