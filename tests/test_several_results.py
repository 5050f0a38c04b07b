"""Models whose stages return several tensors, whose graphs detach, or whose rows are no examples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxstn
from fxstn import hp
from fxstn.bilevel.batches import parts_of


class Stage(nn.Module):
    """A layer, and an operation that returns several tensors."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.layer, self.operation = nn.Linear(6, 8), operation

    def forward(self, x: Tensor) -> Any:
        return self.operation(self.layer(x))


class Network(nn.Module):
    def __init__(self, operation: Any, join: Any) -> None:
        super().__init__()
        self.stage, self.join, self.out = Stage(operation), join, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self.stage(x)))


class Unpooled(nn.Module):
    """As SegNet: pooling with indices, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2, return_indices=True)
        self.unpool, self.out = nn.MaxUnpool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        values, indices = self.pool(self.layer(x).relu())
        return self.out(self.unpool(values, indices))


class Masked(nn.Module):
    """A layer whose output is written to without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        with torch.no_grad():
            h[:, 0] = 0
        return self.out(h)


def product(values: Any) -> Tensor:
    return values[0] * values[1]


SEVERAL = {  # (stage, what reads it, share of zeros where half of each tensor is dropped)
    "chunk": (lambda h: h.chunk(2, -1), product, 0.75),
    "unbind": (lambda h: h.unflatten(-1, (2, 4)).unbind(1), product, 0.75),
    "topk by name": (lambda h: h.topk(4, -1), lambda top: top.values, 0.5),
    "topk by place": (lambda h: h.topk(4, -1), lambda top: top[0] * (1 + top[1]), 0.5),
}


@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_dropout_is_inserted_after_each_tensor_that_a_stage_returns(name: str, trace: str) -> None:
    """Indices stay as they are."""
    *parts, share = SEVERAL[name]
    torch.manual_seed(0)
    model, x = Network(*parts), torch.randn(500, 6)
    nn.init.eye_(model.out.weight), nn.init.zeros_(model.out.bias)
    stn = fxstn.transform(model, [hp.Dropout("stage", init=0.5)], trace=trace, example_inputs=x[:4])
    assert torch.equal(stn.eval()(x), model.eval()(x))
    assert (stn.train()(x) == 0).float().mean().item() == pytest.approx(share, abs=0.05)
    default = fxstn.transform(model, trace=trace, example_inputs=x[:4])  # at the input, and after the stage
    assert default.hparams.names == ("input.dropout", "stage.dropout")
    assert not torch.equal(default.train()(x), default.train()(x))


def test_the_default_dropout_of_a_network_that_pools_with_indices() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    stn = fxstn.transform(Unpooled(), example_inputs=x)
    assert stn.frontend == "fx"
    assert len(stn.hparams.names) == 2
    assert torch.isfinite(stn.train()(x)).all()


def test_what_is_written_without_gradients_ends_no_stage() -> None:
    """The frontend that runs the forward has no place after it."""
    x = torch.randn(5, 6)
    assert fxstn.transform(Masked(), trace="auto", example_inputs=x).frontend == "export"
    with pytest.raises(fxstn.TransformError, match="in place and without gradients"):
        fxstn.transform(Masked(), trace="live", example_inputs=x)


class Detaching(nn.Module):
    """Its second term cancels the value of the third, and leaves its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        return self.a(x).tanh() + y - y.detach()


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_verify_holds_what_a_graph_detaches(trace: str) -> None:
    assert fxstn.verify(Detaching(), torch.randn(5, 6), trace=trace).ok


def test_a_module_without_weights_yet_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    for function in (fxstn.transform, fxstn.explain):
        with pytest.raises(ValueError, match="module '0', a LazyLinear, has no weights before its first forward"):
            function(model)
    model(torch.randn(3, 6))
    assert fxstn.transform(model).frontend == "fx"


def test_batches_whose_rows_refer_to_others_are_not_split() -> None:
    """Nodes with edges, tokens with offsets, targets of graphs or tokens. What all examples share does not stand in the way."""
    x, y = torch.randn(50, 8), torch.zeros(50)
    edges, mask, positions = torch.zeros(2, 150).long(), torch.zeros(7, 7), torch.zeros(1, 7).long()
    tokens, offsets = torch.zeros(25).long(), torch.zeros(8).long()
    assert len(parts_of(((x, edges), y), 10)) == 1
    assert len(parts_of(((tokens, offsets), torch.zeros(8)), 5)) == 1
    assert len(parts_of(((x, mask, positions), y), 10)) == 5
    for other in (torch.zeros(100).long(), torch.zeros(7), torch.zeros(100, 3)):
        assert len(parts_of(((x, mask, positions), other), 10)) == 1
        assert len(parts_of({"x": x, "labels": other, "mask": mask}, 10)) == 1


class Lookup(nn.Module):
    """An embedding as a function of a parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight, padding_idx=0)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("functional", [False, True])
def test_a_padding_row_does_not_respond(functional: bool, trace: str) -> None:
    """torch never trains it; where it is 0, neither does its response move it."""
    torch.manual_seed(0)
    table: nn.Module = nn.Embedding(11, 8, padding_idx=0)
    table = Lookup(table.weight.detach()) if functional else table
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(56, 2)).double()
    ids = torch.randint(1, 11, (16, 7))
    ids[:, 3:] = 0
    gradients = []
    for response in ("structured", "scaled"):
        stn = fxstn.transform(model, [hp.WeightDecay(shared=True)], response=response, trace=trace, example_inputs=ids)
        stn.hparams.double()
        with torch.no_grad():
            stn.response.flat_U.normal_()
        moved = stn.best_response(torch.ones(1).double())["0.weight"] - model[0].weight
        assert not moved[0].any()
        assert moved[1:].all()
        for perturb in ("off", torch.zeros(1).double()):
            stn.hparams.unconstrained.grad = None
            fxstn.hyper_loss(
                stn, lambda y, _: y.sin().square().mean(), ids, torch.zeros(16), perturb=perturb
            ).backward()
            gradients.append(stn.hparams.unconstrained.grad)
    assert gradients[0].item() == pytest.approx(gradients[1].item(), rel=1e-9)
    assert gradients[2].item() == pytest.approx(gradients[3].item(), rel=1e-9)


def test_one_strength_in_place_of_different_ones_is_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.05), nn.Linear(8, 8), nn.Dropout(0.7), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"begins at 0\.05, as the first module has it; '3' has 0\.7"):
        fxstn.transform(model, [hp.Dropout(shared=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxstn.transform(model, [hp.Dropout(shared=True, init=0.2)])
        fxstn.transform(model, [hp.Dropout()])
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.05},
        {"params": model[2].parameters(), "weight_decay": 1e-5},
    ]
    optimizer, loader = torch.optim.AdamW(groups), [(torch.randn(4, 8), torch.zeros(4).long())]
    with pytest.warns(UserWarning, match=r"weight_decay begins at 0\.05, .* 2\.weight has 1e-05"):
        fxstn.tune(model, optimizer, nn.functional.cross_entropy, loader, loader, [hp.WeightDecay(shared=True)])


def test_several_shared_specs_of_one_kind_are_called_by_their_patterns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    stn = fxstn.transform(model, [hp.WeightDecay("0", shared=True), hp.WeightDecay("2", shared=True), hp.Dropout("1")])
    assert stn.hparams.names == ("0.weight_decay", "2.weight_decay", "1.dropout")
    assert fxstn.transform(model, [hp.WeightDecay(shared=True)]).hparams.names == ("weight_decay",)
