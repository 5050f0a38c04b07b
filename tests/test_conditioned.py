"""A user's own model whose forward draws at λ: the same numbers as the network's graph, whatever the frontend."""

from __future__ import annotations

import copy
import inspect
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.frontends import site_mode
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.live.record import record
from fxstn.frontends.model_forwards import condition_modules, restore_modules
from fxstn.network import SelfTuningNetwork
from fxstn.passes.owners import module_sites
from fxstn.passes.request import Request
from fxstn.transform import FRONTENDS, network_over


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.p = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), 0.2

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.a(x)), self.p, self.training)
        F.dropout(x, 0.4, training=self.training, inplace=True)
        return self.c(torch.relu(self.b(x)))


class AtenDropout(FunctionalDropout):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.aten.dropout(torch.relu(self.a(x)), self.p, self.training)
        return self.c(torch.ops.aten.dropout.default(torch.relu(self.b(x)), 0.4, self.training))


class FunctionalStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 12 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.flatten(F.relu(self.b(F.relu(self.a(x)))), 1))


class SharedEncoder(nn.Module):
    """One encoder of functions, of a recurrence and of attention, for both halves of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            FunctionalDropout(), nn.Linear(4, 8), nn.LSTM(8, 8, 3, dropout=0.3, batch_first=True)
        )
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.encoder(x[..., :8])[0], self.encoder(x[..., 8:])[0]
        return self.attention(torch.cat([y, z], -1)) - self.attention(torch.cat([z, y], -1))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = F.dropout(self.cell(step + state), 0.2, self.training)
            states.append(state)
        return torch.stack(states, 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dropout, self.p, self.out = nn.Linear(16, 48), nn.Dropout(0.1), 0.3, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(x.shape[0], -1, 2, 8).transpose(1, 2) for t in self.qkv(x).split(16, 2))
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.dropout(self.out(y.transpose(1, 2).reshape(x.shape)))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.dropout = nn.Embedding(10, 8), nn.Dropout(0.1)
        self.lstm, self.out = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.lstm(self.dropout(self.table(x)))[0]))


class Checkpointed(nn.Module):
    """Two regions that are run again in the backward pass.

    drops: whether they have dropouts, of a module and of functions. Else transform adds some after functions.
    """

    def __init__(self, drops: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.out, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.3)
        self.drops, self.reentrant = drops, False

    def first(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return F.dropout(self.dropout(x), 0.2, self.training) if self.drops else x

    def second(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(x))
        return F.dropout(x, 0.1, self.training) if self.drops else x

    def forward(self, x: Tensor) -> Tensor:
        for region in (self.first, self.second):
            x = checkpoint(region, x, use_reentrant=self.reentrant)
        return self.out(x)


class SharedModules(nn.Module):
    """One activation and one pool behind two convolutions; a cell that is called three times.

    regions: whether the convolutions are run again in the backward pass.
    """

    def __init__(self, regions: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.act, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.AvgPool2d(2)
        self.cell, self.head, self.regions = nn.Linear(16, 16), nn.Linear(16, 5), regions

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):

            def region(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return self.pool(self.act(layer(x)))

            x = checkpoint(region, x, use_reentrant=False) if self.regions else region(x)
        x = x.flatten(1)
        for _ in range(3):
            x = x + self.cell(x)
        return self.head(x)


class Pair(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer, self.first = nn.Linear(8, 8), first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return (y, y.square().sum()) if self.first else (y.tanh(), y.sin())


class Pairs(nn.Module):
    """Stages that return a value and a number, two values in another order than they are made in, and one that is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.attention = Pair(True), Pair(False), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, loss = self.a(x)
        y, z = self.b(x)
        y, z = y[:, None], z[:, None]
        x = self.attention(y, z, y)[0][:, 0]
        return self.head(x) + loss


class Packed(nn.Module):
    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 4)
        self.lstm = nn.LSTM(8, 8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 3, 4, 1])
        sequence = pack_padded_sequence(self.table(x), lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.lstm(sequence)[1][0][-1])


class OneOfSeveral(nn.Module):
    """Takes a result of topk, and of max along a dimension, before a slice after which a stage ends."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.topk(4)[0] + x.max(1, keepdim=True)[0] + x.abs().max()
        y = self.a(x)[..., :4]
        return self.b(largest + y)


def swin() -> nn.Module:
    return torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 8, [1, 1], [2, 2], [2, 2], dropout=0.1, attention_dropout=0.1, stochastic_depth_prob=0.2, num_classes=3
    )


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 1, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=4)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)


def chain() -> nn.Module:
    layers = [nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(8, 8), nn.Dropout(0.2, inplace=True), nn.Linear(8, 4)]
    return nn.Sequential(nn.Linear(8, 8), *layers)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))


IMAGES, ROWS, WORDS, SEQUENCES = (4, 3, 16, 16), (4, 8), (4, 5), (4, 5, 16)
EVERYWHERE, GRAPHS = ("fx", "export", "live"), ("fx", "export")
AUGMENTED = [hp.Dropout(), hp.Affine(), hp.Cutout(), hp.WeightDecay()]
CASES = {
    "resnet18": (torchvision.models.resnet18, IMAGES, None, ("fx",)),  # a ReLU is called twice in each block
    "functional dropout": (FunctionalDropout, ROWS, None, EVERYWHERE),
    "dropout of aten": (AtenDropout, ROWS, None, ("fx", "live")),
    "packed": (Packed, WORDS, None, ("live",)),
    "one of several": (OneOfSeveral, ROWS, None, EVERYWHERE),
    "shared modules": (SharedModules, IMAGES, None, EVERYWHERE),
    "pairs": (Pairs, ROWS, None, ("fx", "live")),
    "pairs by name": (Pairs, ROWS, [hp.Dropout("a", "b", "attention")], ("fx", "live")),
    "shared encoder": (SharedEncoder, SEQUENCES, None, ("export", "live")),
    "functional stages": (FunctionalStages, IMAGES, None, EVERYWHERE),
    "augmented": (FunctionalStages, IMAGES, AUGMENTED, GRAPHS),
    "attention": (Attention, SEQUENCES, None, ("export", "live")),
    "language": (Language, WORDS, None, EVERYWHERE),
    "embedding dropout": (Language, WORDS, [hp.Dropout(), hp.EmbeddingDropout()], GRAPHS),
    "encoder": (encoder, SEQUENCES, None, EVERYWHERE),
    "swin": (swin, IMAGES, None, ("fx", "live")),
    "vit": (vit, IMAGES, None, ("fx",)),
    "chain": (chain, ROWS, None, EVERYWHERE),
    "after layers": (layers, ROWS, [hp.Dropout("0", "2"), hp.GaussianNoise("2")], GRAPHS),
    "checkpointed": (Checkpointed, ROWS, None, ("live",)),
}


def inputs_of(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if shape == WORDS:
        return torch.randint(0, 10, shape, generator=generator)
    return torch.rand(shape, generator=generator)


def conditioned(
    model: nn.Module, x: Tensor, specs: list | None, trace: str = "auto"
) -> tuple[SelfTuningNetwork, Tensor]:
    """The network over a model, which draws at λ from now on; and the values of λ that it reads."""
    network = network_over(model, Request(specs, x, "delta", None, trace, False, "batch", FRONTENDS))
    rewritable = network.recipe.frontend.rewritable
    graph = network.canonical(True) if rewritable else record(model, True, (), Inputs((x,), {}))
    strengths = network.hparams().clone()
    condition_modules(model, module_sites(graph.graph, network.recipe.plan.binding), strengths)
    return network.train(), strengths


BY_DAY = ("functional dropout", "attention", "encoder")  # whose exports run by day, too


@pytest.mark.parametrize(
    ("case", "trace"),
    [
        pytest.param(case, trace, marks=[pytest.mark.nightly] * (trace == "export" and case not in BY_DAY))
        for case, entry in CASES.items()
        for trace in entry[3]
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor:UserWarning", "ignore:enable_nested_tensor:UserWarning")
def test_the_models_own_forward_equals_the_networks_graph(case: str, trace: str) -> None:
    build, shape, specs, _ = CASES[case]
    torch.manual_seed(0)
    model, x = build(), inputs_of(shape)
    network, strengths = conditioned(model, x, specs, trace)
    for value in (0.4, 0.7):  # λ moves
        named = {
            p.name: p.low + value * (min(p.high, 1e3) - p.low) for p in network.hparams.hyperparameters if not p.log
        }
        network.hparams.set(named)
        strengths.copy_(network.hparams())
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(1)
        expected = network.conditioned_output(x)[0]
        model.load_state_dict(state)
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def check_slopes(model: nn.Module, x: Tensor) -> None:
    """The gradients of a forward, against central differences of that forward, with the same noise."""

    def loss() -> Tensor:
        torch.manual_seed(1)
        return model(x).square().sum()

    loss().backward()
    for weight in model.parameters():
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight.add_(direction, alpha=1e-6)
            above = loss()
            weight.sub_(direction, alpha=2e-6)
            below = loss()
            weight.add_(direction, alpha=1e-6)
        slope = (weight.grad * direction).sum()
        torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # where there is no backward pass
@pytest.mark.parametrize("drops", [True, False], ids=["own", "added"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_a_recomputed_forward_see_the_same_masks(reentrant: bool, drops: bool) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(drops).double(), inputs_of(ROWS).double().requires_grad_()
    _, strengths = conditioned(model, x, None, "live" if drops else "fx")
    assert len(strengths) == 3
    model.reentrant = reentrant
    strengths.copy_(torch.linspace(0.4, 0.7, len(strengths)))
    check_slopes(model, x)


class OwnDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.4

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 1 - self.p)) / (1 - self.p) if self.training else x


class Places(nn.Module):
    """A dropout written by hand, in a list that is no module, made in the forward, or a function."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.layer, self.out, self.place = nn.Linear(8, 400), nn.Linear(400, 4), place
        self.drops, self.seen = [nn.Dropout(0.4)], None
        if place == "own":
            self.own = OwnDropout()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.place == "own":
            h = self.own(h)
        elif self.place == "list":
            h = self.drops[0].train(self.training)(h)
        elif self.place == "forward":
            h = nn.Dropout(0.4).train(self.training)(h)
        else:
            h = F.dropout(h, 0.4, self.training)
        self.seen = h.detach()
        return self.out(h)


@pytest.mark.parametrize("place", ["own", "list", "forward"])
def test_a_dropout_is_at_lambda_wherever_the_model_has_it(place: str) -> None:
    torch.manual_seed(0)
    model, x = Places(place), torch.randn(16, 8)
    valid = [(x, torch.zeros(16, dtype=torch.long))]
    tuner = fxstn.tune(
        model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, None, valid, [hp.Dropout(init=0.8)]
    )
    model.train()(x)
    assert (model.seen == 0).float().mean().item() == pytest.approx(0.8, abs=0.05)
    tuner.detach()
    model(x)
    assert (model.seen == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)


def test_a_dropout_that_cannot_be_drawn_at_lambda_is_refused_and_the_model_left_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr(site_mode, "_SPELLINGS", {})  # as in code that torch's functions do not see
    model, x = Places("function"), torch.randn(16, 8)
    optimizer, valid = torch.optim.SGD(model.parameters(), 0.1), [(x, torch.zeros(16, dtype=torch.long))]
    with pytest.raises(
        ValueError, match=r"draws random numbers at rates of its own where its network draws at tuned ones"
    ):
        fxstn.tune(model, optimizer, F.cross_entropy, None, valid, [hp.Dropout(init=0.8)])
    assert "forward" not in vars(model)


def test_gradients_of_a_recomputed_forward_know_which_call_of_a_module_they_are_of() -> None:
    torch.manual_seed(0)
    model, x = SharedModules().double(), inputs_of(IMAGES).double()
    _, strengths = conditioned(model, x, None, "fx")
    model.regions = True
    strengths.copy_(torch.linspace(0.1, 0.7, len(strengths)))
    check_slopes(model, x)


@pytest.mark.parametrize("specs", [None, [hp.Dropout("table", "lstm")]], ids=["default", "by name"])
def test_what_is_dropped_of_a_packed_sequence_is_what_the_forward_reads(specs: list | None) -> None:
    """The state: the graph has another kernel, so that the last digit may differ."""
    torch.manual_seed(0)
    model, x = Packed(0.0), inputs_of(WORDS)
    network, strengths = conditioned(model, x, specs, "live")
    network.hparams.set(dict.fromkeys(network.hparams.names, 0.5))
    strengths.copy_(network.hparams())
    torch.manual_seed(1)
    expected = network.conditioned_output(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)


def test_eval_mode_restoration_copies_and_signatures() -> None:
    torch.manual_seed(0)
    model, x = FunctionalDropout(), inputs_of(ROWS)
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    _, strengths = conditioned(model, x, None)
    assert type(model) is FunctionalDropout
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    model.train()
    twin = pickle.loads(pickle.dumps(model))
    torch.manual_seed(1)
    expected = model(x)
    for other in (copy.deepcopy(model), twin):
        torch.manual_seed(1)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    strengths.zero_()  # λ moves: the copies are no longer tuned
    torch.manual_seed(1)
    assert not torch.equal(model(x), expected)
    torch.manual_seed(1)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    restore_modules(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_of_the_instance_comes_back() -> None:
    model, x = FunctionalDropout(), inputs_of(ROWS)
    own = types.MethodType(type(model).forward, model)
    model.forward = own  # type: ignore[method-assign]
    conditioned(model, x, None)
    assert model.forward is not own
    restore_modules(model)
    assert model.forward is own


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own look
def test_compiled_once_when_the_strengths_are_taken_over_and_never_when_they_move() -> None:
    torch._dynamo.reset()
    model, x, counter = Attention(), inputs_of(SEQUENCES), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    compiled(x).sum().backward()
    before = counter.frame_count
    _, strengths = conditioned(model, x, None, "live")
    compiled(x).sum().backward()
    assert counter.frame_count == before + 1
    for value in (0.0, 0.9):
        strengths.fill_(value)
        compiled(x).sum().backward()
    assert counter.frame_count == before + 1
    restore_modules(model)
    compiled(x)
    assert counter.frame_count == before + 1


@pytest.mark.parametrize(
    ("specs", "what"),
    [
        ([hp.DropConnect()], "DropConnect"),
        ([hp.MixUp()], "MixUp"),
        ([hp.JacobianNorm()], "JacobianNorm"),
        ([hp.ActivationDecay("b")], "ActivationDecay"),
    ],
)
def test_what_only_a_graph_can_do_is_refused(specs: list, what: str) -> None:
    with pytest.raises(ValueError, match=rf"hp\.{what} needs more than the output.*BilevelRunner"):
        conditioned(FunctionalStages(), inputs_of(IMAGES), specs, "fx")


def test_a_dropout_that_is_not_tuned_stays_torchs_own() -> None:
    model, x = chain(), inputs_of(ROWS)
    conditioned(model, x, [hp.Dropout("4")])
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["", "4"]


@pytest.mark.parametrize("trace", ["export", "live"])
def test_functions_in_a_module_have_one_strength_for_all_its_calls(trace: str) -> None:
    network, _ = conditioned(SharedEncoder(), inputs_of(SEQUENCES), None, trace)
    assert network.hparams.values() == pytest.approx({
        "encoder.0.dropout": 0.2, "encoder.0.dropout_1.dropout": 0.4, "encoder.2.dropout": 0.3,
        "encoder.2.dropout_1.dropout": 0.3, "attention.dropout_1.dropout": 0.3, "attention.dropout": 0.1,
    })  # fmt: skip
    with pytest.warns(UserWarning, match=r"begins at 0\.2, as the first module has it"):
        conditioned(SharedEncoder(), inputs_of(SEQUENCES), [hp.Dropout(shared=True)], trace)


@pytest.mark.parametrize(
    ("specs", "rates"),
    [([hp.Dropout()], [0.3, 0.5, 0.8, 0.8, 0.8]), ([hp.Dropout("dropout_1")], [0.2, 0.5, 0.2, 0.2, 0.2])],
    ids=["all", "one"],
)
def test_a_longer_loop_goes_on_as_its_last_step(specs: list, rates: list[float]) -> None:
    torch.manual_seed(0)
    model, x = Steps(), torch.rand(128, 5, 16)
    network, strengths = conditioned(model, x[:, :3], specs, "live")
    rates_by_name = {"dropout": 0.3, "dropout_1.dropout": 0.5, "dropout_2.dropout": 0.8}
    network.hparams.set({name: rates_by_name[name] for name in network.hparams.names})
    strengths.copy_(network.hparams())
    for output in (model(x), network.conditioned_output(x)[0]):
        torch.testing.assert_close((output == 0).float().mean((0, 2)), torch.tensor(rates), rtol=0, atol=0.05)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(4, 1)


class FirstHalf(nn.Module):
    """A stage that returns several results of one function, of which one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.out = Halves(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.halves(x)[0])


def test_one_of_several_results_of_a_stage_is_tuned_where_a_frontend_follows_it() -> None:
    model = FirstHalf()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train, valid = (DataLoader([(torch.rand(8), 0)] * 8, 4) for _ in range(2))
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, train, valid)
    assert (tuner.stn.frontend, list(tuner.values())) == ("live", ["input.dropout", "halves.dropout"])
