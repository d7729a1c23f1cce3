"""What a search has found, for people: report.md, report.html (one file that needs no other) and
the plots, made from the storage alone, so that any machine of a search can write them."""

import base64
import dataclasses
import html
import math
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastdcgan.data.picture import atomic_write
from fastdcgan.search.config import SearchConfig
from fastdcgan.search.space import Choices, Range, Space, held, text
from fastdcgan.search.study import summary, trial_config
from fastdcgan.training.config import TrainConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ROWS = 10
"""Trials in the table of the best."""
ENOUGH = 8
"""Completed trials below which importances would say nothing."""
LETTERS = 24
"""Of the names of a field's choices, beyond which they are written aslant."""
BEST, REFERENCE, OTHER, BAD = "#1f5fa8", "#d1682c", "#8a8a8a", "#b32d4a"

Part = tuple[str, Any]
"""("head", str), ("text", str), ("code", str), ("table", rows) or ("plot", (file, its title))."""


def write_report(study: "Study", config: SearchConfig, base: TrainConfig, space: Space) -> Path:
    """Writes report.md, report.html and the plots into the search's folder; returns report.md."""
    out = config.out
    plots = _draw(study, config, space, out)
    title = f"Search {study.study_name}"
    parts = list(_parts(study, config, base, space, plots))
    path = out / "report.md"
    for file, content in (
        (path, _markdown(title, parts)),
        (out / "report.html", _html(title, parts, out)),
    ):
        atomic_write(file, partial(_write, content.encode()))
    return path


def train_command(config: TrainConfig) -> str:
    """The command line that trains exactly `config`."""
    words = ["python", "-m", "fastdcgan.train", "--data", config.data]
    default = TrainConfig()
    for f in dataclasses.fields(TrainConfig):
        value = getattr(config, f.name)
        if f.name == "data" or value == getattr(default, f.name):
            continue
        flag = f.name.replace("_", "-")
        if isinstance(getattr(default, f.name), bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", repr(value) if isinstance(value, float) else str(value)]
    return shlex.join(words)


# --- what is said --------------------------------------------------------------------------------


def _parts(
    study: "Study",
    config: SearchConfig,
    base: TrainConfig,
    space: Space,
    plots: list[tuple[str, str]],
) -> Iterator[Part]:
    found = summary(study, config.out)
    best, reference, score = found.best, found.reference, config.objective.upper()
    trials = study.trials
    yield "text", _setting(config, base)
    yield "text", _counts(trials)
    if best is None:
        yield "text", "No trial was completed: there is no winner."
    else:
        yield "head", "The winner beside the reference recipe"
        yield "table", _beside(best, reference, config, base, space)
        yield "text", _verdict(best, reference, score)
        yield "text", "This trains the winner again, as its trial did:"
        winner = dataclasses.replace(trial_config(best, base, space), out=config.out / "winner")
        yield "code", train_command(winner)
        for name, trial in (("winner", best), ("reference", reference)):
            sheet = None if trial is None else _last_sheet(config.out, trial.number)
            if sheet is not None:
                yield "head", f"Samples of the {name}, at its end"
                yield "plot", (sheet, f"samples of the {name}")
        yield "head", "The best trials"
        yield "table", _best(trials, score, space)
    for file, what in plots:
        yield "head", what
        yield "plot", (file, what)
    failed = [t for t in trials if "failed" in t.user_attrs]
    if failed:
        yield "head", "Failed trials"
        yield (
            "table",
            [
                ["trial", "why", "values"],
                *([str(t.number), str(t.user_attrs["failed"]), _named(t.params)] for t in failed),
            ],
        )
    yield "head", "What was searched"
    yield (
        "table",
        [
            ["field", "values", "reference"],
            *([n, str(d), text(held(base, n))] for n, d in space.varied.items()),
            *([n, f"{text(v)} (fixed)", text(held(base, n))] for n, v in space.fixed.items()),
        ],
    )


def _setting(config: SearchConfig, base: TrainConfig) -> str:
    length = []
    if config.minutes is not None:
        length.append(f"{text(config.minutes)} minutes")
    if base.steps is not None:
        length.append(f"{base.steps:,} steps")
    return (
        f"Data {base.data} at {base.image_size}x{base.image_size}; space {config.space}, sampler "
        f"{config.sampler}, pruner {config.pruner}. Each trial has {' or '.join(length)}; its "
        f"score is the least {config.objective.upper()}[{base.eval_features}] of its evaluations "
        f"(every {base.eval_every:,} steps, n = {base.eval_n:,}); lower is better."
    )


def _counts(trials: "Sequence[FrozenTrial]") -> str:
    names = {"COMPLETE": "completed", "PRUNED": "pruned", "RUNNING": "running",
             "WAITING": "waiting"}  # fmt: skip
    counts = {said: sum(t.state.name == name for t in trials) for name, said in names.items()}
    failed = sum("failed" in t.user_attrs for t in trials)
    counts["failed"] = failed
    counts["cut off"] = sum(t.state.name == "FAIL" for t in trials) - failed
    return "Trials: " + ", ".join(f"{n} {said}" for said, n in counts.items() if n) + "."


def _beside(
    best: "FrozenTrial",
    reference: "FrozenTrial | None",
    config: SearchConfig,
    base: TrainConfig,
    space: Space,
) -> list[list[str]]:
    winner = trial_config(best, base, space)
    rows = [["", "reference (trial 0)", f"winner (trial {best.number})"]]
    scores = [config.objective, *({"kid", "fid"} - {config.objective})]
    for name in scores:
        rows.append([name.upper(), *(_score(trial, name) for trial in (reference, best))])
    rows.append(["at step", *(_at(trial) for trial in (reference, best))])
    rows.append(["steps in all", *(_attr(trial, "steps") for trial in (reference, best))])
    for name in (*space.varied, *space.fixed):
        rows.append([name, text(held(base, name)), text(held(winner, name))])
    return rows


def _last_sheet(out: Path, number: int) -> str | None:
    """The last samples of a trial that ran on this machine."""
    sheets = sorted((out / "trials" / f"{number:04d}" / "samples").glob("step-*.png"))
    return sheets[-1].relative_to(out).as_posix() if sheets else None


def _score(trial: "FrozenTrial | None", name: str) -> str:
    row = {} if trial is None else trial.user_attrs.get("evaluation", {})
    if row.get(name) is None:
        return "-"
    floor = row.get(f"{name}_floor")
    return text(float(row[name])) + ("" if floor is None else f" (floor {floor:.3g})")


def _at(trial: "FrozenTrial | None") -> str:
    step = None if trial is None else trial.user_attrs.get("evaluation", {}).get("step")
    return "-" if step is None else f"{step:,}"


def _attr(trial: "FrozenTrial | None", name: str) -> str:
    value = None if trial is None else trial.user_attrs.get(name)
    return "-" if value is None else f"{value:,}"


def _verdict(best: "FrozenTrial", reference: "FrozenTrial | None", score: str) -> str:
    noise = (
        "The winner is the least of several noisy scores, so part of its lead is luck: train both "
        "with other seeds before you believe it (a grid over seed does so)."
    )
    if reference is None or reference.value is None or best.value is None:
        return "The reference recipe was not completed: there is nothing to compare with."
    if best.number == reference.number:
        return "No trial was better than the reference recipe."
    if reference.value > 0 and best.value > 0:
        lead = f"{best.value / reference.value:.3g} of"
    else:
        lead = f"{reference.value - best.value:.3g} below"
    return f"The winner's {score} is {lead} the reference's. {noise}"


def _best(trials: "Sequence[FrozenTrial]", score: str, space: Space) -> list[list[str]]:
    done = [t for t in trials if t.state.name == "COMPLETE" and t.value is not None]
    done.sort(key=lambda t: (t.value, t.number))
    rows = [["trial", score, "at step", *space.varied]]
    for trial in done[:ROWS]:
        reference = "reference" in trial.user_attrs
        values = [text(trial.params[n]) if n in trial.params else "-" for n in space.varied]
        number = f"{trial.number} (reference)" if reference else str(trial.number)
        rows.append([number, text(trial.value), _at(trial), *values])
    return rows


def _named(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in params.items()) or "-"


# --- how it is written ---------------------------------------------------------------------------


def _markdown(title: str, parts: Sequence[Part]) -> str:
    lines = [f"# {title}", ""]
    for kind, content in parts:
        if kind == "head":
            lines += [f"## {content}", ""]
        elif kind == "code":
            lines += ["```sh", content, "```", ""]
        elif kind == "plot":
            lines += [f"![{content[1]}]({content[0]})", ""]
        elif kind == "table":
            head, *rows = ([_cell(c) for c in row] for row in content)
            rows = [head, ["---"] * len(head), *rows]
            lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
        else:
            lines += [content, ""]
    return "\n".join(lines)


def _cell(content: str) -> str:
    return content.replace("|", "\\|").replace("\n", " ")


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
pre { background: #f4f4f4; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
"""


def _html(title: str, parts: Sequence[Part], out: Path) -> str:
    escape = html.escape
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for kind, content in parts:
        if kind == "head":
            lines.append(f"<h2>{escape(content)}</h2>")
        elif kind == "code":
            lines.append(f"<pre><code>{escape(content)}</code></pre>")
        elif kind == "plot":
            data = base64.b64encode((out / content[0]).read_bytes()).decode()
            lines.append(f'<img alt="{escape(content[1])}" src="data:image/png;base64,{data}">')
        elif kind == "table":
            head, *rows = content
            lines.append('<div class="wide"><table>')
            lines.append("<tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>")
            for row in rows:
                lines.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>")
            lines.append("</table></div>")
        else:
            lines.append(f"<p>{escape(content)}</p>")
    return "\n".join([*lines, "</body>\n</html>\n"])


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


# --- the plots -----------------------------------------------------------------------------------


def _draw(study: "Study", config: SearchConfig, space: Space, out: Path) -> list[tuple[str, str]]:
    """Draws what there is data for; returns the files, each with what it shows."""
    import matplotlib

    matplotlib.use("Agg", force=False)

    done = [t for t in study.trials if t.state.name == "COMPLETE" and t.value is not None]
    score = config.objective.upper()
    drawn = []
    if done:
        pruned = [t for t in study.trials if t.state.name == "PRUNED"]
        history, slices = _history(done, pruned, score), _slices(done, score, space)
        drawn.append(("history.png", "Scores in the order of the trials", history))
        drawn.append(("slices.png", "Scores by each value", slices))
    importances = _importances(done, space)
    if importances:
        drawn.append(("importances.png", "How much each field matters", _bars(importances)))
    for file, _, figure in drawn:
        atomic_write(out / file, partial(figure.savefig, format="png", dpi=110))
    return [(file, what) for file, what, _ in drawn]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _history(done: "list[FrozenTrial]", pruned: "list[FrozenTrial]", score: str) -> Any:
    figure = _figure(9, 4)
    axes = figure.subplots()
    numbers, values = [t.number for t in done], _scores(done)
    best = [min(values[: i + 1]) for i in range(len(values))]
    axes.scatter(numbers, values, color=OTHER, s=22, label="completed")
    if pruned:
        scores = [t.value for t in pruned]
        axes.scatter([t.number for t in pruned], scores, color=BAD, marker="x", s=22,
                     label="pruned, its last")  # fmt: skip
    axes.step(numbers, best, where="post", color=BEST, label="best so far")
    reference = next((t for t in done if "reference" in t.user_attrs), None)
    if reference is not None:
        axes.axhline(reference.value, color=REFERENCE, linestyle="--", linewidth=1.2,
                     label="reference recipe")  # fmt: skip
    _score_axis(axes, values, score)
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _slices(done: "list[FrozenTrial]", score: str, space: Space) -> Any:
    names = list(space.varied)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(3.4 * columns + 0.6, 2.9 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    best = done[_scores(done).index(min(_scores(done)))]
    for i, axes in enumerate(panels):
        if i >= len(names):
            axes.set_visible(False)
            continue
        _slice(axes, names[i], space.varied[names[i]], done, best)
        _score_axis(axes, _scores(done), score if i % columns == 0 else "")
    handles = {
        label: h for a in panels for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False
    )
    return figure


def _slice(
    axes: Any,
    name: str,
    dimension: Choices | Range,
    done: "list[FrozenTrial]",
    best: "FrozenTrial",
) -> None:
    for trial in done:
        if name not in trial.params:
            continue
        x = trial.params[name]
        if isinstance(dimension, Choices):
            x = dimension.values.index(x)
        reference = "reference" in trial.user_attrs
        colour = BEST if trial.number == best.number else REFERENCE if reference else OTHER
        marked = trial.number == best.number or reference
        label = "winner" if trial.number == best.number else "reference" if reference else None
        axes.scatter(
            [x], [trial.value], color=colour, s=44 if marked else 20, zorder=2 + marked, label=label
        )
    axes.set_xlabel(name)
    if isinstance(dimension, Choices):
        named = [text(v) for v in dimension.values]
        long = sum(map(len, named)) > LETTERS
        axes.set_xticks(
            range(len(named)), named, rotation=20 * long, ha="right" if long else "center"
        )
        axes.set_xlim(-0.5, len(dimension.values) - 0.5)
    elif dimension.log:
        axes.set_xscale("log")


def _bars(importances: dict[str, float]) -> Any:
    figure = _figure(7, 0.38 * len(importances) + 1.1)
    axes = figure.subplots()
    names = list(importances)[::-1]
    shares = [importances[name] for name in names]
    axes.barh(names, shares, color=BEST)
    for y, share in enumerate(shares):
        axes.text(share, y, f" {share:.2f}", va="center")
    axes.set_xlim(0, max(shares) * 1.15 or 1)
    axes.set_xlabel("share of the variance that they explain (fANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _importances(done: "list[FrozenTrial]", space: Space) -> dict[str, float]:
    """Field -> share of the variance that it explains (Hutter et al. 2014), the largest first;
    nothing where there are too few trials."""
    import optuna

    points = [t for t in done if t.params.keys() == space.varied.keys()]
    if len(points) < ENOUGH or len({t.value for t in points}) < 2 or len(space.varied) < 2:
        return {}
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return {}
    study = optuna.create_study()
    study.add_trials(points)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _scores(done: "list[FrozenTrial]") -> list[float]:
    return [t.value for t in done if t.value is not None]


def _score_axis(axes: Any, values: list[float], label: str) -> None:
    """Logarithmic where the scores are far apart."""
    if min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
