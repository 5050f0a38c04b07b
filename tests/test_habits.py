"""What users bring along: accumulation, averages, half precision, schedulers, batches of any kind, callbacks; and replay."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import fxstn
from fxstn import Schedule, hp
from fxstn.bilevel.optim import learning_rate
from tests.nets import mlp
from tests.runs import STARTS, dataset, make, without_times


def in_order(batch: int, **settings) -> fxstn.BilevelRunner:
    """A run without noise, on batches in a fixed order; the response step has one ε."""
    torch.manual_seed(0)
    loaders = DataLoader(dataset(48, 0), batch), DataLoader(dataset(30, 1), 30)
    stn = fxstn.transform(mlp(0.0), [hp.WeightDecay(shared=True)])
    runner = fxstn.BilevelRunner(
        stn, F.cross_entropy, *loaders, progress=False, response=fxstn.ResponseSettings(every=1),
        hyper=fxstn.HyperSettings(train_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=10.0)), **settings,
    )  # fmt: skip
    runner.problem.perturb = torch.tensor([0.7])
    runner._valid.resize(30)  # whatever the size of training batches
    return runner


def state(runner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in runner.stn.state_dict().items()}


def test_accumulating_batches_is_training_on_larger_ones():
    small, large = in_order(8, accumulate=3), in_order(24)
    start = state(small)
    histories = [small.fit(2), large.fit(2)]
    assert small.steps == large.steps == 4
    for name, value in state(large).items():
        torch.testing.assert_close(state(small)[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(start["hparams.unconstrained"], state(small)["hparams.unconstrained"])
    for a, b in zip(*map(without_times, histories), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_rest_of_batches_counts_as_a_step_of_its_own():
    runner = in_order(8, accumulate=4)  # six batches: four and two
    runner.fit(1)
    assert runner.steps == 2


def test_averages_are_those_of_torch_and_are_what_is_evaluated_and_kept(tmp_path):
    decay = 0.8
    runner = make(tmp_path, ema=decay)
    reference = torch.optim.swa_utils.AveragedModel(
        runner.stn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    original = runner._tuner.averages.update
    reference.update_parameters(runner.stn.model)  # the first update copies

    def update():
        original()
        reference.update_parameters(runner.stn.model)

    runner._tuner.averages.update = update
    history = runner.fit(3)
    with runner._tuner.averages.swapped():
        for ours, theirs in zip(runner.stn.model.parameters(), reference.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    x, y = runner.valid_loader.dataset.tensors
    reference.eval()
    with torch.no_grad():
        assert F.cross_entropy(reference(x), y).item() == pytest.approx(history["valid_loss"][-1], rel=1e-4)
        live = F.cross_entropy(runner.stn.eval()(x), y).item()
    assert live != pytest.approx(history["valid_loss"][-1], rel=1e-3)
    assert without_times(make(tmp_path, ema=decay).fit(5)) == without_times(make(ema=decay).fit(5))


def test_schedulers_step_by_epoch_or_by_step_and_go_on_where_they_were(tmp_path):
    def settings():
        by_epoch = {
            "optimizer": lambda o: lr_scheduler.StepLR(o, 2),
            "hyper.optimizer": partial(lr_scheduler.ReduceLROnPlateau, threshold=0.0),
        }
        by_step = {"response.optimizer": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4)}
        return {"schedulers": by_epoch, "step_schedulers": by_step, "hyper": {"optimizer": torch.optim.Adam}}

    runner = make(tmp_path, **settings(), response={"every": 1})
    runner.fit(1)
    rate = runner.optimizers["response.optimizer"].param_groups[0]["lr"]
    assert rate == pytest.approx(0.01)  # five steps of four
    runner.fit(3)
    assert runner.optimizers["optimizer"].param_groups[0]["lr"] == pytest.approx(0.001)
    resumed = make(tmp_path, **settings(), response={"every": 1})
    assert without_times(resumed.fit(5)) == without_times(make(**settings(), response={"every": 1}).fit(5))
    assert resumed.updates.schedulers["hyper.optimizer"].best == min(resumed.history["valid_loss"])


def test_a_scheduler_acts_on_the_default_optimizer_of_lambda_and_so_does_a_way_back():
    """Rates by 0.1 an epoch; then by a half, as after a bad hyper step."""
    runner = make(schedulers={"hyper.optimizer": lambda o: lr_scheduler.StepLR(o, 1, 0.1)})
    rates = []
    runner.fit(1)
    optimizer = runner.optimizers["hyper.optimizer"]
    for epochs in (2, 3, 4):
        if epochs == 4:
            runner.updates.slow("hyper.optimizer", 0.5)
        done, steps = runner.hyper_steps, max(state["step"].item() for state in optimizer.state.values())
        assert done == steps > 0
        runner.fit(epochs)
        rates.append(learning_rate(optimizer) * math.sqrt(1 + (runner.hyper_steps - 1) / 25))
    assert rates == pytest.approx([0.4 * 0.01, 0.4 * 0.001, 0.4 * 0.0001 * 0.5])


class Wrapper(torch.optim.Optimizer):
    """Another optimizer's steps, whose groups it shares."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base = base

    def step(self, closure=None):
        self.base.step()

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


def test_a_scheduler_of_the_optimizer_that_a_wrapper_steps_acts():
    runner = make(
        optimizer=lambda p: Wrapper(torch.optim.SGD(p, lr=0.1)),
        schedulers={"optimizer": lambda o: lr_scheduler.StepLR(o.base, 1, 0.1)},
    )
    runner.fit(2)
    assert learning_rate(runner.optimizers["optimizer"]) == pytest.approx(0.001)


@dataclass
class Example:
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x, y: {"image": x, "label": y, "id": "a"}, lambda batch: (batch["image"], batch["label"])),
        (lambda x, y: (x, y, len(x)), lambda batch: batch[:2]),
        (Example, lambda batch: (batch.image, batch.label)),
    ],
    ids=["dict", "triple", "dataclass"],
)
def test_batches_of_any_structure_train_through_unpack(pack, unpack):
    pairs = [list(DataLoader(dataset(n, seed), 8)) for n, seed in ((40, 0), (30, 1))]
    packed = [[pack(x, y) for x, y in loader] for loader in pairs]

    def run(loaders, **settings):
        torch.manual_seed(0)
        stn = fxstn.transform(mlp(), STARTS)
        return without_times(fxstn.BilevelRunner(stn, F.cross_entropy, *loaders, progress=False, **settings).fit(2))

    assert run(packed, unpack=unpack) == run(pairs)
    with pytest.raises(ValueError, match="unpack="):
        run([[batch if isinstance(batch, dict) else (batch,) for batch in loader] for loader in packed])


def test_callbacks_see_each_row_and_may_stop_the_run():
    seen = []

    def watch(runner):
        seen.append(runner.history.rows[-1]["epoch"])
        if len(seen) == 3:
            runner.stop()

    runner = make(callbacks=[watch])
    assert len(runner.fit(6)) == 3
    assert seen == [1, 2, 3]
    assert len(runner.fit(6)) == 6


def test_the_history_is_also_lines_of_json(tmp_path):
    history = make().fit(3)
    history.to_jsonl(tmp_path / "history.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == history.rows


def test_the_bar_shows_losses_and_some_hyperparameters(capsys):
    make(progress=True).fit(2)
    shown = capsys.readouterr().err
    assert "valid=" in shown
    assert "2.dropout=0." in shown
    make().fit(1)
    assert capsys.readouterr().err == ""


# Replay


def test_a_schedule_goes_to_a_file_and_back_and_can_be_asked_at_any_time(tmp_path):
    schedule = Schedule({"a": [0.1, 0.3, 0.2], "b": [1.0, 1.0, 3.0]})
    schedule.to_json(tmp_path / "schedule.json")
    assert Schedule.from_json(tmp_path / "schedule.json").values == schedule.values
    assert schedule.epochs == 2
    assert schedule.at(0.5) == pytest.approx({"a": 0.2, "b": 1.0})
    assert schedule.at(1.25) == pytest.approx({"a": 0.275, "b": 1.5})
    assert schedule.at(7) == pytest.approx({"a": 0.2, "b": 3.0})
    assert schedule.until(1).at(2) == pytest.approx({"a": 0.3, "b": 1.0})
    assert schedule.final().at(0) == pytest.approx({"a": 0.2, "b": 3.0})
    assert schedule.for_epochs(4).values["a"] == pytest.approx([0.1, 0.2, 0.3, 0.25, 0.2])
    for wrong in ({}, {"a": []}, {"a": [1, 2], "b": [1]}):
        with pytest.raises(ValueError, match="a schedule needs as many values"):
            Schedule(wrong)


def test_replay_trains_on_the_schedule_and_takes_no_step_of_response_or_hyperparameters():
    tuned = make().fit(3)
    schedule = tuned.schedule()
    assert schedule.values["2.dropout"] == [pytest.approx(0.3), *tuned["2.dropout"]]
    runner = make(schedule=schedule)
    response = [p.clone() for p in runner.stn.response_parameters()]
    seen, original = [], runner.problem.general_loss

    def watched(inputs, target):
        seen.append(runner.stn.hparams.values())
        return original(inputs, target)

    runner.problem.general_loss = watched
    history = runner.fit(4)
    assert all(torch.equal(a, b) for a, b in zip(response, runner.stn.response_parameters(), strict=True))
    for name in runner.stn.hparams.names:
        assert history[name][:3] == pytest.approx(tuned[name], rel=1e-4)
        assert history[name][3] == pytest.approx(tuned[name][2], rel=1e-4)
        values = [tuned.start[name], *tuned[name], tuned[name][-1]]
        assert len(seen) == 20  # four epochs of five steps
        for step, at in enumerate(seen):
            epoch, share = divmod(step, 5)
            share = (share + 1) / 5
            assert at[name] == pytest.approx((1 - share) * values[epoch] + share * values[epoch + 1], rel=1e-4)
    assert "response_loss" not in history.rows[0]


def test_replay_of_a_schedule_that_never_moves_is_plain_training():
    torch.manual_seed(0)
    loaders = DataLoader(dataset(40, 0), 8), DataLoader(dataset(30, 1), 30)
    stn = fxstn.transform(mlp(0.0), [hp.WeightDecay("*", shared=True, init=1e-4)])
    plain = copy.deepcopy(stn.model)
    sgd = {"lr": 0.1, "momentum": 0.9}
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, *loaders, schedule=Schedule({"weight_decay": [0.05]}), progress=False,
                                 optimizer=lambda p: torch.optim.SGD(p, **sgd))  # fmt: skip
    runner.fit(3)
    groups = [[p for p in plain.parameters() if (p.dim() > 1) is decays] for decays in (True, False)]
    optimizer = torch.optim.SGD([{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1]}], **sgd)
    for _ in range(3):
        for x, y in loaders[0]:
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(runner.stn.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
