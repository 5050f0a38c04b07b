"""fxstn.tune in loops that step in uncommon places, change their loader, fail, or compile and export the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

import fxstn
from fxstn import hp
from fxstn.loops import idle
from tests.runs import same, without_times
from tests.test_tune import QUICK, data, loaders, mlp, sgd, train

SPECS = [hp.Dropout(), hp.WeightDecay(shared=True)]


def new_loop(make: Any = sgd) -> tuple[nn.Module, Any, Any, DataLoader]:
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer = make(model)
    return model, optimizer, fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, SPECS, **QUICK), loader


# Loaders


def steps(model: nn.Module, optimizer: Any, batches: Iterable, first: int = 0) -> None:
    for number, (x, y) in enumerate(batches, first):
        torch.manual_seed(number)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_validation_batches_made_under_inference_mode_are_as_others() -> None:
    """Features that a frozen network computed once, for example."""
    rows = []
    for inference in (False, True):
        model, (loader, valid) = mlp(0.3), loaders()
        with torch.inference_mode(inference):
            batches = [(x.clone(), y.clone()) for x, y in valid]
        assert batches[0][0].is_inference() == inference
        optimizer = sgd(model)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, batches, SPECS, **QUICK)
        for _ in range(2):
            steps(model, optimizer, loader)
        rows.append(without_times(tuner.history.rows))
    assert len(rows[0]) == 2
    assert same(*rows)


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_loop_that_goes_on_over_the_rest_of_an_epoch_by_another_loader_ends_alike(cut: int) -> None:
    """As with accelerator.skip_first_batches: a new loader yields what is left of the epoch."""
    model, optimizer, tuner, loader = new_loop()
    for _ in range(3):
        steps(model, optimizer, loader)
    parts = [*new_loop()]
    steps(*parts[:2], parts[3])
    under_way = iter(parts[3])  # the state is of amid the pass
    steps(*parts[:2], itertools.islice(under_way, cut))
    saved = [copy.deepcopy(part.state_dict()) for part in parts[:3]]
    again = new_loop()
    for part, state in zip(again, saved, strict=False):
        part.load_state_dict(state)
    other, other_optimizer, other_tuner, other_loader = again
    rest = DataLoader(Subset(other_loader.dataset, range(cut * 12, 60)), 12)
    steps(other, other_optimizer, other_tuner.follow(rest), cut)
    steps(other, other_optimizer, other_loader)
    assert len(other_tuner.history) == 3
    assert same(without_times(tuner.history.rows), without_times(other_tuner.history.rows))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    other_tuner.detach()
    assert type(rest) is DataLoader


def test_the_error_of_another_loader_names_the_remedy_and_it_works() -> None:
    model, optimizer, tuner, _ = new_loop()
    other = DataLoader(data(60), 12)
    with pytest.raises(ValueError, match=r"has yielded no batch .* to tuner\.follow\(loader\)"):
        train(model, optimizer, other)
    assert tuner.follow(other) is other
    train(model, optimizer, other)
    assert len(tuner.history) == 1


def test_the_last_epoch_counts_though_the_loop_still_holds_its_iterator() -> None:
    model, optimizer, tuner, loader = new_loop()
    for _ in range(2):
        batches = iter(loader)
        for _ in range(len(loader)):
            steps(model, optimizer, [next(batches)])
    tuner.detach()
    assert len(tuner.history) == 2


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.cycle(data(60))


@pytest.mark.parametrize("epoch_steps", [None, 4])
def test_a_pass_without_an_end_is_told(monkeypatch: pytest.MonkeyPatch, epoch_steps: int | None) -> None:
    monkeypatch.setattr(idle, "MANY", 8)
    model, loader = mlp(0.3), DataLoader(Endless(), 12)
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, loaders()[1], SPECS, epoch_steps=epoch_steps, **QUICK)
    known = (
        nullcontext()
        if epoch_steps
        else pytest.warns(UserWarning, match=r"8 steps are done, and no pass .*epoch_steps=")
    )
    with known as warned:
        steps(model, optimizer, itertools.islice(loader, 20))
    assert len(tuner.history) == (5 if epoch_steps else 0)
    assert warned is None or len(warned) == 1


def test_only_passes_that_can_be_seen_are_followed() -> None:
    model, optimizer, tuner, _ = new_loop()
    with pytest.raises(ValueError, match=r"passes over a list cannot be seen; give a loader.*tuner\.step\(batch\)"):
        tuner.follow([data(60).tensors])
    tuner.detach()
    told = fxstn.tune(model, optimizer, F.cross_entropy, None, loaders()[1], epoch_steps=5)
    with pytest.raises(ValueError, match=r"sees the passes of no train_loader; call tuner\.step"):
        told.follow(DataLoader(data(60), 12))


# Steps


class Sharpness(torch.optim.Optimizer):
    """Minimises at the worst point near by (Foret et al. 2021, arXiv 2010.01412): the second step is one of `inner`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.before = inner, list[Tensor]()

    @torch.no_grad()
    def first(self) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.before = [weight.clone() for weight in weights]
        for weight in weights:
            weight += 0.05 * weight.grad / weight.grad.norm().clamp_min(1e-12)
        self.zero_grad()

    @torch.no_grad()
    def second(self) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for weight, before in zip(weights, self.before, strict=True):
            weight.copy_(before)
        self.inner.step()


def test_a_step_within_no_grad_tunes_as_one_outside() -> None:
    def values(enabled: bool) -> dict[str, float]:
        model, optimizer, tuner, loader = new_loop()
        if enabled:
            optimizer.step = torch.enable_grad()(optimizer.step)
        sharpness = Sharpness(optimizer)
        for number, (x, y) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader, 4))):
            torch.manual_seed(number)
            sharpness.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sharpness.first()
            F.cross_entropy(model(x), y).backward()
            sharpness.second()
        assert len(tuner.history) == 4
        return tuner.values()

    assert values(False) == values(True) != new_loop()[2].values()


def test_a_step_in_eval_mode_after_a_forward_in_train_mode_tunes_as_any(recwarn: pytest.WarningsRecorder) -> None:
    """As where a loop evaluates between the backward pass and the step."""
    rows = []
    for evaluates in (False, True):
        model, optimizer, tuner, loader = new_loop()
        for number, (x, y) in enumerate(itertools.chain(loader, loader)):
            torch.manual_seed(number)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            if evaluates:
                with torch.no_grad():
                    model.eval()(x)
            optimizer.step()
        rows.append(without_times(tuner.history.rows))
    assert not recwarn.list
    assert same(*rows)


def test_optimizers_that_step_in_the_backward_pass_tune() -> None:
    """One for each weight, as in PyTorch's tutorial on memory."""

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([weight], lr=0.05) for weight in model.parameters()]

    model, optimizers, tuner, loader = new_loop(make)
    before = tuner.values()
    for weight, optimizer in zip(model.parameters(), optimizers, strict=True):

        def step(weight: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        weight.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
    assert tuner.steps == 15
    assert len(tuner.history) == 3
    assert tuner.values() != before


def test_a_compiled_step_tunes_as_a_plain_one() -> None:
    results = []
    for compiled in (False, True):
        model, optimizer, tuner, loader = new_loop()
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number, (x, y) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader, 2))):
            torch.manual_seed(number)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step()
        results.append((tuner.steps, tuner.values()))
    assert results[0][0] == results[1][0] == 10
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4)


# Models


def fail(model: nn.Module, loader: DataLoader, valid: DataLoader) -> None:
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, SPECS)
    steps(model, optimizer, itertools.islice(loader, 2))
    raise KeyboardInterrupt(tuner.values())


def test_a_model_whose_tuner_is_lost_is_tuned_anew() -> None:
    model, (loader, valid) = mlp(0.3), loaders()
    with pytest.raises(KeyboardInterrupt):
        fail(model, loader, valid)
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, SPECS, **QUICK)
    train(model, optimizer, loader, 2)
    assert len(tuner.history) == 2
    tuner.detach()
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_copy_of_a_tuned_model_is_tuned_by_its_own_tuner() -> None:
    model, optimizer, tuner, loader = new_loop()
    train(model, optimizer, loader)
    twin, (other_loader, valid) = copy.deepcopy(model), loaders()
    other_optimizer = sgd(twin)
    other = fxstn.tune(twin, other_optimizer, F.cross_entropy, other_loader, valid, SPECS, **QUICK)
    before, start = tuner.values(), other.values()
    train(twin, other_optimizer, other_loader, 2)
    assert tuner.values() == before
    assert other.values() != start
    train(model, optimizer, loader)
    assert (len(tuner.history), len(other.history)) == (2, 2)


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_while_it_is_tuned(strict: bool) -> None:
    model, optimizer, _, loader = new_loop()
    train(model, optimizer, loader)
    model.eval()
    x = torch.randn(4, 8)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), model(x))


# Weights that no optimizer steps


def head_alone(frozen: bool) -> tuple[nn.Module, Any, DataLoader]:
    """The loop has trained the last layer alone, for four epochs."""
    model, (loader, valid) = mlp(0.3), loaders()
    model[0].requires_grad_(not frozen)
    model[3].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model[6].parameters(), lr=0.05, momentum=0.9)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, SPECS, **QUICK)
    train(model, optimizer, loader, 4)
    return model, (optimizer, tuner), loader


def test_weights_that_no_optimizer_steps_are_constants_as_frozen_ones_are() -> None:
    (left_out, (_, tuner), _), (frozen, (_, other), _) = head_alone(False), head_alone(True)
    assert tuner.values() != tuner.history.start
    for row, expected in zip(without_times(tuner.history.rows), without_times(other.history.rows), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(left_out.state_dict(), frozen.state_dict())
    moved = tuner.stn.best_response(torch.ones(3))
    assert [name for name, weight in left_out.named_parameters() if not torch.equal(moved[name], weight)] == [
        "6.weight",
        "6.bias",
    ]
    assert all(weight.requires_grad for weight in left_out.parameters())


def test_weights_respond_from_when_an_optimizer_steps_them_on() -> None:
    model, (optimizer, tuner), loader = head_alone(False)
    optimizer.add_param_group({"params": list(model[:6].parameters())})
    train(model, optimizer, loader, 2)
    moved = tuner.stn.best_response(torch.ones(3))
    assert all(not torch.equal(moved[name], weight) for name, weight in model.named_parameters())


# Numbers of the loss


@pytest.mark.parametrize("reads", [False, True])
def test_a_loop_whose_loss_does_not_read_a_number_of_the_loss_is_told(reads: bool) -> None:
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer, specs = sgd(model), [hp.LabelSmoothing(), hp.Dropout()]
    tuner = fxstn.tune(model, optimizer, fxstn.cross_entropy, loader, valid, specs, **QUICK)
    told = r"label_smoothing: .*own loss has not.*tuner\.strengths\(examples\)"
    with nullcontext() if reads else pytest.warns(UserWarning, match=told) as warned:
        for x, y in itertools.chain(loader, loader):
            optimizer.zero_grad()
            fxstn.cross_entropy(model(x), y, tuner.strengths(len(x)) if reads else None).backward()
            optimizer.step()
        tuner.detach()
    assert len(tuner.history) == 2
    assert warned is None or len(warned) == 1


def test_a_control_that_no_loss_reads_is_not_asked_of_the_loop() -> None:
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer, specs = sgd(model), [hp.Scalar("control", 0.5, 0, 1), hp.Dropout()]
    with pytest.warns(UserWarning, match="nothing reads control"):
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, **QUICK)
    train(model, optimizer, loader, 2)  # any other warning is an error
    assert len(tuner.history) == 2


# Derivatives within the forward


class Force(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).square().sum(), x, create_graph=True)[0][:, :3]


def test_a_forward_that_takes_derivatives_is_tuned() -> None:
    torch.manual_seed(0)
    model, (loader, valid) = Force(), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    train(model, optimizer, loader, 2)
    assert len(tuner.history) == 2
    assert tuner.values() != tuner.history.start


# Forwards that a graph holds in another way


class Frames(nn.Module):
    """A network for each frame, and the last state of a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.cells, self.out = nn.Linear(2, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 2)
        frames = torch.stack([torch.tanh(self.frame(x[:, t])) for t in range(x.size(1))], 1)
        return self.out(self.cells(frames)[0][:, -1])


def test_a_forward_that_differs_from_its_exported_graph_is_followed_as_it_is() -> None:
    torch.manual_seed(0)
    model, (loader, valid) = Frames(), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    assert tuner.stn.frontend == "live"
    train(model, optimizer, loader, 2)
    assert tuner.values() != tuner.history.start


# Outputs with logits


class Scores(NamedTuple):
    logits: Tensor
    value: Tensor


class WithValue(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.body, self.value, self.kind = mlp(0.3), nn.Linear(8, 1), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=self.body(x), value=self.value(x))


def of_rows(output: Any, target: Tensor) -> Tensor:
    """Of rows 0 and 1 of logits it would be a number, too."""
    return (output[0] - F.one_hot(target, 3)).square().mean() + 0.1 * output[1].square().mean()


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output.logits


def train_with_value(kind: type, loss_fn: Any) -> tuple[nn.Module, Any, DataLoader]:
    torch.manual_seed(0)
    model, (loader, valid) = WithValue(kind), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, loss_fn, loader, valid, SPECS, **QUICK)
    for x, y in itertools.chain(loader, loader):
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model(x)), y).backward()
        optimizer.step()
    return model, tuner, valid


@pytest.mark.parametrize(
    ("kind", "loss_fn", "takes_logits"),
    [
        (Scores, of_rows, False),
        (Scores, lambda output, y: F.cross_entropy(output.logits, y) + output.value.square().mean(), False),
        (dict, lambda output, y: F.cross_entropy(output["logits"], y) + output["value"].square().mean(), False),
        (Scores, F.cross_entropy, True),
        (dict, fxstn.cross_entropy, True),
    ],
    ids=["by number", "by attribute", "by key", "logits", "logits and hparams"],
)
def test_a_loss_gets_the_output_of_the_model_or_else_its_logits(kind: type, loss_fn: Any, takes_logits: bool) -> None:
    model, tuner, valid = train_with_value(kind, loss_fn)
    x, y = valid.dataset.tensors
    output = model.eval()(x)
    expected = loss_fn(logits_of(output) if takes_logits else output, y).item()
    assert tuner.values() != tuner.history.start
    assert tuner.history.rows[-1]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_takes_neither_names_both_reasons() -> None:
    both = r"a Scores \(AttributeError: .*scores.*\), nor its logits \(AttributeError.*give forward="
    with pytest.raises(TypeError, match=both):
        train_with_value(Scores, lambda output, y: output.scores.mean())
