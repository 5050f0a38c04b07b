"""What is averaged over what: batches of unequal size, padding, weights and processes count as one batch of everything."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.bilevel.counts import as_loss
from tests.runs import dataset, grouped, make

WEIGHT = torch.tensor([0.2, 1.0, 3.0])


def network(specs=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))
    return fxstn.transform(model, specs or [hp.WeightDecay(shared=True, init=1e-2)], **settings)


def classes(n: int, padding: int | None = None):
    """Classes of n examples; a third or so of them are padding."""
    generator = torch.Generator().manual_seed(n)
    target = torch.randint(3, (n,), generator=generator)
    if padding is not None:
        target[torch.rand(n, generator=generator) < 0.35] = padding
    return target


def shares(n: int):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) + 0.1


def batches(target, sizes=(4, 4, 1)):
    x = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(9))
    return list(zip(x.split(sizes), target(sum(sizes)).split(sizes), strict=True))


def joined(parts):
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


class Doubled(nn.CrossEntropyLoss):
    def forward(self, output, target):
        return 2 * super().forward(output, target)


def masked(output, target):
    losses, counted = F.cross_entropy(output, target.clamp(min=0), reduction="none"), target >= 0
    return (losses * counted).sum() / counted.sum()


def of_sentences(output, target):
    """A mean over the sentences of a batch, one example each, in a loop."""
    return sum(F.cross_entropy(row[None], entry[None]) for row, entry in zip(output, target, strict=True)) / len(target)


def autoencoder(output, target):
    return F.mse_loss(output, target, reduction="sum") - 0.5 * torch.sum(1 + output - output.exp())


padded, zero_padded = partial(classes, padding=-100), partial(classes, padding=0)
LOSSES = {
    "classes": (F.cross_entropy, classes),
    "padding": (F.cross_entropy, padded),
    "padding of class 0": (partial(F.cross_entropy, ignore_index=0), zero_padded),
    "module": (nn.CrossEntropyLoss(ignore_index=0), zero_padded),
    "weights of classes": (nn.CrossEntropyLoss(weight=WEIGHT), padded),
    "label smoothing": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), padded),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), padded),
    "sum with label smoothing": (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), padded),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT), lambda n: shares(n).softmax(1)),
    "NLL": (lambda output, y: nn.NLLLoss(weight=WEIGHT)(output.log_softmax(1), y), padded),
    "BCE": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), shares),
    "MSE": (F.mse_loss, shares),
    "MSE with weights": (lambda output, y: F.mse_loss(output, y, weight=y), shares),
    "sum of squares": (nn.MSELoss(reduction="sum"), shares),
    "KL": (lambda output, y: F.kl_div(output.log_softmax(1), y, reduction="batchmean"), shares),
    "multi-label": (nn.MultiLabelSoftMarginLoss(), shares),
    "subclass": (Doubled(), padded),
    "fxstn": (fxstn.cross_entropy, padded),
    "function": (lambda output, y: 0.5 * F.cross_entropy(output.flatten(1), y, ignore_index=0), zero_padded),
    "two terms": (lambda output, y: 0 * output.square().mean() + F.cross_entropy(output, y), padded),
    "own mask": (masked, padded),
    "loop": (of_sentences, classes),
    "autoencoder": (autoencoder, shares),
    "sum and count": (lambda output, y: (F.cross_entropy(output, y, reduction="sum"), (y != -100).sum()), padded),
}


def at_once(loss_fn, output, target):
    value = loss_fn(output, target)
    return value[0] / value[1] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", LOSSES)
def test_the_validation_loss_is_that_of_all_batches_at_once(name):
    loss_fn, target = LOSSES[name]
    parts = batches(target)
    stn = network()
    runner = fxstn.BilevelRunner(stn, loss_fn, parts, parts, progress=False)
    x, y = joined(parts)
    expected = at_once(loss_fn, stn.model(x), y).item()
    assert runner.evaluate()["valid_loss"] == pytest.approx(expected, rel=1e-5)


def run_one_step(loss_fn, parts, accumulate, specs=None, **settings):
    """The weights after one step of each kind, with ε the same for every batch."""
    stn = network(specs, **({"method": settings.pop("method")} if "method" in settings else {}))
    stn.hparams.sample = lambda n, generator=None: torch.full((n, len(stn.hparams)), 0.3)
    sgd = partial(torch.optim.SGD, lr=0.1)
    runner = fxstn.BilevelRunner(
        stn, loss_fn, parts, [joined(parts)], optimizer=sgd, accumulate=accumulate, progress=False,
        response=fxstn.ResponseSettings(optimizer=sgd, every=1, perturb="batch"),
        hyper=fxstn.HyperSettings(optimizer=sgd, train_steps=1, recalibrate=0), **settings,
    )  # fmt: skip
    runner._valid.resize(len(joined(parts)[1]))  # that of all parts, not that of one
    row = runner.fit(1).rows[0]
    return [p.detach().clone() for p in stn.parameters()], row


DECAYS = [hp.WeightDecay(shared=True, init=0.05), hp.ActivationDecay("1", init=0.5)]


@pytest.mark.parametrize("method", ["delta", "stn"])
@pytest.mark.parametrize("name", ["classes", "padding", "weights of classes", "sum", "own mask", "sum and count"])
def test_accumulated_batches_of_unequal_size_are_one_batch(name, method):
    loss_fn, target = LOSSES[name]
    parts = batches(target)
    decay = DECAYS if name in ("classes",) else DECAYS[:1]
    (accumulated, row), (whole, expected) = (
        run_one_step(loss_fn, p, n, decay, method=method) for p, n in ((parts, 3), ([joined(parts)], 1))
    )
    for ours, theirs in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    if method == "delta":
        assert row["response_loss"] == pytest.approx(expected["response_loss"], rel=1e-5)


def test_losses_of_the_history_are_means_over_what_counts():
    """Steps of unequal size and with more or less padding, at a rate of zero."""
    parts = batches(padded)
    stn = network([hp.Dropout("2", init=1e-3)])
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        parts,
        parts,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        hyper=fxstn.HyperSettings(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)),
        progress=False,
    )
    stn.hparams.set({"2.dropout": 1e-9})
    row = runner.fit(1).rows[0]
    x, y = joined(parts)
    expected = F.cross_entropy(stn.eval()(x), y).item()
    assert row["valid_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert runner._tuner.evaluator.clean_train_loss() == pytest.approx(expected, rel=1e-5)


def test_a_sum_of_training_batches_is_compared_with_one_of_as_many_validation_entries():
    parts = batches(classes)
    hyper = fxstn.HyperSettings(evaluation_share=1.0)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    runner = fxstn.BilevelRunner(network(), loss_fn, parts[:2], parts * 5, hyper=hyper, progress=False)
    row = runner.fit(1).rows[0]
    x, y = joined(parts[:2])
    mean = F.cross_entropy(runner.stn.model(x), y).item()
    assert row["clean_train_loss"] == pytest.approx(45 * mean, rel=1e-5)


def values_of_a_run(reduction, settings):
    """λ after each epoch, of a runner; the rate of the weights makes up for a loss that is a sum."""
    x, y = (part.double() if part.is_floating_point() else part for part in dataset(60, 0).tensors)
    train, valid = (list(zip(x[rows].split(size), y[rows].split(size), strict=True)) for rows, size in
                    ((slice(40), 8 // settings.get("accumulate", 1)), (slice(40, 60), settings.pop("valid", 8))))  # fmt: skip
    rate = 0.3 if reduction == "mean" else 0.3 / 8
    runner = fxstn.BilevelRunner(
        network([hp.Dropout(init=0.3)]).double(), partial(F.cross_entropy, reduction=reduction), train, valid,
        optimizer=partial(torch.optim.SGD, lr=rate), progress=False, **grouped(settings),
    )  # fmt: skip
    return runner.fit(12).schedule().values


@pytest.mark.parametrize(
    "settings", [{}, {"valid": 3}, {"accumulate": 4}, {"hyper": {"fraction": 0.3}}], ids=lambda settings: str(settings)
)
@pytest.mark.filterwarnings("ignore:.*still learns fast")
def test_a_sum_moves_lambda_as_the_mean_does(settings):
    torch.manual_seed(0)
    mean = values_of_a_run("mean", dict(settings))
    torch.manual_seed(0)
    total = values_of_a_run("sum", dict(settings))
    (values,), (others,) = mean.values(), total.values()
    assert max(values) - min(values) > 0.05
    torch.testing.assert_close(others, values, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.*still learns fast")
def test_a_sum_moves_lambda_as_the_mean_does_in_a_loop_that_accumulates():
    def values(reduction):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
        x, y = (part.double() if part.is_floating_point() else part for part in dataset(60, 0).tensors)
        train, valid = list(zip(x[:40].split(2), y[:40].split(2), strict=True)), [(x[40:], y[40:])]
        loss_fn, share = partial(F.cross_entropy, reduction=reduction), 4 if reduction == "mean" else 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3 if reduction == "mean" else 0.3 / 8)
        tuner = fxstn.tune(model, optimizer, loss_fn, None, valid, [hp.Dropout()], epoch_steps=5)
        for number, batch in enumerate(train * 12):
            (loss_fn(model(batch[0]), batch[1]) / share).backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            tuner.step(batch)
        tuner.detach()
        return next(iter(tuner.history.schedule().values.values()))

    mean, total = values("mean"), values("sum")
    assert max(mean) - min(mean) > 0.05
    torch.testing.assert_close(total, mean, rtol=1e-4, atol=0)


def test_batches_of_padding_alone_count_for_nothing():
    (x, y), *rest = batches(classes)
    nothing = x, torch.full_like(y, -100)
    for loss_fn in (F.cross_entropy, fxstn.cross_entropy, LOSSES["sum and count"][0]):
        runners = []
        for parts in ([nothing, *rest], rest):
            stn = network()
            runners.append(fxstn.BilevelRunner(stn, loss_fn, parts, parts, metrics={"accuracy": fxstn.accuracy},
                                               accumulate=len(parts), progress=False))  # fmt: skip
            runners[-1].fit(1)
        ours, theirs = runners
        for name in ("train_loss", "valid_loss", "accuracy"):
            assert ours.history[name] == pytest.approx(theirs.history[name], rel=1e-5)
        for p, q in zip(ours.stn.general_parameters(), theirs.stn.general_parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        alone = fxstn.BilevelRunner(
            network(), loss_fn, [nothing], rest, progress=False, checkpoints=fxstn.CheckpointSettings(rollbacks=0)
        )
        assert alone.fit(1)["train_loss"] == [0.0]
        with pytest.raises(
            ValueError, match="loader has nothing that valid_loss is a mean over: all its targets are ign"
        ):
            alone.evaluate([nothing])


def test_metrics_are_means_over_the_entries_that_the_loss_counts():
    parts = batches(zero_padded)
    x, y = joined(parts)

    def right(output, target):
        return (output.argmax(1) == target)[target != 0].float()

    metrics = {"mean": lambda o, t: right(o, t).mean(), "total": lambda o, t: (right(o, t).sum(), len(right(o, t)))}
    for weight in (None, WEIGHT):  # the weights of classes are none of a metric's
        loss_fn = nn.CrossEntropyLoss(weight, ignore_index=0)
        runner = fxstn.BilevelRunner(network(), loss_fn, parts, parts, metrics=metrics, progress=False)
        values = runner.evaluate()
        expected = right(runner.stn.model(x), y).mean().item()
        assert values["mean"] == pytest.approx(expected, rel=1e-6)
        assert values["total"] == pytest.approx(expected, rel=1e-6)


def test_a_metric_over_nothing_is_nan_and_the_run_goes_on(tmp_path):
    """The recall of a class that does not occur in the validation set."""
    parts = [(x, y.clamp(max=1)) for x, y in batches(classes)]

    def recall(number, output, target):
        return (output.argmax(1) == target)[target == number].sum(), (target == number).sum()

    metrics = {f"recall {number}": partial(recall, number) for number in (1, 2)} | {"none": lambda o, t: (0, 0)}
    settings = {"metrics": metrics, "checkpoints": fxstn.CheckpointSettings(out_dir=tmp_path), "progress": False}
    history = fxstn.BilevelRunner(network(), F.cross_entropy, parts, parts, **settings).fit(2)
    resumed = fxstn.BilevelRunner(network(), F.cross_entropy, parts, parts, **settings).fit(3)
    for rows in (history, resumed):
        assert all(map(math.isnan, rows["recall 2"] + rows["none"]))
        assert all(0 <= value <= 1 for value in rows["recall 1"])
    assert len(resumed) == 3


def test_metrics_of_targets_that_are_no_tensor_count_as_the_loss_does():
    parts = [(x, {"classes": y}) for x, y in batches(zero_padded)]
    x, y = joined(batches(zero_padded))
    counted = y != 0

    def loss_fn(output, target):
        return F.cross_entropy(output, target["classes"], WEIGHT, ignore_index=0)

    def right(output, target):
        return (output.argmax(1) == target["classes"])[target["classes"] != 0].float().mean()

    runner = fxstn.BilevelRunner(network(), loss_fn, parts, parts, metrics={"right": right}, progress=False)
    expected = (runner.stn.model(x).argmax(1) == y)[counted].float().mean().item()
    assert runner.evaluate()["right"] == pytest.approx(expected, rel=1e-6)


def test_accuracy_leaves_ignored_targets_out():
    output = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert fxstn.accuracy(output, torch.tensor([0, 0, -100])) == 0.5


def test_the_smoothed_loss_is_that_of_torch_also_with_padding_and_further_dimensions():
    output = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.stack([padded(5), padded(6)[:5], classes(5), padded(5)])
    for smoothing in (0.0, 0.1):
        ours = fxstn.cross_entropy(output, target, {"label_smoothing": torch.full((4,), smoothing)})
        torch.testing.assert_close(ours, F.cross_entropy(output, target, label_smoothing=smoothing))
    torch.testing.assert_close(fxstn.cross_entropy(output, target), F.cross_entropy(output, target))


def test_the_objectives_take_a_sum_and_its_count():
    ((x, y),) = batches(padded, (9,))
    loss_fn = LOSSES["sum and count"][0]
    for objective in (fxstn.general_loss, fxstn.hyper_loss):
        torch.testing.assert_close(*(objective(network(), f, x, y) for f in (loss_fn, F.cross_entropy)))
    for wrong in (lambda o, y: (o, 3), lambda o, y: (o.sum(), y), lambda o, y: (o.sum(), 2, 3)):
        with pytest.raises(
            ValueError, match=r"loss_fn must return a scalar tensor, .* give losses.mean\(\) or \(sum, count\)"
        ):
            fxstn.general_loss(network(), wrong, x, y)


class Mean(fxstn.BilevelProblem):
    """The mean of the numbers of a batch, of which those that are NaN are missing."""

    def __init__(self):
        super().__init__()
        self.at, self.number = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def general_parameters(self):
        return [self.at]

    def hyper_parameters(self):
        return [self.number]

    def general_loss(self, inputs, target):
        there = ~target.isnan()
        return 0.5 * (self.at - target[there]).square().sum(), there.sum()

    def hyper_loss(self, inputs, target):
        return (self.number - 1) ** 2

    def validation_loss(self, inputs, target):
        return self.general_loss(inputs, target), inputs


def test_a_problem_of_ones_own_may_say_what_its_losses_are_means_over():
    target = torch.tensor([1.0, 2.0, 6.0, torch.nan, torch.nan])
    parts = [(target[:1], target[:1]), (target[1:], target[1:])]
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "accumulate": 2, "progress": False}
    problem = Mean()
    history = fxstn.BilevelRunner(problem, parts, parts, **settings).fit(1)
    assert problem.at.item() == pytest.approx(3.0)
    assert history["valid_loss"] == [pytest.approx(0.5 * (4 + 1 + 9) / 3)]
    assert history["train_loss"] == [pytest.approx(0.5 * (1 + 4 + 36) / 3)]


def test_a_mean_in_half_precision_counts_further_than_its_type():
    output, target = torch.zeros(3001, 3, dtype=torch.bfloat16, requires_grad=True), classes(3001, -100)
    loss = as_loss(F.cross_entropy(output, target), output, target)
    assert int(loss.count) == int((target != -100).sum())


def seen_by_hyper_steps(model, size, specs=None, examples=10, **settings):
    """The validation examples that the hyper steps of two passes see, by number, and the runner."""
    torch.manual_seed(0)
    x = torch.randn(examples, 6)
    x[:, 0] = torch.arange(examples)
    parts = list(zip(x.split(size), (torch.arange(examples) % 3).split(size), strict=True))
    stn = fxstn.transform(model, specs or [hp.Dropout("2", init=0.3)], **settings.pop("transform", {}))
    train = 2 * len(parts) * [(x, torch.arange(examples) % 3)]
    runner = fxstn.BilevelRunner(
        stn, F.cross_entropy, train, parts, **grouped(settings, hyper={"train_steps": 1}, progress=False)
    )
    seen, hyper = [], runner._tuner.stepper.hyper
    runner._tuner.stepper.hyper = lambda batch: (seen.extend(batch[0][:, 0].int().tolist()), hyper(batch))
    runner.fit(1)
    return seen, runner


def layers(*norms):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), *norms, nn.Flatten(), nn.Linear(8, 3))


PICTURES = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2))  # four values per channel of one example


@pytest.mark.parametrize("norms", [(), (nn.LayerNorm(8),), (PICTURES,)], ids=["none", "layer norm", "pictures"])
def test_hyper_steps_see_every_validation_batch_of_one_example_that_can_be_normalised(norms):
    assert seen_by_hyper_steps(layers(*norms), 1)[0] == 2 * list(range(10))


@pytest.mark.parametrize("transform", [{"statistics": "running"}, {"method": "stn"}], ids=["running", "stn"])
def test_a_norm_that_uses_running_statistics_takes_one_example(transform):
    assert seen_by_hyper_steps(layers(nn.BatchNorm1d(8)), 1, transform=transform)[0] == 2 * list(range(10))


def test_a_rest_of_one_example_is_left_out_where_it_cannot_be_normalised():
    assert seen_by_hyper_steps(layers(nn.BatchNorm1d(8)), 3)[0][:18] == [*range(9), *range(9)]
    assert seen_by_hyper_steps(layers(), 3)[0] == 2 * list(range(10))


def test_validation_batches_of_one_example_under_a_batch_norm_are_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match="'3' has one value per channel to normalise by: give valid_loader a batch_size of 2"
    ):
        seen_by_hyper_steps(layers(nn.BatchNorm1d(8)), 1)


def test_a_part_of_a_batch_has_two_examples_where_a_batch_norm_needs_them():
    settings = {"hyper": {"fraction": 0.1}, "response": {"fraction": 0.01, "every": 1}}
    for norms, examples in (((), 1), ((nn.BatchNorm1d(8),), 2)):
        runner = seen_by_hyper_steps(layers(*norms), 10, **settings)[1]
        sizes, outputs = [], runner.stn.perturbed_output
        runner.stn.perturbed_output = lambda x, **kw: (sizes.append(len(x)), outputs(x, **kw))[1]  # noqa: B023
        runner.fit(2)
        assert set(sizes) - {10} == {examples}


def test_a_pass_over_a_loader_switches_to_eval_mode_once_and_back(monkeypatch):
    """Not at all where the network is in eval mode."""
    runner = make()
    evaluator, modes, train = runner._tuner.evaluator, [], fxstn.SelfTuningNetwork.train
    monkeypatch.setattr(
        fxstn.SelfTuningNetwork, "train", lambda stn, mode=True: (modes.append(mode), train(stn, mode))[1]
    )
    for training, switches in ((True, [False, True]), (False, [])):
        runner.stn.train(training)
        before = [module.training for module in runner.stn.modules()]
        modes.clear()
        evaluator.means(runner.valid_loader, "valid_loader")
        assert modes == switches
        assert [module.training for module in runner.stn.modules()] == before
