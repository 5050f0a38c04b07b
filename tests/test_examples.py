"""The examples, each in a small setting, and what a problem of one's own gets from the runner."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from examples import class_weights, detection, label_noise, own_loop
from fxstn import hp
from tests.runs import grouped, without_times

SMALL = SimpleNamespace(train_size=200, valid_size=50, noise=0.4, eta=0.15, lr=0.02, hyper_lr=0.1)


def noisy(out_dir=None, seed: int = 0):
    """A small run of examples/label_noise.py."""
    runner = label_noise.prepare(SMALL, seed, out_dir)[0]
    runner.progress = False
    return runner


def accuracy_in(printed: str) -> float:
    return float(printed.rpartition("accuracy")[2])


def last_dropout(printed: str) -> float:
    return float(printed.rpartition("dropout ")[2].split(",")[0])


# Examples


def test_own_loop_trains_and_tunes(capsys):
    plain = own_loop.main(["--epochs", "5"])
    assert type(plain) is nn.Sequential
    assert all("forward" not in vars(module) for module in plain.modules())
    printed = capsys.readouterr().out
    assert printed.count("epoch") == 5
    assert accuracy_in(printed) > 0.7
    assert last_dropout(printed) < 0.45  # from 0.5


def test_a_loop_of_accelerate_trains_and_tunes(capsys):
    pytest.importorskip("accelerate", reason="accelerate comes with the extra fxstn[accelerate]")
    from examples import with_accelerate

    plain = with_accelerate.main(["--cpu", "--epochs", "3"])
    assert type(plain) is nn.Sequential
    printed = capsys.readouterr().out
    assert accuracy_in(printed) > 0.7
    assert last_dropout(printed) < 0.48  # from 0.5


def test_weights_of_examples_tell_right_labels_from_wrong_ones():
    found = label_noise.main(["--epochs", "10", "--seeds", "1"])
    (learned,), (plain,) = found["weights learned"], found["plain"]
    assert learned[2] > 0.85  # 0.954 to 0.976 with five seeds
    assert learned[0] > 0.88  # 0.932 to 0.960
    assert learned[0] > plain[0]  # 0.949 and 0.923 in the mean; plain training has just begun to learn the wrong labels
    assert plain[2] == 0.5  # no hyper step


def test_weights_of_classes_move_towards_the_rare_class():
    found = class_weights.main(["--epochs", "10", "--seeds", "1"])
    ((tuned, common, rare),), ((plain, *untouched),) = found["tuned"], found["weights 1"]
    assert common < 0.7
    assert rare > 1.4
    assert untouched == pytest.approx([1, 1])
    assert tuned > plain


def test_the_hypergradient_reaches_the_weights_of_classes_through_the_response():
    stn = fxstn.transform(nn.Linear(4, 2), [hp.Scalar(n, 1.0, 0.05, 20.0, log=True) for n in ("common", "rare")])
    x, y = torch.randn(8, 4), torch.tensor([0, 1] * 4)

    def gradient() -> torch.Tensor:
        stn.zero_grad()
        fxstn.hyper_loss(stn, class_weights.loss_fn, x, y, perturb="off").backward()
        return stn.hparams.unconstrained.grad

    assert not gradient().any()  # Θ is zero at first
    fxstn.response_loss(stn, class_weights.loss_fn, x, y).backward()
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter -= 0.1 * parameter.grad
    assert gradient().all()


def test_a_detector_of_drawn_shapes_trains_and_tunes(capsys):
    image, target = detection.drawn(40, 0)[3]
    assert image.shape == (3, 64, 64)
    assert ((target["boxes"] >= 0) & (target["boxes"] <= 64)).all()
    sizes = ["--train-size", "8", "--valid-size", "2", "--test-size", "2", "--width", "4", "--epochs", "1"]
    with pytest.warns(UserWarning, match="one ε for the whole batch"):  # they meet in its batch norms
        results = detection.main([*sizes, "--seeds", "1", "--no-progress"])
    assert "augment.1.rotation" in capsys.readouterr().out
    assert {name: len(runs) for name, runs in results.items()} == {"start kept": 1, "tuned": 1}
    for (run,) in results.values():
        assert all(math.isfinite(run[column]) for column in detection.COLUMNS)


def test_average_precision_counts_each_true_box_once():
    class Answers(nn.Module):
        def forward(self, images):
            near, far = [10.0, 10.0, 20.0, 20.0], [30.0, 30.0, 40.0, 40.0]
            boxes = torch.tensor([near, near, far, far])
            return [
                {"boxes": boxes, "labels": torch.tensor([1, 1, 2, 3]), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
            ]

    target = {"boxes": torch.tensor([[10.0, 10, 20, 21], [30, 30, 40, 40], [0, 0, 9, 9], [30, 30, 40, 40]]),
              "labels": torch.tensor([1, 2, 2, 3])}  # fmt: skip
    found = detection.average_precision(Answers(), [((torch.ones(3, 64, 64),), (target,))])
    assert found == pytest.approx((1 + 0.5 + 1) / 3)


# A problem of one's own in the runner


def test_the_hypergradient_one_step_ahead_is_a_central_difference():
    problem = label_noise.Reweighting(nn.Linear(5, 3), 6, eta=0.3).double()
    x, y, xv, yv = torch.randn(6, 5).double(), torch.arange(6) % 3, torch.randn(9, 5).double(), torch.arange(9) % 3
    problem.general_loss((x, torch.arange(6)), y)
    problem.hyper_loss(xv, yv).backward()
    assert all(w.grad is None for w in problem.model.parameters())
    for i in range(6):
        values = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                problem.logits[i] += change
            values.append(problem.hyper_loss(xv, yv).item())
            with torch.no_grad():
                problem.logits[i] -= change
        assert problem.logits.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_a_cut_run_of_an_own_problem_ends_like_an_uncut_one(tmp_path):
    whole = noisy()
    whole.fit(4)
    noisy(tmp_path).fit(2)
    torch.manual_seed(99)
    resumed = noisy(tmp_path)
    resumed.fit(4)
    assert without_times(resumed.history) == without_times(whole.history)
    assert torch.equal(resumed.problem.logits, whole.problem.logits)
    assert len(whole.problem.seen) == len(resumed.problem.seen) > 0
    assert all(map(torch.equal, resumed.problem.seen, whole.problem.seen))


def test_an_own_problem_has_history_best_model_and_plot(tmp_path):
    runner = noisy(tmp_path)
    history = runner.fit(3)
    assert set(history.rows[0]) == {
        "epoch",
        "train_loss",
        "valid_loss",
        "accuracy",
        "mean weight",
        "smallest weight",
        "seconds",
    }
    assert history.schedule().at(0) == {"mean weight": 1.0, "smallest weight": 1.0}
    best = runner.best_model()
    assert type(best) is nn.Sequential
    images, labels = (torch.stack([*part]) for part in zip(*runner.valid_loader.dataset, strict=True))
    with torch.no_grad():
        assert F.cross_entropy(best(images), labels).item() == pytest.approx(history.best()["valid_loss"], rel=1e-4)
    history.plot(tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").stat().st_size > 1000


class Ridge(fxstn.BilevelProblem):
    """One weight with dropout, whose penalty exp(λ) is learned through its best response."""

    def __init__(self, careless: bool = False) -> None:
        super().__init__()
        self.weight, self.log_penalty = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
        self.dropout, self.careless = nn.Dropout(0.5), careless

    def general_parameters(self):
        return [self.weight]

    def hyper_parameters(self):
        return [self.log_penalty]

    def general_loss(self, inputs, target):
        penalty = self.log_penalty if self.careless else self.log_penalty.detach()
        return self.validation_loss(inputs, target)[0] + penalty.exp() * self.weight.square().sum()

    def hyper_loss(self, inputs, target):
        shrunk = self.weight.detach() / (1 + self.log_penalty.exp())
        return (inputs @ shrunk - target).square().mean()

    def validation_loss(self, inputs, target):
        output = self.dropout(inputs) @ self.weight
        return (output - target).square().mean(), output

    def values(self):
        return {"penalty": self.log_penalty.exp().item()}

    def ranges(self):
        return {"penalty": (0.0, 10.0)}


def ridge(careless: bool = False, **settings) -> fxstn.BilevelRunner:
    x = torch.randn(8, 2)
    return fxstn.BilevelRunner(
        Ridge(careless), [(x, x.sum(1))], [(x, x.sum(1))], **grouped(settings, hyper={"train_steps": 1}, progress=False)
    )


def test_validation_of_an_own_problem_is_in_eval_mode_without_gradients():
    runner = ridge()
    runner.fit(4)  # ranges without σ are watched, too
    first, again = runner.evaluate(), runner.evaluate()
    assert first == again
    assert runner.problem.training
    assert math.isfinite(runner.history["penalty"][-1])
    inputs, target = runner.valid_loader[0]
    loss, output = runner.problem.evaluation()(inputs, target)
    assert not loss.requires_grad
    assert not output.requires_grad


def test_a_loss_that_gives_gradients_to_parameters_of_another_step_is_refused():
    with pytest.raises(
        RuntimeError, match=r"the step of optimizer also has gradients for the parameters of hyper\.optimizer"
    ):
        ridge(careless=True).fit(1)


@pytest.mark.parametrize(
    "settings",
    [{"valid_loss_fn": F.mse_loss}, {"execution": {"compile": True}}, {"hyper": {"tune_scale": True}}],
    ids=["valid_loss_fn", "execution.compile", "hyper.tune_scale"],
)
def test_settings_of_networks_are_refused_for_an_own_problem(settings, request):
    with pytest.raises(TypeError, match=f"^{re.escape(request.node.callspec.id)}: only for a network"):
        ridge(**settings)


def test_an_own_problem_takes_no_loss_function():
    batches = [(1, 2)]
    for loss_fn in (F.mse_loss, None):
        with pytest.raises(
            TypeError, match=r"or \(problem, train_loader, .* has its losses itself: too many positional"
        ):
            fxstn.BilevelRunner(Ridge(), loss_fn, batches, batches)
    with pytest.raises(TypeError, match="no argument 'loss_fn'; a BilevelProblem has its losses itself"):
        fxstn.BilevelRunner(Ridge(), loss_fn=F.mse_loss, train_loader=batches, valid_loader=batches)


def test_the_arguments_of_both_forms_may_be_named():
    x = torch.randn(4, 2)
    batches = [(x, x.sum(1))]
    runner = fxstn.BilevelRunner(
        valid_loader=batches, problem=(problem := Ridge()), train_loader=batches, progress=False
    )
    assert runner.problem is problem
    assert len(runner.fit(1)) == 1
