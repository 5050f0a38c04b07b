"""BilevelRunner: the alternation, resume, faults, results; and the command line."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import inspect
import io
import json
import math
import pydoc
import re
import sys
import typing
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import fxstn
from fxstn import hp
from fxstn.bilevel import network_problem as steps
from fxstn.bilevel.run_settings import Settings, SettingsDict
from fxstn.bilevel.settings import GROUPS
from fxstn.ir.cost import RAMP
from fxstn.tools import cli, data
from fxstn.tools.bench import bench
from fxstn.tools.workloads import Setup
from tests.nets import mlp, randomize_response, tiny_conv
from tests.runs import Empty, dataset, grouped, make, same, without_times


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_training_learns_and_the_history_has_every_column(method, tmp_path):
    runner = make(tmp_path, method=method, **({} if method == "delta" else fxstn.PAPER))
    history = runner.fit(8)
    assert history["epoch"] == list(range(1, 9))
    assert history["valid_loss"][-1] < history["valid_loss"][0]
    names = runner.stn.hparams.names
    assert {"train_loss", "valid_loss", "accuracy", "seconds", *names, *(f"scale:{n}" for n in names)} <= set(
        history.rows[0]
    )
    assert all(history[name][0] != history[name][-1] for name in names)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert float(rows[-1]["valid_loss"]) == history["valid_loss"][-1]


@pytest.mark.parametrize("generator", [True, False], ids=["own-generators", "global-generator"])
def test_a_run_that_was_cut_ends_like_one_that_was_not(tmp_path, generator):
    whole = make(generator=generator).fit(5)
    make(tmp_path, generator).fit(2)
    torch.manual_seed(99)  # whatever happened in between
    resumed = make(tmp_path, generator)
    torch.rand(7)
    assert without_times(resumed.fit(5)) == without_times(whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = make(tmp_path).fit(2)
    assert without_times(make(tmp_path).fit(2)) == without_times(first)


def test_the_best_model_is_that_of_the_lowest_validation_loss(tmp_path):
    runner = make(tmp_path)
    history = runner.fit(6)
    best = history.best()
    model = runner.best_model().eval()
    x, y = runner.valid_loader.dataset.tensors
    with torch.no_grad():
        assert F.cross_entropy(model(x), y).item() == pytest.approx(best["valid_loss"], rel=1e-4)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert saved["epoch"] == best["epoch"]
    mlp().load_state_dict(saved["model"], strict=True)


def test_warm_up_epochs_leave_lambda_alone():
    runner = make(hyper={"warmup_epochs": 2, "optimizer": torch.optim.Adam})
    history = runner.fit(3)
    name = runner.stn.hparams.names[0]
    assert history[name][0] == history[name][1] != history[name][2]


def reads_nothing(output, target, hparams=None):
    return F.cross_entropy(output, target)


@pytest.mark.parametrize("correction", [0.0, 1.0, 0.5])
def test_the_hyper_step_descends_the_validation_less_the_training_gradient_along_the_response(correction):
    net, (x, y), (xv, yv) = mlp(0.0), *((torch.randn(16, 6), torch.randint(3, (16,))) for _ in "tv")
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)])
    randomize_response(stn)
    columns = torch.eye(2)
    before = [{n: p.detach().clone() for n, p in stn.best_response(c).items()} for c in (0 * columns[0], *columns)]
    loaders = ([(a, b)] for a, b in ((x, y), (xv, yv)))
    runner = fxstn.BilevelRunner(
        stn,
        reads_nothing,
        *loaders,
        hyper=fxstn.HyperSettings(
            train_steps=1, inner_correction=correction, optimizer=partial(torch.optim.SGD, lr=1.0)
        ),
        response=fxstn.ResponseSettings(every=9),
        progress=False,
    )
    runner.fit(1)
    after = [{n: p.detach() for n, p in stn.best_response(c).items()} for c in (0 * columns[0], *columns)]

    def along(weights, inputs, target):
        """Derivatives of a loss in the two directions of the response."""
        live = {n: p.clone().requires_grad_() for n, p in weights[0].items()}
        gradients = torch.autograd.grad(
            F.cross_entropy(functional_call(net, live, (inputs,)), target), [*live.values()]
        )
        return torch.stack([
            sum((g * (moved[n] - weights[0][n])).sum() for n, g in zip(live, gradients, strict=True))
            for moved in weights[1:]
        ])  # fmt: skip

    expected = along(after, xv, yv) - correction * along(before, x, y)
    start = torch.zeros(2)  # the middle of the range
    torch.testing.assert_close(start - stn.hparams.unconstrained.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_run_that_begins_with_the_network_of_another_one_warns_once(tmp_path):
    def runner(stn, out_dir=None):
        checkpoints = fxstn.CheckpointSettings(out_dir=out_dir)
        loaders = DataLoader(dataset(40, 0), 8), DataLoader(dataset(30, 1), 8)
        return fxstn.BilevelRunner(stn, F.cross_entropy, *loaders, checkpoints=checkpoints, progress=False)

    stn = fxstn.transform(mlp())
    start = copy.deepcopy(stn.state_dict())
    first = runner(stn, tmp_path)
    first.fit(2)
    first.fit(3)
    first.refit(DataLoader(dataset(70, 0), 8), epochs=1)
    first.save(tmp_path / "run.pt")
    runner(stn, tmp_path).fit(4)  # resumes
    loaded = runner(stn)
    loaded.load(tmp_path / "run.pt")
    loaded.fit(4)
    runner(copy.deepcopy(stn)).fit(1)
    second = runner(stn)
    with pytest.warns(
        fxstn.RunWarning, match="another run has trained this network.*a refit.*for a fresh run transform a new model"
    ):
        second.fit(1)
    second.fit(2)
    stn.load_state_dict(start)
    runner(stn).fit(1)


@pytest.mark.parametrize(
    "name",
    ["train_loader", "valid_loader", "loss_fn", "metrics", "columns", "optimizers", "hyper", "clip_norm", "lr", "stn"],
)
def test_what_a_runner_would_not_heed_cannot_be_set_by_hand(name):
    runner = make()
    with pytest.raises(
        AttributeError, match=rf"BilevelRunner\.{name} cannot be set to 0 by hand.*; make a new Bilevel"
    ):
        setattr(runner, name, 0)


def test_what_acts_can_be_set_by_hand():
    runner, calls = make(), []
    runner.callbacks, runner.progress, runner.note = [calls.append], False, "a user's own"
    runner.schedule = fxstn.Schedule.of(runner.problem.values())
    runner.fit(1)
    assert calls == [runner]
    assert not runner.hyper_steps


def test_a_fixed_scale_stays():
    runner = make(hyper={"tune_scale": False})
    history = runner.fit(2)
    assert all(value == pytest.approx(1.0) for name in history.names for value in history[f"scale:{name}"])


def test_patience_stops_a_run_that_does_not_improve_and_keeps_it_stopped(tmp_path):
    still = {"hparams": [hp.Dropout("2")], "valid_loss_fn": lambda output, target: 1 + 0 * output.mean()}
    runner = make(tmp_path, callbacks=[fxstn.EarlyStopping(patience=2)], **still)
    assert len(runner.fit(50)) == 2  # the start is as good
    assert len(runner.fit(50)) == 2  # the start is as good
    assert len(make(tmp_path, callbacks=[fxstn.EarlyStopping(2)], **still).fit(50)) == 2  # ended before it resumes
    more = {"callbacks": [fxstn.EarlyStopping(4)], **still}
    assert without_times(make(tmp_path, **more).fit(50)) == without_times(make(**more).fit(50))


def test_time_stops_a_run_that_is_over_it_and_counts_what_was_before(tmp_path):
    assert len(make(tmp_path).fit(50, minutes=1e-9)) == 1
    assert len(make(tmp_path).fit(50, minutes=1e-9)) == 1
    assert len(make(tmp_path).fit(2, minutes=60)) == 2


def test_the_time_of_a_run_is_that_of_the_clock_with_callbacks_and_what_was_before_a_resume(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fxstn.bilevel.clock.time", SimpleNamespace(monotonic=lambda: now[0]))

    def spend(runner):
        now[0] += 60

    assert len(make(callbacks=[spend]).fit(9, minutes=3)) == 3
    runner = make(tmp_path, callbacks=[spend])
    assert len(runner.fit(2)) == 2
    now[0] += 9999  # between two fits nothing counts
    assert len(runner.fit(9, minutes=4)) == 4
    assert len(make(tmp_path, callbacks=[spend]).fit(9, minutes=6)) == 6


@pytest.mark.filterwarnings("ignore::fxstn.RunWarning")
def test_a_run_that_goes_back_has_spent_the_time_all_the_same(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fxstn.bilevel.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        now[0] += 60
        return F.cross_entropy(output, target) * (math.nan if len(calls) == 20 else 1)

    runner = make(loss_fn=loss_fn, valid_loss_fn=F.cross_entropy)
    runner.fit(3)
    assert runner._tuner.counters.rollbacks == 1
    assert runner._clock.seconds() == 60 * len(calls)


@pytest.mark.filterwarnings("ignore::fxstn.RunWarning")
@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_best(tmp_path, step):
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        broken = len(calls) > 2 * 5 * 2 + step
        return F.cross_entropy(output, target) * (math.nan if broken else 1)

    runner = make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy, response={"every": 1})
    with pytest.raises(fxstn.DivergedError, match=r"became nan in epoch 3, step \d.*dropout=.*best.pt.*learning rate"):
        runner.fit(9)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] in (1, 2)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


def test_an_empty_loader_is_refused():
    stn = fxstn.transform(mlp())
    full, empty = DataLoader(dataset(8, 0), 4), DataLoader(dataset(8, 0), 16, drop_last=True)
    for loaders, name in (((empty, full), "train_loader"), ((full, empty), "valid_loader")):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            fxstn.BilevelRunner(stn, F.cross_entropy, *loaders)
    with pytest.raises(ValueError, match="train_loader is empty"):
        fxstn.BilevelRunner(stn, F.cross_entropy, Empty(), full, progress=False).fit(1)


def test_a_batch_that_is_no_pair_is_refused():
    loader = DataLoader(TensorDataset(torch.randn(8, 6)), 4)
    with pytest.raises(ValueError, match=r"must yield \(inputs, target\)"):
        fxstn.BilevelRunner(fxstn.transform(mlp()), F.cross_entropy, loader, loader, progress=False).fit(1)


def test_optimizers_must_hold_exactly_their_parameters():
    runner = make()
    stn, loader = runner.stn, runner.train_loader
    good = torch.optim.Adam(stn.general_parameters())
    assert fxstn.BilevelRunner(stn, F.cross_entropy, loader, loader, optimizer=good).optimizers["optimizer"] is good
    for name, bad in (
        ("optimizer", torch.optim.SGD(stn.parameters(), lr=0.1)),
        ("hyper.optimizer", lambda p: torch.optim.SGD(stn.model.parameters(), lr=0.1)),
    ):
        keywords = {"hyper": fxstn.HyperSettings(optimizer=bad)} if name == "hyper.optimizer" else {name: bad}
        with pytest.raises(ValueError, match=f"^{name} holds .* not its own.*pass a factory"):
            fxstn.BilevelRunner(stn, F.cross_entropy, loader, loader, **keywords)
    with pytest.raises(TypeError, match="factory"):
        fxstn.BilevelRunner(stn, F.cross_entropy, loader, loader, optimizer="sgd")


def test_weight_decay_set_twice_is_a_warning():
    with pytest.warns(UserWarning, match=r"set in optimizer: both act; set weight_decay=0 there.*AdamW, or") as caught:
        runner = make(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4))
    assert runner.warnings == [(0, str(caught[0].message))]


@pytest.mark.parametrize(
    "bad", [{"hyper": {"train_steps": 0}}, {"response": {"every": 0}}, {"response": {"fraction": 0.0}},
            {"hyper": {"fraction": 1.5}}, {"hyper": {"entropy_weight": -1.0}}]
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    ((group, ((name, value),)),) = ((group, fields.items()) for group, fields in bad.items())
    with pytest.raises(ValueError, match=rf"^{group}\.{name}={value} must "):
        make(**bad)


def test_the_response_step_is_taken_when_due_on_its_part_of_the_batch(monkeypatch):
    seen = {"response": [], "hyper": []}
    for kind, batches in seen.items():
        original = getattr(steps, f"{kind}_loss")

        def counted(stn, loss_fn, inputs, target, original=original, batches=batches, **settings):
            batches.append((len(inputs), len(target)))
            return original(stn, loss_fn, inputs, target, **settings)

        monkeypatch.setattr(steps, f"{kind}_loss", counted)
    runner = make(response={"every": 2, "fraction": 0.3}, hyper={"fraction": 0.5, "train_steps": 5})
    runner._tuner.counters.steps = 2 * RAMP  # in the first of which response steps come more often
    history = runner.fit(2)
    assert seen == {"response": [(3, 3)] * 5, "hyper": [(4, 4)] * 2}  # 10 inner steps of 8 examples
    assert all(math.isfinite(loss) for loss in history["response_loss"])


def test_low_precision_and_memory_format_stay_close_to_the_plain_run():
    def run(**settings):
        torch.manual_seed(0)
        stn = fxstn.transform(models.resnet18(num_classes=3), [hp.Dropout("layer1", init=0.2)])
        data = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 3)
        runner = fxstn.BilevelRunner(
            stn,
            F.cross_entropy,
            DataLoader(data, 16),
            DataLoader(data, 16),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-4),  # a large step magnifies rounding
            **grouped(settings, hyper={"train_steps": 1}, response={"every": 1}, progress=False),
        )
        return runner, runner.fit(1).rows[0], runner._tuner.prepare.last[0]

    (_, plain, _), (runner, low, images) = (
        run(),
        run(execution={"autocast": torch.bfloat16, "memory_format": torch.channels_last}),
    )
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert runner.stn.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert runner.stn.model.conv1.weight.dtype == torch.float32
    assert low["train_loss"] != plain["train_loss"]
    for name in ("train_loss", "response_loss"):
        assert low[name] == pytest.approx(plain[name], rel=0.05)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make(tmp_path).fit(1)
    with pytest.raises(
        ValueError, match=r"has hyperparameters .*weight_decay.*, this run \['2.dropout'\]; choose another"
    ):
        make(tmp_path, hparams=[hp.Dropout("2")]).fit(2)
    with pytest.raises(ValueError, match=r"has method delta, this run centered"):
        make(tmp_path, method="centered").fit(2)
    with pytest.raises(ValueError, match=r"has optimizers .*SGD.*, this run .*RMSprop"):
        make(tmp_path, optimizer=torch.optim.RMSprop).fit(2)
    with pytest.raises(ValueError, match=r"has schedulers \{\}, this run .*StepLR"):
        make(tmp_path, schedulers={"optimizer": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)}).fit(2)
    wider = make(tmp_path)
    wider.stn.model[6] = torch.nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"another model: stn.model.6.bias is \(3,\) there and \(4,\) here"):
        wider.fit(2)


def group_per_tensor(parameters):
    return torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hparams": [hp.Dropout("2")]}, "has hyperparameters .* choose another out_dir, or the same settings"),
        ({"optimizer": group_per_tensor}, r"has optimizers .*SGD of 6 tensors.*, this run .*SGD of 1, 1, 1.* tensors"),
        ({"ema": 0.9}, r"has averages \(ema\) False, this run True"),
        (
            {"generator": False},
            r"has generator= \(train_loader.generator\), which this run's train_loader does not have; .* the same loaders",
        ),
    ],
    ids=["hyperparameters", "parameter groups", "averages", "generators of the loaders"],
)
def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path, settings, message):
    make(tmp_path, optimizer=partial(torch.optim.SGD, lr=0.1)).fit(1)
    runner = make(**({"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings))
    before = copy.deepcopy((runner._checkpoints.parts.state_dict(), torch.get_rng_state()))
    with pytest.raises(ValueError, match=message):
        runner.load(tmp_path / "last.pt")
    after = (runner._checkpoints.parts.state_dict(), torch.get_rng_state())
    assert same(without_seconds(after), without_seconds(before))


def without_seconds(state):
    """Without the clock."""
    state[0]["processes"][0]["means"].pop("seconds")
    return state


def test_the_keywords_are_the_settings_and_documented():
    """What type checkers read of `BilevelRunner(...)` has the names and types of the dataclass, and its docstring says each."""
    fields = typing.get_type_hints(Settings)
    assert typing.get_type_hints(SettingsDict) == fields
    for name in fields:
        assert re.search(rf"^    {name}: ", fxstn.BilevelRunner.__doc__, re.MULTILINE), name
    for group in GROUPS:
        for name in typing.get_type_hints(group).keys() - {"keyword"}:
            assert re.search(rf"^    {name}: ", group.__doc__, re.MULTILINE), name


def test_help_on_the_runner_lists_the_settings_with_their_defaults():
    parameters = inspect.signature(fxstn.BilevelRunner).parameters
    assert list(parameters)[:4] == ["stn", "loss_fn", "train_loader", "valid_loader"]
    assert {name: p.default for name, p in list(parameters.items())[4:]} == vars(Settings())
    page = pydoc.render_doc(fxstn.BilevelRunner, renderer=pydoc.plaintext)
    assert "hyper: 'HyperSettings' = HyperSettings()" in page
    assert "train_steps: 'int' = 5" in pydoc.render_doc(fxstn.HyperSettings, renderer=pydoc.plaintext)
    assert page.count("Settings of a run") == 0


@pytest.mark.parametrize("kind", [Settings, *GROUPS])
def test_the_docstring_of_a_setting_names_its_default(kind):
    entries = re.split(r"^    (?=\w+: )", kind.__doc__, flags=re.MULTILINE)[1:]
    texts = {entry.partition(":")[0]: " ".join(entry.split()) for entry in entries}
    for name, default in vars(kind()).items():
        value = f'"{default}"' if isinstance(default, str) else "" if default is None else default
        value = f"`fxstn.{default}`" if isinstance(default, GROUPS) else value
        assert f" Default: {value}" in texts[name], name


def test_a_keyword_that_is_none_is_refused_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"BilevelRunner has no argument 'metric'; did you mean 'metrics'\?"):
        make(metric=3)


@pytest.mark.parametrize("perturb", ["off", "none", None, "sample"])
@pytest.mark.parametrize("objective", ["general", "response", "hyper"])
def test_an_objective_refuses_perturbations_that_it_does_not_know(objective, perturb):
    """Method "stn", for which the general loss is perturbed, too. Only the hyper loss has a use for "off"."""
    stn, (x, y) = fxstn.transform(mlp(), [hp.Dropout("2")], method="stn"), dataset(8, 0).tensors
    known = (objective, perturb) == ("hyper", "off")
    message = rf"perturb={perturb!r} must be 'auto', 'example', 'batch' or a tensor"
    with contextlib.nullcontext() if known else pytest.raises(ValueError, match=message):
        loss = getattr(fxstn, f"{objective}_loss")(stn, F.cross_entropy, x, y, perturb=perturb)
        assert loss.isfinite()


@pytest.mark.parametrize("kind", [Settings, *GROUPS])
def test_settings_do_not_change(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, 3)


def test_a_group_shows_what_differs_from_its_defaults():
    assert repr(fxstn.ResponseSettings(every=1, widening=2)) == "ResponseSettings(every=1)"
    assert (
        repr(dataclasses.replace(fxstn.PAPER["response"], every=4))
        == "ResponseSettings(widening=1.0, perturb='example')"
    )


def test_the_best_model_needs_an_epoch():
    with pytest.raises(ValueError, match="call fit first"):
        make().best_model()


def test_the_history_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra fxstn[plot]")
    history = make().fit(3)
    history.plot(tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def test_tune_writes_a_row_per_epoch_and_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with the extra fxstn[data]")
    common = ["tune", "--model", "tests.nets:tiny_conv", "--train-size", 128, "--valid-size", 64, "--seed", 0]
    assert run(*common, "--epochs", 1, "--out", tmp_path / "cut") == 0
    assert run(*common, "--epochs", 2, "--out", tmp_path / "cut") == 0
    assert run(*common, "--epochs", 2, "--out", tmp_path / "whole", "--refit") == 0
    rows = {}
    for name in ("cut", "whole"):
        with open(tmp_path / name / "history.csv") as file:
            rows[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    assert len(rows["cut"]) == 2
    assert rows["cut"] == rows["whole"]
    assert (tmp_path / "whole" / "schedules.png").exists()
    replay = ["--replay", tmp_path / "whole" / "schedule.json"]
    assert run(*common, "--epochs", 2, "--out", tmp_path / "again", *replay) == 0
    with open(tmp_path / "again" / "history.csv") as file:
        again = list(csv.DictReader(file))
    assert float(again[-1]["weight_decay"]) == pytest.approx(float(rows["whole"][-1]["weight_decay"]), rel=1e-4)
    assert run(*common, "--epochs", 3, "--out", tmp_path / "whole", *replay) == 2
    output = capsys.readouterr().out
    assert "test loss" in output
    assert "weight_decay" in output
    assert "refit, " in output
    weights = torch.load(tmp_path / "whole" / "refit" / "weights.pt", weights_only=True)
    tiny_conv(10).load_state_dict(weights)


class Terminal(io.StringIO):
    """Where progress bars are drawn."""

    def isatty(self):
        return True


def test_bench_writes_rows_with_ratios_against_plain(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    file = tmp_path / "bench.json"
    assert run("bench", "tests.nets:tiny_conv", "--batch-size", 4, "--rounds", 2, "--json", file, "--memory") == 0
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows] == [
        "plain", "general", "response", "schedule", "schedule-default", "schedule-long", "tune",
        "func-jvp", "func-jvp-batch", "double-backward",
    ]  # fmt: skip
    assert {"variant", "step_ms", "ratio", "peak_mb"} <= set(rows[0])
    assert rows[0]["ratio"] == 1
    for text in ("build", "first step of response", "rounds", "memory of plain"):
        assert text in terminal.getvalue()
    assert "plain" in capsys.readouterr().out


@pytest.mark.nightly
def test_bench_measures_memory_in_a_fresh_process():
    rows = bench(Setup("squeezenet1_0", batch_size=4, image_size=48), names=("plain",), rounds=1, quiet=True)
    assert rows[0]["peak_mb"] > 1


def test_explain_and_verify_print_and_set_the_exit_status(capsys):
    assert run("explain", "tests.nets:tiny_conv") == 0
    assert "hyperlayer" in capsys.readouterr().out
    assert run("verify", "tests.nets:tiny_conv", "--image-size", 8) == 0
    assert "ok: largest error" in capsys.readouterr().out


def test_a_users_mistake_is_one_line_on_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FXSTN_DATA", raising=False)
    assert run("explain", "resnet99") == 2
    assert "fxstn explain: model 'resnet99' is neither" in capsys.readouterr().err
    assert run("tune", "--data", "mnist", "--out", tmp_path) == 2
    assert "--data-root" in capsys.readouterr().err
    monkeypatch.setattr("torchvision.datasets.MNIST.download", broken_download)
    assert run("tune", "--data", "mnist", "--data-root", tmp_path, "--out", tmp_path) == 2
    assert "mnist is not under" in capsys.readouterr().err


def broken_download(self):
    raise RuntimeError("no network")


def test_the_binary_version_of_cifar10_is_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = torch.randint(256, (6, 4, 3073), dtype=torch.uint8)
    records[..., 0] %= 10
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], records, strict=True):
        (folder / f"{name}.bin").write_bytes(part.numpy().tobytes())
    split = data.load("cifar10", 32, 12, 8, root=str(tmp_path), normalise=False)
    assert [len(part) for part in (split.train, split.valid, split.test)] == [12, 8, 4]
    x, y = split.test.tensors
    assert torch.equal(y, records[5, :, 0].long())
    torch.testing.assert_close(x[1, 2, 3, 4], records[5, 1, 1 + 2 * 1024 + 3 * 32 + 4] / 255)
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"data_batch_3\.bin is not CIFAR-10's binary version"):
        data.load("cifar10", root=str(tmp_path))
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin"):
        data.load("cifar10", root=str(tmp_path))
