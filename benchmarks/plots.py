"""The plots of a report: images/s of the whole step by batch, the blocks as bars, and the history
over commits; of a GPU run the step's images/s and its launches; of recipes the KID over time."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import page
from benchmarks.saved import Entry, Run
from fastdcgan.data.picture import atomic_write

GREYS = ["#8a8a8a", "#b9a27c", "#c9c9c9", "#d9b8a0"]  # what is not ours
LAUNCHES = 25
"""Launches in the plot of where the time goes."""
COLOURS = ["#1f5fa8", "#2f9e6e", "#d1682c", "#8b3fa0", "#b32d4a"]


def draw(
    run: Run,
    history: Sequence[Run],
    out: Path,
    *,
    roofline: tuple[str, dict[int, float]] | None = None,
) -> list[str]:
    """Draws what there is data for, into the folder `out`.

    Args:
        run: the one that the report is about.
        history: runs of the same hardware, the oldest first, `run` among them.
        roofline: label, and images/s of the whole step by batch.

    Returns:
        The names of the files.
    """
    pyplot = _pyplot()
    figures = {
        "step.png": _step(run, roofline, pyplot),
        "blocks.png": _blocks(run, pyplot),
        "history.png": _history(history, pyplot),
    }
    return _save(figures, out, pyplot)


def draw_gpu(
    run: page.Summary, out: Path, predicted: Mapping[str, Mapping[int, float]]
) -> list[str]:
    """Draws what a run of `python -m benchmarks.gpu` measured, into the folder `out`.

    Args:
        predicted: label -> images/s of our step by batch; two of them.

    Returns:
        The names of the files.
    """
    pyplot = _pyplot()
    figures = {"steps.png": _gpu_steps(run, predicted, pyplot)}
    for batch, facts in page.profiles(run).items():
        figures[f"launches-{batch}.png"] = _gpu_launches(run, batch, facts, pyplot)
    return _save(figures, out, pyplot)


def draw_curves(rows: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Draws the KID over minutes of training of the recipes that were scored on their way, a
    picture for each data, into the folder `out`.

    Args:
        rows: of `python -m benchmarks.recipes`.

    Returns:
        The names of the files.
    """
    scored: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["curve"]:
            scored.setdefault(row["data"], []).append(row)
    if not scored:
        return []  # nor is matplotlib needed
    pyplot = _pyplot()
    figures = {curve_name(data): _curves(data, of_it, pyplot) for data, of_it in scored.items()}
    return _save(figures, out, pyplot)


def curve_name(data: str) -> str:
    """The picture of `draw_curves` for the data."""
    return f"kid-{data}.png"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figures: Mapping[str, Any], out: Path, pyplot: Any) -> list[str]:
    """Writes those that there are; returns their names."""
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save = partial(figure.savefig, format="png", dpi=110, bbox_inches="tight")
        atomic_write(out / name, save)
        pyplot.close(figure)
    return list(drawn)


def _family(run: Run, family: str) -> list[Entry]:
    return [entry for entry in run.entries.values() if entry.facts.get("family") == family]


def _styles(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Colour and line of each variant: ours in colour and solid, the others grey and dashed."""
    styles: dict[str, dict[str, Any]] = {}
    greys, colours = iter(GREYS), iter(COLOURS)
    for entry in sorted(entries, key=lambda entry: entry.ours):
        if entry.variant not in styles:
            colour = next(colours if entry.ours else greys, "#000000")
            styles[entry.variant] = {"color": colour, "linestyle": "-" if entry.ours else "--"}
    return styles


def _step(run: Run, roofline: tuple[str, dict[int, float]] | None, pyplot: Any) -> Any:
    entries = [entry for entry in _family(run, "step") if not entry.throttled]
    if not entries:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    styles = _styles(entries)
    for i, (variant, style) in enumerate(styles.items()):
        own = sorted((e for e in entries if e.variant == variant), key=lambda e: e.facts["batch"])
        aside = 2 ** (0.06 * (i - len(styles) / 2))  # so that equal rates do not hide each other
        batches = [entry.facts["batch"] * aside for entry in own]
        rates = [entry.facts["batch"] / entry.median for entry in own]
        low = [rate - e.facts["batch"] / e.q3 for rate, e in zip(rates, own, strict=True)]
        high = [e.facts["batch"] / e.q1 - rate for rate, e in zip(rates, own, strict=True)]
        axes.errorbar(
            batches, rates, yerr=[low, high], label=variant, marker="o", capsize=3, **style
        )
    if roofline is not None:
        label, rates_of = roofline
        batches = sorted(rates_of)
        axes.plot(batches, [rates_of[b] for b in batches], "k:", label=label)
    _by_batch(axes, sorted({entry.facts["batch"] for entry in entries}))
    axes.set_title(f"whole training step, {_where(run)}")
    return figure


def _by_batch(axes: Any, batches: Sequence[int]) -> None:
    """Images/s over the batch."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlim(batches[0] / 1.5, batches[-1] * 1.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="batch", ylabel="images/s")
    _legend(axes)


def _blocks(run: Run, pyplot: Any) -> Any:
    entries = [entry for entry in _family(run, "block") if not entry.throttled]
    if not entries:
        return None
    modes = list(dict.fromkeys(entry.facts["mode"] for entry in entries))
    names = list(dict.fromkeys(entry.facts["block"] for entry in entries))
    styles = _styles(entries)
    width = 0.8 / len(styles)
    figure, rows = pyplot.subplots(
        len(modes), 1, figsize=(10, 2.6 * len(modes)), sharex=True, squeeze=False
    )
    for mode, axes in zip(modes, rows[:, 0], strict=True):
        for i, (variant, style) in enumerate(styles.items()):
            own = [e for e in entries if e.variant == variant and e.facts["mode"] == mode]
            at = [names.index(e.facts["block"]) + (i + 0.5) * width - 0.4 for e in own]
            times = [e.median * 1e3 for e in own]
            axes.bar(at, times, width, color=style["color"], label=variant)
        axes.set(ylabel=f"{mode} (ms)")
        axes.set_xticks(range(len(names)), names)
        _tidy(axes)
    batch = entries[0].facts["batch"]
    rows[0, 0].set_title(f"blocks by themselves, batch {batch}, {_where(run)}; shorter is better")
    _legend(rows[0, 0])
    return figure


def _history(history: Sequence[Run], pyplot: Any) -> Any:
    """Images/s of the whole step at the largest batch that all runs have, over commits."""
    with_steps = [run for run in history if any(not e.throttled for e in _family(run, "step"))]
    if len(with_steps) < 2:
        return None
    batches = set.intersection(
        *({e.facts["batch"] for e in _family(run, "step")} for run in with_steps)
    )
    if not batches:
        return None
    batch = max(batches)
    rates: dict[str, dict[int, float]] = {}
    shown: dict[str, Entry] = {}
    for i, run in enumerate(with_steps):
        for entry in _family(run, "step"):
            if entry.facts["batch"] == batch and not entry.throttled:
                rates.setdefault(entry.variant, {})[i] = batch / entry.median
                shown.setdefault(entry.variant, entry)
    figure, axes = pyplot.subplots(figsize=(max(6, len(with_steps)), 4.5))
    for variant, style in _styles(list(shown.values())).items():
        points = rates[variant]
        axes.plot(list(points), list(points.values()), marker="o", label=variant, **style)
    labels = [f"{run.label}\n{run.when[:10]}" for run in with_steps]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(bottom=0)
    title = f"whole training step, batch {batch}, by commit, {_where(with_steps[-1])}"
    axes.set(ylabel="images/s", title=title)
    _legend(axes)
    return figure


def _gpu_steps(run: page.Summary, predicted: Mapping[str, Mapping[int, float]], pyplot: Any) -> Any:
    """Ours and what was measured in turn with it; predictions are dotted."""
    ours = page.step_of_ours(run)
    if not ours:
        return None
    lines: dict[str, dict[int, page.Facts]] = {page.OURS: ours}
    for batch, group in page.steps(run, in_turn=True).items():
        for name, facts in group.items():
            lines.setdefault(name, {}).setdefault(batch, facts)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    greys = iter(GREYS)
    for name, found in lines.items():
        mine = name == page.OURS
        style = {"color": COLOURS[0] if mine else next(greys), "linestyle": "-" if mine else "--"}
        batches = sorted(found)
        rates = [batch / found[batch]["median"] for batch in batches]
        low, high = [], []
        for batch, rate in zip(batches, rates, strict=True):
            first, third = _middle_half(found[batch])
            low.append(rate - batch / third)
            high.append(batch / first - rate)
        axes.plot(batches, rates, label=name, marker="o", **style)
        axes.errorbar(batches, rates, [low, high], fmt="none", capsize=3, ecolor=style["color"])
    for (name, guessed), colour in zip(predicted.items(), (COLOURS[0], "black"), strict=True):
        batches = sorted(guessed)
        axes.plot(batches, [guessed[b] for b in batches], ":", color=colour, label=name)
    _by_batch(axes, sorted({batch for found in lines.values() for batch in found}))
    axes.set_title(f"whole training step, {page.card_of(run)}")
    return figure


def _middle_half(facts: page.Facts) -> tuple[float, float]:
    """First and third quartile of the rounds."""
    rounds = facts.get("rounds", [])
    if len(rounds) < 3:
        return facts["median"], facts["median"]
    first, _, third = statistics.quantiles(rounds, method="inclusive")
    return first, third


def _gpu_launches(run: page.Summary, batch: int, facts: page.Facts, pyplot: Any) -> Any:
    """The launches that lose most, the worst on top."""
    worst = sorted(facts["rows"], key=page.lost, reverse=True)[:LAUNCHES]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.24 * len(worst)))
    at = range(len(worst))
    floors = [1e6 * row.get("floor_seconds", 0.0) for row in worst]
    losses = [max(0.0, 1e6 * page.lost(row)) for row in worst]
    axes.barh(at, floors, color=COLOURS[0], label="floor: FLOPs or memory at the peak")
    axes.barh(at, losses, left=floors, color=GREYS[1], label="beyond it")
    guesses = [(i, 1e6 * row["predicted_seconds"]) for i, row in enumerate(worst)
               if "predicted_seconds" in row]  # fmt: skip
    if guesses:
        places, values = zip(*guesses, strict=True)
        axes.plot(values, places, "k|", markersize=9, label="predicted with the L2")
    axes.set_yticks(at, [page.named(row) for row in worst], fontsize=8)
    axes.invert_yaxis()
    every = [row.get("seconds", 0.0) for row in facts["rows"]]
    share = sum(row.get("seconds", 0.0) for row in worst) / (sum(every) or 1.0)
    axes.set(
        xlabel="µs",
        title=f"{len(worst)} of {len(every)} launches, {share:.0%} of their time: those that lose "
        f"most\nbatch {batch}, {page.card_of(run)}",
    )
    axes.margins(y=0.01)
    _legend(axes, along="x")
    return figure


def _curves(data: str, rows: Sequence[Mapping[str, Any]], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for row in rows:
        minutes, kids = zip(*row["curve"], strict=True)
        label = f"{row['recipe']}, {row['minutes']:g} minutes, seed {row['seed']}"
        colour = COLOURS[names.index(row["recipe"]) % len(COLOURS)]
        axes.plot(minutes, kids, marker="o", markersize=3, label=label, color=colour)
    axes.set(xlabel="minutes of training", ylabel="KID", title=data)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", length=3, pad=3)  # one line of labels
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _where(run: Run) -> str:
    device = run.hardware["device"]
    if device == "cpu":
        return f"{run.hardware['CPU']}, {run.hardware['threads']} threads"
    return str(device)


def _legend(axes: Any, along: str = "y") -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _tidy(axes, along)


def _tidy(axes: Any, along: str = "y") -> None:
    axes.grid(axis=along, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
