"""Statistics of batch norms in an evaluation."""

from __future__ import annotations

import copy
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import fxstn
from benchmarks.norms import averaged as by_torch
from benchmarks.norms import norms_of
from fxstn import hp
from fxstn.bilevel.norm_statistics import recalibrated_norms
from tests.runs import grouped, same, without_times


class Net(nn.Sequential):
    """Batch norms of two kinds, and a group norm, which has no statistics."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip


def images(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 3, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator))


def share_of(ours: Tensor, sampled: Tensor, running: Tensor) -> float:
    """How far ours are on the way from the one to the other, the same for all channels."""
    way, whole = ours - sampled, running - sampled
    share = (way @ whole / (whole @ whole)).item()
    torch.testing.assert_close(way, share * whole, rtol=1e-3, atol=1e-5)
    return share


def shares_of(norms: list[_BatchNorm], sampled: list[_BatchNorm], running: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each norm's mean and of its variance."""
    shares = []
    for norm, other, (mean, variance) in zip(norms, sampled, running, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        shares += [share_of(norm.running_mean, other.running_mean, mean)]
        shares += [share_of(norm.running_var, other.running_var, variance)]
    return shares


def running_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms_of(model)]


@pytest.mark.parametrize("sizes", [(6, 6, 2), (6,)], ids=["far away", "one batch"])
def test_the_statistics_are_those_that_torch_makes_of_the_same_batches_and_the_old_ones_come_back(sizes):
    """Where the running ones are far from them, and where one batch does not say how noisy they are."""
    torch.manual_seed(0)
    model = Net()
    for norm in norms_of(model):
        norm.running_mean.normal_(std=1e4)
        norm.running_var.fill_(1e6)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.rand(n, 3, 8, 8) for n in sizes]
    expected, model = by_torch(model, batches), model.eval()
    with recalibrated_norms(norms_of(model), (model(x) for x in batches)):
        for ours, theirs in zip(norms_of(model), norms_of(expected), strict=True):
            torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0])
def test_the_statistics_of_few_batches_are_nearer_to_the_true_ones_for_the_running_ones(offset):
    """The error of the mean and of the variance over 200 draws of four batches, with running ones that are right or wrong."""
    torch.manual_seed(0)
    norm, center, deviation = nn.BatchNorm1d(16).double().eval(), torch.randn(16).double(), 1 + torch.rand(16).double()
    ours, sampled = torch.zeros(2), torch.zeros(2)
    for _ in range(200):
        batches = [center + deviation * torch.randn(8, 16, dtype=torch.float64) for _ in range(4)]
        norm.running_mean = center + offset * deviation + 0.05 * torch.randn(16)
        norm.running_var = deviation.square() * (1 + offset) * (1 + 0.05 * torch.randn(16))
        by_batches = by_torch(norm, batches)
        with recalibrated_norms([norm], (norm(x) for x in batches)):
            for errors, one in ((ours, norm), (sampled, by_batches)):
                errors[0] += ((one.running_mean - center) / deviation).square().mean()
                errors[1] += (one.running_var / deviation.square() - 1).square().mean()
    assert (ours < {0.0: 0.4, 0.1: 0.7, 1.0: 1.001}[offset] * sampled).all(), ours / sampled


def errors_of(change, running: float) -> Tensor:
    """Mean square errors of mean and variance of all channels but the last, ours over torch's averages, 100 × 4 batches of 16.

    change: what happens to the last channel of a batch.
    running: what the running statistics are off by.
    """
    torch.manual_seed(0)
    norm, errors = nn.BatchNorm1d(32).eval(), torch.zeros(2, 2)
    for _ in range(100):
        batches = [torch.randn(16, 32) for _ in range(4)]
        for x in batches:
            x[:, -1] = change(x[:, -1])
        norm.running_mean = running + 0.03 * torch.randn(32)
        norm.running_var = 1 + running + 0.03 * torch.randn(32)
        by_batches = by_torch(norm, batches)
        with recalibrated_norms([norm], (norm(x) for x in batches)):
            for sums, one in zip(errors, (norm, by_batches), strict=True):
                sums[0] += one.running_mean[:-1].square().mean()
                sums[1] += (one.running_var[:-1] - 1).square().mean()
    return errors[0] / errors[1]


@pytest.mark.parametrize(
    "change", [lambda x: x, torch.zeros_like, lambda x: 1e12 * x], ids=["alike", "constant", "large"]
)
def test_one_channel_of_another_kind_has_no_say_over_the_others(change):
    assert (errors_of(change, running=0.0) < 0.5).all()
    assert (errors_of(change, running=5.0) < 1.01).all()


@pytest.mark.parametrize("gap", [0.0, 3.0, 10.0])
def test_places_of_a_shared_norm_differ_and_that_is_no_noise(gap):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16).eval()
    norm.running_mean.fill_(1.0)

    def forward() -> None:
        for sign in (-1, 1):
            norm(torch.randn(32, 16) + sign * gap)

    with recalibrated_norms([norm], (forward() for _ in range(4))):
        assert norm.running_mean.mean().abs() < 0.1


def test_a_batch_that_overflows_counts_for_nothing_and_where_all_do_the_loss_shows_it():
    norm, batches = nn.BatchNorm1d(4).eval(), [torch.randn(9, 4) for _ in range(3)]
    norm.running_mean += 1
    with recalibrated_norms([norm], (norm(x) for x in batches)):
        ((mean, variance),) = running_of(norm)
    overflowing = torch.full((9, 4), torch.inf)
    with recalibrated_norms([norm], (norm(x) for x in (batches[0], overflowing, *batches[1:]))):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
    with recalibrated_norms([norm], (norm(overflowing) for _ in range(2))):
        assert norm(batches[0]).isnan().all()


def test_running_statistics_that_are_not_finite_are_not_followed():
    norm = nn.BatchNorm1d(4).eval()
    norm.running_mean.fill_(torch.nan)
    norm.running_var.fill_(torch.inf)
    with recalibrated_norms([norm], (norm(torch.randn(9, 4)) for _ in range(3))):
        assert norm.running_mean.isfinite().all()
        assert norm.running_var.isfinite().all()


def test_norms_that_see_nothing_or_one_value_keep_theirs():
    norm = nn.BatchNorm1d(3).eval()
    for batches in ((), (torch.randn(1, 3),)):
        with recalibrated_norms([norm], (norm(x) for x in batches)):
            assert torch.equal(norm.running_mean, torch.zeros(3))
            assert torch.equal(norm.running_var, torch.ones(3))


def make(model: nn.Module, specs: list[hp.Spec], out=None, train: int = 48, **settings) -> fxstn.BilevelRunner:
    torch.manual_seed(0)
    loaders = DataLoader(images(train, 0), 8, shuffle=True), DataLoader(images(24, 1), 24)
    stn = fxstn.transform(model, specs)
    return fxstn.BilevelRunner(
        stn, F.cross_entropy, *loaders, **grouped(settings, checkpoints={"out_dir": out}, progress=False)
    )


@pytest.mark.parametrize("augmented", [False, True], ids=["module", "graph"])
def test_a_run_evaluates_and_keeps_the_network_with_statistics_of_its_last_batches(augmented):
    """Also where a graph runs in the module's place in eval mode, since torchvision's transforms stay random there."""
    torch.manual_seed(0)
    model = nn.Sequential(v2.ColorJitter(0.4), Net()) if augmented else Net()
    runner = make(
        model,
        [hp.Dropout("1.6" if augmented else "6", init=0.6)],
        hyper={"recalibrate": 3},
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    )  # better than its start after an epoch
    seen, take = [], runner._train.take

    def watched(n):
        batches = take(n)
        seen.extend(x for x, _ in batches)
        return batches

    runner._train.take = watched
    loss = runner.fit(1)["valid_loss"][-1]
    net = runner.stn.model[1] if augmented else runner.stn.model
    best = runner.best_model()[1] if augmented else runner.best_model()
    shares = shares_of(norms_of(best), norms_of(by_torch(net, seen[-3:])), running_of(net))
    assert all(0 < share < 1 for share in shares), shares
    x, y = runner.valid_loader.dataset.tensors
    with torch.no_grad():
        assert F.cross_entropy(best.eval()(x), y).item() == pytest.approx(loss, rel=1e-5)
        assert F.cross_entropy(net.eval()(x), y).item() != pytest.approx(loss, rel=1e-4)
    assert runner.evaluate()["valid_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("rest", [0, 2])
def test_the_rest_of_a_pass_takes_no_whole_batch_s_place(rest):
    """An evaluation of so short an epoch has four batches for its statistics, and three for the loss of training."""
    runner = make(Net(), [hp.Dropout("6")], train=80 + rest)
    sizes = []

    def note(module, inputs):
        if not module.training:
            sizes.append(len(inputs[0]))

    runner.stn.model[0].register_forward_pre_hook(note)
    runner.fit(1)
    more, validation = [rest] * (rest > 0), [24]
    expected = [*validation, *[8] * 4, *more, *validation, *[8] * 3, *more]  # the first before training
    assert sizes[: len(expected)] == expected


def test_without_recalibration_it_is_the_network_as_it_is():
    runner = make(Net(), [hp.Dropout("6")], hyper={"recalibrate": 0})
    loss = runner.fit(1)["valid_loss"][-1]
    x, y = runner.valid_loader.dataset.tensors
    with torch.no_grad():
        assert F.cross_entropy(runner.stn.model.eval()(x), y).item() == pytest.approx(loss, rel=1e-5)


def test_a_norm_that_the_user_froze_keeps_its_statistics():
    model = Net()
    model[1].eval()
    runner = make(model, [hp.Dropout("6")])
    runner.fit(1)
    saved_norms = norms_of(runner.best_model())
    assert torch.equal(saved_norms[0].running_mean, torch.zeros(4))
    assert not torch.equal(saved_norms[1].running_mean, torch.zeros(8))


def test_a_cut_run_recalibrates_on_the_same_batches(tmp_path):
    def losses(history):
        return [row["valid_loss"] for row in history]

    torch.manual_seed(0)
    net = Net()
    whole = make(net, [hp.Dropout("6")]).fit(3)
    make(net, [hp.Dropout("6")], tmp_path).fit(1)
    assert losses(make(net, [hp.Dropout("6")], tmp_path).fit(3)) == losses(whole)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.7}], ids=["plain", "ema"])
def test_a_resumed_run_evaluates_with_the_statistics_of_the_last_evaluation(tmp_path, settings):
    """So does a run that loads the file; all three evaluate, and go on, alike to the last bit."""
    torch.manual_seed(0)
    net = Net()
    test = DataLoader(images(30, 2), 7)

    def results(runner):
        norms = [norm.running_var.clone() for norm in norms_of(runner.best_model())]
        return runner.evaluate(), runner.evaluate(test), norms, runner.stn.state_dict()

    whole = make(net, [hp.Dropout("6")], tmp_path / "run", **settings)
    rows = whole.fit(2).rows
    whole.save(tmp_path / "other.pt")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    resumed, loaded = (make(net, [hp.Dropout("6")], out, **settings) for out in (tmp_path / "copy", None))
    resumed.fit(2)
    loaded.load(tmp_path / "other.pt")
    expected = results(whole)
    assert expected[0]["valid_loss"] == rows[-1]["valid_loss"]
    for runner in (resumed, loaded):
        assert same(results(runner), expected)
    for runner in (whole, resumed, loaded):
        torch.manual_seed(3)  # the evaluations before drew from the one generator that all three share
        runner.fit(3)
    assert same(results(resumed), results(whole))
    assert same(results(loaded), results(whole))


def test_a_run_cut_in_mid_epoch_evaluates_as_the_one_that_was_cut(tmp_path):
    torch.manual_seed(0)
    net = Net()
    expected = without_times(make(net, [hp.Dropout("6")], hyper={"train_steps": 1}).fit(3))
    cut = make(net, [hp.Dropout("6")], tmp_path, hyper={"train_steps": 1})
    hyper_step = cut._tuner.stepper.hyper

    def end_at_step_ten(batch):
        cut._stop.signal = signal.SIGTERM if cut.steps == 10 else None
        return hyper_step(batch)

    cut._tuner.stepper.hyper = end_at_step_ten
    with pytest.raises(SystemExit):
        cut.fit(3)
    loaded = make(net, [hp.Dropout("6")], hyper={"train_steps": 1})
    loaded.load(tmp_path / "last.pt")
    assert loaded.steps == cut.steps == 10  # the fourth of six steps of the second epoch
    assert loaded.evaluate() == cut.evaluate() == loaded.evaluate()
    loaded.load(tmp_path / "last.pt")  # with the generators as they were: an evaluation draws the seeds of its workers
    assert same(without_times(loaded.fit(3)), expected)


def test_weights_that_a_user_writes_are_evaluated_with_statistics_of_their_own():
    runner = make(Net(), [hp.Dropout("6")])
    runner.fit(1)
    before = runner.evaluate()
    with torch.no_grad():
        runner.stn.model[0].weight.mul_(2)
    x, y = runner.valid_loader.dataset.tensors
    model, recent = runner.stn.model.eval(), [x for x, _ in runner._train.recent]
    with torch.no_grad(), recalibrated_norms(norms_of(model), (model(x) for x in recent)):
        expected = F.cross_entropy(model(x), y).item()
    assert runner.evaluate()["valid_loss"] == pytest.approx(expected, rel=1e-5)
    assert runner.evaluate() != before
