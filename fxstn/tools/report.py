"""fxstn.write_report: one HTML file about a run, with its results and its settings."""

from __future__ import annotations

import base64
import datetime
import io
import math
import platform
import statistics
from collections.abc import Iterable, Sequence, Sized
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.faults import AT_BOUND, share_of_range
from fxstn.bilevel.files import write_text
from fxstn.bilevel.history import SCALE
from fxstn.bilevel.optim import SettlingAdam, learning_rate
from fxstn.bilevel.plots import figure_class, figure_of, panels
from fxstn.bilevel.run import Run
from fxstn.ir.input_errors import as_path
from fxstn.network import SelfTuningNetwork
from fxstn.tools.explain import Explanation, explain

COSTLY = ("hyper.train_steps", "hyper.longest_cycle", "hyper.valid_steps", "hyper.fraction", "response.every",
          "response.fraction", "response.windows", "response.perturb", "hyper.evaluation_share", "accumulate",
          "execution.compile", "execution.autocast", "execution.memory_format")  # fmt: skip
HIDDEN = ("lr", "gap", "limited")  # of an optimizer: shown otherwise, or the state of a run
PAGE = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def write_report(
    runner: Run,
    path: str | Path,
    *,
    explanation: Explanation | None = None,
    title: str = "fxstn run",
) -> None:
    """Write a report of a run, after `fit` or from a callback: an HTML file that needs no other file, script or network.

    It has the results at the best epoch, warnings, the values and their places in their ranges, plots, steps and times,
    settings, environment, and what became of the network. Of several processes the first one writes.

    path: of the file.
    explanation: of the network, from `fxstn.explain`; None: the report makes one.
    title: heading of the page.

    Raises ValueError where no epoch is done yet, ImportError without matplotlib (fxstn[plot]), and OSError.
    """
    path = as_path(path, "write_report")
    figure_class("fxstn.write_report")
    runner.history.best()  # raises ValueError before the first epoch is done
    if distributed.rank():
        return
    if explanation is None and isinstance(runner.stn, SelfTuningNetwork):
        explanation = explain(runner.stn)
    sections = {
        "": _headline(runner),
        "Warnings": "".join(f"<p class='warning'>{escape(text)}</p>" for _, text in runner.warnings),
        "Values found": _values(runner),
        "Course of the run": _plots(runner),
        "What it cost": _cost(runner),
        "Settings": _settings(runner),
        "Environment": _pairs(_environment(runner)),
        "Network": _network(explanation),
    }
    heads = {name: f"<h2>{name}</h2>\n" if name else "" for name in sections}
    body = "\n".join(f"<section>\n{heads[name]}{part}\n</section>" for name, part in sections.items() if part)
    write_text(path, PAGE.substitute(title=escape(title), body=body))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


class Markup(str):
    """A cell that is HTML already. All other cells are escaped."""


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """kind: the table's class in the style sheet."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"<td class='number'>{_number(value)}</td>"
        return f"<td>{value if isinstance(value, Markup) else escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    head = f"<thead><tr>{head}</tr></thead>" if heads else ""
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table class='{kind}'>{head}<tbody>\n{body}\n</tbody></table>"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs)
    return f"<dl>{''.join(cells)}</dl>"


def _headline(runner: Run) -> str:
    best, times = runner.history.best(), [row["seconds"] for row in runner.history]
    shown = [("best epoch", f"{best['epoch']} of {len(times)}"), ("validation loss", _number(best["valid_loss"]))]
    shown += [(name, _number(best[name])) for name in runner.metrics if name in best]
    shown += [("training loss", _number(best["train_loss"]))] if "train_loss" in best else []
    shown += [("hyperparameters", str(len(runner.history.names)))]
    shown += [("time per epoch", _seconds(statistics.median(times))), ("in all", _seconds(sum(times)))]
    cards = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in shown)
    return f"<div class='cards'>{''.join(cards)}</div>\n<p>Losses and metrics are those of the best epoch.</p>"


def _values(runner: Run) -> str:
    """What `History.outcome` has of each, in its range."""
    history, ranges = runner.history, runner.problem.ranges()
    outcome, last, rows = history.outcome(), history.rows[-1], []
    bounded = {name: ends for name, ends in ranges.items() if math.isfinite(ends[1] - ends[0]) and ends[0] < ends[1]}
    for name in history.names:
        start = history.start.get(name, math.nan)
        value = outcome.values[name]
        row: list[object] = [name, start, f"{_number(value)} ± {outcome.spread[name]:.1g}", last[name]]
        if ranges:
            row += ["", "", ""] if name not in ranges else ["[{:.4g}, {:.4g}]".format(*ranges[name]), "", ""]
        if name in bounded:
            row[-2:] = [_bar(start, value, last[name], bounded[name]), _bound(last[name], bounded[name])]
        rows.append([*row, last[SCALE + name]] if SCALE + name in last else row)
    if not rows:
        return ""
    heads = ["hyperparameter", "start", "value", "last epoch", *(["range", "place in it", ""] if ranges else [])]
    heads += ["σ"] if any(SCALE + name in last for name in history.names) else []
    key = ("<p>Place in the range: <i class='key start'></i> start, <i class='key best'></i> value, <i class='key "
           "last'></i> last epoch; on a logarithmic scale where the range spans a factor of 100 or more.</p>")  # fmt: skip
    moving = f" At the end still moved: {', '.join(outcome.unsettled)}." if outcome.unsettled else " λ has settled."
    note = f"<p>Values are those that <code>refit</code> takes, ± their spread over the epochs.{escape(moving)}</p>"
    return _table(heads, rows, "found") + (key if bounded else "") + note


def _bar(start: float, best: float, last: float, ends: tuple[float, float]) -> Markup:
    marks = ""
    for kind, value in (("start", start), ("last", last), ("best", best)):
        if not math.isnan(value):
            share = share_of_range(min(max(value, ends[0]), ends[1]), *ends)
            marks += f"<i class='{kind}' style='left:{100 * share:.1f}%'></i>"
    return Markup(f"<span class='bar'>{marks}</span>")


def _bound(value: float, ends: tuple[float, float]) -> Markup:
    share = share_of_range(min(max(value, ends[0]), ends[1]), *ends)
    end = "upper" if share > 1 - AT_BOUND else "lower" if share < AT_BOUND else ""
    return Markup(f"<span class='bound'>at {end} end</span>" if end else "")


def _plots(runner: Run) -> str:
    best, images = int(runner.history.best()["epoch"]), []
    for panel in panels(runner.history.groups(), runner.history.start):
        figure_of([panel], best, "fxstn.write_report").savefig(
            buffer := io.BytesIO(), format="svg", metadata={"Date": None}
        )
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f"<img alt='{escape(panel.title)} over epochs' src='data:image/svg+xml;base64,{data}'>")
    scales = {row[column] for row in runner.history for column in row if column.startswith(SCALE)}
    note = f" The perturbation scale σ was kept at {_number(scales.pop())}." if len(scales) == 1 else ""
    return f"<div class='plots'>{''.join(images)}</div>\n<p>The dotted line is the best epoch.{note}</p>"


def _cost(runner: Run) -> str:
    times, epochs = [row["seconds"] for row in runner.history], len(runner.history)
    first, last = _seconds(times[0]), _seconds(times[-1])
    rows = [("time per epoch", f"{_seconds(statistics.median(times))} (median; first {first}, last {last})")]
    responds = f"{runner.response_steps} ({runner.response_steps / epochs:.3g} per epoch)"
    responds = "with each inner step" if runner.problem.joint else responds
    rows += [("inner steps", f"{runner.steps} ({runner.steps / epochs:.3g} per epoch)"),
             ("response steps", responds),
             ("hyper steps", f"{runner.hyper_steps} ({runner.hyper_steps / epochs:.3g} per epoch)")]  # fmt: skip
    rows += [(name, runner.settings[name]) for name in COSTLY]
    return _pairs(rows) + ("<p>Times include evaluation and diagnostics. What the same epochs cost without tuning "
                                        "was not measured in this run; <code>fxstn bench</code> does.</p>")  # fmt: skip


def _optimizer(runner: Run, name: str, optimizer: torch.optim.Optimizer) -> list[str]:
    """A row of the table of optimizers.

    name: that of the runner's argument.
    """
    group = optimizer.param_groups[0]
    first = group["lr"] if isinstance(optimizer, SettlingAdam) else optimizer.defaults.get("lr")
    rate = group.get("initial_lr", first)
    options = {key: group[key] for key in optimizer.defaults if key not in HIDDEN and key in group}
    text = ", ".join(f"{key} {value}" for key, value in options.items() if value not in (None, False, 0))
    updates = runner.updates
    schedulers = [type(part[name]) for part in (updates.schedulers, updates.step_schedulers) if name in part]
    size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return [
        name,
        type(optimizer).__name__,
        f"{size:,} parameters",
        f"{rate} → {learning_rate(optimizer):.4g}",
        text,
        ", ".join(scheduler.__name__ for scheduler in schedulers),
    ]


def _settings(runner: Run) -> str:
    rows = [_optimizer(runner, name, optimizer) for name, optimizer in runner.optimizers.items()]
    optimizers = _table(("argument", "optimizer", "of", "lr, first → last", "others", "scheduler"), rows)
    data = {"training data": _data(runner.train_loader), "validation data": _data(runner.valid_loader)}
    elsewhere = (*COSTLY, *runner.optimizers, "train_loader", "valid_loader")
    others = data | {name: text for name, text in runner.settings.items() if name not in elsewhere}
    unset = [name for name, text in others.items() if text == "None"]
    pairs = _pairs((name, text) for name, text in others.items() if name not in unset)
    return optimizers + pairs + (f"<p>Not set: {', '.join(unset)}.</p>" if unset else "")


def _data(loader: object) -> str:
    """Its type, and how many batches of what size it has, where it knows."""
    try:
        batches = f", {len(loader):,} batches" if isinstance(loader, Sized) else ""
    except TypeError:  # an IterableDataset without a length
        batches = ""
    size = getattr(loader, "batch_size", None)
    return type(loader).__name__ + batches + (f" of {size}" if batches and size else "")


def _environment(runner: Run) -> list[tuple[str, str]]:
    try:
        version = metadata.version("fxstn")
    except metadata.PackageNotFoundError:
        version = "not installed"
    device = str(runner.device)
    if runner.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(runner.device)})"
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return [("fxstn", version), ("torch", torch.__version__), ("Python", platform.python_version()),
            ("platform", platform.platform()), ("device", device), ("CPU threads", str(torch.get_num_threads())),
            ("processes", str(distributed.processes())), ("report written", now)]  # fmt: skip


def _network(explanation: Explanation | None) -> str:
    if explanation is None:
        return ""
    notes = "".join(f"<li>{escape(str(text))}</li>" for text in (*explanation.problems, *explanation.notes))
    rows = [(row.module, row.operation, row.became, row.rule) for row in explanation.rows]
    table = _table(("module", "operation", "became", "rule"), rows)
    details = f"<details><summary>{len(rows)} operations, and what became of each</summary>{table}</details>"
    return f"<ul>{notes}</ul>" + (details if rows else "")
