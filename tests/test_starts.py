"""Where λ starts: at `init=` wherever there is one, else at the module's own strength, else as the usual recipe has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader
from torchvision import ops
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions.recognition import recognise_dropout
from fxstn.frontends.inputs import InputSpec
from fxstn.frontends.symbolic import Symbolic
from fxstn.passes.match import bind
from fxstn.passes.recipe import canonical_graphs
from tests.nets import mlp
from tests.runs import dataset

IMAGES = torch.rand(2, 3, 12, 12)


def conv(*before: nn.Module) -> nn.Module:
    return nn.Sequential(*before, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))


class Functional(nn.Module):
    """Dropout as a function, at a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.inner(x), 0.2, self.training))


class Text(nn.Module):
    """Words and what is no index, but integers, too: how many of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        counted = torch.arange(words.shape[1]) < lengths[:, None]
        return self.head((self.table(words) * counted[..., None]).sum(1))


class Residual(nn.Module):
    """A branch that some examples skip."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop, self.head = nn.Linear(6, 6), drop, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.drop(self.branch(x)))


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * mask.div_(1 - self.drop_prob)


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))


# (spec, model, the module that a pattern names, what init=None gives)
ROWS: dict[str, tuple[type[hp.Spec], Any, str, float]] = {
    "inserted dropout": (hp.Dropout, lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), "0", 0.1),
    "dropout that is off": (hp.Dropout, lambda: mlp(0.0), "2", 0.1),
    "dropout": (hp.Dropout, lambda: mlp(0.4), "2", 0.4),
    "dropout of channels": (hp.Dropout, lambda: conv(nn.Dropout2d(0.3)), "0", 0.3),
    "functional dropout": (hp.Dropout, Functional, "dropout", 0.2),
    "stochastic depth": (hp.StochasticDepth, lambda: Residual(ops.StochasticDepth(0.2, "row")), "drop", 0.2),
    "stochastic depth that is off": (
        hp.StochasticDepth, lambda: Residual(ops.StochasticDepth(0.0, "row")), "drop", 0.1),
    "drop path": (hp.StochasticDepth, lambda: Residual(DropPath(0.3)), "drop", 0.3),
    "drop block": (hp.DropBlock, lambda: conv(ops.DropBlock2d(0.3, 3)), "0", 0.3),
    "inserted drop block": (hp.DropBlock, conv, "1", 0.1),
    "locked dropout": (hp.LockedDropout, words, "0", 0.1),
    "embedding dropout": (hp.EmbeddingDropout, words, "0", 0.1),
    "drop connect": (hp.DropConnect, mlp, "0", 0.1),
    "weight decay": (hp.WeightDecay, mlp, "0", 5e-4),
    "activation decay": (hp.ActivationDecay, mlp, "0", 1e-3),
    "temporal decay": (hp.TemporalDecay, words, "0", 1e-3),
    "jacobian norm": (hp.JacobianNorm, mlp, "", 1e-3),
    "label smoothing": (hp.LabelSmoothing, mlp, "", 0.1),
    "mixup": (hp.MixUp, conv, "input", 0.2),
    "cutmix": (hp.CutMix, conv, "input", 1.0),
    "cutout": (hp.Cutout, conv, "input", 1),
    "inserted jitter": (hp.ColorJitter, conv, "input", 0.4),
    "jitter": (hp.ColorJitter, lambda: conv(v2.ColorJitter(0.2, 0.2, 0.2, 0.2)), "0", 0.2),
    "inserted affine": (hp.Affine, conv, "input", 10),
    "affine": (hp.Affine, lambda: conv(v2.RandomAffine(15, (0.2, 0.2), (0.8, 1.2), 7)), "0", 15),
    "affine that is off": (hp.Affine, lambda: conv(v2.RandomAffine(0)), "0", 10),
    "rotation": (hp.Rotation, lambda: conv(v2.RandomRotation(20)), "0", 20),
    "inserted flip": (hp.Flip, conv, "input", 0.5),
    "flip": (hp.Flip, lambda: conv(v2.RandomHorizontalFlip(0.3)), "0", 0.3),
    "flip that is off": (hp.Flip, lambda: conv(v2.RandomHorizontalFlip(0.0)), "0", 0.5),
    "vertical flip": (hp.VerticalFlip, lambda: conv(v2.RandomVerticalFlip(0.3)), "0", 0.3),
    "grayscale": (hp.Grayscale, lambda: conv(v2.RandomGrayscale(0.3)), "0", 0.3),
    "erasing": (hp.Erasing, lambda: conv(v2.RandomErasing(0.3)), "0", 0.3),
    "noise": (hp.GaussianNoise, lambda: conv(v2.GaussianNoise(0.0, 0.2)), "0", 0.2),
    "blur": (hp.GaussianBlur, lambda: conv(v2.GaussianBlur(3, (0.1, 2.0))), "0", 2.0),
}  # fmt: skip
WITHOUT_PLACE = (hp.JacobianNorm, hp.LabelSmoothing)
NEEDS_PLACE = (hp.ActivationDecay, hp.TemporalDecay, hp.LockedDropout)
NOT_HERE = {hp.LayerDrop, hp.Scalar}  # of whole encoders (test_drop_path); Scalar has no start but init


def traced(model: nn.Module) -> fx.GraphModule:
    """What specs are matched with."""
    recognise_dropout(model)
    return canonical_graphs(Symbolic(InputSpec.of(model, None)), model, (), None)[0]


def start(graph: fx.GraphModule, spec: hp.Spec) -> float:
    return bind(graph, [spec]).hyperparameters[0].init


@pytest.mark.parametrize("row", ROWS)
def test_a_start_is_that_of_init_or_of_the_module_or_of_the_usual_recipe(row: str) -> None:
    kind, build, place, expected = ROWS[row]
    without = kind in WITHOUT_PLACE
    name, number = next(iter((kind() if without else kind("0")).numbers.items()))
    other = number.low + (3 if number.integer else 0.013 * (number.high - number.low))
    inits: list[Any] = [{name: other}] if kind is not hp.LabelSmoothing else []
    inits += [other] if len(kind.numbers) < 2 else []
    graph = traced(build())
    for where in [()] if without else [(place,)] if kind in NEEDS_PLACE else [(), (place,)]:
        assert start(graph, kind(*where)) == pytest.approx(expected)
        for init in inits:
            assert start(graph, kind(*where, init=init)) == pytest.approx(other)
            assert without or start(graph, kind(*where, init=init, shared=True)) == pytest.approx(other)


def test_every_spec_has_a_row() -> None:
    kinds = {kind for kind, *_ in ROWS.values()}
    assert {getattr(hp, name) for name in hp.__all__ if is_spec(name)} - NOT_HERE == kinds


def is_spec(name: str) -> bool:
    kind = getattr(hp, name)
    own = isinstance(kind, type) and issubclass(kind, hp.Spec) and kind.__module__.startswith("fxstn")
    return own and (bool(kind.numbers) or kind in (hp.Scalar, hp.LabelSmoothing))


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_every_frontend_starts_alike(trace: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0), nn.Linear(6, 6), nn.Dropout(0.4), nn.Linear(6, 3))
    for specs, expected in (
        (None, (0.1, 0.4)),
        ([hp.Dropout(init=0.3)], (0.3, 0.3)),
        ([hp.Dropout("1", "3")], (0.1, 0.4)),
    ):
        stn = fxstn.transform(model, specs, trace=trace, example_inputs=torch.randn(3, 6))
        assert tuple(stn.hparams.values().values()) == pytest.approx(expected)


def test_a_partly_chosen_start_leaves_the_other_numbers_to_the_module() -> None:
    model = conv(v2.ColorJitter(0.2, 0.3, 0.1, 0.05))
    values = fxstn.transform(model, [hp.ColorJitter(init={"hue": 0.2})]).hparams.values()
    assert list(values.values()) == pytest.approx([0.2, 0.3, 0.1, 0.2])


def test_a_usual_start_outside_the_range_is_moved_inside() -> None:
    assert start(traced(mlp(0.0)), hp.Dropout("2", low=0.2, high=0.6)) == pytest.approx(0.204)
    assert start(traced(mlp()), hp.WeightDecay("0", low=1e-3, high=1e-1)) == pytest.approx(1e-3 * 100**0.01)
    with pytest.raises(ValueError, match=r"init=0.1 is not strictly between"):
        fxstn.transform(mlp(), [hp.Dropout("2", init=0.1, low=0.2, high=0.6)])


def test_what_is_chosen_is_said() -> None:
    specs = [hp.Dropout("2", init=0.3), hp.Dropout("5"), hp.WeightDecay(shared=True)]
    stn = fxstn.transform(mlp(0.4), specs)
    for line in ("2.dropout: start 0.3 (init=), in [0, 0.95]", "5.dropout: start 0.4 (the module's own), in [0, 0.95]",
                 "weight_decay: start 0.0005 (the usual recipe), in [1e-07, 0.1]"):  # fmt: skip
        assert line in repr(stn.hparams)
    notes = fxstn.explain(mlp(0.4), specs).notes
    assert "start 0.3 (init=): 2.dropout" in notes
    assert "start 0.0005 (the usual recipe): weight_decay" in notes


def test_decay_starts_at_that_of_the_optimizer_unless_init_says_otherwise() -> None:
    def tuned(decay: float, *specs: hp.Spec) -> fxstn.LoopTuner:
        model, batches = mlp(), DataLoader(dataset(16, 0), 8)
        matrices = [[model[0].weight], [model[3].weight, model[6].weight]]
        groups = [{"params": matrices[0], "weight_decay": decay}, {"params": matrices[1], "weight_decay": 3 * decay}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return fxstn.tune(model, optimizer, F.cross_entropy, batches, batches, list(specs))

    assert list(tuned(0.0, hp.WeightDecay()).values().values()) == pytest.approx([5e-4] * 3)
    own = tuned(1e-3, hp.WeightDecay())
    assert list(own.values().values()) == pytest.approx([1e-3, 3e-3, 3e-3])
    assert "3.weight_decay: start 0.003 (the optimizer's weight_decay)" in repr(own.stn.hparams)
    said = tuned(1e-3, hp.WeightDecay("0", "3", init=1e-3), hp.WeightDecay("6"))
    assert list(said.values().values()) == pytest.approx([1e-3, 1e-3, 3e-3])


# One module that is called twice


class Twice(nn.Module):
    """A pool after each of two convolutions, and one dropout after both."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(36, 3)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.2) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.pool(torch.relu(self.a(x))))
        x = self.drop(self.pool(torch.relu(self.b(x))))
        return self.head(x.flatten(1))


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_model_may_call_a_top_level_module_twice(trace: str) -> None:
    stn = fxstn.transform(Twice(False), trace=trace, example_inputs=IMAGES)
    assert stn.hparams.names == ("input.dropout", "a.dropout", "b.dropout")
    shared = fxstn.transform(Twice(True), trace=trace, example_inputs=IMAGES)
    assert shared.hparams.values() == pytest.approx({"drop.dropout": 0.2})  # one λ for both calls, masks of their own
    for network in (stn, shared) if trace != "export" else ():
        fxstn.response_loss(network, F.cross_entropy, IMAGES, torch.tensor([0, 1])).backward()
        fxstn.hyper_loss(network, F.cross_entropy, IMAGES, torch.tensor([0, 1])).backward()
        assert network.hparams.unconstrained.grad is not None


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_nothing_is_inserted_after_inputs_of_integers(trace: str) -> None:
    words = torch.randint(9, (4, 5))
    examples = (words, torch.tensor([5, 2, 3, 1]))
    stn = fxstn.transform(Text(), example_inputs=examples, trace=trace)
    assert stn.hparams.names == ("table.dropout",)
    with pytest.raises(ValueError, match=r"no input holds floating point numbers.*an embedding"):
        fxstn.transform(Text(), [hp.Dropout("input")], example_inputs=examples, trace=trace)
