"""Tables with sparse gradients: the same numbers as with dense ones, and several optimizers as one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, SparseAdam

import fxstn
from fxstn import hp
from fxstn.bilevel.combined import CombinedOptimizer
from fxstn.ops.multi_tensor import clip_gradients
from tests.nets import randomize_response
from tests.runs import grouped

WORDS, TARGET = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
BATCHES = [(WORDS[i : i + 4], TARGET[i : i + 4]) for i in range(0, 16, 4)]
TABLES = [nn.Embedding, nn.EmbeddingBag]


def net(kind: type[nn.Module] = nn.EmbeddingBag, sparse: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    flat, width = ([nn.Flatten()], 32) if kind is nn.Embedding else ([], 8)
    return nn.Sequential(kind(20, 8, sparse=sparse), *flat, nn.Dropout(0.1), nn.Linear(width, 3))


def transformed(model: nn.Module, **options):
    return fxstn.transform(model, [hp.Dropout(), hp.WeightDecay()], example_inputs=WORDS[:4], **options)


def runner_of(stn, out_dir=None, **settings):
    defaults = {"hyper": {"train_steps": 1}, "response": {"every": 1}, "checkpoints": {"out_dir": out_dir}}
    keywords = grouped(settings, progress=False, accumulate=2, clip_norm=0.1, **defaults)
    return fxstn.BilevelRunner(stn, F.cross_entropy, BATCHES, BATCHES, **keywords)


def two_optimizers(parameters):
    table = next(p for p in parameters if p.shape == (20, 8))
    return [SparseAdam([table], lr=0.01), Adam([p for p in parameters if p is not table], lr=0.003)]


@pytest.mark.parametrize("response", ["scaled", "structured"])
@pytest.mark.parametrize("kind", TABLES)
def test_the_training_hypergradient_is_that_of_dense_gradients(kind, response):
    values = []
    for sparse in (True, False):
        stn = transformed(net(kind, sparse), response=response).train()
        torch.manual_seed(1)
        randomize_response(stn)
        fxstn.general_loss(stn, F.cross_entropy, WORDS, TARGET).backward()
        assert stn.model[0].weight.grad.is_sparse is sparse
        values.append(stn.hypergradient())
    assert values[0].abs().min() > 1e-4
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "trace", "kind"),
    [*(("delta", "fx", kind) for kind in TABLES), ("stn", "fx", nn.Embedding), ("stn", "fx", nn.EmbeddingBag),
     ("stn", "live", nn.Embedding), ("centered", "live", nn.EmbeddingBag), ("delta", "export", nn.Embedding)],
)  # fmt: skip
def test_a_run_is_that_with_dense_gradients(method, trace, kind):
    """Clipping, accumulation and averages included; the default optimizer cannot be fused."""
    ends = []
    for sparse in (True, False):
        stn = transformed(net(kind, sparse), method=method, trace=trace)
        torch.manual_seed(2)
        runner_of(stn, ema=0.9).fit(2)
        ends.append(list(stn.parameters()))
    for ours, dense in zip(*ends, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


def test_sparse_adam_beside_adam_trains_and_goes_on_after_a_resume(tmp_path):
    def finished(*epochs):
        torch.manual_seed(3)
        for last in epochs:
            runner = runner_of(transformed(net()), optimizer=two_optimizers, out_dir=tmp_path / str(epochs))
            runner.fit(last)
        return runner.stn

    before, once, twice = transformed(net()), finished(2), finished(1, 2)
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name
    assert all((p != q).any() for p, q in zip(before.general_parameters(), once.general_parameters(), strict=True))


def test_a_network_that_is_one_table_trains_with_sparse_adam_alone():
    stn = fxstn.transform(nn.Sequential(nn.EmbeddingBag(20, 3, sparse=True), nn.Dropout(0.1)), example_inputs=WORDS)
    before = stn.model[0].weight.detach().clone()
    runner_of(stn, optimizer=lambda p: SparseAdam(p, lr=0.1)).fit(2)
    assert (stn.model[0].weight != before)[WORDS].all()


def test_float16_unscales_sparse_gradients():
    stn = transformed(net())
    runner_of(stn, optimizer=two_optimizers, execution={"autocast": torch.float16}).fit(1)
    assert all(p.isfinite().all() for p in stn.parameters())


def test_several_optimizers_are_stepped_scheduled_and_restored_as_one():
    """Against the two alone, with the same gradients and rates."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    alone = copy.deepcopy((first, second))
    parts = [SGD(first.parameters(), lr=1.0, momentum=0.9), Adam(second.parameters(), lr=0.5)]
    apart = [SGD(alone[0].parameters(), lr=1.0, momentum=0.9), Adam(alone[1].parameters(), lr=0.5)]
    combined = CombinedOptimizer(parts)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (combined, *apart)]
    for step in range(4):
        for model in (first, second, *alone):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + step)
        for optimizer in (combined, *apart):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if step == 1:
            saved = copy.deepcopy(combined.state_dict())
            parts = [SGD(first.parameters(), lr=1.0, momentum=0.9), Adam(second.parameters(), lr=0.5)]
            combined = CombinedOptimizer(parts)
            combined.load_state_dict(saved)
            schedulers[0].optimizer = combined
    assert [group["lr"] for part in parts for group in part.param_groups] == [0.0625, 0.03125]
    for ours, theirs in zip((first, second), alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (lambda p: [SGD(p, lr=0.1), Adam(p)], ValueError, "optimizer: .* have a parameter in common"),
        (lambda p: [SGD(p[:1], lr=0.1)], ValueError, "lacks 2 of its 3"),
        (lambda p: [SGD(p, lr=0.1), None], TypeError, "must be an optimizer, or a list of them"),
        (lambda p: [], TypeError, "must be an optimizer, or a list of them"),
        (lambda p: [torch.optim.LBFGS(p)], ValueError, "LBFGS evaluates a closure"),
    ],
)  # fmt: skip
def test_a_list_of_optimizers_is_checked(optimizer, error, message):
    with pytest.raises(error, match=message):
        runner_of(transformed(net()), optimizer=optimizer)


@pytest.mark.parametrize("most", [0.3, 1e3])
def test_sparse_and_dense_gradients_are_clipped_as_the_dense_ones(most):
    table, layer = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)
    layer(table(torch.tensor([1, 2, 2, 7]))).square().sum().backward()
    dense = [nn.Parameter(w.detach().clone()) for w in (table.weight, layer.weight)]
    for other, weight in zip(dense, (table.weight, layer.weight), strict=True):
        other.grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad.clone()
    nn.utils.clip_grad_norm_(dense, most)
    clip_gradients([table.weight, layer.weight], most)
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense[0].grad)
    torch.testing.assert_close(layer.weight.grad, dense[1].grad)


class OnAGraph(nn.Module):
    """Two layers, and between them a product with a constant matrix, of a graph say."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return self.last((self.matrix @ self.first(x).relu().mT).mT)


MATRIX = torch.tensor([[0, 1.5, 0], [0.5, 0, 2.0], [3.0, 0, 1.0]])


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("trace", ["fx", "live"])
def test_a_compressed_sparse_buffer_gives_what_its_dense_matrix_does(trace, layout):
    """torch cannot copy it by copy.deepcopy, nor say whether any of its entries is not 0."""
    x, ends = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), []
    for matrix in (getattr(MATRIX, f"to_sparse_{layout}")(), MATRIX):
        model = OnAGraph(matrix)
        stn = fxstn.transform(model, [hp.WeightDecay()], example_inputs=x, trace=trace)
        randomize_response(stn)
        y, dy = stn.pushforward(x, delta=torch.full((len(stn.hparams),), 0.3))
        ends.append((y, dy, torch.autograd.grad(dy.square().sum(), list(stn.response_parameters()))))
        assert fxstn.verify(model, x, hparams=[hp.WeightDecay()]).ok
    torch.testing.assert_close(*ends)
