"""fxstn.tune in loops of the user's own: what it must not change, what it does, and what it comes back to."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxstn
from fxstn import ExecutionSettings, HyperSettings, ResponseSettings, hp
from tests.processes import run
from tests.runs import Empty

QUICK = {"response": ResponseSettings(every=1), "hyper": HyperSettings(train_steps=2)}


def mlp(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3)]
    return nn.Sequential(nn.Linear(8, 32), *layers)


def data(examples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    noise = torch.randn(examples, 3, generator=generator)
    rule = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    return TensorDataset(x, (x @ rule + 2 * noise).argmax(1))


def loaders(train: int = 60, valid: int = 80, size: int = 12, valid_size: int = 40) -> tuple[DataLoader, DataLoader]:
    return DataLoader(data(train), size), DataLoader(data(valid, 1), valid_size)


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def train(model: nn.Module, optimizer: Optimizer, loader: Any, epochs: int = 1) -> None:
    """A user's loop."""
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# What stays as it is


@pytest.mark.parametrize("name", ["train_loader", "valid_loader", "loss_fn", "callbacks", "hyper", "model", "metrics"])
def test_what_a_tuner_would_not_heed_cannot_be_set_by_hand(name: str) -> None:
    model, (loader, valid) = mlp(), loaders()
    tuner = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid)
    with pytest.raises(AttributeError, match=rf"LoopTuner\.{name} cannot be set to 0 by hand.*; call detach\(\), and"):
        setattr(tuner, name, 0)


def test_the_model_stays_the_object_that_it_is() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer, keys, parameters = sgd(model), list(model.state_dict()), list(map(id, model.parameters()))
    kinds = [type(module) for module in model.modules()]
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    for stage in ("before", "during", "after"):
        assert list(model.state_dict()) == keys, stage
        assert list(map(id, model.parameters())) == parameters
        assert [type(module) for module in model.modules()] == kinds
        assert sum(map(len, (group["params"] for group in optimizer.param_groups))) == len(parameters)
        if stage == "before":
            train(model, optimizer, loader, 2)
        elif stage == "during":
            assert len(tuner.history) == 2
            assert tuner.values() != tuner.history.start
            tuner.detach()
    assert all("forward" not in vars(module) for module in model.modules())
    assert type(loader) is DataLoader
    steps = tuner.steps
    train(model, optimizer, loader)
    assert (tuner.steps, len(tuner.history)) == (steps, 2)


def test_the_users_random_numbers_and_steps_are_the_same_while_no_value_moves() -> None:
    """Weight decay alone, at rest: the loop with a tuner is the loop without one."""
    weights, draws = [], []
    for tuned in (False, True):
        model, (_, valid) = mlp(), loaders()
        loader = DataLoader(data(60), 12, shuffle=True)
        optimizer = sgd(model, weight_decay=1e-2)
        if tuned:
            specs, hyper = [hp.WeightDecay(shared=True)], HyperSettings(warmup_epochs=9)
            tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, hyper=hyper)
            assert tuner.values() == pytest.approx({"weight_decay": 1e-2})
        torch.manual_seed(5)
        train(model, optimizer, loader, 3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own look
@pytest.mark.parametrize("first", ["compile", "tune"])
def test_a_compiled_model_is_compiled_once_more_at_most(first: str) -> None:
    torch._dynamo.reset()
    model, (loader, valid) = mlp(), loaders()
    optimizer, counter = sgd(model), CompileCounterWithBackend("eager")
    called = torch.compile(model, backend=counter) if first == "compile" else model
    if first == "compile":
        called(next(iter(loader))[0]).sum().backward()
        optimizer.zero_grad()
    tuner = fxstn.tune(called, optimizer, F.cross_entropy, loader, valid, **QUICK)
    called = called if first == "compile" else torch.compile(model, backend=counter)
    train(called, optimizer, loader, 3)
    assert tuner.values() != tuner.history.start
    assert counter.frame_count == (2 if first == "compile" else 1)


def test_dead_steps_are_no_steps() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model.train()
    for number, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if number == 1:
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert tuner.steps == len(loader) - 1


def test_a_step_without_gradients_is_no_step() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    for _ in loader:
        optimizer.step()
    assert tuner.steps == 0


# What it does


def trained_by(step: Any, kind: str = "AdamW", wrap: Any = lambda optimizer: optimizer) -> Any:
    """The tuner of a loop whose step, a function (optimizer, closure), is another one."""
    model, (loader, valid) = mlp(), loaders()
    optimizer = getattr(torch.optim, kind)(model.parameters(), 1e-2, weight_decay=1e-2)
    specs = [hp.Dropout(), hp.WeightDecay()]
    tuner = fxstn.tune(model, wrap(optimizer), F.cross_entropy, loader, valid, specs, **QUICK)
    torch.manual_seed(3)
    for _ in range(2):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                (loss := F.cross_entropy(model(x), y)).backward()
                return loss

            step(optimizer, closure)
    return tuner


def apart(optimizer: Optimizer, closure: Any) -> None:
    closure()
    optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "step",
    [lambda optimizer, closure: optimizer.step(closure), lambda optimizer, closure: optimizer.step(closure=closure)],
    ids=["position", "keyword"],
)
def test_gradients_of_a_closure_are_those_of_a_backward_pass_before_the_step(kind: str, step: Any) -> None:
    one, other = trained_by(apart, kind), trained_by(step, kind)
    assert one.values() == other.values() != one.history.start
    assert torch.equal(one.model[0].weight, other.model[0].weight)


def test_a_closure_that_runs_several_times_is_one_step() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    hyper = HyperSettings(train_steps=10)
    tuner = fxstn.tune(
        model, optimizer, F.cross_entropy, loader, valid, response=ResponseSettings(every=1), hyper=hyper
    )
    calls = []
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            (loss := F.cross_entropy(model(x), y)).backward()
            calls.append(loss.item())
            return loss

        optimizer.step(closure)
    assert len(calls) > tuner.steps == len(loader) == len(tuner._tuner.stepper.training_hypergradients)


class Wrapped(Optimizer):
    """An optimizer as accelerate wraps it: without hooks of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


def test_a_wrapped_optimizer_is_the_one_that_steps() -> None:
    assert trained_by(apart, wrap=Wrapped).values() == trained_by(apart).values()


def test_accumulated_batches_are_one_step() -> None:
    model, (_, valid) = mlp(), loaders()
    loader, optimizer = DataLoader(data(60), 6), sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    sizes: list[int] = []
    response = tuner.problem.response_loss

    def response_loss(x: Any, y: Any) -> Any:
        sizes.append(len(x.args[0]))
        return response(x, y)

    tuner.problem.response_loss = response_loss  # type: ignore[method-assign]
    for number, (x, y) in enumerate(loader, 1):
        (F.cross_entropy(model(x), y) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert (tuner.steps, sizes) == (5, [6] * 10)


def test_a_loop_without_a_loader_tells_every_batch_that_a_step_accumulates() -> None:
    values = []
    for observed in (True, False):
        model, (_, valid) = mlp(), loaders()
        loader, optimizer = DataLoader(data(60), 6), sgd(model)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader if observed else None, valid, **QUICK)
        torch.manual_seed(3)
        for number, (x, y) in enumerate(loader, 1):
            (F.cross_entropy(model(x), y) / 2).backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
            if not observed:
                tuner.step((x, y))
        if not observed:
            tuner.end_epoch()
        assert tuner.steps == 5
        values.append(tuner.values())
    assert values[0] == values[1]


def test_the_size_of_validation_batches_does_not_matter_to_the_tuner() -> None:
    values = []
    for size in (5, 80):
        model, (loader, _) = mlp(), loaders()
        optimizer, valid = sgd(model), DataLoader(data(80, 1), size)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
        torch.manual_seed(3)
        train(model, optimizer, loader, 2)
        assert tuner._valid.size == 12
        values.append(list(tuner.values().values()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


class OwnLoss(nn.Module):
    """A model that computes its loss inside its forward, as small GPTs do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.body(x)
        return logits, None if y is None else F.cross_entropy(logits, y)


def test_a_loop_without_a_loader_whose_model_computes_its_loss() -> None:
    model, rows = OwnLoss(), data(60).tensors
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    valid = [tuple(t[i : i + 12] for t in data(48, 1).tensors) for i in range(0, 48, 12)]
    tuner = fxstn.tune(model, optimizer, None, None, valid, epoch_steps=10, **QUICK)
    for number in range(20):
        batch = tuple(t[number % 5 * 12 :][:12] for t in rows)
        optimizer.zero_grad()
        _, loss = model(*batch)
        loss.backward()
        if number != 7:  # a step that a scaler would skip
            optimizer.step()
        tuner.step(batch)
    assert (tuner.steps, len(tuner.history)) == (19, 1)
    assert tuner.values() != tuner.history.start
    plain = nn.Sequential(*model.body)
    loss = sum(F.cross_entropy(plain.eval()(x), y).item() for x, y in valid) / 4
    assert tuner.history["valid_loss"][-1] != pytest.approx(loss, abs=1e-6)  # of ten steps ago


class Output(dict):
    """What a model of Hugging Face returns."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.body(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits) if loss is not None else Output(logits=logits)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, None])
def test_batches_that_are_dicts_with_labels(loss_fn: Any) -> None:
    def collate(rows: list) -> UserDict:  # as collators of Hugging Face do
        return UserDict(features=torch.stack([x for x, _ in rows]), labels=torch.stack([y for _, y in rows]))

    model = Keywords()
    loader, valid = (DataLoader(part, 12, collate_fn=collate) for part in (data(60), data(80, 1)))
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, loss_fn, loader, valid, **QUICK)
    torch.manual_seed(3)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            labels = batch.pop("labels")
            F.cross_entropy(model(**batch).logits, labels).backward()
            optimizer.step()
    assert tuner._valid.size == 12
    twin, (pairs, held) = mlp(), loaders()
    steps = sgd(twin)
    other = fxstn.tune(twin, steps, F.cross_entropy, pairs, held, **QUICK)
    other._tuner.stepper.seed, other._valid.seed = tuner._tuner.stepper.seed, tuner._valid.seed
    torch.manual_seed(3)
    train(twin, steps, pairs, 2)
    assert list(tuner.values().values()) == pytest.approx(list(other.values().values()), rel=1e-5)


@pytest.mark.parametrize("specs", [None, [hp.Dropout(), hp.WeightDecay(init=1e-3)]])
def test_the_runner_is_a_loop_around_the_same_tuner_bit_for_bit(specs: list | None) -> None:
    def seeded() -> tuple[nn.Module, DataLoader, DataLoader]:
        pieces = (mlp(), *loaders())
        torch.manual_seed(7)  # of the tuner's noise
        return pieces

    model, loader, valid = seeded()
    tuner = fxstn.tune(model, optimizer := sgd(model), F.cross_entropy, loader, valid, specs, **QUICK)
    torch.manual_seed(1)
    train(model, optimizer, loader, 3)
    other, loader, valid = seeded()
    runner = fxstn.BilevelRunner(
        fxstn.transform(other, specs), F.cross_entropy, loader, valid, progress=False, **QUICK,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    )  # fmt: skip
    torch.manual_seed(1)
    runner.fit(3)
    assert tuner.values() == runner.problem.values() != tuner.history.start
    assert tuner.history.start_loss == runner.history.start_loss is not None
    without = ("train_loss", "seconds")
    rows = [{k: v for k, v in row.items() if k not in without} for row in runner.history.rows]
    assert [{k: v for k, v in row.items() if k not in without} for row in tuner.history.rows] == rows


def tune_in_processes(rank: int, world: int) -> tuple[dict[str, float], list[float], list[Tensor]]:
    """Weight decay tuned, in a process that has its share of the examples."""
    model, parts = mlp(0.0).double(), []
    for examples, seed, size in ((64, 0, 16), (48, 1, 24)):
        x, y = data(examples, seed).tensors
        part = TensorDataset(x.double(), y)
        sampler = DistributedSampler(part, shuffle=False) if world > 1 else None
        parts.append(DataLoader(part, size // world, sampler=sampler))
    called = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(5 + rank)  # the tuner takes the seed of the first process
    optimizer = torch.optim.AdamW(called.parameters(), 1e-2, weight_decay=1e-2)
    hyper = HyperSettings(train_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    tuner = fxstn.tune(
        called, optimizer, F.cross_entropy, *parts, [hp.WeightDecay()], hyper=hyper, response=QUICK["response"]
    )
    train(called, optimizer, parts[0], 3)
    return tuner.values(), tuner.history["valid_loss"], [p.detach() for p in model.parameters()]


def test_two_processes_equal_one_on_the_whole_batch() -> None:
    alone = tune_in_processes(0, 1)
    assert max(abs(value / 1e-2 - 1) for value in alone[0].values()) > 1e-2
    for result in run(2, tune_in_processes, 2):
        for one, other in zip(result, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# Weight decay


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam", "RMSprop"])
def test_taken_over_decay_is_the_optimizers_own(kind: str) -> None:
    """At rest, λ in place of the group's coefficient gives the same steps; groups without decay stay without."""
    weights = []
    for own in (1e-2, 3e-2):  # of the optimizer; λ is 3e-2 in both
        model, (loader, valid) = mlp(0.0).double(), loaders()
        loader = DataLoader(TensorDataset(*(t.double() if t.is_floating_point() else t for t in data(60).tensors)), 12)
        valid = DataLoader(
            TensorDataset(*(t.double() if t.is_floating_point() else t for t in data(60, 1).tensors)), 12
        )
        matrices = [p for p in model.parameters() if p.dim() > 1][:2]
        others = [p for p in model.parameters() if all(p is not m for m in matrices)]
        groups = [{"params": matrices, "weight_decay": own}, {"params": others, "weight_decay": 0.0}]
        optimizer = getattr(torch.optim, kind)(groups, lr=1e-2)
        specs = [hp.WeightDecay(shared=True)]
        tuner = fxstn.tune(
            model, optimizer, F.cross_entropy, loader, valid, specs, hyper=HyperSettings(warmup_epochs=9)
        )
        assert [name for name, _, _ in tuner.stn.terms.penalties] == ["0.weight", "3.weight"]
        tuner.stn.hparams.set({"weight_decay": 3e-2})
        train(model, optimizer, loader, 3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert optimizer.param_groups[0]["weight_decay"] == own
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)  # λ's range is float32


def test_decay_follows_the_learning_rate_of_an_optimizer_that_was_loaded() -> None:
    """λ is 3e-2 in both; load_state_dict gives the optimizer new groups, which a scheduler then changes."""
    weights = []
    for own in (1e-2, 3e-2):
        model, (loader, valid) = mlp(0.0), loaders()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=own)
        specs, hyper = [hp.WeightDecay(shared=True)], HyperSettings(warmup_epochs=9)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, None, valid, specs, hyper=hyper)
        tuner.stn.hparams.set({"weight_decay": 3e-2})
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 0.5
        model(next(iter(loader))[0]).sum().backward()
        optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_weight_decay_starts_where_the_groups_are() -> None:
    model, (loader, valid) = mlp(), loaders()
    first, second = [model[0].weight, model[0].bias], [p for layer in (model[3], model[6]) for p in layer.parameters()]
    groups = [{"params": first, "weight_decay": 0.2}, {"params": second, "weight_decay": 0.01}]
    tuner = fxstn.tune(model, torch.optim.AdamW(groups), F.cross_entropy, loader, valid, [hp.WeightDecay()])
    expected = {"0.weight_decay": 0.2, "3.weight_decay": 0.01, "6.weight_decay": 0.01}
    assert tuner.values() == pytest.approx(expected)
    tuner.detach()
    tuner = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid, [hp.WeightDecay(init=1e-3)])
    assert tuner.values() == pytest.approx(dict.fromkeys(expected, 1e-3))


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([hp.WeightDecay()], {"0.weight_decay": 0.2}),
        ([hp.WeightDecay("3")], {"3.weight_decay": 5e-4}),
        ([hp.WeightDecay("[36]", shared=True)], {"weight_decay": 5e-4}),
        ([hp.WeightDecay("[03]", shared=True)], {"weight_decay": 0.2}),
        ([hp.WeightDecay("0"), hp.WeightDecay("3")], {"0.weight_decay": 0.2, "3.weight_decay": 5e-4}),
        ([hp.WeightDecay("3", init=0.01)], {"3.weight_decay": 0.01}),
    ],
    ids=repr,
)
def test_groups_without_decay_have_none_unless_a_spec_is_for_them_alone(specs: Any, expected: dict[str, float]) -> None:
    model, (loader, valid) = mlp(), loaders()
    decayed, *others = model[0].parameters(), model[3].parameters(), model[6].parameters()
    groups = [{"params": decayed, "weight_decay": 0.2}, *({"params": own, "weight_decay": 0.0} for own in others)]
    tuner = fxstn.tune(model, torch.optim.AdamW(groups), F.cross_entropy, loader, valid, specs)
    assert tuner.values() == pytest.approx(expected, rel=1e-4)


def test_weights_that_no_optimizer_steps_have_no_decay_even_where_a_spec_is_for_them_alone() -> None:
    model, (loader, valid) = mlp(), loaders()
    specs = [hp.WeightDecay("0"), hp.WeightDecay("[36]", shared=True)]
    groups = [{"params": model[3].parameters(), "weight_decay": 0.0}, {"params": model[6].bias, "weight_decay": 0.1}]
    tuner = fxstn.tune(model, torch.optim.AdamW(groups), F.cross_entropy, loader, valid, specs)
    assert list(tuner.values()) == ["weight_decay"]
    assert {name for name, _, _ in tuner.problem.stn.terms.penalties} == {"3.weight"}


# Resume


def test_a_resumed_loop_is_the_loop_that_never_stopped() -> None:
    def begin() -> tuple[nn.Module, Optimizer, DataLoader, Any]:
        model, (loader, valid) = mlp(), loaders()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
        specs = [hp.Dropout(), hp.WeightDecay()]
        return model, optimizer, loader, fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, **QUICK)

    model, optimizer, loader, tuner = begin()
    torch.manual_seed(4)
    train(model, optimizer, loader, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), tuner.state_dict(), torch.get_rng_state()))
    train(model, optimizer, loader, 2)
    torch.manual_seed(99)  # another process
    again, steps, other_loader, other = begin()
    again.load_state_dict(saved[0])
    steps.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    assert other.values() == {name: tuner.history.rows[1][name] for name in tuner.history.names}
    train(again, steps, other_loader, 2)
    assert other.values() == tuner.values()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in tuner.history.rows]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in other.history.rows] == rows


def test_a_state_of_something_else_is_refused() -> None:
    model, (loader, valid) = mlp(), loaders()
    tuner = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid, [hp.Dropout(shared=True)])
    state = tuner.state_dict()
    tuner.detach()
    other = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid)
    with pytest.raises(ValueError, match=r"the state tunes dropout, and this tuner 2\.dropout, 5\.dropout"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"no state of a tuner"):
        other.load_state_dict(model.state_dict())


def test_a_state_of_another_model_changes_nothing() -> None:
    tuners = []
    for width in (32, 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.1), nn.Linear(width, 3))
        tuners.append(fxstn.tune(model, sgd(model), F.cross_entropy, *loaders()))
    before = tuners[0].state_dict()
    with pytest.raises(
        ValueError, match=r"another model: response\.flat_U has the shape \(38, 1\) there and \(70, 1\)"
    ):
        tuners[0].load_state_dict(tuners[1].state_dict())
    assert str(tuners[0].state_dict()) == str(before)


@pytest.mark.parametrize("other", [None, "6.module"])
def test_a_state_is_loaded_whatever_the_state_dict_of_the_model_has(other: str | None) -> None:
    def change(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}6.")]:
            value = state.pop(name)
            if other is not None:
                state[name.replace("6", other)] = value

    states = []
    for _ in range(2):
        model, (loader, valid) = mlp(), loaders()
        model.register_state_dict_post_hook(change)
        tuner = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid)
        nn.init.normal_(next(iter(tuner.stn.response_parameters())))
        states.append(tuner.state_dict())
    tuner.load_state_dict(states[0])
    assert torch.equal(tuner.state_dict()["network"]["response.flat_U"], states[0]["network"]["response.flat_U"])
    before = tuner.state_dict()
    with pytest.raises(ValueError, match=r"another model: hparams\.raw_scale has the shape None"):
        tuner.load_state_dict(states[0] | {"network": {}})
    assert str(tuner.state_dict()) == str(before)


def test_weights_that_no_optimizer_steps_are_left_out() -> None:
    model, (loader, valid) = mlp(), loaders()
    for decay in (0.0, 1e-2):
        optimizer = torch.optim.SGD(model[6].parameters(), lr=0.1, weight_decay=decay)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, [hp.WeightDecay()])
        assert list(tuner.values()) == ["6.weight_decay"]
        tuner.detach()


def test_a_model_that_moves_after_tune_is_told() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = sgd(model)
    fxstn.tune(model, optimizer, F.cross_entropy, loader, valid)
    model.double()
    with pytest.raises(ValueError, match=r"moved from \(cpu, float32\) to \(cpu, float64\) since fxstn.tune"):
        train(model, optimizer, [(x.double(), y) for x, y in loader])


# Mistakes


def mistakes() -> Iterator[tuple[dict[str, Any], str]]:
    model = mlp()
    yield {"optimizer": sgd(nn.Linear(2, 2))}, r"none of the model's parameters"
    yield {"optimizer": []}, r"must be an optimizer"
    copies = nn.DataParallel(model)
    copies.device_ids = [0, 1]
    yield {"model": copies}, r"copies of the model on 2 devices.*torchrun"
    yield {"model": fxstn.transform(model)}, r"not transformed yet"
    yield {"valid_loader": []}, r"valid_loader is empty"
    yield {"train_loader": Empty()}, r"a loader yields no batch"
    yield {"wieght": 1}, r"tune has no argument 'wieght'"
    yield {"forward": lambda model, batch: (batch[0], batch[1])}, r"does not call its model"
    yield {"hparams": [hp.MixUp()]}, r"hp\.MixUp needs more than the output"


@pytest.mark.parametrize(("change", "message"), list(mistakes()))
def test_mistakes_are_explained(change: dict[str, Any], message: str) -> None:
    model, (loader, valid) = mlp(), loaders()
    arguments = {"model": model, "optimizer": sgd(model), "loss_fn": F.cross_entropy, "train_loader": loader}
    arguments |= {"valid_loader": valid} | change
    with pytest.raises((ValueError, TypeError), match=message):
        fxstn.tune(**arguments)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_loop_over_another_loader_is_told_at_its_first_step() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = sgd(model)
    fxstn.tune(model, optimizer, F.cross_entropy, loader, valid)
    with pytest.raises(ValueError, match=r"train_loader has yielded no batch.*accelerator\.prepare"):
        train(model, optimizer, DataLoader(data(60), 12))


def test_two_tuners_of_one_loader_are_refused() -> None:
    model, (loader, valid) = mlp(), loaders()
    optimizer = sgd(model)  # keeps the tuner
    fxstn.tune(model, optimizer, F.cross_entropy, loader, valid)
    with pytest.raises(ValueError, match=r"another tuner"):
        fxstn.tune(other := mlp(), sgd(other), F.cross_entropy, loader, valid)
    assert all("forward" not in vars(module) for module in other.modules())


def test_a_model_is_tuned_by_one_tuner_at_a_time() -> None:
    model, (loader, valid) = mlp(), loaders()
    tuner = fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid)
    with pytest.raises(ValueError, match=r"tuned already; call detach\(\)"):
        fxstn.tune(model, sgd(model), F.cross_entropy, *loaders())
    tuner.detach()
    fxstn.tune(model, sgd(model), F.cross_entropy, *loaders())


def test_the_tuner_works_on_the_models_device_and_compiles_its_graphs() -> None:
    model, (loader, valid) = mlp(), loaders()
    with pytest.raises(ValueError, match=r"execution\.device='cuda', and the model is on cpu"):
        fxstn.tune(model, sgd(model), F.cross_entropy, loader, valid, execution=ExecutionSettings(device="cuda"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    execution = ExecutionSettings(compile={"backend": counter})
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, execution=execution, **QUICK)
    train(model, optimizer, loader)
    assert tuner.hyper_steps
    assert counter.frame_count >= 2  # of the response and of the hyper step
