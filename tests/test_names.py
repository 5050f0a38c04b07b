"""The names by which patterns find modules and weights: of parametrized ones, and of those that have several names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxstn
from fxstn import hp

X = torch.randn(4, 3, 9)


class Mirrored(nn.Module):
    def forward(self, x):
        return x + x.flip(-1)


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.left = nn.Parameter(torch.randn(len(weight), 2))
        self.right = nn.Parameter(torch.randn(2, weight.shape[1]))

    def forward(self, weight):
        return weight + self.left @ self.right


def mirrored(layer):
    parametrize.register_parametrization(layer, "bias", Mirrored())
    return parametrize.register_parametrization(layer, "weight", Mirrored())


class Block(nn.Module):
    """Its layers are registered by themselves and in a sequence, as in the repository of the temporal convolutional network."""

    def __init__(self, parametrized=lambda layer: layer):
        super().__init__()
        self.conv1 = parametrized(nn.Conv1d(3, 6, 3, padding=1))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.2)
        self.conv2 = nn.Conv1d(6, 6, 3, padding=1)
        self.net = nn.Sequential(self.conv1, self.relu, self.dropout, self.conv2)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.net(x)[:, :, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(self.table(x)))


def names(model, *specs, examples=X):
    return fxstn.transform(model, list(specs), example_inputs=examples).hparams.names


ORIGINALS = {
    parametrizations.weight_norm: ["weight.original0", "weight.original1"],
    parametrizations.spectral_norm: ["weight.original"],
    parametrizations.orthogonal: ["weight.original"],
    mirrored: ["weight.original"],
}


@pytest.mark.parametrize("parametrized", ORIGINALS, ids=lambda function: function.__name__)
def test_the_decay_of_a_parametrized_layer_has_the_name_of_the_layer(parametrized):
    model = Block(parametrized)
    stn = fxstn.transform(model, [hp.WeightDecay("conv1", init=0.05), hp.WeightDecay("head")], example_inputs=X)
    assert stn.hparams.names == ("conv1.weight_decay", "head.weight_decay")
    decayed = {f"conv1.parametrizations.{name}" for name in ORIGINALS[parametrized]}
    fxstn.general_loss(stn.train(), lambda output, target: output.sum() * 0, X, torch.zeros(4, 2)).backward()
    for name, parameter in stn.model.named_parameters():
        if parameter.requires_grad and name != "head.weight":
            expected = 0.05 * parameter.detach() if name in decayed else torch.zeros_like(parameter)
            torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_weights_of_a_parametrization_belong_to_the_layer():
    model = Block()
    parametrize.register_parametrization(model.head, "weight", LowRank(model.head.weight))
    model.head.parametrizations.weight.original.requires_grad_(False)
    stn = fxstn.transform(model, [hp.WeightDecay("head")], example_inputs=X)
    own = ["head.parametrizations.weight.0.left", "head.parametrizations.weight.0.right"]
    assert stn.terms.penalties == tuple((name, 0, 2) for name in own)
    assert stn.hparams.names == ("head.weight_decay",)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ("conv1.weight_decay", "conv2.weight_decay", "head.weight_decay")),
        ("net.*", ("conv1.weight_decay", "conv2.weight_decay")),
        ("net.0", ("conv1.weight_decay",)),
        ("conv1.weight", ("conv1.weight.weight_decay",)),
        ("net.0.weight", ("conv1.weight.weight_decay",)),
        ("conv1.parametrizations.weight", ("conv1.weight.weight_decay",)),
        ("*.original1", ("conv1.parametrizations.weight.original1.weight_decay",)),
    ],
)
def test_a_weight_matches_by_each_of_its_names_once(pattern, expected):
    model = Block(parametrizations.weight_norm)
    assert names(model, hp.WeightDecay(pattern)) == expected
    assert names(model, hp.DropConnect(pattern)) == tuple(
        name.replace("weight_decay", "drop_connect") for name in expected
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["net.*"], ["conv1", "relu", "dropout", "conv2"]),
        (["net.0", "net.2"], ["conv1", "dropout"]),
        (["conv1", "net"], ["conv1", "net"]),
        (["net*"], ["dropout", "net"]),
    ],
)
def test_a_dropout_acts_at_a_module_of_any_of_its_names(patterns, expected):
    own = [name if name == "dropout" else f"{name}.dropout" for name in expected]
    assert sorted(names(Block(), hp.Dropout(*patterns))) == sorted(own)


@pytest.mark.parametrize("trace", ["export", "live"])
def test_every_way_to_follow_a_forward_knows_the_names(trace):
    model = Block(parametrizations.weight_norm)
    specs = [hp.Dropout("net.0"), hp.WeightDecay("net.*")]
    result = fxstn.verify(model, X, hparams=specs, trace=trace, seeds=1)
    assert result.ok, result


def test_an_operation_of_a_function_has_the_names_of_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.3, self.training)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(3, 2)
            self.net = nn.Sequential(self.inner, self.head)

        def forward(self, x):
            return self.net(x)

    assert names(Outer(), hp.Dropout("net.0.dropout"), examples=X[:, :, 0]) == ("inner.dropout",)


def test_a_tied_weight_matches_by_the_layers_that_have_it():
    examples = torch.randint(0, 7, (4, 5))
    for pattern in ("table", "head", "head.weight", "table.weight"):
        (name,) = names(Tied(), hp.WeightDecay(pattern), examples=examples)
        assert name.startswith("table")


def test_the_nearest_names_can_be_given():
    model = Block(parametrizations.weight_norm)
    with pytest.raises(ValueError, match=r"nearest module names: .*'conv1'"):
        names(model, hp.WeightDecay("conv"))
    with pytest.raises(ValueError, match=r"nearest module names: .*'net\.0'"):
        names(model, hp.WeightDecay("net.1"))


def test_decay_is_left_where_the_optimizer_has_it_under_any_name():
    model = Block(parametrizations.weight_norm)
    direction, length = model.conv1.parametrizations.weight.original1, model.conv1.parametrizations.weight.original0
    rest = [p for name, p in model.named_parameters() if "original" not in name and name != "conv2.weight"]
    groups = [
        {"params": [direction, model.conv2.weight], "weight_decay": 0.1},
        {"params": [length, *rest], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1)
    data = [(X, torch.randn(4, 2))]
    specs = [hp.WeightDecay("net.*", "head"), hp.Dropout()]
    tuner = fxstn.tune(model, optimizer, F.mse_loss, data, data, specs)
    assert list(tuner.values()) == ["conv1.weight_decay", "conv2.weight_decay", "dropout"]
    decayed = {name for name, _, _ in tuner.problem.stn.terms.penalties}
    assert decayed == {"conv1.parametrizations.weight.original1", "conv2.weight"}
