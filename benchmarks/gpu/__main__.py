"""The command `python -m benchmarks.gpu`. Needs torch, Triton, NumPy and pytest; loads none of them
itself."""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import driver, page
from fastdcgan.errors import InputError

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
DESCRIPTION = """Prove the kernels on this machine's GPU and measure where the time of a training
step goes: ours beside PyTorch tuned and PyTorch's example."""
EPILOG = """examples:
  python -m benchmarks.gpu                       everything, in eight minutes
  python -m benchmarks.gpu                       once more: goes on where the first call ended
  python -m benchmarks.gpu --only steps,profile  these phases, whether measured before or not
  python -m benchmarks.gpu --rehearse            on a CPU, tiny: shows that all phases run

It writes items.jsonl (each item as it was measured), summary.json, report.md, gpu.xml (pytest's)
and tuned-CARD.json (for $FASTDCGAN_CACHE). `python -m benchmarks.report --gpu` makes the page with
plots and the README's table of them.
"""
CARD = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ",".join(phase.name for phase in driver.PHASES)
    parser.add_argument(
        "--minutes", type=float, default=driver.MINUTES, help="for everything; default 8"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run; default benchmarks/results/gpu/CARD"
    )
    parser.add_argument("--only", default="", metavar="PHASE,...", help=f"some of {names}")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU with tiny sizes; measures no GPU"
    )
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < 24 * 60:
        parser.error(f"--minutes {given.minutes:g} was given; give more than 0, less than a day")
    only = [name for name in given.only.split(",") if name]
    options = [f"--minutes {given.minutes:g}", *[f"--only {given.only}"] * bool(only)]
    made_by = " ".join(["python -m benchmarks.gpu", *options, *["--rehearse"] * given.rehearse])
    try:
        out = given.out or _default_folder(given.rehearse)
        summary = driver.run(
            out,
            minutes=given.minutes,
            only=only,
            rehearse=given.rehearse,
            made_by=made_by,
            say=_say,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what is in {out}", file=sys.stderr)
        return 130
    problem = summary["problem"]
    try:
        (out / "report.md").write_text(page.document(summary), "utf-8")
    except OSError as error:
        problem = problem or f"cannot write {out / 'report.md'}: {error.strerror}"
    print(*page.screen(summary), sep="\n")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    else:
        print(f"wrote {out / 'report.md'}")
    ended = [summary["phases"].get(phase.name, {}).get("state") for phase in driver.PHASES]
    return int(bool(problem) or any(state not in (None, "done") for state in ended))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _default_folder(rehearse: bool) -> Path:
    """That of this machine's card.

    Raises:
        InputError: there is none.
    """
    if rehearse:
        return Path(".benchmarks/gpu/rehearsal")
    asked = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True)
    card = asked.stdout.strip()
    if not card:
        why = asked.stderr.strip().splitlines()[-1:] or ["PyTorch sees no GPU here"]
        raise InputError(f"{why[0]}: --rehearse shows the phases on a CPU")
    return RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")


if __name__ == "__main__":
    sys.exit(main())
