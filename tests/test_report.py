"""What comes out of a run: the report, TensorBoard, the plot, and values to begin a search with."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import fxstn
from fxstn import hp
from fxstn.bilevel import plots
from fxstn.bilevel.faults import Monitors
from fxstn.bilevel.plots import Panel
from fxstn.tools.charts import Scale, chart
from fxstn.tools.report_setup import repeat_section
from tests.nets import mlp
from tests.test_runner import make, without_times

VOID = ("meta", "img", "br", "link", "input")
with_plots = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra fxstn[plot]")


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.data: list[dict[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.data += [dict(attrs) for _ in range("data-chart" in dict(attrs))]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def written(runner, path, **arguments) -> Page:
    fxstn.write_report(runner, path / "report.html", **arguments)
    text = (path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|http", text.split("<body>")[0])
    return Page(text)


def test_a_report_says_what_was_found_and_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fxstn", "tune", "--data", "my photos"])
    runner = make(hparams=[hp.Dropout("2", "5", init=0.3), hp.WeightDecay()], optimizer=torch.optim.Adam)
    history = runner.fit(4)
    page = written(runner, tmp_path, title="first try")
    runner.report(tmp_path / "same.html", title="first try")
    assert len(Page((tmp_path / "same.html").read_text(encoding="utf-8")).text) == len(page.text)
    assert runner.values() == runner.stn.hparams.values()
    assert page.addresses == []
    assert page.tags["script"] == 1
    assert not page.tags.keys() & {"link", "iframe", "object", "img"}
    best = history.best()
    for name in history.names:
        assert name in page.text
        assert f"{best[name]:.4g}" in page.text
    for text in (
        "first try", f"{best['epoch']} of 4", f"{best['valid_loss']:.4g}", f"{best['accuracy']:.4g}", "[1e-07, 0.1]",
        "SettlingAdam", "response.every", "training data", "DataLoader, 5 batches of 8", torch.__version__,
        "CPU threads", "parameters respond", "carries a tangent", "weights respond, 100.0% of their elements",
        "fxstn tune --data 'my photos'", f"seed of torch {torch.initial_seed()}", "loss before training",
        f"before the first step {history.start_loss:.4g}",
        "the run cost 3.08 times plain training", "training 32%", "inner steps 20 (5 per epoch)",
        "in epochs, in all", "Callbacks, saves and what comes before the first step are not among them",
        "response steps 17 (4.25 per epoch)", "hyper steps 10 (2.5 per epoch)", "was kept at 1",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.text.count("weights respond, 100.0% of their elements") == 1
    assert "At the end" in page.text
    assert "it scrolls" in page.text  # shown where it does
    assert "Warnings" not in page.text
    assert "limits True" in page.text
    assert "limited" not in page.text  # a list with an entry for each number
    charts = [json.loads(chart["data-chart"]) for chart in page.data]
    assert len(charts) == 5  # loss, accuracy, dropout, weight decay, diagnostics
    assert charts[2]["names"] == ["2", "5"]
    lines = [[history.start[name], *history[name]] for name in ("2.dropout", "5.dropout")]
    assert charts[2]["values"] == [pytest.approx(line, rel=1e-3) for line in lines]
    assert page.tags["figcaption"] == 5
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train.py", "--lr", "0.1"], "python train.py --lr 0.1"),
        (["/opt/fxstn/__main__.py", "tune"], "fxstn tune"),
        (["/opt/ipykernel_launcher.py", "-f", "kernel.json"], "No command started the run"),
        (["/opt/colab_kernel_launcher.py", "-f", "kernel.json"], "No command started the run"),
        (["-"], "No command started the run"),
    ],
)
def test_a_report_says_how_the_run_was_started(words, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    runner = make()
    runner.fit(1)
    assert shown in repeat_section(runner)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 0.4, False, [-0.2, 0, 0.2, 0.4]),
        (1e-4, 1.0, True, [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (1.0, 30.0, True, [1, 2, 5, 10, 20]),
        (1e-20, 1.0, True, [1e-20, 1e-16, 1e-12, 1e-8, 1e-4, 1]),
    ],
)
def test_ticks_of_a_chart_are_round_numbers(low, high, log, ticks):
    scale = Scale(low, high, log)
    assert scale.ticks() == pytest.approx(ticks)
    assert [scale.share(low), scale.share(high)] == pytest.approx([0, 1])


def test_a_chart_leaves_out_what_is_no_number():
    shown = chart(Panel("loss", {"train": [math.nan, 2.0, math.inf, 1.0], "valid": [math.nan] * 4}, "loss"), 2)
    assert shown.count("<polyline") == 1
    assert "train from 2 to 1" in shown
    assert "[[null,2.0,null,1.0],[null,null,null,null]]" in html.unescape(shown)
    assert chart(Panel("loss", {"train": [math.nan]}, "loss"), 1) == ""


def test_a_report_shows_warnings_and_values_at_their_bounds(tmp_path):
    runner = make(hparams=[hp.Dropout("2", init=0.3), hp.Scalar("<b>&", 0.5, 0, 1)], loss_fn=fxstn.cross_entropy)
    runner.fit(3)
    for row in runner.history.rows:
        row["2.dropout"] = runner.problem.ranges()["2.dropout"][1]
        row["<b>&"] = 0.0
    with (
        pytest.warns(fxstn.RunWarning, match="upper end"),
        pytest.warns(fxstn.RunWarning, match="lower end of its range .* low=$"),
    ):
        runner._tuner.monitors.read(runner.history.rows)
    assert runner.warnings[0][0] == 3
    page = written(runner, tmp_path, title="a < b")
    assert "at upper end" in page.text
    assert "at lower end" in page.text
    what, _, remedy = runner.warnings[0][1].partition("; ")
    assert f"{what} What to do: {remedy}" in page.text
    assert "<b>&" in page.text
    assert "a < b" in page.text


def test_every_text_of_a_report_is_escaped(tmp_path):
    bad = "<script>alert('&\"')</script>"
    hparams = [hp.Dropout("2", init=0.3), hp.Scalar(bad, 0.5, 0, 1)]
    runner = make(hparams=hparams, metrics={f"{bad}!": fxstn.accuracy}, loss_fn=fxstn.cross_entropy)
    runner.fit(2)
    runner._tuner.monitors.warnings.append((1, bad))
    runner.settings["checkpoints.out_dir"] = bad
    explanation = fxstn.explain(torch.nn.ModuleDict({"<i>": torch.nn.Linear(2, 2)}))
    explanation.rows.append(fxstn.explain(mlp()).rows[0].__class__(bad, bad, bad, bad))
    explanation.notes.append(bad)
    page = written(runner, tmp_path, title=bad, explanation=explanation)
    assert page.tags["script"] == 1  # the page's own
    assert page.text.count(bad) >= 9
    assert html.escape(bad) in (tmp_path / "report.html").read_text()


def test_reports_change_nothing_in_a_run_and_go_on_after_a_resume(tmp_path):
    plain = make(hyper={"train_steps": 2}).fit(4)
    callbacks = [lambda runner: fxstn.write_report(runner, tmp_path / "report.html")]
    make(tmp_path, callbacks=callbacks).fit(2)
    assert "of 2" in (tmp_path / "report.html").read_text()
    again = make(tmp_path, callbacks=callbacks)
    again._checkpoints.resume(begun=False)
    again._tuner.monitors.warnings.append((2, "seen before"))
    again.save(tmp_path / "last.pt")
    resumed = make(tmp_path, callbacks=callbacks)
    assert without_times(resumed.fit(4)) == without_times(plain)
    page = Page((tmp_path / "report.html").read_text())
    for text in ("of 4", "seen before", "inner steps 20", "response steps 17", "hyper steps 10"):
        assert text in page.text


def test_a_report_of_a_stream_of_unknown_length(tmp_path):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(6), torch.tensor(1))] * 16)

    runner = make()
    loader = torch.utils.data.DataLoader(Rows(), 8)
    runner = fxstn.BilevelRunner(runner.stn, F.cross_entropy, loader, runner.valid_loader, progress=False)
    runner.fit(1)
    assert "training data DataLoader validation data DataLoader, 4 batches of 8" in written(runner, tmp_path).text


def test_a_run_that_went_back_says_so(tmp_path):
    runner = make(loss_fn=Fails(at=7))
    with pytest.warns(fxstn.RunWarning, match="back to epoch"):
        runner.fit(3)
    assert [epoch for epoch, _ in runner.warnings] == [1]  # once: the gradient of the bad loss is forgotten
    assert "back to epoch 0 with lower learning rates" in written(runner, tmp_path).text


class Fails:
    """Cross entropy that is NaN at one call."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, output, target):
        self.calls += 1
        return F.cross_entropy(output, target) * (math.nan if self.calls == self.at else 1.0)


class Mean(fxstn.BilevelProblem):
    """w₀ is drawn to the data, λ to the validation data; no σ, and ranges on demand."""

    def __init__(self, **ranges) -> None:
        super().__init__()
        self.w, self.shift = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(()))
        self.known = ranges

    def general_parameters(self):
        return [self.w]

    def hyper_parameters(self):
        return [self.shift]

    def general_loss(self, inputs, target):
        return (inputs - self.w - self.shift.detach()).square().mean()

    def hyper_loss(self, inputs, target):
        return (inputs - self.w.detach() - self.shift).square().mean()

    def validation_loss(self, inputs, target):
        return self.hyper_loss(inputs, target), inputs

    def values(self):
        return {"shift": self.shift.item()}

    def ranges(self):
        return self.known


@pytest.mark.parametrize("ranges", [{}, {"shift": (-5.0, 5.0)}, {"shift": (0.0, math.inf)}])
def test_a_problem_of_ones_own_has_a_report_of_what_it_has(ranges, tmp_path):
    batches = [(torch.randn(8, 3) + 1, torch.zeros(8)) for _ in range(4)]
    runner = fxstn.BilevelRunner(Mean(**ranges), batches, batches, progress=False)
    runner.fit(4)
    page = written(runner, tmp_path)
    assert "shift" in page.text
    assert ("range" in page.text) == bool(ranges)
    assert ("place in it" in page.text) == bool(ranges)
    assert "σ" not in page.text
    assert "Network" not in page.text


def test_a_report_needs_an_epoch(tmp_path):
    with pytest.raises(ValueError, match="no epoch is done yet"):
        fxstn.write_report(make(), tmp_path / "report.html")


def test_a_picture_of_a_history_needs_matplotlib_and_a_report_does_not(tmp_path, monkeypatch):
    runner = make()
    runner.fit(1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"History.plot needs matplotlib: pip install 'fxstn\[plot\]'"):
        runner.history.plot(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    assert written(runner, tmp_path).data


def test_an_explanation_of_a_network_is_that_of_its_model():
    for model in (mlp(), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())):
        assert str(fxstn.explain(fxstn.transform(model))) == str(fxstn.explain(model))
    live = fxstn.transform(mlp(), trace="live", example_inputs=torch.randn(4, 6))
    assert fxstn.explain(live).ok
    assert "6 parameters respond to the hyperparameters" in str(fxstn.explain(live))
    assert fxstn.explain(live, example_inputs=torch.randn(4, 6)).rows


def test_panels_of_a_history():
    runner = make(hyper={"tune_scale": True, "scale_optimizer": torch.optim.Adam}, metrics={"accuracy": fxstn.accuracy})
    runner.fit(2)
    shown = {panel.title: panel for panel in plots.panels(runner.history.groups(), runner.history.start)}
    assert list(shown) == ["loss", "accuracy", "dropout", "weight_decay", "perturbation scale σ", "diagnostics"]
    assert list(shown["dropout"].lines) == ["2", "5"]
    assert shown["dropout"].lines["2"][0] == pytest.approx(0.3)
    assert len(shown["dropout"].lines["2"]) == 3
    assert list(shown["diagnostics"].lines) == ["response norm", "linearization error"]


def test_no_line_of_a_panel_takes_the_place_of_another():
    """A shared number has the name of its kind, and a module may have it, too."""
    groups = {"hyperparameter": {"dropout": [0.1, 0.2], "dropout.dropout": [0.3, 0.4]}}
    (_, panel) = plots.panels(groups, {})
    assert {label: line[1:] for label, line in panel.lines.items()} == groups["hyperparameter"]
    assert panel.names == {"dropout": "dropout", "dropout.dropout": "dropout.dropout"}


@with_plots
@pytest.mark.parametrize("name", ["new/folder/curves.png", "curves", "new/curves.svg"])
def test_a_picture_lies_where_it_was_asked_for(name, tmp_path):
    runner = make()
    runner.fit(1)
    runner.history.plot(tmp_path / name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    beginning = (tmp_path / name).read_bytes()[:8]
    assert beginning[1:4] == b"PNG" if not name.endswith("svg") else beginning.startswith(b"<?xml")


@with_plots
@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_hyperparameters_can_be_drawn(count, tmp_path):
    names = tuple(f"layer{i}.weight_decay" for i in range(count))
    row = {"train_loss": 1.0, "valid_loss": -1.0, "response_loss": math.nan, "seconds": 1.0} | dict.fromkeys(
        names, 1e-4
    )
    history = fxstn.History(names, [row | {"epoch": 1}, row | {"epoch": 2, "new": 3.0}], dict.fromkeys(names, 1e-6))
    history.plot(tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


def test_monitors_keep_the_warnings_of_a_run():
    monitors = Monitors({"a": (0.0, 1.0)})
    rows = [{"epoch": epoch, "a": 1.0} for epoch in (1, 2, 3, 4)]
    with pytest.warns(fxstn.RunWarning):
        monitors.read(rows[:3])
    monitors.read(rows)
    assert [epoch for epoch, _ in monitors.warnings] == [3]


# TensorBoard


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag → (step, value)."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra fxstn[tensorboard]"
    )
    shown = accumulator.EventAccumulator(str(folder))
    shown.Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.fixture
def board():
    pytest.importorskip("tensorboard", reason="needs the extra fxstn[tensorboard]")
    boards = []

    def make_board(folder):
        boards.append(fxstn.TensorBoard(folder))
        return boards[-1]

    yield make_board
    for callback in boards:
        callback.close()


def test_tensorboard_has_a_scalar_per_column_and_epoch(tmp_path, board):
    history = make(callbacks=[board(tmp_path)]).fit(3)
    scalars = events(tmp_path)
    assert set(scalars) == {
        "loss/train", "loss/clean_train", "loss/valid", "loss/response", "metric/accuracy", "hyperparameter/2.dropout",
        "hyperparameter/5.dropout", "hyperparameter/weight_decay", "scale/2.dropout", "scale/5.dropout",
        "scale/weight_decay", "diagnostics/response_norm", "diagnostics/linearization_error", "diagnostics/taken_back",
        "diagnostics/seconds",
    }  # fmt: skip
    for tag, column in (("loss/valid", "valid_loss"), ("hyperparameter/2.dropout", "2.dropout")):
        assert [step for step, _ in scalars[tag]] == [1, 2, 3]
        assert [value for _, value in scalars[tag]] == pytest.approx(history[column])


def test_a_resumed_run_is_on_the_board_once(tmp_path, board):
    make(tmp_path / "run", callbacks=[board(tmp_path / "board")]).fit(2)
    cut = make(callbacks=[board(tmp_path / "board")])  # a run that was killed after its callback, before its file
    cut.load(tmp_path / "run" / "last.pt")
    cut.fit(3)
    history = make(tmp_path / "run", callbacks=[board(tmp_path / "board")]).fit(4)
    scalars = events(tmp_path / "board")
    assert [step for step, _ in scalars["loss/valid"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars["loss/valid"]] == pytest.approx(history["valid_loss"])


def test_a_board_that_comes_later_or_goes_back_is_whole(tmp_path, board):
    make(tmp_path / "run").fit(2)
    callback = board(tmp_path / "board")
    make(tmp_path / "run", callbacks=[callback]).fit(4)
    assert [step for step, _ in events(tmp_path / "board")["loss/valid"]] == [1, 2, 3, 4]
    make(callbacks=[callback]).fit(2)  # the same board, from epoch 1 on
    assert [step for step, _ in events(tmp_path / "board")["loss/valid"]] == [1, 2]


def test_tensorboard_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"needs tensorboard: pip install 'fxstn\[tensorboard\]'"):
        fxstn.TensorBoard(tmp_path)


# Optuna


def test_a_search_begins_with_the_values_found():
    optuna = pytest.importorskip("optuna", reason="needs the extra fxstn[search]")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runner = make()
    values = runner.fit(3).best_values()
    assert values == runner.history.outcome().values
    ranges = runner.problem.ranges()

    def objective(trial):
        return sum(trial.suggest_float(name, *ranges[name], log=name == "weight_decay") for name in ranges)

    study = optuna.create_study()
    study.enqueue_trial(values)
    study.optimize(objective, n_trials=2)
    assert study.trials[0].params == pytest.approx(values)
    assert study.trials[1].params != study.trials[0].params
    with pytest.raises(ValueError, match="no epoch is done yet"):
        fxstn.History(("a",)).best_values()
