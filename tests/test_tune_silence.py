"""fxstn.tune in loops that pass over batches, drop gradients, look at training data within an epoch, or go wrong in silence."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.loops.decay import groups_of, is_decoupled
from tests.runs import same, without_times
from tests.test_tune import QUICK, data, loaders, mlp, sgd, train
from tests.test_tune_loops import Attributes, tuned

# What a step is made of


class Scaled:
    """A loop in float16 whose first gradients overflow: they are dropped, and the optimizer does not step."""

    def __init__(self, overflows: int) -> None:
        self.left = overflows

    def step(self, optimizer: Any) -> None:
        self.left -= 1
        if self.left < 0:
            optimizer.step()


@pytest.mark.parametrize("zeros", ["before", "after", "before, in place", "after, in place"])
@pytest.mark.parametrize(
    ("skips", "overflows", "accumulates"), [(0, 0, 1), (3, 0, 1), (0, 3, 1), (2, 0, 2), (0, 2, 3), (3, 1, 1)]
)
def test_a_step_is_made_of_the_batches_whose_gradients_it_has(
    skips: int, overflows: int, accumulates: int, zeros: str
) -> None:
    """Not of those that the loop passes over, nor of those whose gradients it drops; a refit accumulates as many."""
    loader, valid = DataLoader(data(60), 5), loaders()[1]
    for observed in (True, False):
        model, optimizer, tuner = tuned(loader if observed else None, valid)
        scaler, to_none = Scaled(overflows), "in place" not in zeros
        for epoch in range(2):
            count = 0
            for number, (x, y) in enumerate(loader):
                if epoch == 0 and number < skips:
                    continue
                if zeros.startswith("before") and count % accumulates == 0:
                    optimizer.zero_grad(set_to_none=to_none)
                F.cross_entropy(model(x), y).backward()
                count += 1
                if count % accumulates == 0:
                    scaler.step(optimizer)
                    if zeros.startswith("after"):
                        optimizer.zero_grad(set_to_none=to_none)
                if not observed:
                    tuner.step((x, y))
        assert tuner._seen.most == accumulates
        tuner.detach()
        assert "zero_grad" not in vars(optimizer)


@pytest.mark.parametrize("observed", [True, False])
def test_a_gradient_that_is_put_in_place_of_another_is_that_of_all_its_batches(observed: bool) -> None:
    """As DistributedDataParallel puts views of its buckets, and a loop the mean of what it accumulates."""
    loader, valid = DataLoader(data(60), 5), loaders()[1]
    model, optimizer, tuner = tuned(loader if observed else None, valid)
    for number, (x, y) in enumerate(loader, 1):
        F.cross_entropy(model(x), y).backward()
        if number % 4 == 0:
            for weight in model.parameters():
                weight.grad = weight.grad.detach() / 4
            optimizer.step()
            optimizer.zero_grad()
        if not observed:
            tuner.step((x, y))
    assert (tuner.steps, tuner._seen.most) == (3, 4)


def test_a_loop_that_accumulates_more_later_has_its_later_steps() -> None:
    loader, valid = DataLoader(data(60), 5), loaders()[1]
    model, optimizer, tuner = tuned(loader, valid)
    for number, (x, y) in enumerate(loader):
        F.cross_entropy(model(x), y).backward()
        if number < 4 or number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert tuner._seen.most == 4


@pytest.mark.parametrize("after", [3, 5, 9])
def test_a_loop_that_passes_over_batches_to_its_place_ends_as_the_one_that_never_stopped(after: int) -> None:
    def run(stop: bool) -> Any:
        loader, valid = DataLoader(data(60), 5), loaders()[1]
        model, optimizer, tuner = tuned(loader, valid)
        place = 0
        for epoch in range(3):
            for number, (x, y) in enumerate(loader):
                if number < place:
                    continue
                place = 0
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if stop and (epoch, number) == (1, after - 1):
                    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), tuner.state_dict()))
                    noise = torch.get_rng_state()
                    break
            else:
                continue
            break
        if not stop:
            return tuner
        tuner.detach()
        model, optimizer, tuner = tuned(loader, valid)
        for part, state in zip((model, optimizer, tuner), saved, strict=True):
            part.load_state_dict(state)
        for epoch in (1, 2):
            for number, (x, y) in enumerate(loader):
                if epoch == 1 and number < after:
                    continue
                if (epoch, number) == (1, after):
                    torch.set_rng_state(noise)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return tuner

    whole, resumed = run(False), run(True)
    assert resumed._seen.most == whole._seen.most == 1
    assert without_times(resumed.history.rows) == without_times(whole.history.rows)


# Passes


@pytest.mark.parametrize("kind", [DataLoader, Attributes])
def test_a_look_at_the_training_data_within_an_epoch_is_no_epoch(kind: Any) -> None:
    rows = []
    for looks in (False, True):
        loader, valid = loaders()
        loader = loader if kind is DataLoader else kind(list(loader))
        model, optimizer, tuner = tuned(loader, valid)
        for _ in range(3):
            for number, batch in enumerate(loader):
                if looks and number in (1, 3, 4):
                    noise = torch.get_rng_state()
                    with torch.no_grad():
                        assert len([model(x) for x, _ in loader]) == 5
                        next(iter(loader))  # and another one, which is left
                    torch.set_rng_state(noise)
                train(model, optimizer, [batch])
        rows.append(without_times(tuner.history.rows))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_a_pass_in_which_the_loop_takes_steps_is_one_though_another_is_not_over() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    kept = []
    for _ in range(3):
        kept.append(iter(loader))
        for _ in range(3):
            train(model, optimizer, [next(kept[-1])])
    assert (tuner.steps, len(tuner.history)) == (9, 2)


def test_a_loop_over_two_passes_at_once_has_a_row_for_each_of_its_own() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    for _ in range(3):
        for one, other in zip(loader, loader, strict=False):
            train(model, optimizer, [tuple(torch.cat(parts) for parts in zip(one, other, strict=True))])
    tuner.detach()
    assert (tuner.steps, len(tuner.history)) == (15, 3)


@pytest.mark.parametrize("end", ["detach", "report", "refit"])
def test_the_last_epoch_of_a_loop_that_cuts_its_passes_is_not_lost(end: str, tmp_path: Any) -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    for _ in range(2):
        train(model, optimizer, itertools.islice(loader, 3))
    assert len(tuner.history) == 1
    {"detach": tuner.detach, "report": lambda: tuner.report(tmp_path / "report.html"),
     "refit": lambda: tuner.refit(loader, epochs=1)}[end]()  # fmt: skip
    assert (tuner.steps, len(tuner.history)) == (6, 2)


def test_a_tuner_that_leaves_amid_an_epoch_does_not_evaluate_it() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    for number, batch in enumerate(loader):
        train(model, optimizer, [batch])
        if number == 2:
            tuner.detach()
    assert len(tuner.history) == 0


# What goes wrong in silence


def test_steps_of_an_optimizer_that_the_tuner_does_not_know_are_told_once() -> None:
    loader, valid = loaders()
    model, _, tuner = tuned(loader, valid)
    with pytest.warns(UserWarning, match="no optimizer that fxstn.tune knows has stepped") as caught:
        train(model, sgd(model), loader, 3)
    assert len(caught) == 1
    assert not len(tuner.history)


@pytest.mark.parametrize("stepping", [True, False])
def test_a_loop_that_trains_another_model_is_told_once(stepping: bool) -> None:
    """With the optimizer that the tuner knows, which has no gradients then, or with one of its own."""
    loader, valid = loaders()
    _, optimizer, tuner = tuned(loader, valid)
    other = mlp()
    optimizer = optimizer if stepping else sgd(other)
    train(other, optimizer, loader)
    with pytest.warns(
        UserWarning, match=r"neither called the model of fxstn\.tune nor stepped its optimizer"
    ) as caught:
        train(other, optimizer, loader, 3)
    assert len(caught) == 1
    assert not len(tuner.history)


@pytest.mark.parametrize("reads", ["means", "part of it", "no gradients", "evaluation", "forwards"])
def test_passes_that_read_the_data_or_the_model_are_no_reason_to_warn(reads: str) -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    with torch.set_grad_enabled(reads != "no gradients"):
        for _ in range(1 if reads == "means" else 3):
            for x, _ in itertools.islice(loader, 2) if reads == "part of it" else loader:
                model.train(reads == "forwards")
                if reads in ("evaluation", "forwards"):
                    with torch.set_grad_enabled(reads == "forwards"):
                        model(x)
    train(model, optimizer, loader, 2)
    assert len(tuner.history) == 2


def test_a_pass_without_steps_is_no_reason_to_warn() -> None:
    loader, valid = loaders()
    model, optimizer, _ = tuned(loader, valid)
    for _ in range(2):
        with torch.no_grad():
            assert len([model(x) for x, _ in loader]) == 5
        train(model, optimizer, loader)


def test_weights_that_are_loaded_between_two_passes_are_no_steps() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    next(iter(loader))
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    train(model, optimizer, loader)
    other, _, tuner_of_other = tuned(DataLoader(data(60), 12), valid)
    other.load_state_dict({name: 2 * value for name, value in other.state_dict().items()})
    train(other, tuner_of_other._stepping[0], tuner_of_other.train_loader)
    assert tuner.history.start_loss == tuner_of_other.history.start_loss


def test_a_tuner_that_comes_within_a_pass_hears_of_its_rest() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    for number, batch in enumerate(loader):
        train(model, optimizer, [batch])
        if number == 1:
            tuner.detach()
            other = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    assert (tuner.steps, len(tuner.history), other.steps, len(other.history)) == (2, 0, 3, 1)


def test_a_loop_that_reads_all_batches_before_it_trains_is_refused_at_its_first_step() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    with pytest.raises(ValueError, match="also where the loop reads all batches before it trains, train_loader=None"):
        train(model, optimizer, list(loader))
    assert not tuner.steps


def test_training_in_eval_mode_is_told() -> None:
    loader, valid = loaders()
    model, optimizer, _ = tuned(loader, valid)
    model.eval()

    def train_in_eval_mode() -> None:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"eval mode in all steps of epoch 1.*model.train\(\)"):
        train_in_eval_mode()
    train_in_eval_mode()  # once


@pytest.mark.parametrize(
    ("kind", "every", "warns"), [(list, 2, True), (list, 1, False), (lambda loader: loader, 2, False)]
)
def test_a_loop_that_accumulates_over_a_list_is_told(
    kind: Any, every: int, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model, (loader, valid) = mlp(), loaders(48)
    batches, optimizer = kind(loader), sgd(model)
    fxstn.tune(model, optimizer, F.cross_entropy, batches, valid, **QUICK)
    for _ in range(2):
        for number, (x, y) in enumerate(batches):
            F.cross_entropy(model(x), y).backward()
            if number % every == every - 1:
                optimizer.step()
                optimizer.zero_grad()
    texts = [str(warning.message) for warning in recwarn.list]
    assert sum("had 2 forwards before a step, and train_loader is no DataLoader" in text for text in texts) == warns


def test_a_tuner_that_fails_leaves_an_optimizer_without_hooks() -> None:
    loader, valid = loaders()
    _, _, tuner = tuned(loader, valid)
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"this train_loader, which may be one of an earlier cell .*tuner\.detach\(\)"):
        fxstn.tune(model, optimizer, F.cross_entropy, loader, valid)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    tuner.detach()
    again = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid)
    train(model, optimizer, loader)
    assert again.steps == 5


def test_a_state_that_cannot_be_taken_changes_nothing() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    train(model, optimizer, loader, 2)
    state = copy.deepcopy(tuner.state_dict())
    adam = fxstn.HyperSettings(train_steps=2, optimizer=partial(torch.optim.Adam, lr=0.1))
    tuner.detach()
    other = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, response=QUICK["response"], hyper=adam)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"with SettlingAdam as hyper.optimizer, and this one has Adam"):
        other.load_state_dict(state)
    assert same(before, other.state_dict())
    other.detach()
    other = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="tuner with other settings: KeyError: 'steps'; tune with those"):
        other.load_state_dict(state | {"means": {}})
    assert same(before, other.state_dict())
    for wrong in (None, 5, {}, {key: value for key, value in state.items() if key != "backtracking"}):
        with pytest.raises(ValueError, match="no state of a tuner"):
            other.load_state_dict(wrong)


def test_a_state_stays_as_it_was_written() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    train(model, optimizer, loader)
    state = tuner.state_dict()
    rates, rows = copy.deepcopy(state["rates"]), copy.deepcopy(state["history"])
    train(model, optimizer, loader)
    assert state["rates"] == rates
    assert same(state["history"], rows)


@pytest.mark.parametrize(("search", "tolerance"), [(None, 1e-3), ("strong_wolfe", 1e-6)])
def test_an_optimizer_that_reads_the_loss_of_its_closure_reads_the_penalty_too(search: Any, tolerance: float) -> None:
    """Against the same optimizer on the penalised loss. Without a search, the steps make the last bit of λ grow."""
    decay, losses = 0.05, []
    x, y = data(60).tensors
    pairs = [(x.double(), y)]
    for tunes in (True, False):
        model = mlp(0.0).double()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn=search)
        if tunes:
            specs = [hp.WeightDecay("*", init=decay, shared=True)]
            fxstn.tune(
                model, optimizer, F.cross_entropy, pairs, pairs, specs, hyper=fxstn.HyperSettings(warmup_epochs=9)
            )
        weights = [p for p in model.parameters() if p.dim() > 1]

        def penalised(model=model, weights=weights):
            return F.cross_entropy(model(pairs[0][0]), y) + decay / 2 * sum(w.square().sum() for w in weights)

        def closure(model=model, optimizer=optimizer, tunes=tunes, penalised=penalised):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pairs[0][0]), y) if tunes else penalised()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        losses.append(penalised().item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


class Own(torch.optim.Optimizer):
    """Its decay does not know the learning rate, and its step is the sign of the gradient."""

    def __init__(self, parameters: Any, lr: float = 0.1, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.mul_(1 - 0.01 * group["weight_decay"]).sub_(group["lr"] * weight.grad.sign())


class Needy(torch.optim.SGD):
    """It cannot be made of parameters and a rate alone."""

    def __init__(self, parameters: Any, lr: float, needed: str) -> None:
        super().__init__(parameters, lr, 0.9, weight_decay=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [(Own, "Own decays weights neither as SGD and Adam nor as AdamW do"),
     (partial(Needy, lr=0.1, needed=""), "how Needy decays weights cannot be seen .TypeError")],
)  # fmt: skip
def test_decay_that_acts_in_another_way_is_told(make: Any, message: str) -> None:
    loader, valid = loaders()
    model = mlp()
    with pytest.warns(UserWarning, match=message):
        fxstn.tune(model, make(model.parameters()), F.cross_entropy, loader, valid, [hp.WeightDecay()])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("kind", "decoupled"), [("SGD", False), ("Adam", False), ("AdamW", True), ("Adamax", False), ("NAdam", False),
                            ("RAdam", False), ("RMSprop", False), ("Adagrad", False), ("Adadelta", False)],
)  # fmt: skip
def test_how_torchs_optimizers_decay_is_seen(kind: str, decoupled: bool, maximize: bool) -> None:
    options = {"weight_decay": 0.1, "maximize": maximize} | ({"momentum": 0.9} if kind == "SGD" else {})
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(3, 3))], lr=0.1, **options)
    (group,) = optimizer.param_groups
    group.pop("decoupled_weight_decay", None)
    assert is_decoupled(optimizer, group) == decoupled


def test_groups_that_decay_alike_are_tried_once() -> None:
    steps: list[object] = []

    class Counted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(self)
            return super().step(closure)

    def tried(groups: list[dict[str, Any]]) -> int:
        steps.clear()
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in groups]
        pairs = zip(groups, weights, strict=True)
        optimizer = Counted([{"params": [(f"{id(x)}", x)], **group} for group, x in pairs], lr=0.1, weight_decay=0.1)
        groups_of_weights = groups_of([optimizer])
        assert [groups_of_weights[id(x)] for x in weights] == [(optimizer, k, False) for k in range(len(groups))]
        return len(steps)

    one = tried([{}])
    assert one > 0
    assert tried([{"lr": 0.1 * k} for k in range(1, 9)]) == one
    assert tried([{}, {"nesterov": True, "momentum": 0.9}, {}]) == 2 * one
