"""A run of `python -m benchmarks.gpu` in words: its page in Markdown, and ten lines for the screen.
Anything may be missing from a run: a phase that was not reached, an item that raised, a fact that
could not be read. Not here: measuring, plots. Imports neither torch nor matplotlib."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import driver
from fastdcgan.errors import InputError

Summary = dict[str, Any]
"""As in summary.json: made_by, when, commit, rehearsal, phases, items; what is null is left out."""
Facts = dict[str, Any]

PHASES = tuple(phase.name for phase in driver.PHASES)
OURS, TUNED, EXAMPLE = "fastdcgan --amp", "pytorch tuned", "pytorch example"
IN_ONE_STREAM = f"{OURS} --overlap off"
"""Ours with a switch turned."""
ROWS = 40
"""Launches in the table of where the time goes."""
WIDTH = 100
"""Characters of a line on the screen."""
LOG_LINES = 12


# --- Reading --------------------------------------------------------------------------------------


def load(folder: Path) -> Summary:
    """The run in `folder`: what summary.json says, and over it what items.jsonl says, which a run
    that was killed has alone.

    Raises:
        InputError: the folder holds no run.
    """
    summary: Summary = known(_json(_text(folder / "summary.json")))
    for name in ("phases", "items"):
        summary.setdefault(name, {})
    for line in _text(folder / "items.jsonl").splitlines():
        _take(known(_json(line)), summary)
    if not (summary["phases"] or summary["items"]):
        raise InputError(
            f"{folder} holds no run: neither summary.json nor items.jsonl has a phase; "
            "make one with python -m benchmarks.gpu"
        )
    if "rehearsal" not in summary:
        states = summary["phases"].values()
        card = items(summary, "machine").get("card")
        on_cpu = card is not None and "capability" not in card
        summary["rehearsal"] = on_cpu or any(state.get("rehearsal") for state in states)
    return summary


def known(value: Any) -> Any:
    """Without what is null, at any depth."""
    if isinstance(value, dict):
        return {name: known(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [known(one) for one in value if one is not None]
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _json(text: str) -> Facts:
    """Nothing, of a text that is torn or is no object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _take(row: Facts, summary: Summary) -> None:
    """A line of items.jsonl: the newest of an item or of a phase's state counts."""
    phase = row.pop("phase", None)
    if phase is None:
        return
    summary["when"] = max(summary.get("when", ""), row.get("at", ""))
    if "state" in row:
        if row.get("anew"):  # measured once more
            summary["items"].pop(phase, None)
        summary["phases"][phase] = row
    elif "item" in row:
        summary["items"].setdefault(phase, {})[row.pop("item")] = row


def items(summary: Summary, phase: str) -> dict[str, Facts]:
    """What a phase measured, by the item's name; nothing of those that raised."""
    found = summary.get("items", {}).get(phase) or {}
    return {
        name: facts for name, facts in found.items() if isinstance(facts, dict) and
        "error" not in facts
    }  # fmt: skip


def failures(summary: Summary) -> list[str]:
    """What did not work, a line each: phases, items, proofs, tests, kernels."""
    lines = []
    for phase, state in summary.get("phases", {}).items():
        if state.get("state") not in ("done", None):
            why = f" ({state['why']})" if state.get("why") else ""
            ending = "did not end" if state["state"] == "started" else state["state"]
            lines.append(f"{phase} {ending}{why}")
    for phase, found in summary.get("items", {}).items():
        for name, facts in (found or {}).items():
            if isinstance(facts, dict) and "error" in facts:
                lines.append(f"{phase}, {name}: {facts['error']}")
    for name, facts in items(summary, "proof").items():
        lines += [f"proof, {name}: {line}" for line in wrong(facts)]
    lines += [
        f"engines, {name}: {facts['wrong']}"
        for name, facts in items(summary, "engines").items() if facts.get("wrong")
    ]  # fmt: skip
    tests = items(summary, "tests").get("pytest", {})
    lines += [f"test {f.get('name')}: {f.get('why')}" for f in tests.get("failures") or []]
    for name, facts in items(summary, "compile").items():
        bad = (facts.get("failed") or {}).items()
        lines += [f"compile, {name}: {kernel}: {why}" for kernel, why in bad]
    return lines


def card_of(summary: Summary) -> str:
    """The GPU's name."""
    return str(items(summary, "machine").get("card", {}).get("name") or "a card of unknown name")


def steps(summary: Summary, *, in_turn: bool) -> dict[int, dict[str, Facts]]:
    """Batch -> variant -> facts, of the whole step: measured in turn with others, or alone."""
    found: dict[int, dict[str, Facts]] = {}
    for facts in items(summary, "steps").values():
        whole = all(map(_number, (facts.get("median"), facts.get("batch"))))
        if whole and bool(facts.get("in_turn")) == in_turn:
            found.setdefault(facts["batch"], {})[str(facts.get("variant"))] = facts
    return dict(sorted(found.items()))


def speedups(summary: Summary) -> dict[int, dict[str, float]]:
    """Batch -> variant -> how many times as fast ours is, of what was measured in turn."""
    return {
        batch: {
            name: facts["median"] / group[OURS]["median"]
            for name, facts in group.items() if name != OURS
        }
        for batch, group in steps(summary, in_turn=True).items() if OURS in group
    }  # fmt: skip


def step_of_ours(summary: Summary) -> dict[int, Facts]:
    """Batch -> our step, in turn with the baselines or, where there are none, alone."""
    found = {}
    for in_turn in (False, True):
        for batch, group in steps(summary, in_turn=in_turn).items():
            if OURS in group:
                found[batch] = group[OURS]
    return dict(sorted(found.items()))


def rates(summary: Summary) -> dict[int, float]:
    """Batch -> images/s of ours."""
    return {batch: batch / own["median"] for batch, own in step_of_ours(summary).items()}


def lost(row: Facts) -> float:
    """Seconds that a launch takes beyond its floor."""
    return (_number(row.get("seconds")) or 0.0) - (_number(row.get("floor_seconds")) or 0.0)


def named(row: Facts) -> str:
    """A launch in words, as far as they are known."""
    halves = (("layer", "pass"), ("kernel", "tile"))
    words = (" ".join(str(row[name]) for name in half if row.get(name)) for half in halves)
    return ", ".join(filter(None, words))


def profiles(summary: Summary) -> dict[int, Facts]:
    """Batch -> the profile of a step, where it has rows."""
    found = {
        int(facts["batch"]): facts for facts in items(summary, "profile").values()
        if facts.get("rows") and facts.get("batch")
    }  # fmt: skip
    return dict(sorted(found.items()))


def wrong(proof: Facts) -> list[str]:
    """What a step's comparison with plain PyTorch found beyond its bounds."""
    figures = proof.get("figures") or {}
    found = []
    for name, value in (("blocks", "largest"), ("gradients", "error"), ("graph", "error")):
        figure = figures.get(name) or {}
        if figure and not _within(figure.get(value), figure.get("allowed")):
            place = f" at {figure['where']}" if figure.get("where") else ""
            found.append(
                f"{name} {_figures(figure.get(value))} of {_figures(figure.get('allowed'))}{place}"
            )
    updates = (figures.get("update") or {}).get("wrong") or []
    found += [f"update of {name}" for name in updates]
    if not figures:
        found.append("nothing was compared")
    return found + [str(line) for line in proof.get("said") or []]


def _within(value: Any, allowed: Any) -> bool:
    """False also for NaN, and for what is missing."""
    return None not in (_number(value), _number(allowed)) and value <= allowed


def _number(value: Any) -> float | None:
    """None of what is no finite number."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


# --- The page -------------------------------------------------------------------------------------


def document(summary: Summary, plots: Sequence[str] = ()) -> str:
    """The run's report.md.

    Args:
        plots: names of pictures beside it.
    """
    summary = known(summary)
    sections = (
        _speed, _proof, _engines, _tests, _time, _ways, _tiles, _counters, _compiled, _phases
    )  # fmt: skip
    lines = _head(summary)
    for name in plots:
        lines += [f"![{Path(name).stem}]({name})", ""]
    for section in sections:
        lines += section(summary)
    return "\n".join(lines).rstrip() + "\n"


def _head(summary: Summary) -> list[str]:
    card = items(summary, "machine").get("card", {})
    versions = items(summary, "machine").get("versions", {})
    title = f"# A training step on {card_of(summary)}"
    if summary.get("rehearsal"):
        title = "# A rehearsal on a CPU: no GPU was measured, and no number here is one of a GPU's"
    facts = [f"{name} {value}" for name, value in versions.items() if name != "at"]
    for name, unit, words in (
        ("multiprocessors", 1, "multiprocessors"), ("memory_bytes", 2**30, "GiB"),
        ("l2_bytes", 2**20, "MiB of L2"), ("sm_mhz", 1, "MHz"), ("memory_mhz", 1, "MHz memory"),
        ("power_limit_watts", 1, "W at most"),
    ):  # fmt: skip
        if _number(card.get(name)) is not None:
            facts.append(f"{card[name] / unit:,.0f} {words}")
    rows = [
        (words, _figures(_number(facts_of.get(name)), scale), unit)
        for item, name, words, scale, unit in (
            ("product", "flops_per_second", "product of large bf16 matrices", 1e-12, "TFLOP/s"),
            ("copy", "bytes_per_second", "copy in memory, read and written", 1e-12, "TB/s"),
            ("l2", "bytes_per_second", "reads from the L2", 1e-12, "TB/s"),
        ) if (facts_of := items(summary, "machine").get(item))
    ]  # fmt: skip
    lines = [
        title, "",
        f"{_or(summary.get('when'), 'date unknown')}, commit "
        f"`{_or(summary.get('commit'), 'unknown')}`, by "
        f"`{_or(summary.get('made_by'), 'python -m benchmarks.gpu, which did not end')}`.",
        *([f"{', '.join(facts)}."] if facts else []), "",
    ]  # fmt: skip
    if rows:
        lines += _table(("peak, as measured", "", ""), rows)
    bad = failures(summary)
    if bad:
        lines += [f"**Not everything worked** ({len(bad)}):", "", *_list(bad, 20)]
    return lines


def _speed(summary: Summary) -> list[str]:
    found = [
        (batch, in_turn, name, facts)
        for in_turn in (True, False)
        for batch, group in steps(summary, in_turn=in_turn).items()
        for name, facts in sorted(group.items(), key=lambda item: item[0] != OURS)
    ]
    if not found:
        return _missing("Images per second", summary, "steps")
    gains, rows, said = speedups(summary), [], []
    for batch, in_turn, name, facts in sorted(found, key=lambda one: (one[0], not one[1])):
        gain = gains.get(batch, {}).get(name) if in_turn else None
        rows.append(
            (
                batch, "in turn" if in_turn else "alone",
                f"**{name}**" if name == OURS else name,
                _spread(facts), f"{batch / facts['median']:,.0f}",
                "" if gain is None else f"{gain:.2f}", *_clocks(facts),
            )
        )  # fmt: skip
        said += [f"{batch}, {name}: {line}" for line in facts.get("said") or []]
    columns = ("batch", "measured", "variant", "ms a step (middle half)", "images/s",
               "its time / ours", *CLOCKS)  # fmt: skip
    return [
        "## Images per second", "",
        "The whole training step. Only what was measured in turn is compared.", "",
        *_table(columns, rows), *_list(said, 20),
    ]  # fmt: skip


CLOCKS = ("MHz", "°C", "W", "images/J", "peak MiB", "")


def _clocks(facts: Facts) -> list[str]:
    numbers = [
        _figures(facts.get(name))
        for name in ("sm_mhz", "celsius_max", "watts", "images_per_joule", "memory_peak_mib")
    ]
    reasons = ", ".join(facts.get("throttle_reasons") or [])
    notes = [f"THROTTLED {reasons}".strip()] if facts.get("throttled") else []
    return [
        *numbers,
        ", ".join([*notes, *["at its power limit"] * bool(facts.get("power_capped"))]),
    ]


def _spread(facts: Facts) -> str:
    rounds = [1e3 * r for r in facts.get("rounds") or [] if _number(r) is not None]
    middle = f"{1e3 * facts['median']:.3f}"
    if len(rounds) < 3:
        return middle
    low, _, high = statistics.quantiles(rounds, method="inclusive")
    return f"{middle} ({low:.3f} to {high:.3f})"


def _proof(summary: Summary) -> list[str]:
    found = items(summary, "proof")
    if not found:
        return _missing("Proof", summary, "proof")
    rows = []
    for name, facts in sorted(found.items(), key=_by_number):
        figures = facts.get("figures") or {}
        cells = []
        for figure, value in (("blocks", "largest"), ("gradients", "error"), ("graph", "error")):
            own = figures.get(figure)
            text = f"{_figures(own.get(value))} of {_figures(own.get('allowed'))}" if own else "-"
            where = f" ({own['where']})" if own and own.get("where") else ""
            cells.append(text + where)
        update = figures.get("update")
        differing = "-" if update is None else ", ".join(update.get("wrong") or []) or "right"
        verdict = "; ".join(wrong(facts)) or "within its bounds"
        rows.append((name, *cells, differing, "yes" if facts.get("graphed") else "no", verdict))
    columns = ("batch", "blocks: error of allowed", "gradients", "CUDA graph", "update", "graphed",
               "verdict")  # fmt: skip
    return [
        "## Proof", "",
        "The first step beside plain PyTorch, and its CUDA graph beside the step run eagerly.", "",
        *_table(columns, rows),
    ]  # fmt: skip


def _engines(summary: Summary) -> list[str]:
    found = {name: f for name, f in items(summary, "engines").items() if f.get("engine")}
    if not found:
        return []
    rows = [
        (
            facts.get("layer") or name, facts.get("pass") or "-", facts["engine"],
            facts.get("tile") or "-", _us(facts.get("seconds")), _us(facts.get("vendor_seconds")),
            _figures(facts.get("ratio")), facts.get("wrong") or facts.get("skipped") or "right",
        )
        for name, facts in found.items()
    ]  # fmt: skip
    looks = [f"{name}: {facts['debugger']}" for name, facts in found.items()
             if facts.get("debugger")]  # fmt: skip
    columns = ("layer", "pass", "engine", "tile", "us", "cuDNN us", "cuDNN's time / its", "values")
    return [
        "## Engines", "",
        "Each engine on the big layers, in turn with cuDNN's convolution: replays of CUDA graphs, "
        "operands as warm in the L2 for one as for the other. Forward tiles also make the "
        "statistics of BatchNorm, which cuDNN's time is without.", "",
        *_table(columns, rows), *_list(looks, 4),
    ]  # fmt: skip


def _tests(summary: Summary) -> list[str]:
    facts = items(summary, "tests").get("pytest")
    if not facts:
        return _missing("Tests", summary, "tests")
    bad = [f"`{f.get('name')}`: {f.get('why')}" for f in facts.get("failures") or []]
    return ["## Tests", "", f"`pytest -m gpu`: {_counts(facts)}.", "", *_list(bad, 40)]


def _counts(facts: Facts) -> str:
    counts = [f"{facts.get(name) or 0} {name}" for name in ("passed", "failed", "skipped")]
    return f"{', '.join(counts)} in {_figures(facts.get('seconds'))} s"


def _time(summary: Summary) -> list[str]:
    found = profiles(summary)
    if not found:
        return _missing("Where the time goes", summary, "profile")
    lines = []
    for batch, facts in found.items():
        lines += [f"## Where the time goes, batch {batch}", "", *_totals(batch, facts), ""]
        lines += [*_kinds(facts), *_rows(facts), *_others(facts)]
    return lines


def _totals(batch: int, facts: Facts) -> list[str]:
    peaks, rows = facts.get("peaks") or {}, facts["rows"]
    measured, floor, predicted = (
        _sum(rows, name) for name in ("seconds", "floor_seconds", "predicted_seconds")
    )
    total, span = _number(facts.get("seconds")), _number(facts.get("span_seconds"))
    lines = [
        f"By {_or(facts.get('source'), 'unknown means')}. Our {len(rows)} launches: "
        f"{_us(measured)} us measured, {_us(predicted)} predicted with the L2, {_us(floor)} at the "
        f"peaks of FLOPs and memory ({_or(peaks.get('source'), 'unknown')}: "
        f"{_figures(peaks.get('flops_per_second'), 1e-12)} TFLOP/s, "
        f"{_figures(peaks.get('bytes_per_second'), 1e-12)} TB/s, "
        f"{_figures(peaks.get('l2_bytes_per_second'), 1e-12)} TB/s from the L2)."
    ]
    if total:
        line = f"All kernels of the step: {_us(total)} us"
        if span:
            line += f"; from the first one's start to the last one's end {_us(span)} us, which is "
            line += f"{batch / span:,.0f} images/s; gaps are {_us(span - total)} us of it"
        lines.append(line + ".")
    if facts.get("joined") is False:
        lines.append("The profiler's kernels were not those launches: each was timed by itself.")
    return lines


def _kinds(facts: Facts) -> list[str]:
    kinds: dict[str, list[Facts]] = {}
    for row in facts["rows"]:
        kinds.setdefault(_or(row.get("pass"), "unknown"), []).append(row)
    total = _sum(facts["rows"], "seconds") or math.inf
    rows = [
        (
            kind, len(own), _us(seconds), f"{seconds / total:.0%}",
            _us(_sum(own, "floor_seconds")), _us(_sum(own, "predicted_seconds")),
        )
        for kind, own in kinds.items() for seconds in [_sum(own, "seconds")]
    ]  # fmt: skip
    rows.sort(key=lambda row: -_sum(kinds[row[0]], "seconds"))
    return _table(("kind", "launches", "us", "share", "floor us", "predicted us"), rows)


def _rows(facts: Facts) -> list[str]:
    order = sorted(facts["rows"], key=lost, reverse=True)
    rows = []
    for row in order[:ROWS]:
        seconds = _number(row.get("seconds"))
        rate = 1 / seconds if seconds else None
        rows.append(
            (
                _us(lost(row)), row.get("layer") or "-", row.get("pass") or "-",
                row.get("kernel") or "-", row.get("tile") or "-", _us(seconds),
                _figures(_number(row.get("flops")), rate and 1e-12 * rate),
                _figures(_number(row.get("bytes")), rate and 1e-9 * rate),
                _share(row), _us(row.get("predicted_seconds")),
            )
        )  # fmt: skip
    columns = ("us lost", "layer", "pass", "kernel", "tile", "us", "TFLOP/s", "GB/s",
               "floor of its time", "predicted us")  # fmt: skip
    lines = _table(columns, rows)
    rest = order[ROWS:]
    if rest:
        lines += [f"{len(rest)} other launches lose {_us(sum(map(lost, rest)))} us.", ""]
    return lines


def _share(row: Facts) -> str:
    seconds, floor = _number(row.get("seconds")), _number(row.get("floor_seconds"))
    return f"{floor / seconds:.0%}" if seconds and floor is not None else "-"


def _others(facts: Facts) -> list[str]:
    rows = [
        (f"`{_short(_or(other.get('name'), 'unknown'), 80)}`", _or(other.get("launches"), "-"),
         _us(other.get("seconds")))
        for other in (facts.get("others") or [])[:20]
    ]  # fmt: skip
    return _table(("PyTorch's own kernels, and copies", "launches", "us"), rows) if rows else []


def _ways(summary: Summary) -> list[str]:
    found = {name: f for name, f in items(summary, "ways").items() if _number(f.get("median"))}
    if not found:
        return []
    rows = [
        (
            _or(facts.get("batch"), name), facts.get("way") or name, _spread(facts),
            _figures(facts.get("images_per_second")), *_clocks(facts),
            "; ".join(facts.get("said") or []),
        )
        for name, facts in sorted(found.items(), key=_by_number)
    ]  # fmt: skip
    columns = ("batch", "every block", "ms a step (middle half)", "images/s", *CLOCKS, "said")
    return ["## Ways to run the blocks", "", *_table(columns, rows)]


def _tiles(summary: Summary) -> list[str]:
    found = items(summary, "tiles")
    if not found:
        return []
    rows = []
    for name, facts in found.items():
        tried = facts.get("candidates") or []
        timed = [one for one in tried if _number(one.get("seconds")) is not None]
        best = min((one["seconds"] for one in timed), default=None)
        failed = [f"{one.get('tile')}: {one['why']}" for one in tried if one.get("why")]
        rows.append(
            (
                facts.get("name") or name, facts.get("kept") or "-", _us(best),
                _figures(facts.get("gain")), f"{len(timed)} of {len(tried)}", "; ".join(failed[:2]),
            )
        )  # fmt: skip
    columns = ("task", "kept", "best us", "default's time / kept's", "timed", "dropped")
    return ["## Tiles", "", *_table(columns, rows)]


def _counters(summary: Summary) -> list[str]:
    found = items(summary, "counters")
    lines: list[str] = []
    for name, facts in found.items():
        if facts.get("missing"):
            lines.append(f"- {name}: not measured: {facts['missing']}")
        elif "errors" in facts:
            lines.append(f"- {name}: {_or(facts['errors'], 'unknown')} errors")
        else:
            metrics = (facts.get("metrics") or {}).items()
            numbers = ", ".join(f"{metric} {_figures(value)}" for metric, value in metrics)
            layer = f" ({facts['layer']})" if facts.get("layer") else ""
            lines.append(f"- {facts.get('kernel') or name}{layer}: {numbers or 'nothing'}")
    return ["## Counters", "", *lines, ""] if lines else []


def _compiled(summary: Summary) -> list[str]:
    found = items(summary, "compile")
    if not found:
        return []
    rows = [
        (name, _or(f.get("kernels"), "-"), _or(f.get("compiled"), "-"), _figures(f.get("seconds")))
        for name, f in found.items()
    ]
    bad = [
        f"{name}, {kernel}: {why}" for name, f in found.items()
        for kernel, why in (f.get("failed") or {}).items()
    ]  # fmt: skip
    columns = ("launches of", "kernels", "compiled", "seconds")
    return ["## Compilation", "", *_table(columns, rows), *_list(bad, 20)]


def _phases(summary: Summary) -> list[str]:
    states = summary.get("phases", {})
    names = [*PHASES, *(name for name in states if name not in PHASES)]
    rows, logs = [], []
    for name in names:
        state = states.get(name, {})
        rows.append(
            (name, state.get("state") or "not run", _figures(state.get("seconds")),
             state.get("why") or "")
        )  # fmt: skip
        if state.get("log"):
            logs += [f"{name}, its last lines:", "", "```",
                     *str(state["log"]).splitlines()[-LOG_LINES:], "```", ""]  # fmt: skip
    return ["## Phases", "", *_table(("phase", "state", "seconds", "why"), rows), *logs]


def _missing(title: str, summary: Summary, phase: str) -> list[str]:
    state = summary.get("phases", {}).get(phase, {})
    why = f": {state['why']}" if state.get("why") else ""
    return [f"## {title}", "", f"Not measured: phase {phase} {_or(state.get('state'), 'not run')}"
            f"{why}.", ""]  # fmt: skip


# --- The screen -----------------------------------------------------------------------------------


def screen(summary: Summary) -> list[str]:
    """The run in nine lines of WIDTH characters or fewer."""
    summary = known(summary)
    lines = [
        _machine_line(summary), *verdicts(summary), *_speed_lines(summary),
        *_lost_lines(summary), _failed_line(summary),
    ]  # fmt: skip
    return [_short(line, WIDTH) for line in lines]


def _machine_line(summary: Summary) -> str:
    if summary.get("rehearsal"):
        return "a rehearsal on a CPU: no GPU was measured"
    machine = items(summary, "machine")
    peaks = [
        f"{words} {_figures(machine[item][name], 1e-12)} {unit}"
        for item, name, words, unit in (
            ("product", "flops_per_second", "products", "TFLOP/s"),
            ("copy", "bytes_per_second", "memory", "TB/s"),
            ("l2", "bytes_per_second", "L2", "TB/s"),
        ) if _number(machine.get(item, {}).get(name))
    ]  # fmt: skip
    return f"{card_of(summary)}: {', '.join(peaks) or 'its peaks were not measured'}"


def verdicts(summary: Summary) -> list[str]:
    """Whether the proof and the tests passed, a line each."""
    return [_proof_line(summary), _tests_line(summary)]


def _proof_line(summary: Summary) -> str:
    found = items(summary, "proof")
    if not found:
        return "proof: none"
    bad = [f"{name}: {'; '.join(said)}" for name, facts in found.items() if (said := wrong(facts))]
    batches = ", ".join(name for name, _ in sorted(found.items(), key=_by_number))
    return f"proof: FAILED at {', '.join(bad)}" if bad else f"proof: within bounds at {batches}"


def _tests_line(summary: Summary) -> str:
    facts = items(summary, "tests").get("pytest")
    return f"tests: {_counts(facts) if facts else 'none'}"


def _speed_lines(summary: Summary) -> list[str]:
    found = [f"{rate:,.0f} at {batch}" for batch, rate in rates(summary).items()]
    compared = [
        " and ".join(
            f"{gains[name]:.2f} of {name.split()[-1]}" for name in (TUNED, EXAMPLE) if name in gains
        )
        + f" at {batch}"
        for batch, gains in speedups(summary).items()
    ]
    return [
        f"images/s of ours: {', '.join(found) or 'not measured'}",
        f"its speed in turn with PyTorch's: {'; '.join(compared) or 'not measured'}",
    ]


def _lost_lines(summary: Summary) -> list[str]:
    found = profiles(summary)
    if not found:
        return ["where the time goes: not measured"]
    batch, facts = next(iter(found.items()))
    return [
        f"at {batch}, {_us(lost(row))} us lost of {_us(row.get('seconds'))}: {named(row)}"
        for row in sorted(facts["rows"], key=lost, reverse=True)[:3]
    ]


def _failed_line(summary: Summary) -> str:
    bad = failures(summary)
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return f"failed: {_short(bad[0], WIDTH - 8 - len(more))}{more}" if bad else "nothing failed"


# --- Words ----------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [
        *("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in cells), "",
    ]  # fmt: skip


def _list(lines: Sequence[str], most: int) -> list[str]:
    """As many, and how many more there are."""
    if not lines:
        return []
    more = [f"- and {len(lines) - most} more"] if len(lines) > most else []
    return [*(f"- {_short(line, 300)}" for line in lines[:most]), *more, ""]


def _sum(rows: Iterable[Facts], name: str) -> float:
    return sum(_number(row.get(name)) or 0.0 for row in rows)


def _us(seconds: Any) -> str:
    value = _number(seconds)
    return "-" if value is None else f"{value * 1e6:,.1f}"


def _figures(value: Any, scale: float | None = 1.0) -> str:
    """Three figures; "-" of what is no number."""
    if _number(value) is None or scale is None:
        return "-"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _or(value: Any, otherwise: str) -> str:
    return otherwise if value is None else str(value)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _by_number(item: tuple[str, Facts]) -> tuple[float, str]:
    """Items whose names begin with a batch, by it."""
    first = item[0].split()[0]
    return (int(first) if first.isdigit() else math.inf), item[0]
