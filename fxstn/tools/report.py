"""fxstn.write_report: one HTML file about a run, with its results, what it cost, and how to repeat it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from fxstn.bilevel import distributed
from fxstn.bilevel.faults import AT_BOUND, share_of_range
from fxstn.bilevel.files import write_text
from fxstn.bilevel.history import SCALE
from fxstn.bilevel.plots import panels
from fxstn.bilevel.run import Run
from fxstn.ir.cost import GENERAL, HYPER, RESPONSE, cost_ratio
from fxstn.ir.input_errors import as_file, in_a_line
from fxstn.network import SelfTuningNetwork
from fxstn.tools.charts import Scale, chart, spark
from fxstn.tools.explain import Explanation, explain
from fxstn.tools.markup import Markup, cards, details, number, pairs, seconds, table
from fxstn.tools.parameters import parameter_rows
from fxstn.tools.report_setup import COSTLY, repeat_section, settings_section

SIGNS = "<p>docs/guides/runs.md#signs-of-trouble has all signs and their remedies.</p>"
PAGE = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def write_report(
    runner: Run,
    path: str | Path,
    *,
    explanation: Explanation | None = None,
    title: str = "fxstn run",
) -> None:
    """Write a report of a run, after `fit` or from a callback: an HTML file that needs no other file and no network.

    It has the results at the best epoch, warnings with their remedies, the values and their places in their ranges, curves that
    show their numbers under the pointer, steps and times, the network, settings, and how to repeat the run: the command line
    with all its words, versions and seeds. Of several processes the first one writes.

    runner: a BilevelRunner, or what `fxstn.tune` returns, after an epoch.
    path: of the file.
    explanation: of the network, from `fxstn.explain`; None: the report makes one.
    title: heading of the page.

    Raises ValueError where no epoch is done yet, and OSError; TypeError for what has no history, and a title that is no text.
    """
    if not isinstance(runner, Run):
        raise TypeError(f"write_report(runner, path): a report is of a BilevelRunner, or of what fxstn.tune returns, "
                        f"which have a history; got {in_a_line(runner)}")  # fmt: skip
    if not isinstance(title, str):
        raise TypeError(f"write_report: title={title!r} must be text")
    path = as_file(path, "write_report")
    runner.history.best()  # raises ValueError before the first epoch is done
    if distributed.rank():
        return
    network = isinstance(runner.stn, SelfTuningNetwork)
    if explanation is None and network:
        explanation = explain(runner.stn)
    sections = {
        "": _headline(runner),
        "Warnings": "".join(map(_warning, [text for _, text in runner.warnings])) + SIGNS * bool(runner.warnings),
        "Values": _values(runner),
        "Course of the run": _plots(runner),
        "Against the start": _against_start(runner),
        "What it cost": _cost(runner),
        "How to repeat it": repeat_section(runner),
        "Network": _network(runner, explanation),
        "Settings": settings_section(runner),
    }
    heads = {name: f"<h2>{name}</h2>\n" if name else "" for name in sections}
    body = "\n".join(f"<section>\n{heads[name]}{part}\n</section>" for name, part in sections.items() if part)
    write_text(path, PAGE.substitute(title=escape(title), body=body))


def _headline(runner: Run) -> str:
    best, times = runner.history.best(), [row["seconds"] for row in runner.history]
    which = f"{best['epoch']} of {len(times)}" if best["epoch"] else "0, the start"
    shown = [("best epoch", which), ("validation loss", number(best["valid_loss"]))]
    if runner.history.start_loss is not None:
        shown.append(("loss before training", number(runner.history.start_loss)))
    shown += [(name, number(best[name])) for name in runner.metrics if name in best]
    shown += [("training loss", number(best["train_loss"]))] if "train_loss" in best else []
    shown += [("hyperparameters", str(len(runner.history.names)))]
    shown += [("time per epoch", seconds(statistics.median(times))), ("in epochs, in all", seconds(sum(times)))]
    return f"{cards(shown)}\n<p>Losses and metrics are those of the best epoch.</p>"


def _warning(text: str) -> str:
    """What is wrong, and the remedy, which is the part after the first semicolon."""
    what, _, remedy = text.partition("; ")
    advice = f"<br><b>What to do:</b> {escape(remedy)}" if remedy else ""
    return f"<p class='warning' role='note'>{escape(what)}{advice}</p>"


def _values(runner: Run) -> str:
    """What `History.outcome` has of each, in its range."""
    history, ranges = runner.history, runner.problem.ranges()
    outcome, last = history.outcome(), history.rows[-1]
    scaled = any(SCALE + name in last for name in history.names)
    rows, kinds = [], []
    for name in history.names:
        start, value = history.start.get(name, math.nan), outcome.values[name]
        spread = Markup.of(f"{number(value)} <small>± {outcome.spread[name]:.1g}</small>", value, "number")
        place = _place(start, value, last[name], ranges.get(name)) if ranges else ()
        row: list[object] = [name, start, spread, last[name], *place]
        rows.append(
            [*row, _course(runner, name, name in outcome.unsettled), last.get(SCALE + name, math.nan)][
                : None if scaled else -1
            ]
        )
        kinds.append(name.rpartition(".")[2])
    if not rows:
        return ""
    heads = ["hyperparameter", "start", "value", "last epoch", *(["range", "place in it"] if ranges else []), "course"]
    key = ("<p>Place in the range: <i class='key start'></i> start, <i class='key best'></i> value, <i class='key "
           "last'></i> last epoch; on a logarithmic scale where the range spans a factor of 100 or more.</p>")  # fmt: skip
    count = len(outcome.unsettled)
    moving = (
        f"At the end {count} of {len(rows)} still moved: see the course." if count else "At the end none still moved."
    )
    note = f"<p>Values are those that <code>refit</code> takes, ± their spread over the epochs. {moving}</p>"
    return (
        table([*heads, "σ"][: len(rows[0])], rows, "hyperparameters", kinds, "wide")
        + key * any(map(_bounded, ranges.values()))
        + note
    )


def _bounded(ends: tuple[float, float]) -> bool:
    return math.isfinite(ends[1] - ends[0]) and ends[0] < ends[1]


def _place(start: float, value: float, last: float, ends: tuple[float, float] | None) -> tuple[object, object]:
    """Cells of a range and of the places in it."""
    if ends is None:
        return "", ""
    text = Markup.of("[{:.4g}, {:.4g}]".format(*ends), ends[1], "number")
    if not _bounded(ends):
        return text, ""
    marks, share = "", 0.0
    for kind, point in (("start", start), ("last", last), ("best", value)):
        if not math.isnan(point):
            share = share_of_range(min(max(point, ends[0]), ends[1]), *ends)
            marks += f"<i class='{kind}' style='left:{100 * share:.1f}%'></i>"
    now = share_of_range(min(max(last, ends[0]), ends[1]), *ends)
    end = "upper" if now > 1 - AT_BOUND else "lower" if now < AT_BOUND else ""
    note = f"<span class='bound'>at {end} end</span>" if end else ""
    return text, Markup.of(f"<span class='bar'>{marks}</span>{note}", share)


def _course(runner: Run, name: str, moves: bool) -> Markup:
    """A small line of a hyperparameter from its start on, between the smallest and the largest value.

    moves: whether it still moved at the end.
    """
    history = runner.history
    line = [value for value in (history.start.get(name, math.nan), *history[name]) if math.isfinite(value)]
    low, high = min(line), max(line)
    change = line[-1] - line[0]
    note = "<span class='bound'>still moves</span>" if moves else ""
    return Markup.of(spark(line, Scale(low, high) if low < high else Scale(low - 1, low + 1)) + note, change)


def _plots(runner: Run) -> str:
    history = runner.history
    best = int(history.best()["epoch"])
    figures = [chart(panel, best) for panel in panels(history.groups(), history.start)]
    scales = {row[column] for row in history for column in row if column.startswith(SCALE)}
    note = f" The perturbation scale σ was kept at {number(scales.pop())}." if len(scales) == 1 else ""
    return f"<div class='plots'>{''.join(figures)}</div>\n<p>The dotted line is the best epoch.{note}</p>"


def _against_start(runner: Run) -> str:
    """Losses and metrics before training, in the first epoch, in the best and in the last."""
    history, best = runner.history, runner.history.best()
    columns = [
        name for name in ("valid_loss", "clean_train_loss", "train_loss", *runner.metrics) if name in history.columns()
    ]
    heads = ["", *(name.replace("_", " ").replace("valid loss", "validation loss") for name in columns)]
    rows: list[list[object]] = []
    if history.start_loss is not None:
        first = "before the first step" + ", the best" * (best["epoch"] == 0)
        rows.append([first, history.start_loss, *[math.nan] * (len(columns) - 1)])
    named = {"epoch 1": history.rows[0]} | ({f"epoch {best['epoch']}, the best": best} if best["epoch"] else {})
    named |= {f"epoch {len(history)}, the last": history.rows[-1]} if best["epoch"] != len(history) else {}
    rows += [[name, *(float(row.get(column, math.nan)) for column in columns)] for name, row in named.items()]
    note = ("<p>The clean training loss is that of training batches without dropout and augmentation; what the validation loss "
            "is above it, regularisation could gain. What the network reaches at the values of the start was not measured in "
            "this run: <code>schedule=fxstn.Schedule({name: [start]})</code> trains without tuning.</p>")  # fmt: skip
    return table(heads, rows) + note


def _cost(runner: Run) -> str:
    times, epochs = [row["seconds"] for row in runner.history], len(runner.history)
    first, last = seconds(times[0]), seconds(times[-1])
    rows = [("time per epoch", f"{seconds(statistics.median(times))} (median; first {first}, last {last})")]
    joint = runner.problem.joint
    responds = (
        "with each inner step" if joint else f"{runner.response_steps} ({runner.response_steps / epochs:.3g} per epoch)"
    )
    rows += [("inner steps", f"{runner.steps} ({runner.steps / epochs:.3g} per epoch)"),
             ("response steps", responds),
             ("hyper steps", f"{runner.hyper_steps} ({runner.hyper_steps / epochs:.3g} per epoch)")]  # fmt: skip
    rows += [(name, runner.settings[name]) for name in COSTLY]
    counted = ""
    if runner.steps and not joint and isinstance(runner.stn, SelfTuningNetwork):
        fraction = float(runner.settings["response.fraction"])
        ratio = cost_ratio(runner.steps, runner.response_steps, runner.hyper_steps, fraction)
        parts = [("training", GENERAL * runner.steps), ("response", RESPONSE * fraction * runner.response_steps),
                 ("hyper", HYPER * runner.hyper_steps)]  # fmt: skip
        whole = sum(size for _, size in parts)
        bars = "".join(
            f"<span class='c{i}' style='flex-grow:{size / whole:.4f}'>{name} {size / whole:.0%}</span>"
            for i, (name, size) in enumerate(parts)
            if size
        )
        counted = (f"<p>Counted in passes through the network, the run cost <b>{ratio:.2f}</b> times plain training: an inner "
                   f"step takes {GENERAL} (a backward pass is two), a response step {RESPONSE}, a hyper step {HYPER}.</p>"
                   f"<div class='stack'>{bars}</div>")  # fmt: skip
    note = ("<p>Times are those of epochs: steps, evaluation and diagnostics. Callbacks, saves and what comes before the first "
            "step are not among them. What the same epochs take without tuning was not measured in this run; <code>fxstn "
            "bench</code> does.</p>")  # fmt: skip
    return counted + pairs(rows) + note


def _network(runner: Run, explanation: Explanation | None) -> str:
    """What responds, and what became of each operation."""
    if explanation is None:
        return ""
    texts = [str(text) for text in (*explanation.problems, *explanation.notes)]
    notes = "".join(f"<li>{escape(text)}</li>" for text in texts)
    parameters = _parameters(runner.stn, texts) if isinstance(runner.stn, SelfTuningNetwork) else ""
    rows = [(row.module, row.operation, row.became, row.rule) for row in explanation.rows]
    kinds = [row.rule for row in explanation.rows]
    operations = table(("module", "operation", "became", "rule"), rows, "operations", kinds)
    shown = f"<ul>{notes}</ul>" + parameters
    return shown + details(f"{len(rows)} operations, and what became of each", operations) * bool(rows)


def _parameters(stn: SelfTuningNetwork, texts: Sequence[str]) -> str:
    """Each parameter, and how many respond, unless the texts above say so."""
    rows = parameter_rows(stn)
    cells = [(row.name, " × ".join(map(str, row.shape)), row.elements, row.obstacle or "responds") for row in rows]
    kinds = ["does not respond" if row.obstacle else "responds" for row in rows]
    coverage = str(stn.coverage)
    text = "" if any(coverage in text for text in texts) else f"<p>{escape(coverage)}.</p>"
    heads = ("parameter", "shape", "elements", "response")
    return text + details(f"{len(rows)} parameters, one by one", table(heads, cells, "parameters", kinds))
