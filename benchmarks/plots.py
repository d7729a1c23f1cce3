"""The plots of a report: images/s of the whole step by batch, the blocks as bars, and the history
over commits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.saved import Entry, Run
from fastdcgan.data.picture import atomic_write

GREYS = ["#8a8a8a", "#b9a27c", "#c9c9c9", "#d9b8a0"]  # what is not ours
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, figure in (
        ("step.png", _step(run, roofline, pyplot)),
        ("blocks.png", _blocks(run, pyplot)),
        ("history.png", _history(history, pyplot)),
    ):
        if figure is None:
            continue
        save = partial(figure.savefig, format="png", dpi=110, bbox_inches="tight")
        atomic_write(out / name, save)
        pyplot.close(figure)
        drawn.append(name)
    return drawn


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
    axes.set_xscale("log", base=2)
    ticks = sorted({entry.facts["batch"] for entry in entries})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="batch", ylabel="images/s", title=f"whole training step, {_where(run)}")
    _legend(axes)
    return figure


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


def _where(run: Run) -> str:
    device = run.hardware["device"]
    if device == "cpu":
        return f"{run.hardware['CPU']}, {run.hardware['threads']} threads"
    return str(device)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
