"""Inputs by name: the same call, whatever its spelling, on every frontend, in every objective and in a run."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.errors import TransformError

TRACES = ["fx", "export", "live"]
DROPOUT = [hp.Dropout("drop")]


class Reader(nn.Module):
    """Tokens with a mask, in the manner of transformers: most inputs may be left out, and anything else goes to `extra`."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, ids=None, mask=None, kinds=None, *, scale=None, labels=None, **extra):
        h = self.table(ids)
        if kinds is not None:
            h = h + self.table(kinds)
        h = self.drop(torch.tanh(self.layer(h)))
        if scale is not None:
            h = h * scale
        if "shift" in extra:
            h = h + extra["shift"]
        weight = torch.ones_like(h[..., :1]) if mask is None else mask[..., None].to(h.dtype)
        scores = self.out((h * weight).sum(1) / weight.sum(1))
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)


def batch(rows=4, length=5):
    ids, mask = torch.randint(11, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, 3:] = 0
    return {"ids": ids, "mask": mask}


def network(trace, example_inputs):
    torch.manual_seed(0)
    return fxstn.transform(Reader(), DROPOUT, example_inputs=example_inputs, trace=trace).double()


def seeded(function, *args, **kwargs):
    torch.manual_seed(5)
    return function(*args, **kwargs)


@pytest.mark.parametrize("trace", TRACES)
def test_a_call_is_the_same_in_every_spelling(trace):
    inputs = batch()
    by_name, by_position = network(trace, inputs), network(trace, tuple(inputs.values()))
    assert by_name.frontend == by_position.frontend == trace
    swapped, args = dict(reversed(inputs.items())), tuple(inputs.values())
    delta = torch.full((1,), 0.3, dtype=torch.double)
    for training in (True, False):
        for call in (
            lambda stn, *args, **kwargs: stn(*args, **kwargs),
            lambda stn, *args, **kwargs: stn.conditioned_output(*args, **kwargs)[0],
            lambda stn, *args, **kwargs: stn.pushforward(*args, delta=delta, condition=delta, **kwargs)[1],
            lambda stn, *args, **kwargs: stn.perturbed_output(*args, delta=delta, condition=delta, **kwargs)[0],
        ):
            expected = seeded(call, by_position.train(training), *args)
            for stn, positional, named in (
                (by_name, (), swapped),
                (by_name, args, {}),
                (by_position, args[:1], {"mask": args[1]}),
                (by_position, (), swapped | {"kinds": None, "labels": None}),
            ):
                assert torch.equal(seeded(call, stn.train(training), *positional, **named), expected)


@pytest.mark.parametrize("trace", TRACES)
def test_losses_take_a_mapping(trace):
    inputs, target = batch(), torch.tensor([0, 2, 1, 1])
    stn = network(trace, inputs)
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        expected = seeded(loss, stn, F.cross_entropy, tuple(inputs.values()), target)
        for spelled in (inputs, dict(reversed(inputs.items())), UserDict(inputs)):
            assert torch.equal(seeded(loss, stn, F.cross_entropy, spelled, target), expected)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", ["kinds", "scale", "shift"])
def test_gaps_keyword_only_inputs_and_those_of_kwargs(trace, name):
    extra = {"kinds": torch.randint(11, (4, 5)), "scale": torch.rand(4, 1, 1), "shift": torch.rand(4, 5, 6)}[name]
    inputs = {"ids": batch()["ids"], name: extra}
    torch.manual_seed(0)
    assert fxstn.verify(Reader(), inputs, hparams=DROPOUT, trace=trace).ok
    stn = network(trace, inputs).eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    y, _ = stn.pushforward(**inputs, delta=torch.ones(1).double())
    assert torch.equal(y, stn.model(**inputs))
    if name == "shift" and trace == "fx":
        with pytest.raises(TypeError, match=r"traced with the inputs \(ids, shift\) and got no shift; give it"):
            stn.pushforward(inputs["ids"], delta=torch.ones(1).double())
    elif trace != "fx":  # export captures the forward anew
        y, _ = stn.pushforward(inputs["ids"], delta=torch.ones(1).double())
        assert torch.equal(y, stn.model(inputs["ids"]))


@pytest.mark.parametrize("trace", TRACES)
def test_inputs_that_the_graph_does_not_have_are_named(trace):
    stn, inputs = network(trace, batch()).train(), batch()
    with pytest.raises(
        TypeError, match=r"the forward of Reader takes \(ids, mask, kinds, .*'ids'; give the inputs that it names"
    ):
        stn(inputs["ids"], **inputs)
    if trace != "live":  # runs the forward as it is, with all that it takes
        with pytest.raises(TypeError, match=r"traced with the inputs \(ids, mask\) and got labels, shift, too; give"):
            stn(**inputs, labels=torch.zeros(4, dtype=torch.long), shift=1)
    else:
        loss, scores = stn(**inputs, labels=torch.zeros(4, dtype=torch.long))
        assert (loss.dim(), scores.shape) == (0, (4, 3))


def test_an_example_that_is_none_is_a_constant_of_symbolic_tracing():
    ids, kinds = batch()["ids"], torch.randint(11, (4, 5))
    stn = fxstn.transform(Reader(), DROPOUT, example_inputs=(ids, None, kinds))
    assert stn.frontend == "fx"
    assert torch.equal(seeded(stn, ids, None, kinds), seeded(stn, ids, kinds=kinds))
    with pytest.raises(TypeError, match="and got mask, too"):
        stn(ids, torch.ones(4, 5), kinds)


def test_a_dict_of_other_names_is_one_input():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, batch):
            return self.layer(batch["x"]) + batch["y"]

    inputs = {"x": torch.randn(4, 3), "y": torch.randn(4, 3)}
    stn = fxstn.transform(Whole(), [hp.Dropout("layer")], example_inputs=inputs, trace="export")
    assert stn(inputs).shape == (4, 3)
    fxstn.response_loss(stn, F.mse_loss, inputs, torch.randn(4, 3)).backward()


def test_a_run_takes_batches_of_mappings():
    def loader(kind, sizes):
        return [(kind(batch(rows, length)), torch.randint(3, (rows,))) for rows, length in sizes]

    torch.manual_seed(0)
    train, valid = loader(UserDict, [(4, 5), (4, 7), (2, 4)]), loader(dict, [(4, 6), (1, 4)])
    stn = fxstn.transform(Reader(), DROPOUT, example_inputs=train[0][0])
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, train, valid, progress=False)
    assert runner.fit(1)["valid_loss"][0] < 2
    labelled = [({**train[0][0], "labels": train[0][1]}, train[0][1])]
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, labelled, valid, progress=False)
    with pytest.raises(TypeError, match=r"train_loader in epoch 1, step 1: .* and got labels, too"):
        runner.fit(1)


def test_a_state_does_not_go_with_inputs_by_name():
    carried = fxstn.CarriedState(F.mse_loss, lambda rows: (torch.zeros(rows, 2),))
    with pytest.raises(TypeError, match=r"inputs by name \(ids, mask\) cannot be joined with a state"):
        carried.inputs(batch())


def test_required_names_are_checked_at_transform():
    with pytest.raises((TypeError, TransformError), match=r"the forward of Linear takes \(input\)"):
        fxstn.transform(
            nn.Sequential(nn.Linear(3, 3)).get_submodule("0"), DROPOUT, example_inputs=(torch.ones(2, 3),) * 2
        )


class GraphNetwork(nn.Module):
    """Nodes are the examples of a batch, which is one graph."""

    def __init__(self):
        super().__init__()
        self.hidden, self.dropout, self.out = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, nodes, edges):
        return self.out(self.dropout(torch.relu(torch.mm(edges, self.hidden(nodes)))))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_graph_of_more_nodes_than_diagnostics_take_is_a_batch_as_a_whole(sparse):
    edges = torch.eye(42).to_sparse() if sparse else torch.eye(42)
    batches = [((torch.randn(42, 6), edges), torch.randint(3, (42,)))] * 2
    stn = fxstn.transform(GraphNetwork())
    (row,) = fxstn.BilevelRunner(stn, F.cross_entropy, batches, batches[:1], progress=False).fit(1).rows
    assert 0 <= row["linearization_error"] <= 1
    network = GraphNetwork()
    tuner = fxstn.tune(network, torch.optim.SGD(network.parameters(), 0.1), F.cross_entropy, batches, batches[:1])
    F.cross_entropy(network(*batches[0][0]), batches[0][1]).backward()
    assert set(tuner.values()) == {"dropout"}
