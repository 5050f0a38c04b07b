"""Recurrent modules: laws 1 to 5 over their configurations, the states between windows, and dropout between layers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions.recurrent import recurrent
from fxstn.ir.closed import closed_call
from fxstn.ops.recurrence import recurrence, recurrence_tangent
from fxstn.ops.recurrent import Steps, recurrent_layer, steps
from fxstn.tools.verify import relative_error

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell, "relu": nn.RNNCell}
INPUTS, WIDTH, BATCH, TIME = 3, 4, 5, 6


class Recurrent(nn.Module):
    """An embedding of floats, a recurrent module and a head on all that it returns; the state is given or not."""

    def __init__(self, kind: str, stateful: bool, **choices: object) -> None:
        super().__init__()
        nonlinearity = {} if kind in ("lstm", "gru") else {"nonlinearity": kind}
        self.enter = nn.Linear(2, INPUTS)
        self.rnn = KINDS[kind](INPUTS, WIDTH, **nonlinearity, **choices)
        self.head = nn.Linear((self.rnn.proj_size or WIDTH) * (1 + self.rnn.bidirectional), 2)
        self.kind, self.stateful = kind, stateful

    def forward(self, x, h=None, c=None):
        x = torch.tanh(self.enter(x))
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        if self.stateful:  # batch first outside, layers first inside
            h = h.transpose(0, 1)
            y, after = self.rnn(x, (h, c.transpose(0, 1)) if self.kind == "lstm" else h)
        else:
            y, after = self.rnn(x)
        after = after if self.kind == "lstm" else (after,)
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        return self.head(y), tuple(s.transpose(0, 1) for s in after)

    def inputs(self):
        layers = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        widths = (self.rnn.proj_size or WIDTH, WIDTH)[: 2 if self.kind == "lstm" else 1]
        state = tuple(torch.randn(BATCH, layers, width) for width in widths) if self.stateful else ()
        return torch.randn(BATCH, TIME, 2), *state


def moved(stn, model, inputs, delta):
    """s ↦ model at w₀ + s Θ delta."""
    ahead, at = stn.best_response(delta), dict(model.named_parameters())
    return lambda s: functional_call(model, {n: (p + s * (ahead[n] - p)) for n, p in at.items()}, inputs)


def shuffled(stn):
    """Response parameters away from their start."""
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.uniform_(-0.5, 0.5)
    return stn


CONFIGURATIONS = st.fixed_dictionaries({
    "kind": st.sampled_from(list(KINDS)), "stateful": st.booleans(), "num_layers": st.integers(1, 3),
    "bidirectional": st.booleans(), "batch_first": st.booleans(), "bias": st.booleans(), "proj_size": st.sampled_from([0, 2]),
})  # fmt: skip


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def built(configuration, training=True):
    configuration = dict(configuration)
    if configuration["kind"] != "lstm":
        configuration.pop("proj_size", None)
    torch.manual_seed(0)
    model = Recurrent(**configuration).train(training)
    return model, model.inputs()


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    CONFIGURATIONS, st.booleans(), st.sampled_from(["fx", "export", "live"]), st.sampled_from(["scaled", "structured"])
)
def test_a_tangent_equals_a_central_difference_of_the_original(configuration, training, frontend, response):
    """Law 1, and that every parameter of the module responds, under its own name."""
    model, inputs = built(configuration, training)
    specs = [hp.Scalar("a", 1.0, 0.0, 2.0), hp.Scalar("b", 1.0, 0.0, 2.0)]
    stn = fxstn.transform(model, specs, example_inputs=inputs, trace=frontend, response=response)
    shuffled(stn).train(training)
    delta = torch.randn(2)
    y, dy = stn.pushforward(*inputs, delta=delta)
    torch.testing.assert_close(y, model(*inputs), rtol=1e-10, atol=1e-12)
    assert relative_error(dy, moved(stn, model, inputs, delta), 1e-7) <= 1e-6
    ahead = stn.best_response(delta)
    assert all((ahead[name] != parameter).any() for name, parameter in model.named_parameters())


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(CONFIGURATIONS, st.sampled_from(["delta", "centered", "stn"]))
def test_each_example_moves_as_it_would_alone(configuration, method):
    """Row i of a perturbation per example equals the shared result for it; finite steps equal the moved weights."""
    model, inputs = built(configuration)
    specs = [hp.Scalar("a", 1.0, 0.0, 2.0), hp.Scalar("b", 1.0, 0.0, 2.0)]
    stn = shuffled(fxstn.transform(model, specs, example_inputs=inputs, method=method))
    deltas = torch.randn(BATCH, 2)
    together, _ = stn.perturbed_output(*inputs, delta=deltas)
    for i in range(BATCH):
        alone, _ = stn.perturbed_output(*inputs, delta=deltas[i])
        for a, b in zip((together[0], *together[1]), (alone[0], *alone[1]), strict=True):
            torch.testing.assert_close(a[i], b[i], rtol=1e-9, atol=1e-11)
        if method != "delta":
            expected = functional_call(model, stn.best_response(deltas[i]), inputs)
            torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=10, deadline=None)
@given(CONFIGURATIONS)
def test_the_training_graph_trains_like_the_original(configuration):
    model, inputs = built(configuration)
    stn = fxstn.transform(copy.deepcopy(model), [hp.Scalar("a", 1.0, 0.0, 2.0)], example_inputs=inputs)
    for network in (model, stn):
        y, state = network(*inputs)
        (y.square().mean() + sum(s.sum() for s in state)).backward()
    for own, other in zip(model.parameters(), stn.general_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("frontend", ["fx", "export", "live"])
@pytest.mark.parametrize("given_state", [True, False])
def test_cells(kind, frontend, given_state):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            nonlinearity = {} if kind in ("lstm", "gru") else {"nonlinearity": kind}
            self.cell = CELLS[kind](INPUTS, WIDTH, **nonlinearity)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x):
            start = x.new_ones((x.shape[0], WIDTH))
            state = None if not given_state else (start, -start) if kind == "lstm" else start
            for t in range(3):
                state = self.cell(x[:, t], state)
            return self.head(state[0] if kind == "lstm" else state)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(BATCH, 3, INPUTS)
    stn = shuffled(fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)], example_inputs=x, trace=frontend))
    delta = torch.ones(1)
    y, dy = stn.pushforward(x, delta=delta)
    torch.testing.assert_close(y, model(x))
    assert relative_error(dy, moved(stn, model, (x,), delta), 1e-7) <= 1e-6
    assert set(stn.best_response(delta)) == {n for n, _ in model.named_parameters()}
    assert all((stn.best_response(delta)[n] != p).any() for n, p in model.named_parameters())


def test_a_sequence_without_a_batch():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(INPUTS, WIDTH, 2, bidirectional=True)), torch.randn(TIME, INPUTS)
    stn = shuffled(fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)]))
    y, dy = stn.pushforward(x, delta=torch.ones(1))
    torch.testing.assert_close(y, model(x))
    assert relative_error(dy, moved(stn, model, (x,), torch.ones(1)), 1e-7) <= 1e-6


@pytest.mark.parametrize(
    ("mode", "projected"), [("lstm", True), *((mode, False) for mode in ("lstm", "gru", "rnn_tanh", "rnn_relu"))]
)
def test_the_transposed_recurrence_is_the_transpose(mode, projected):
    torch.manual_seed(0)
    gates = {"lstm": 4, "gru": 3}.get(mode, 1)
    width = 2 if projected else WIDTH
    h, c = torch.randn(BATCH, width), torch.randn(BATCH, WIDTH) if mode == "lstm" else None
    weight = torch.randn(gates * WIDTH, width)
    projection = torch.randn(width, WIDTH) if projected else None
    did = steps(mode, torch.randn(TIME, BATCH, gates * WIDTH), h, c, weight, None, projection)
    assert isinstance(did, Steps)
    entering = torch.randn_like(did.by_hidden).requires_grad_()
    dh, dc = torch.randn_like(h).requires_grad_(), None if c is None else torch.randn_like(c).requires_grad_()
    change = torch.randn(TIME, BATCH, width).requires_grad_() if projected else None
    inputs = [x for x in (entering, dh, dc, change) if x is not None]
    weights = [torch.randn(TIME, BATCH, width), torch.randn(BATCH, width), torch.randn(BATCH, WIDTH)]

    def gradients(results):
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(results, weights, strict=False)), inputs)

    by_hand = gradients(recurrence_tangent(mode, entering, dh, dc, change, did, weight, projection))
    coefficients = (did.by_hidden, did.carry, did.output)
    dy, last = recurrence(entering, dh, dh if dc is None else dc, change, *coefficients, weight, projection)
    for a, b in zip(by_hand, gradients((dy, dy[-1], last)[: 3 if mode == "lstm" else 2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_between_layers_is_tuned():
    """The inner dropout is found under the module's name, and acts as a dropout between two single layers would."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(INPUTS, WIDTH, 3, dropout=0.3, batch_first=True)), torch.randn(BATCH, TIME, INPUTS)
    stn = fxstn.transform(model)
    assert stn.hparams.names == ("0.dropout", "0.dropout_1.dropout")
    assert list(stn.hparams.values().values()) == pytest.approx([0.3, 0.3])
    torch.manual_seed(1)
    y, _ = stn(x)
    torch.manual_seed(1)
    lstm, value = model[0], x.transpose(0, 1)
    for layer in range(3):
        own = [getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        if layer:
            value = value * ((torch.rand(value.shape) >= 0.3) / 0.7)
        value = recurrent("lstm", value, None, own, True, 1, 0.0, True, False)[0]
    torch.testing.assert_close(y, value.transpose(0, 1))
    assert fxstn.verify(model, x).ok
    assert fxstn.verify(model, x, hparams=[hp.Dropout("0.dropout*", shared=True)]).ok


def test_a_spec_that_names_a_recurrent_module_acts_on_its_output_alone():
    model, x = nn.Sequential(nn.GRU(INPUTS, WIDTH, batch_first=True)), torch.randn(BATCH, TIME, INPUTS)
    for frontend in ("fx", "export", "live"):
        stn = fxstn.transform(model, [hp.Dropout("0", init=0.5)], example_inputs=x, trace=frontend)
        y, h = stn(x)
        assert (y == 0).any()
        assert (h != 0).all()


@pytest.mark.parametrize("frontend", ["fx", "export", "live"])
def test_a_recurrent_stage_ends_with_its_output(frontend):
    """Without specs, dropout is inserted after it, and not after the state that nobody uses."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(INPUTS, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    x = torch.randn(BATCH, TIME, INPUTS)
    stn = fxstn.transform(Net(), example_inputs=x, trace=frontend)
    assert stn.hparams.names == ("input.dropout", "rnn.dropout")
    condition = torch.zeros(2, requires_grad=True)
    stn.graph("train")(x, condition=condition).sum().backward()
    assert (condition.grad != 0).all()  # both rates act


def test_of_a_recurrent_module_whose_output_is_not_used_the_state_is_meant():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(INPUTS, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[1][0].squeeze(0))

    x = torch.randn(BATCH, TIME, INPUTS)
    for frontend in ("fx", "export", "live"):
        stn = fxstn.transform(Last(), [hp.Dropout("rnn", init=0.5)], example_inputs=x, trace=frontend)
        assert (stn(x) != stn(x)).any()


def test_the_penalty_of_a_jacobian_goes_through_a_recurrent_layer():
    torch.manual_seed(0)
    model, x = built({"kind": "lstm", "stateful": False, "batch_first": True})
    stn = shuffled(fxstn.transform(model, [hp.JacobianNorm()]))
    loss = lambda output, target: output[0].square().mean()  # noqa: E731
    stn.hparams.unconstrained.data.fill_(2.0)

    def at(scale):
        torch.manual_seed(1)
        U = stn.response.flat_U
        before = U.detach().clone()
        U.data += scale * direction
        value = fxstn.response_loss(stn, loss, x, None)
        U.data = before
        return value

    direction = torch.randn_like(stn.response.flat_U)
    at(0.0).backward()
    slope = (stn.response.flat_U.grad * direction).sum()
    expected = (at(1e-5) - at(-1e-5)).detach() / 2e-5
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-9)


class Packed(nn.Module):
    """A recurrent module on sequences of several lengths; its state comes from a parameter, or is zero."""

    def __init__(self, kind: str, sorts: bool, stateful: bool, **choices: object) -> None:
        super().__init__()
        self.rnn, self.sorts = KINDS[kind](INPUTS, WIDTH, batch_first=True, **choices), sorts
        self.head = nn.Linear((self.rnn.proj_size or WIDTH) * (1 + self.rnn.bidirectional), 2)
        layers = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        self.state = nn.Parameter(torch.randn(layers, 1, WIDTH)) if stateful else None

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=not self.sorts)
        hx = None if self.state is None else self.state.expand(-1, len(x), -1).contiguous()
        y, after = self.rnn(packed, (hx, hx.tanh()) if hx is not None and isinstance(self.rnn, nn.LSTM) else hx)
        y, _ = pad_packed_sequence(y, batch_first=True)
        return self.head(y), *(s.transpose(0, 1) for s in (after if isinstance(after, tuple) else (after,)))


@pytest.mark.parametrize(
    ("kind", "sorts", "stateful", "choices"),
    [
        ("lstm", True, True, {"bidirectional": True, "num_layers": 2, "dropout": 0.3}),
        ("lstm", True, False, {"proj_size": 2, "bias": False}),
        ("gru", True, True, {"bidirectional": True}),
        ("relu", False, False, {"num_layers": 2}),
    ],
)
def test_packed_sequences_keep_law_one(kind, sorts, stateful, choices):
    model, x = Packed(kind, sorts, stateful, **choices), torch.randn(4, TIME, INPUTS)
    lengths = torch.tensor([3, TIME, 1, 3] if sorts else [TIME, 4, 4, 1])
    spec = None if choices.get("dropout") else [hp.Scalar("a", 1.0, 0.0, 2.0)]
    report = fxstn.verify(model, x, lengths, hparams=spec, trace="live")
    assert report.ok, str(report)


def test_explain_calls_a_recurrent_layer_a_hyperlayer():
    model = nn.Sequential(nn.LSTM(INPUTS, WIDTH, 2))
    table = fxstn.explain(model, [hp.Scalar("a", 1.0, 0.0, 2.0)])
    assert table.ok
    assert [row.rule for row in table.rows if "recurrent_layer" in row.operation] == ["hyperlayer"] * 2


def test_examples_along_dimension_one_move_alone():
    """A time-major module inside a batch-first network: the examples are found along dimension 1."""

    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(INPUTS, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)

    torch.manual_seed(0)
    x = torch.randn(BATCH, TIME, INPUTS)
    stn = shuffled(fxstn.transform(TimeMajor(), [hp.Scalar("a", 1.0, 0.0, 2.0)]))
    deltas = torch.randn(BATCH, 1)
    _, dy = stn.pushforward(x, delta=deltas)
    for i in range(BATCH):
        torch.testing.assert_close(dy[i], stn.pushforward(x, delta=deltas[i])[1][i])
    assert stn.per_example(x)


def test_the_response_step_leaves_weights_alone():
    """Law 3."""
    model, inputs = built({"kind": "lstm", "stateful": True, "batch_first": True})
    stn = fxstn.transform(model, [hp.Dropout("rnn")], example_inputs=inputs)
    loss = lambda output, target: F.mse_loss(output[0], target)  # noqa: E731
    fxstn.response_loss(stn, loss, inputs, torch.zeros(BATCH, TIME, 2)).backward()
    assert all(parameter.grad is None for parameter in stn.general_parameters())
    assert all(parameter.grad is not None for parameter in stn.response_parameters())


@pytest.mark.nightly
def test_a_compiled_recurrent_network_computes_the_same():
    """A recurrent layer is one operator of the graph; sequences of a second length are compiled once more."""
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, inputs = built({"kind": "lstm", "stateful": True, "num_layers": 2, "batch_first": True})
    plain = shuffled(fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)], example_inputs=inputs))
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=counter)
    loss = lambda output, target: F.mse_loss(output[0], target)  # noqa: E731
    for batch, time, graphs in ((BATCH, TIME, 3), (BATCH - 1, TIME, 3), (BATCH, TIME + 3, 6), (BATCH - 2, TIME + 1, 6)):
        inputs = torch.randn(batch, time, 2), *(torch.randn(batch, *state.shape[1:]) for state in inputs[1:])
        gradients = []
        for stn in (plain, compiled):
            stn.zero_grad()
            for objective in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
                torch.manual_seed(0)
                objective(stn, loss, inputs, torch.zeros(batch, time, 2)).backward()
            gradients.append([parameter.grad for parameter in stn.parameters() if parameter.grad is not None])
        assert len(gradients[0]) > 10
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("lowered", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("layer", [recurrent_layer, steps])
def test_a_closed_call_is_the_function_with_its_gradient(layer, lowered):
    """What torch.compile takes as one operator: a state without a gradient, biases that are missing, nested results."""
    torch.set_default_dtype(torch.float32 if lowered else torch.float64)
    x, h = torch.randn(TIME, BATCH, 3 * WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH)
    weights = [torch.randn(3 * WIDTH, n, requires_grad=True) for n in (3 * WIDTH, WIDTH)]
    own = (weights[0], None, weights[1], None, None) if layer is recurrent_layer else (weights[1], None, None)
    found = []
    for function in (layer.__wrapped__, partial(closed_call, layer.__wrapped__)):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            results, structure = tree_flatten(function("gru", x, h, None, *own))
        values = [leaf for leaf in results if leaf is not None]
        total = sum(leaf.float().square().sum() for leaf in values)
        found.append((str(structure), values, torch.autograd.grad(total, (x, weights[1]))))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:])
