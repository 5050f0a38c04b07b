"""torch.compile: a step's graph, loss and penalties are one region for all batches and every λ, with the eager values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fxstn
from fxstn.bilevel.counts import as_loss
from fxstn.ir.staging import functions_in_graph
from tests.runs import make, without_times


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_each_kind_of_step_is_one_graph_for_all_batches_and_every_lambda():
    settings = {"train": 45, "hyper": {"optimizer": partial(torch.optim.SGD, lr=1.0)}}
    plain = make(**settings).fit(2)  # batches of 8; the last has 5, and that of validation 6
    counter = CompileCounterWithBackend("eager")
    run = make(**settings, execution={"compile": {"backend": counter}})
    run.fit(1)
    assert counter.frame_count == 3
    assert set(map(str, run.stn._graphs.compiled)) == {"train", "linearized", "at_rest_eval"}
    for a, b in zip(without_times(plain), without_times(run.fit(2)), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert counter.frame_count == 3
    assert not counters["graph_break"]
    assert run.history["2.dropout"][0] != run.history["2.dropout"][1]


ALONE = {"backend": "eager", "fullgraph": False}  # the graphs alone are compiled
WEIGHT = torch.tensor([1.0, 0.5, 2.0])
LOSSES = {
    "sum over the number of examples": lambda output, target: (output**2).sum() / len(target),
    "sum over a number": lambda output, target: F.cross_entropy(output, target, reduction="sum") / 10,
    "mean": F.cross_entropy,
    "weighted": lambda output, target: F.cross_entropy(output, target, weight=WEIGHT, label_smoothing=0.1),
    "sum": lambda output, target: F.cross_entropy(output, target, reduction="sum"),
    "own mean": lambda output, target: F.cross_entropy(output, target, reduction="none").mean(),
    "by the count": lambda output, target: (
        F.cross_entropy(output, target, reduction="none").sum() / (target != -100).sum()
    ),
    "pair": lambda output, target: (F.cross_entropy(output, target, reduction="sum"), (target != -100).sum()),
    "two": lambda output, target: F.cross_entropy(output, target) + 0.1 * F.cross_entropy(-output, target),
    "of the output": lambda output, target: F.mse_loss(output, F.one_hot(target.clamp_min(0), 3).float()),
    "no record": lambda output, target: output.logsumexp((0, 1)) / 7,
}


def test_a_compiled_loss_knows_what_it_is_a_mean_over():
    counter = CompileCounterWithBackend("aot_eager")
    for function in functions_in_graph():  # as before a step is compiled
        torch.compiler.allow_in_graph(function)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def parts(output, target):
        losses = [as_loss(loss_fn(output, target), output, target) for loss_fn in LOSSES.values()]
        losses.append(as_loss(output.logsumexp((0, 1)), output, output.detach()))  # the entries of the target count
        return [(loss.data, loss.count, loss.entries, loss.additive) for loss in losses]

    for batch in (8, 5):
        target = torch.arange(batch) % 3
        target[1] = -100
        output, totals = torch.randn(batch, 3, requires_grad=True), [0.0, 0.0]
        for (name, loss_fn), (data, *facts) in zip(LOSSES.items(), parts(output, target)[:-1], strict=True):
            expected = as_loss(loss_fn(output, target), output, target)
            wanted = [float(fact) for fact in (expected.count, expected.entries, expected.additive)]
            assert [float(fact) for fact in facts] == pytest.approx(wanted), name
            totals = [total + loss for total, loss in zip(totals, (data, expected.data), strict=True)]
        assert float(parts(output, target)[-1][1]) == 3 * batch
        gradient, other = (torch.autograd.grad(total, output)[0] for total in totals)
        torch.testing.assert_close(gradient, other)
    assert counter.frame_count == 1


def item(output, target):
    return F.cross_entropy(output, target) * (1.0 if output.sum().item() > 0 else 2.0)


def test_what_cannot_be_compiled_is_named_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"cannot follow this step, .*test_compile\.py:\d+: .*item\(\).*'fullgraph': False"
    ):
        make(loss_fn=item, execution={"compile": {"backend": "eager"}}).fit(1)
    rows = [without_times(make(loss_fn=item, execution={"compile": on}).fit(1))[0] for on in (False, ALONE)]
    # the difference of two losses, each of which is within 1e-5
    errors = [row.pop("linearization_error") for row in rows]
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
    assert errors[1] == pytest.approx(errors[0], abs=3e-5)
    with pytest.raises(ValueError, match="train_loader in epoch 1, step 1: loss_fn cannot take an output"):
        make(loss_fn=lambda output, target: F.cross_entropy(output, target + 0.5),
             execution={"compile": {"backend": "eager"}}).fit(1)  # fmt: skip


def test_cuda_graphs_are_the_default_on_a_gpu_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fxstn.ExecutionSettings(compile=True).compile_options(cuda) == {"mode": "reduce-overhead"}
    assert fxstn.ExecutionSettings(compile=True).compile_options(cpu) == {}
    assert fxstn.ExecutionSettings(compile={"backend": "eager"}).compile_options(cuda) == {"backend": "eager"}
    assert fxstn.ExecutionSettings().compile_options(cuda) is None


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.dropout, self.out = kind(4, 6, batch_first=True), nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.dropout(self.rnn(x)[0].mean(1)))


class MaskedEncoder(nn.Module):
    """Of sequences in which some words are padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.encoder(x, src_key_padding_mask=x[..., 0] > 1).mean(1))


class OwnLoss(nn.Module):
    """A network that computes a loss, whose tangent is its own backward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.dropout, self.out = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        y = self.out(self.dropout(self.body(x).relu()).mean(1))
        return y + F.smooth_l1_loss(y, x[:, :3, 0])


LAYERS = {kind.__name__: partial(Recurrent, kind) for kind in (nn.GRU, nn.RNN, nn.LSTM)} | {
    "encoder": MaskedEncoder,
    "loss": OwnLoss,
}


@pytest.mark.parametrize(
    "layer", [pytest.param(name, marks=[pytest.mark.nightly] * (name in ("GRU", "RNN"))) for name in LAYERS]
)
def test_a_compiled_response_step_has_the_gradient_of_the_plain_one(layer):
    stn = fxstn.transform(LAYERS[layer](), example_inputs=torch.randn(6, 5, 4))
    nn.init.normal_(stn.response.flat_U)
    x, target, epsilon = torch.randn(6, 5, 4), torch.arange(6) % 3, torch.randn(6, len(stn.hparams))
    gradients = []
    for compiled in (False, True):
        if compiled:
            stn.compile(backend="aot_eager")
        torch.manual_seed(0)
        loss = fxstn.response_loss(stn, F.cross_entropy, x, target, perturb=epsilon)
        gradients.append(torch.autograd.grad(loss, stn.response.flat_U)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_no_function_with_a_backward_of_its_own_returns_what_it_has_written_in_place():
    """Dynamo of torch 2.11 lists such a tensor twice among its results, and the gradient goes to the one that is not used."""
    forwards = [
        method
        for path in Path(fxstn.__file__).parent.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.ClassDef) and "torch.autograd.Function" in map(ast.unparse, function.bases)
        for method in function.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    ]
    assert len(forwards) > 8
    returned = [node.value for forward in forwards for node in ast.walk(forward) if isinstance(node, ast.Return)]
    calls = [ast.unparse(value.func) for value in returned if isinstance(value, ast.Call)]
    assert not [call for call in calls if re.search(r"\w_$", call)]
