"""λ moves as far as there is something to gain: limits of its steps by the generalisation gap."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.noise import seed_of_step
from fxstn.bilevel.optim import SettlingAdam, set_gap
from tests.nets import mlp
from tests.runs import STARTS, dataset, grouped, make, same, without_times


def gap(runner: fxstn.BilevelRunner) -> float | None:
    return runner.optimizers["hyper.optimizer"].param_groups[0]["gap"]


def test_a_run_begins_with_a_gap_of_zero():
    """So that nothing rises in the first epoch, and little evidence lowers."""
    runner = make()
    assert gap(runner) == 0.0
    assert runner.optimizers["hyper.optimizer"].param_groups[0]["limited"] == [True] * 3


class Ends(fxstn.BilevelProblem):
    """One regularising number, near the lower end of its range or where there is none; its gradient is what loaders yield."""

    def __init__(self, logits: bool):
        super().__init__()
        self.weight, self.number = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), -9.0))
        self.logits = logits

    def general_parameters(self):
        return [self.weight]

    def hyper_parameters(self):
        return [self.number]

    def general_loss(self, inputs, target):
        return 1 + self.weight.square().sum()

    def hyper_loss(self, inputs, target):
        return 1 + (inputs * self.number).sum()

    def validation_loss(self, inputs, target):
        return inputs.sum() * 0 + 1, inputs

    def regularizing(self):
        return [True]

    def positions(self, unconstrained):
        return unconstrained.sigmoid() if self.logits else super().positions(unconstrained)


@pytest.mark.parametrize("logits", [True, False])
def test_only_a_number_near_an_end_of_its_range_needs_certainty_of_steps_towards_it(logits):
    """A gap of zero, so that steps down need no certainty but at the end; of that more than these gradients show."""
    noise = 1.0 + torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(noise, noise), 1)
    problem = Ends(logits)
    runner = fxstn.BilevelRunner(
        problem,
        loader,
        loader,
        hyper=fxstn.HyperSettings(
            train_steps=1, optimizer=lambda params: SettlingAdam(params, lr=0.1, settle=1e12, certainty=100.0)
        ),
        progress=False,
    )
    runner.fit(1)
    assert (problem.number.item() == -9.0) == logits


@pytest.mark.parametrize("high", [0.95, math.inf])
def test_where_in_their_ranges_the_numbers_of_a_network_are(high):
    """Reference: the constrained value as a share of the range; a range without upper end has no ends."""
    hparams = [hp.Dropout("2", init=0.3), hp.Scalar("a", 0.2, 0.0, high, regularizes=True)]
    runner = make(hparams=hparams, loss_fn=fxstn.cross_entropy)
    position = runner.optimizers["hyper.optimizer"].position(runner.stn.hparams.unconstrained.detach())
    shares = [0.3 / runner.problem.ranges()["2.dropout"][1], 0.2 / high if math.isfinite(high) else 0.5]
    torch.testing.assert_close(position, torch.tensor(shares))


class Rising(fxstn.BilevelProblem):
    """Two numbers whose gradient always says up, the first of which regularises; losses are what the loaders yield."""

    def __init__(self):
        super().__init__()
        self.weight, self.numbers = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))

    def general_parameters(self):
        return [self.weight]

    def hyper_parameters(self):
        return [self.numbers]

    def general_loss(self, inputs, target):
        return inputs.mean() + self.weight.square().sum()

    def hyper_loss(self, inputs, target):
        return inputs.mean() - self.numbers.sum()

    def validation_loss(self, inputs, target):
        return inputs.mean(), inputs

    def regularizing(self):
        return [True, False]


def test_a_run_measures_both_losses_after_each_epoch_and_nothing_rises_before_the_first():
    """Validation data at 0.4; training batches at 0.3, the first two of which are forgotten, at 9."""
    train = torch.cat([torch.full((8, 1), 9.0), torch.full((12, 1), 0.3)])
    loaders = [DataLoader(TensorDataset(x, x), 4) for x in (train, torch.full((4, 1), 0.4))]
    places, problem = [], Rising()
    runner = fxstn.BilevelRunner(
        problem,
        *loaders,
        hyper=fxstn.HyperSettings(
            train_steps=1,
            recalibrate=3,
            evaluation_share=1.0,
            optimizer=partial(SettlingAdam, lr=0.1, settle=1e12, certainty=None),
        ),
        progress=False,
        callbacks=[lambda run: places.append(problem.numbers.detach().clone())],
    )
    history = runner.fit(3)
    assert history["clean_train_loss"] == pytest.approx([0.3] * 3)
    first, second, third = torch.stack(places).diff(dim=0, prepend=torch.zeros(1, 2))
    torch.testing.assert_close(first, torch.tensor([0.0, 0.5]), rtol=1e-4, atol=1e-5)  # five steps
    for epoch in (second, third):
        torch.testing.assert_close(epoch, torch.tensor([0.25 * 0.5, 0.5]), rtol=1e-4, atol=1e-5)


def test_the_loss_on_training_batches_is_that_of_the_evaluated_network():
    """Without dropout, of the last two batches, which a plain copy of the network sees, too."""
    runner = make(hyper={"recalibrate": 2})
    seen, take = [], runner._train.take
    runner._train.take = lambda n: [seen.append(batch) or batch for batch in take(n)]
    (row,) = runner.fit(1)
    x, y = (torch.cat(parts) for parts in zip(*seen[-2:], strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(runner.best_model().eval()(x), y).item()
    assert row["clean_train_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["clean_train_loss"] != pytest.approx(row["train_loss"], rel=1e-3)
    assert gap(runner) == pytest.approx(min(max(1 - expected / row["valid_loss"], 0.0), 1.0), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [fxstn.PAPER, {"hyper": {"recalibrate": 0}}, {"hyper": {"optimizer": partial(SettlingAdam, limits=False)}},
     {"hparams": [hp.Scalar("a", 0.5, 0, 1)], "loss_fn": fxstn.cross_entropy}],
    ids=["paper", "no training batches", "asked not to", "nothing regularises"],
)  # fmt: skip
def test_where_nothing_is_limited_nothing_is_measured(settings):
    runner = make(**settings)
    (row,) = runner.fit(1)
    assert "clean_train_loss" not in row
    (group,) = runner.optimizers["hyper.optimizer"].param_groups
    assert group.get("gap") is None


@pytest.mark.parametrize("kind", [ValueError, AssertionError, KeyError, RuntimeError])
def test_a_validation_loss_that_takes_no_training_batches_is_a_warning_and_nothing_is_limited(kind):
    def picky_loss(output, target):
        if len(target) == 8:
            raise kind("a whole training batch")
        return F.cross_entropy(output, target)

    train, valid = (DataLoader(dataset(n, 0), size) for n, size in ((32, 8), (15, 5)))
    stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        train,
        list(valid),  # batches that stay as they are
        valid_loss_fn=picky_loss,
        hyper=fxstn.HyperSettings(train_steps=2),
        progress=False,
    )
    with pytest.warns(
        fxstn.RunWarning, match="λ is not limited.*a whole training batch.*give a valid_loss_fn that takes"
    ) as warned:
        history = runner.fit(2)
    assert {w.filename for w in warned if w.category is fxstn.RunWarning} == {__file__}
    assert all(map(math.isnan, history["clean_train_loss"]))
    assert gap(runner) is None


def test_a_training_batch_that_overflows_in_the_evaluation_is_said_once():
    """In float16 the step on that batch counts for nothing, and the evaluation of it is not finite."""
    (x, y), *rest = DataLoader(dataset(32, 0), 8)
    train, valid = [*rest, (1e5 * x, y)], list(DataLoader(dataset(15, 1), 5))
    stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        train,
        valid,
        execution=fxstn.ExecutionSettings(autocast=torch.float16),
        hyper=fxstn.HyperSettings(train_steps=1),
        progress=False,
    )
    with pytest.warns(
        fxstn.RunWarning, match=r"λ is not limited after an epoch .* is (nan|inf).*overflows; use"
    ) as warned:
        history = runner.fit(2)
    assert len([w for w in warned if "λ is not limited" in str(w.message)]) == 1
    assert not any(map(math.isfinite, history["clean_train_loss"]))
    assert all(map(math.isfinite, history["valid_loss"]))
    assert gap(runner) is None


def test_a_run_resumed_without_limits_has_none(tmp_path):
    make(tmp_path).fit(1)
    runner = make(tmp_path, hyper={"recalibrate": 0})
    with pytest.warns(fxstn.RunWarning, match=r"takes anew: hyper\.recalibrate=0 \(was 10\)$"):
        runner.fit(2)
    assert gap(runner) is None


def test_limits_are_part_of_a_saved_run(tmp_path):
    first = make(tmp_path / "a")
    first.fit(2)
    first.optimizers["hyper.optimizer"].param_groups[0]["gap"] = 0.1
    first.save(tmp_path / "run.pt")
    second = make()
    second.load(tmp_path / "run.pt")
    assert gap(second) == 0.1


@pytest.mark.parametrize("said", [[True], [True, False, True]])
def test_a_problem_must_say_of_each_number_whether_it_regularises(said):
    problem = Rising()
    problem.regularizing = lambda: said
    loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 4)
    with pytest.raises(
        ValueError, match=r"regularizing\(\) of Rising .* shapes \[\(2,\)\]; give one entry for each number"
    ):
        fxstn.BilevelRunner(problem, loader, loader)


def test_unpack_may_take_things_out_of_a_batch():
    batches = [{"x": x, "y": y} for x, y in DataLoader(dataset(16, 0), 8)]
    stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
    unpack = lambda batch: (batch.pop("x"), batch.pop("y"))  # noqa: E731
    hyper = fxstn.HyperSettings(evaluation_share=1.0)
    settings = {"hyper": hyper, "unpack": unpack, "progress": False}
    (row,) = fxstn.BilevelRunner(stn, F.cross_entropy, batches, batches, **settings).fit(1)
    assert row["clean_train_loss"] == pytest.approx(row["valid_loss"], rel=1e-5)


@pytest.mark.parametrize("argument", ["metrics", "columns"])
def test_a_metric_cannot_take_the_place_of_a_column_of_the_run(argument):
    with pytest.raises(ValueError, match=argument + r"\['clean_train_loss'\]: the history has a column of that name"):
        make(**{argument: {"clean_train_loss": fxstn.accuracy}})


def test_which_numbers_regularise():
    scalars = [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1, regularizes=True)]
    hparams = [hp.Dropout("2", init=0.3), *scalars, hp.LabelSmoothing()]
    space = make(hparams=hparams, loss_fn=fxstn.cross_entropy).stn.hparams
    assert {p.name: p.regularizes for p in space.hyperparameters} == {
        "2.dropout": True, "a": False, "b": True, "label_smoothing": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hparams", "text"),
    [
        (
            [hp.Dropout("2"), hp.Scalar("margin", 0.5, 0, 1)],
            r"nothing reads margin: loss_fn has no parameter hparams; give a",
        ),
        ([hp.LabelSmoothing()], r"nothing reads label_smoothing: .*; fxstn\.cross_entropy reads label_smoothing; give"),
    ],
)
def test_a_number_that_the_loss_cannot_read_is_a_warning(hparams, text):
    with pytest.warns(UserWarning, match=text):
        make(hparams=hparams)
    make(hparams=hparams, loss_fn=lambda output, target, hparams=None: F.cross_entropy(output, target))


@pytest.mark.parametrize("kind", [OSError, NameError, torch.OutOfMemoryError])
def test_a_fault_that_is_none_of_the_validation_loss_on_training_batches_is_raised(kind):
    def broken_loss(output, target):
        if len(target) == 8:
            raise kind("no matter which batch")
        return F.cross_entropy(output, target)

    loaders = [DataLoader(dataset(n, 0), size) for n, size in ((32, 8), (15, 5))]
    stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, *loaders, valid_loss_fn=broken_loss, progress=False)
    with pytest.raises(kind, match="no matter which batch"):
        runner.fit(1)


def joined(norm, gap, steps=60, **settings):
    """The share of response steps that draw one ε for the whole batch, at a generalisation gap."""
    stn = fxstn.transform(nn.Sequential(nn.Linear(6, 8), norm, nn.Dropout(0.2), nn.Linear(8, 3)))
    loader = DataLoader(dataset(8, 0), 4)
    problem = fxstn.BilevelRunner(stn, F.cross_entropy, loader, loader, **grouped(settings)).problem
    x, drawn = torch.randn(5, 6), []
    problem.follow_gap(gap)
    for step in range(steps):
        problem.begins_step(seed_of_step(0, step))
        drawn.append(problem._draw(x))
    assert {one.shape for one in drawn} == {(5, 1)}
    assert {one.stride() for one in drawn} == {(1, 1)}  # else torch.compile makes a graph for each kind
    return sum(float((one == one[:1]).all()) for one in drawn) / steps


def test_the_more_a_network_with_batch_norms_overfits_the_rarer_is_an_epsilon_per_example():
    """Truth: the share that is asked for, within three standard errors of 60 draws."""
    for gap, share in ((0.0, 0.0), (0.125, 0.5), (0.25, 1.0), (1.0, 1.0)):
        assert joined(nn.BatchNorm1d(8), gap) == pytest.approx(share, abs=0.2 if 0 < share < 1 else 0)
        assert joined(nn.LayerNorm(8), gap, steps=3) == 0.0
    assert joined(nn.BatchNorm1d(8), 1.0, steps=3, response={"perturb": "example"}) == 0.0


def test_a_problem_follows_the_gap_also_when_its_run_resumes(tmp_path):
    runner = make(tmp_path, hyper={"evaluation_share": 1.0})
    runner.fit(2)
    assert runner.problem._gap == gap(runner)
    resumed = make(tmp_path, hyper={"evaluation_share": 1.0})
    resumed.fit(2)
    assert resumed.problem._gap == gap(runner)
    free = make(hyper={"optimizer": partial(SettlingAdam, limits=False)})
    free.fit(1)
    assert free.problem._gap is None


def test_certain_steps_are_as_long_however_far_a_network_overfits():
    """Rises are multiplied by the gap alone."""
    moves = {}
    for share in (0.0, 0.5, 1.0):
        x = nn.Parameter(torch.zeros(2))
        optimizer = SettlingAdam([x], lr=0.1, settle=1e12, certainty=None)
        set_gap(optimizer, share, [True, True])
        for _ in range(5):
            x.grad = torch.tensor([1.0, -1.0])
            optimizer.step()
        moves[share] = x.detach()
    for share, move in moves.items():
        torch.testing.assert_close(move, 0.5 * torch.tensor([-1.0, share]), rtol=1e-4, atol=1e-6)


class ByData(torch.optim.SGD):
    """Writes into `.data`, which torch does not count, as optimizers outside of torch do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def test_strengths_follow_an_optimizer_of_lambda_that_torch_does_not_notice():
    """Truth: torch's SGD, bit for bit."""
    ends = []
    for kind in (torch.optim.SGD, ByData):
        run = make(hyper={"optimizer": partial(kind, lr=5.0), "train_steps": 2}, hparams=STARTS)
        rows = without_times(run.fit(2).rows)
        ends.append((rows, run.problem.values()))
    assert same(*ends)
    assert ends[0][1]["2.dropout"] != pytest.approx(0.3, abs=1e-3)
