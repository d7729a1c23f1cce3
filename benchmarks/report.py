"""`python -m benchmarks.report`: what the saved runs say, as a Markdown page with plots, and
whether anything became slower than it was; with --gpu the pages of the GPUs that were measured, and
the README's part on them. Reading and comparing is in saved.py and gpu/page.py, drawing in
plots.py."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from benchmarks.gpu import page as gpu
from benchmarks.saved import Change, Entry, Run, compare, differences, duration, load, load_all
from benchmarks.saved import previous as previous_of
from fastdcgan import command
from fastdcgan.data.picture import atomic_write
from fastdcgan.errors import InputError

DESCRIPTION = """Make tables and plots of saved benchmark runs, and compare two of them.

Examples:

  pytest benchmarks/ --benchmark-only --benchmark-autosave && python -m benchmarks.report

  python -m benchmarks.report --against previous --fail-on 10%
      exits with status 1, and a line for each, if anything of ours became more than 10 % slower
      beyond noise: the middle halves of its rounds, then and now, have no time in common, and none
      of the baselines that were timed in turn with it became as much slower

  python -m benchmarks.report --gpu
      page and plots of each run of `python -m benchmarks.gpu`, and the README's table of them
"""
ROOT = Path(__file__).parents[1]
BEGIN = "<!-- gpu: made by python -m benchmarks.report --gpu -->"
END = "<!-- /gpu -->"
NONE = """\
**No GPU has been measured: there is no row for one.** `python -m benchmarks.gpu` proves the kernels
on yours and measures them in eight minutes; `python -m benchmarks.report --gpu` puts its rows
here."""


@dataclass(frozen=True)
class Options:
    """Which runs, and where to write."""

    run: str = "latest"
    """latest, or a file that pytest-benchmark saved."""
    against: str = "previous"
    """Compare with this one: a file, or previous (the newest before it on the same hardware)."""
    fail_on: str | None = None
    """A percentage, as 10%: fail on what became slower by more than it, beyond noise."""
    out: Path = Path(".benchmarks/report")
    """Folder for report.md and the plots."""
    storage: Path = Path(".benchmarks")
    """Where the saved runs are (pytest's --benchmark-storage)."""
    roofline: tuple[Path, ...] = ()
    """To draw in the plot of the whole step: what `python -m benchmarks.cost_model --json` printed,
    a file for each batch."""
    gpu: bool = False
    """Pages and plots of the runs of `python -m benchmarks.gpu`, and the README's part on them; of
    the options only the next two are read."""
    gpu_runs: Path = ROOT / "benchmarks/results/gpu"
    """Folder of these runs, one folder each, or the folder of one run."""
    readme: Path = ROOT / "README.md"
    """Where their table goes, between its two comments."""


def _report(args: Sequence[str]) -> list[str]:
    """Writes the report; returns what --fail-on fails on."""
    options = command.parse(
        Options, prog="python -m benchmarks.report", description=DESCRIPTION, args=args
    )
    if options.gpu:
        _gpu(options.gpu_runs, options.readme)
        return []
    limit = None if options.fail_on is None else _percentage(options.fail_on)
    # A run or an earlier one that is named need not lie among the saved ones.
    named = options.run != "latest" and options.against != "previous"
    runs = [] if named and not options.storage.is_dir() else load_all(options.storage)
    run = runs[-1] if options.run == "latest" else load(Path(options.run))
    changes, lines = _changes(run, runs, options.against)
    failures = [] if limit is None else _failures(run, changes, limit)
    if limit is not None and not changes and options.against != "previous":
        failures.append(f"nothing could be compared with {options.against}")

    from benchmarks import plots

    roofline = _roofline(options.roofline) if options.roofline else None
    options.out.mkdir(parents=True, exist_ok=True)
    history = [r for r in runs if r.hardware == run.hardware and r.when <= run.when]
    drawn = plots.draw(run, history, options.out, roofline=roofline)
    page = "\n".join([*markdown(run, drawn), *_comparison(changes, lines, limit)])
    atomic_write(options.out / "report.md", lambda file: file.write(page.encode()))
    for line in [*lines, *_throttled(run), f"wrote {options.out / 'report.md'}"]:
        print(line)
    return failures


def _percentage(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?%?", text):
        raise InputError(f"--fail-on {text} was given; give a percentage, as 10%")
    return float(text.removesuffix("%")) / 100


def _roofline(paths: Sequence[Path]) -> tuple[str, dict[int, float]]:
    """(label, images/s by batch): of the first step in each, which is the engine's own."""
    device, rates = "", {}
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            device, batch = str(data["device"]), int(data["batch"])
            rates[batch] = batch / float(data["steps"][0]["roofline_seconds"])
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, ZeroDivisionError):
            raise InputError(
                f"{path} is no roofline: give what python -m benchmarks.cost_model --json printed"
            ) from None
    return f"roofline of ours on {device}, predicted", rates


# --- comparing ------------------------------------------------------------------------------------


def _changes(run: Run, runs: Sequence[Run], against: str) -> tuple[list[Change], list[str]]:
    """What changed since `against`, and what is to be said of the comparison."""
    if against == "previous":
        before = previous_of(runs, run)
        if before is None:
            return [], ["no earlier run of this hardware: nothing was compared"]
    else:
        before = load(Path(against))
    lines = [f"compared with {before.path} of {before.label}, {before.when[:16]}"]
    other = differences(before.hardware, run.hardware)
    if other:
        return [], [f"not compared with {before.path}, of another machine ({other})"]
    other = differences(before.software, run.software)
    if other:
        lines.append(f"note: other software ({other})")
    gone = [entry for name, entry in before.entries.items() if name not in run.entries]
    if gone:
        lines.append(f"note: {len(gone)} entries of the earlier run are not in this one")
    changes = compare(before, run)
    lines += [f"not compared: {c.now}: {c.refused}" for c in changes if c.refused]
    return changes, lines


def _failures(run: Run, changes: Iterable[Change], limit: float) -> list[str]:
    regressions = [f"regression: {c}" for c in changes if c.regressed(limit)]
    return [*regressions, *_throttled(run)]


def _throttled(run: Run) -> list[str]:
    held = [str(entry) for entry in run.entries.values() if entry.throttled]
    return [f"THROTTLED, so no good run: {', '.join(held)}"] if held else []


def _comparison(changes: Sequence[Change], lines: Sequence[str], limit: float | None) -> list[str]:
    page = ["## Compared with an earlier run", "", *(f"- {line}" for line in lines), ""]
    shown = [c for c in changes if not c.refused and (c.slower or c.faster)]
    if changes:
        page += [
            f"{len(changes)} entries of ours are in both; {len(shown)} changed beyond noise (the "
            "middle halves of the rounds, then and now, have no time in common, also if what "
            "happened to any baseline of the group is taken for the machine's part)"
            + (":" if shown else "."),
            "",
        ]
    if shown:
        page += ["| what | then | now | time | meanwhile | |", "|---|---|---|---|---|---|"]
        for c in sorted(shown, key=lambda c: -c.relative):
            failed = limit is not None and c.regressed(limit)
            verdict = "**regression**" if failed else "slower" if c.slower else "faster"
            page.append(
                f"| {c.now} | {duration(c.before.median)} | {duration(c.now.median)} "
                f"| {c.relative:+.1%} | {c.meanwhile} | {verdict} |"
            )
        page.append("")
    return page


# --- GPU runs -------------------------------------------------------------------------------------


def _gpu(folder: Path, readme: Path) -> None:
    """Writes the page and the plots of each run, and the README's part."""
    runs = gpu_runs(folder)
    text = with_gpu_part(_read(readme), readme_part(runs, readme.parent), readme)

    from benchmarks import plots

    for path, run in runs.items():
        page = gpu.document(run, plots.draw_gpu(run, path, _predicted(run))).encode()
        atomic_write(path / "report.md", partial(_put, page))
        print(f"wrote {path / 'report.md'}")
    atomic_write(readme, partial(_put, text.encode()))
    print(f"wrote {readme}, of {len(runs)} GPU{'s' * (len(runs) != 1)}")


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def gpu_runs(folder: Path) -> dict[Path, gpu.Summary]:
    """The runs of a folder, or the one that it is.

    Raises:
        InputError: one of them is a rehearsal, or cannot be read.
    """
    files = ("summary.json", "items.jsonl")
    places = {
        path.parent for name in files for path in [*folder.glob(name), *folder.glob(f"*/{name}")]
    }
    runs = {path: gpu.load(path) for path in sorted(places)}
    for path, run in runs.items():
        if run["rehearsal"]:
            raise InputError(
                f"{path} is a rehearsal: no GPU was measured, and the README takes none of it"
            )
    return runs


def _predicted(run: gpu.Summary) -> dict[str, dict[int, float]]:
    """Images/s of our step at this card's peaks."""
    from benchmarks import cost_model

    device = cost_model.device_of(run)
    found: dict[str, dict[int, float]] = {"predicted with the L2": {}, "roofline, predicted": {}}
    for batch in gpu.rates(run):
        one = cost_model.cost("default", device=device, batch=batch, size=64, dtype="bf16")
        for seconds, rates in zip(
            (one.predicted(device, "bf16"), one.roofline(device, "bf16")),
            found.values(), strict=True,
        ):  # fmt: skip
            rates[batch] = batch / seconds
    return found


def readme_part(runs: Mapping[Path, gpu.Summary], root: Path) -> str:
    """What the README says of these runs, between its comments.

    Args:
        root: the README's folder, from which it links to the pages.
    """
    parts = [_readme_of(run, os.path.relpath(path, root)) for path, run in runs.items()]
    return f"{BEGIN}\n{chr(10).join(parts) or NONE}\n{END}"


def _readme_of(run: gpu.Summary, link: str) -> str:
    versions = gpu.items(run, "machine").get("versions", {})
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    lines = [
        f"Measured on {gpu.card_of(run)}{torch}, {run.get('when', 'date unknown')[:10]}, by "
        f"`{run.get('made_by', 'python -m benchmarks.gpu')}`: medians of rounds that all of a row "
        f"ran in turn. [All tables and plots]({link}/report.md).",
        "",
        "| images per second | PyTorch example | PyTorch tuned, AMP | fastdcgan `--amp` |",
        "|---|---|---|---|",
    ]
    gains, beside = gpu.speedups(run), gpu.steps(run, in_turn=True)
    for batch, own in gpu.step_of_ours(run).items():
        faster = gains.get(batch, {})
        cells = [
            _rate(beside[batch][name]) if name in faster else ""
            for name in (gpu.EXAMPLE, gpu.TUNED)
        ]
        words = [
            f"{gain:.2f}x {name.split()[-1]}" for name, gain in sorted(faster.items())
            if name in (gpu.EXAMPLE, gpu.TUNED)
        ]  # fmt: skip
        row = [f"training step, batch {batch}", *cells, _rate(own, *words)]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"{line[0].upper()}{line[1:]}." for line in gpu.verdicts(run)), ""]
    return "\n".join(lines)


def _rate(facts: gpu.Facts, *words: str) -> str:
    """Images/s, and what is to be said of them."""
    notes = [*words, *["throttled"] * bool(facts.get("throttled"))]
    return f"{facts['batch'] / facts['median']:,.0f}" + f" ({', '.join(notes)})" * bool(notes)


def with_gpu_part(text: str, part: str, readme: Path) -> str:
    """The README with this part between its comments.

    Raises:
        InputError: it does not have them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{readme} has no place for the table: a line {BEGIN}, and a line {END}")
    return before + part + after


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


# --- tables ---------------------------------------------------------------------------------------


def markdown(run: Run, drawn: Iterable[str]) -> list[str]:
    """The run in Markdown: where it ran, the plots, a table for each group.

    Args:
        drawn: file names of the plots.
    """
    facts = {**run.hardware, **run.software}
    where = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    page = [
        "# Benchmarks",
        "",
        f"Commit `{run.commit}`{' with changes' if run.dirty else ''}, {run.when[:16]} UTC; "
        f"{where}. Times are medians of rounds that ours and the baselines ran in turn; in "
        "parentheses the middle half of them.",
        "",
    ]
    for name in drawn:
        page += [f"![{Path(name).stem}]({name})", ""]
    groups: dict[str, list[Entry]] = {}
    blocks: dict[str, list[Entry]] = {}
    for entry in run.entries.values():
        if entry.facts.get("family") == "block":
            blocks.setdefault(entry.facts["mode"], []).append(entry)
        else:
            groups.setdefault(entry.group, []).append(entry)
    for group, entries in sorted(groups.items()):
        page += [f"## {group}", "", *_table(entries), ""]
    for mode, entries in blocks.items():
        batch = entries[0].facts["batch"]
        page += [f"## blocks, {mode}, batch {batch} (ms)", "", *_block_table(entries), ""]
    return page


def _table(entries: Sequence[Entry]) -> list[str]:
    baseline = next((entry for entry in entries if not entry.ours), None)
    columns = ["variant", "time", "images/s"]
    columns += [f"speed of {baseline.variant}"] if baseline else []
    more = [
        (title, key)
        for title, key in (
            ("images/J", "images_per_joule"),
            ("W", "watts"),
            ("SM MHz", "sm_mhz"),
            ("°C", "celsius_max"),
            ("peak MiB", "memory_peak_mib"),
            ("packing, s", "packing_seconds"),
        )
        if any(key in entry.facts for entry in entries)
    ]
    columns += [title for title, _ in more]
    rows = [columns, ["---"] * len(columns)]
    for entry in entries:
        name = f"**{entry.variant}**" if entry.ours else entry.variant
        name += " (THROTTLED)" if entry.throttled else ""
        name += " (at its power limit)" if entry.facts.get("power_capped") else ""
        time = f"{duration(entry.median)} ({duration(entry.q1)} to {duration(entry.q3)})"
        row = [name, time, _number(entry.facts.get("images_per_second"))]
        if baseline:
            row.append(f"{baseline.median / entry.median:.2f} x")
        rows.append(row + [_number(entry.facts.get(key)) for _, key in more])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _block_table(entries: Sequence[Entry]) -> list[str]:
    variants = list(dict.fromkeys(entry.variant for entry in entries))
    times: dict[str, dict[str, str]] = {}
    totals = dict.fromkeys(variants, 0.0)
    for entry in entries:
        marked = " (THROTTLED)" if entry.throttled else ""
        times.setdefault(entry.facts["block"], {})[entry.variant] = (
            f"{entry.median * 1e3:.3f}{marked}"
        )
        totals[entry.variant] += entry.median * 1e3
    rows = [["block", *variants], ["---"] * (len(variants) + 1)]
    rows += [[name, *(row.get(v, "") for v in variants)] for name, row in times.items()]
    rows.append(["sum", *(f"{totals[v]:.3f}" for v in variants)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    failures: list[str] = []
    status = command.run(lambda given: failures.extend(_report(given)), args)
    for line in failures:
        print(line, file=sys.stderr)
    return status or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
