"""The regularisers of language models: masks locked in time, dropped words, temporal decay, weights by their names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.ir.staging import draws
from fxstn.ir.tangents import BatchAxis
from fxstn.ops.noise import locked_mask, word_mask
from fxstn.tools.commands import AUGMENTATIONS
from tests.nets import randomize_response

WORDS, BATCH, TIME, FEATURES = 12, 4, 5, 6


class Model(nn.Module):
    """Words (batch, time) → scores (batch, time, words), the decoder tied to the table; inside time first, if asked."""

    def __init__(self, time_first: bool = False) -> None:
        super().__init__()
        self.time_first = time_first
        self.encoder, self.hidden = nn.Embedding(WORDS, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.decoder = nn.Linear(FEATURES, WORDS, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.encoder(words.t() if self.time_first else words)
        y = self.decoder(torch.tanh(self.hidden(x)))
        return y.transpose(0, 1) if self.time_first else y


class Cell(nn.Module):
    """Two weights in one module, as in a recurrent layer, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh = (nn.Parameter(0.5 * torch.randn(FEATURES, FEATURES)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight_ih)), self.weight_hh, self.bias)


def language_model(time_first: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(time_first).double()


def recurrent() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, FEATURES), Cell(), nn.Linear(FEATURES, 2)).double()


def words() -> Tensor:
    return torch.randint(WORDS, (BATCH, TIME), generator=torch.Generator().manual_seed(1))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def nothing(output: Tensor, target: Tensor) -> Tensor:
    return 0 * output.sum()


# Masks


@pytest.mark.parametrize("axis", [1, 0, -2])
def test_a_locked_mask_is_the_same_at_all_times_and_has_each_examples_rate(axis):
    torch.manual_seed(0)
    time_first = axis == 0
    x = torch.zeros((TIME, 400, 50) if time_first else (400, TIME, 50), dtype=torch.float64)
    p = torch.tensor([0.2, 0.7]).repeat(200)
    mask = locked_mask(x, p, axis, BatchAxis(1 if time_first else 0))
    assert mask.shape == ((1, 400, 50) if time_first else (400, 1, 50))
    assert mask.dtype == x.dtype
    rows = mask.reshape(400, 50)
    for entries, rate in ((rows[::2], 0.2), (rows[1::2], 0.7)):
        assert (entries == 0).double().mean().item() == pytest.approx(rate, abs=0.02)
        assert entries.mean().item() == pytest.approx(1, abs=0.07)
        torch.testing.assert_close(entries.unique(), torch.tensor([0, 1 / (1 - rate)], dtype=x.dtype))
    assert len(rows[::2].unique(dim=0)) == len(rows[1::2].unique(dim=0)) == 200


def test_words_are_dropped_wherever_they_occur_and_at_each_examples_rate():
    torch.manual_seed(0)
    table = torch.zeros(2000, 3, dtype=torch.float64)
    index = torch.arange(2000).repeat(2, 2)  # every word twice in each of two examples
    mask = word_mask(index, table, torch.tensor([0.2, 0.7]))
    assert mask.shape == (2, 4000, 1)
    assert mask.dtype == table.dtype
    assert torch.equal(mask[:, :2000], mask[:, 2000:])
    for row, rate in ((mask[0], 0.2), (mask[1], 0.7)):
        assert (row == 0).double().mean().item() == pytest.approx(rate, abs=0.04)
        assert row.mean().item() == pytest.approx(1, abs=0.12)
        torch.testing.assert_close(row.unique(), torch.tensor([0, 1 / (1 - rate)], dtype=table.dtype))
    assert (mask[1][mask[0] == 0] == 0).all()  # one draw: who drops more drops those, too
    alike = word_mask(index, table, torch.tensor(0.4))
    assert torch.equal(alike[0], alike[1])
    assert not torch.equal(alike, word_mask(index, table, torch.tensor(0.4)))
    by_time = word_mask(index.t(), table, torch.tensor([0.0, 0.7]), BatchAxis(1))
    assert (by_time[:, 0] == 1).all()
    assert (by_time[:, 1] == 0).any()


def test_values_that_are_not_floating_point_are_left_alone():
    assert torch.equal(hp.LockedDropout.function(words(), 0.9, axis=1), words())
    stn = fxstn.transform(language_model(), [hp.LockedDropout("input", init=0.9)]).train()
    torch.testing.assert_close(stn(words()), stn.model(words()))


@pytest.mark.parametrize(
    ("shape", "p", "axis", "batch_axis"),
    [((3,), 0.5, 1, BatchAxis(0)), ((3, 4), torch.rand(3), 0, BatchAxis(0)), ((4, 3, 2), 0.5, 1, BatchAxis(1))],
)
def test_a_mask_is_not_locked_along_the_examples(shape, p, axis, batch_axis):
    with pytest.raises(ValueError, match=rf"hp\.LockedDropout: axis={axis} cannot be that of time .* pass axis=1 for"):
        locked_mask(torch.zeros(shape), p, axis, batch_axis)


# In the graph

DROPOUTS = {
    "words": lambda axis: [hp.EmbeddingDropout(init=0.4)],
    "locked": lambda axis: [hp.LockedDropout("encoder", "hidden", init=0.4, axis=axis)],
    "both": lambda axis: [
        hp.EmbeddingDropout("enc*", init=0.4), hp.LockedDropout("encoder", "hidden", init=0.3, axis=axis)
    ],
}  # fmt: skip


def by_hand(name: str, model: Model, weights: dict[str, Tensor], rates: Tensor, seed: int) -> Tensor:
    """The model with the draws of that seed at rates (batch, h), every mask written out."""
    torch.manual_seed(seed)
    table, index = weights["encoder.weight"], words()
    columns = list(rates.unbind(1))
    x = table[index]
    if name != "locked":
        noise = torch.rand(WORDS, dtype=torch.float64)
        p = columns.pop(0)[:, None, None]
        x = x * (noise[index][..., None] >= p) / (1 - p)
    for layer in range(2) if name != "words" else ():
        shape = (1, BATCH, FEATURES) if model.time_first else (BATCH, 1, FEATURES)
        mask = torch.rand(shape, dtype=torch.float64).reshape(BATCH, 1, FEATURES)
        p = columns.pop(0)[:, None, None]
        x = F.linear(x, weights["hidden.weight"], weights["hidden.bias"]) if layer else x
        x = x * (mask >= p) / (1 - p)
    x = x if name != "words" else F.linear(x, weights["hidden.weight"], weights["hidden.bias"])
    return F.linear(torch.tanh(x), table)


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_primal_and_tangent_have_one_draw_at_the_rates_of_each_example(name, time_first):
    """Reference: the model written out by hand with its masks, and its central difference along the best response."""
    model = language_model(time_first)
    stn = fxstn.transform(model, DROPOUTS[name](int(not time_first)), example_inputs=words()).train()
    assert stn.per_example(words())
    randomize_response(stn, 0.1)
    torch.manual_seed(0)
    h = len(stn.hparams)
    delta, condition = torch.randn(h, dtype=torch.float64), torch.randn(BATCH, h, dtype=torch.float64)
    torch.manual_seed(5)
    y, dy = stn.pushforward(words(), delta=delta, condition=condition)
    rates = stn.hparams(condition)
    assert len(rates[:, 0].unique()) == BATCH

    def moved(step: float) -> Tensor:
        return by_hand(name, model, stn.best_response(step * delta), rates, 5)

    torch.testing.assert_close(y, moved(0.0))
    torch.testing.assert_close(dy, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)
    assert dy.abs().max() > 0.01
    assert (y - model(words())).abs().max() > 0.01


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_training_reads_the_rates_at_lambda_and_evaluation_drops_nothing(name, time_first):
    model = language_model(time_first)
    stn = fxstn.transform(model, DROPOUTS[name](int(not time_first)), example_inputs=words())
    rates = stn.hparams().detach()
    assert rates[0].item() == pytest.approx(0.4)
    torch.manual_seed(7)
    output = stn.train()(words())
    torch.testing.assert_close(output, by_hand(name, model, dict(model.named_parameters()), rates.expand(BATCH, -1), 7))
    torch.testing.assert_close(stn.eval()(words()), model(words()), rtol=0, atol=0)
    torch.testing.assert_close(stn.graph("eval")(words()), model(words()), rtol=0, atol=0)


@pytest.mark.parametrize("name", DROPOUTS)
def test_the_tangent_is_the_derivative(name):
    report = fxstn.verify(language_model(), words(), hparams=DROPOUTS[name](1))
    assert report.ok, report


def test_a_mask_along_the_wrong_axis_is_refused():
    stn = fxstn.transform(language_model(time_first=True), [hp.LockedDropout("hidden")]).train()
    with pytest.raises(ValueError, match="whose examples are along dimension 1"):
        stn.pushforward(words(), delta=torch.zeros(1).double(), condition=torch.zeros(BATCH, 1).double())


class Twice(nn.Module):
    """One table read twice by its module, another one by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(WORDS, FEATURES), nn.Tanh())
        self.table, self.head = nn.Parameter(torch.randn(WORDS, FEATURES)), nn.Linear(FEATURES, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.encoder(words) - self.encoder(words.flip(1))
        return self.head(x + F.embedding(words, self.table))


def test_every_lookup_is_found_and_has_a_draw_of_its_own():
    stn = fxstn.transform(Twice(), [hp.EmbeddingDropout()])
    module, function = stn.hparams.names
    assert module == "encoder.0.embedding_dropout"
    assert function == "embedding.embedding_dropout"  # a call of the function
    assert sum(draws(node.target) for node in stn.graph("train").graph.nodes) == 3
    one = fxstn.transform(Twice(), [hp.EmbeddingDropout("*.0")])
    assert one.hparams.names == ("encoder.0.embedding_dropout",)
    assert sum(draws(node.target) for node in one.graph("train").graph.nodes) == 2
    shared = fxstn.transform(Twice(), [hp.EmbeddingDropout("*", shared=True)])
    assert shared.hparams.names == ("embedding_dropout",)
    assert sum(draws(node.target) for node in shared.graph("train").graph.nodes) == 3


class Branching(Model):
    """Only torch.export follows it."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) if words.shape[1] > 3 else super().forward(words.flip(1))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_the_losses_train_with_every_spec(frontend):
    torch.manual_seed(0)
    model = Model() if frontend == "fx" else Branching()
    specs = [*DROPOUTS["both"](1), hp.TemporalDecay("hidden"), hp.DropConnect("hidden.weight"), hp.WeightDecay()]
    stn = fxstn.transform(model, specs, example_inputs=words()).train()
    assert stn.frontend == frontend
    if frontend == "fx":
        stn.compile(backend="aot_eager")  # fullgraph=True
    randomize_response(stn)
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss(stn, loss_of, words(), words()).backward()
    for parameter in (*stn.general_parameters(), *stn.response_parameters(), stn.hparams.unconstrained):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_pictures_are_of_augmentations_only():
    assert {"ColorJitter", "MixUp", "Flip"} <= set(AUGMENTATIONS)
    assert not {"LockedDropout", "EmbeddingDropout", "StochasticDepth"} & set(AUGMENTATIONS)


# Temporal decay


@pytest.mark.parametrize("axis", [1, 0])
def test_temporal_decay_is_the_mean_square_of_the_change_in_time(axis):
    """Its value, and its gradient in the weights by central differences."""
    model = language_model(time_first=axis == 0)
    stn = fxstn.transform(model, [hp.TemporalDecay("hidden", init=0.5, axis=axis)]).train()
    assert stn.hparams.names == ("hidden.temporal_decay",)
    weight, direction = model.hidden.weight, torch.randn(FEATURES, FEATURES, dtype=torch.float64)

    def penalty(step: float) -> Tensor:
        with torch.no_grad():
            h = F.linear(model.encoder(words()), weight + step * direction, model.hidden.bias)
            return stn.hparams()[0] * (h[:, 1:] - h[:, :-1]).square().mean()

    loss = fxstn.general_loss(stn, nothing, words(), words())
    torch.testing.assert_close(loss, penalty(0.0))
    loss.backward()
    derivative = (stn.model.hidden.weight.grad * direction).sum()
    torch.testing.assert_close(derivative, (penalty(1e-5) - penalty(-1e-5)) / 2e-5, rtol=1e-8, atol=0)


@pytest.mark.parametrize("axis", [1, 0])
def test_temporal_decay_in_the_response_step_is_that_of_moved_activations(axis):
    """Each example at its own coefficient and its own weights, by central differences of the original."""
    model = language_model(time_first=axis == 0)
    stn = fxstn.transform(model, [hp.TemporalDecay("hidden", init=0.5, axis=axis)]).train()
    randomize_response(stn, 0.05)
    torch.manual_seed(3)
    epsilon = stn.hparams.sample(BATCH).detach()

    def activation(i: int, step: float) -> Tensor:
        weights = stn.best_response(step * epsilon[i])
        return F.linear(weights["encoder.weight"][words()[i]], weights["hidden.weight"], weights["hidden.bias"])

    total = []
    for i in range(BATCH):
        h = activation(i, 0.0) + (activation(i, 1e-5) - activation(i, -1e-5)) / 2e-5
        total.append(stn.hparams(epsilon)[i, 0] * h.diff(dim=0).square().mean())
    torch.manual_seed(3)
    loss = fxstn.response_loss(stn, nothing, words(), words())
    torch.testing.assert_close(loss, torch.stack(total).mean(), rtol=1e-8, atol=0)


def test_temporal_decay_is_one_value_per_example_and_zero_for_a_single_time():
    h = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    spec, time_first = hp.TemporalDecay("x"), hp.TemporalDecay("x", axis=0)
    expected = torch.stack([sum((row[t + 1] - row[t]).square().sum() for t in range(3)) / 30 for row in h])
    torch.testing.assert_close(spec.measure(h), expected)
    torch.testing.assert_close(time_first.measure(h.transpose(0, 1)), expected)
    one = h[:, :1].clone().requires_grad_()
    assert spec.measure(one).tolist() == time_first.measure(one.transpose(0, 1)).tolist() == [0, 0, 0]
    spec.measure(one).sum().backward()
    assert one.grad.abs().max() == 0


# Weights by their names


@pytest.mark.parametrize("spec", [hp.DropConnect, hp.WeightDecay])
@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (["*.weight_hh*"], ["1.weight_hh"]),
        (["1.weight_??", "2"], ["1.weight_ih", "1.weight_hh", "2"]),
        (["*"], ["0", "1", "2"]),
        (["1", "1.weight_hh"], ["1"]),
        (["0.weight"], ["0.weight"]),
    ],
)
def test_a_weight_is_matched_by_its_name_where_its_layer_is_not(spec, patterns, paths):
    stn = fxstn.transform(recurrent(), [spec(*patterns)])
    kind = "drop_connect" if spec is hp.DropConnect else "weight_decay"
    assert stn.hparams.names == tuple(f"{path}.{kind}" for path in paths)
    shared = fxstn.transform(recurrent(), [spec(*patterns, shared=True)])
    assert shared.hparams.names == (kind,)


def test_only_the_weight_that_is_named_is_dropped():
    model = recurrent()
    stn = fxstn.transform(model, [hp.DropConnect("*.weight_hh", init=0.4)]).train()
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.manual_seed(2)
    output = stn(x)
    torch.manual_seed(2)
    weight = model[1].weight_hh
    p = stn.hparams()[0]
    constant = weight * (torch.rand_like(weight) >= p) / (1 - p)
    torch.testing.assert_close(output, functional_call(model, {"1.weight_hh": constant}, (x,)))
    torch.testing.assert_close(stn.eval()(x), model(x), rtol=0, atol=0)
    assert fxstn.verify(model, x, hparams=[hp.DropConnect("*.weight_hh")]).ok


def test_only_the_weight_that_is_named_decays():
    model, x = recurrent(), torch.zeros(2, 3, dtype=torch.float64)
    specs = [
        hp.WeightDecay("1.weight_hh", init=1e-2),
        hp.WeightDecay("1.weight_ih", norm=1, init=1e-3),
        hp.WeightDecay("2"),
    ]
    stn = fxstn.transform(model, specs).train()
    expected = 0.5e-2 * model[1].weight_hh.square().sum() + 1e-3 * model[1].weight_ih.abs().sum()
    expected += 2.5e-4 * model[2].weight.square().sum()
    torch.testing.assert_close(fxstn.general_loss(stn, nothing, x, x), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hp.LockedDropout("0", time=0), TypeError, "has no argument 'time'; it has axis"),
        (lambda: hp.LockedDropout("0", high=0.99), ValueError, "need 0 <= low < high <= 0.95 for locked_dropout"),
        (hp.TemporalDecay, TypeError, "hp.TemporalDecay needs the names of modules"),
        (lambda: hp.TemporalDecay("0", axis=-1), ValueError, "axis=-1 must be a whole number, .* counted from the front"),
        (
            lambda: fxstn.transform(language_model(), [hp.EmbeddingDropout("hidden")]),
            ValueError,
            r"'hidden' matches nothing it could tune, a module whose output is the result of F\.embedding; "
            "nearest module names: 'encoder'",
        ),
        (
            lambda: fxstn.transform(recurrent(), [hp.EmbeddingDropout()]),
            ValueError,
            r"the model calls no F\.embedding when it trains",
        ),
        (
            lambda: fxstn.transform(language_model(), [hp.EmbeddingDropout(), hp.EmbeddingDropout("encoder")]),
            ValueError,
            "EmbeddingDropout is asked for twice at 'encoder'",
        ),
        (
            lambda: fxstn.transform(recurrent(), [hp.DropConnect("1.weight_hh"), hp.DropConnect("1")]),
            ValueError,
            "DropConnect is asked for twice at '1.weight_hh'",
        ),
        (
            lambda: fxstn.transform(recurrent(), [hp.DropConnect("1.weight_hx")]),
            ValueError,
            "'1.weight_hx' matches nothing.*'1.weight_hh'",
        ),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
