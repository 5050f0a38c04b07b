"""A target for each graph, where the inputs have rows of nodes: one rule in the steps, the runner and a user's loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.bilevel.batches import first_part

NODES = torch.randn(10, 5)
GRAPHS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3])
CLASSES = torch.tensor([0, 2, 1, 0])
INPUTS = (NODES, GRAPHS)


class OfGraphs(nn.Module):
    """Sums up nodes to four graphs."""

    def __init__(self, outputs=3, p=0.0):
        super().__init__()
        self.nodes, self.dropout, self.graphs = nn.Linear(5, 8), nn.Dropout(p), nn.Linear(8, outputs)

    def forward(self, x, graph):
        hidden = F.relu(self.nodes(x))
        sums = hidden.new_zeros(4, 8).index_add(0, graph, hidden)
        return self.graphs(self.dropout(sums))


def pooled_loss(output, target, hparams=None):
    """Squares, which broadcast, weighed by a number of each row."""
    squares = (output.squeeze(-1) - target) ** 2
    return (squares if hparams is None else squares * hparams["weight"]).mean()


def made(p=0.0, outputs=3, specs=(), **kind):
    return fxstn.transform(OfGraphs(outputs, p), [hp.Dropout(init=0.2), *specs], example_inputs=INPUTS, **kind)


def runner(target, loss=F.cross_entropy, **options):
    data = [(INPUTS, target)] * 3
    return fxstn.BilevelRunner(made(), loss, data, data, progress=False, **options)


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")
@pytest.mark.parametrize("step", [fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("trace", ["live", "export"])
def test_the_steps_compute_the_plain_loss_of_graphs(step, trace):
    stn = fxstn.transform(OfGraphs(), [hp.WeightDecay(init=1e-6)], example_inputs=INPUTS, trace=trace)
    options = {} if step is fxstn.general_loss else {"perturb": torch.zeros(2)}
    if step is fxstn.hyper_loss:
        options["entropy_weight"] = 0.0
    loss = step(stn.train(), F.cross_entropy, INPUTS, CLASSES, **options)
    decay = (
        0 if step is fxstn.hyper_loss else 0.5e-6 * sum(w.square().sum() for w in stn.model.parameters() if w.dim() > 1)
    )
    torch.testing.assert_close(loss, F.cross_entropy(stn.model(*INPUTS), CLASSES) + decay)


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")
def test_a_number_of_the_loss_has_a_value_for_each_graph():
    stn = made(outputs=1, specs=[hp.Scalar("weight", 0.5, 0.0, 2.0)])
    target = torch.randn(4)
    stn.hparams.set({"dropout": 0.0})
    loss = fxstn.general_loss(stn.train(), pooled_loss, INPUTS, target)
    torch.testing.assert_close(loss, 0.5 * pooled_loss(stn.model(*INPUTS), target))
    assert math.isfinite(fxstn.response_loss(stn, pooled_loss, INPUTS, target).item())


def test_a_number_of_each_example_is_no_number_of_a_graph():
    class Nodes(nn.Linear):
        def forward(self, x):
            return super().forward(x), x.new_zeros(4)

    stn = fxstn.transform(Nodes(5, 1), [hp.Scalar("weight", 0.5, 0.0, 2.0), hp.WeightDecay()], example_inputs=NODES)
    with pytest.raises(
        ValueError, match=r"reads weight for 4 rows .* 10 examples have a value each: .*perturb='batch'"
    ):
        fxstn.response_loss(
            stn, lambda y, t, hparams: (hparams["weight"] * t).mean(), NODES, torch.randn(4), perturb="example"
        )


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")
def test_the_runner_and_a_loop_train_and_tune_on_graphs():
    history = runner(CLASSES, response=fxstn.ResponseSettings(fraction=0.5)).fit(1)
    assert math.isfinite(history.rows[-1]["valid_loss"])
    model, data = OfGraphs(p=0.2), [(INPUTS, CLASSES)] * 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuner = fxstn.tune(model, optimizer, fxstn.cross_entropy, data, data, [hp.Dropout(), hp.LabelSmoothing()])
    for inputs, target in data:
        optimizer.zero_grad()
        fxstn.cross_entropy(model(*inputs), target, tuner.strengths(len(target))).backward()
        optimizer.step()
    assert math.isfinite(tuner.history.rows[-1]["valid_loss"])


REFUSED = "the target has 3 examples, the inputs have 10 and the output has 4 rows; give as many"


@pytest.mark.parametrize("step", [fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:one ε for the whole batch")
def test_other_rows_are_refused_by_the_steps(step):
    with pytest.raises(ValueError, match=REFUSED):
        step(made(), pooled_loss, INPUTS, torch.randn(3))


def test_other_rows_are_refused_by_the_runner():
    with pytest.raises(ValueError, match=f"train_loader in epoch 1, step 1: {REFUSED}"):
        runner(torch.randn(3), pooled_loss).fit(1)


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")
@pytest.mark.parametrize(
    "loss", [pooled_loss, lambda output, target: pooled_loss(output, target)], ids=["read", "plain"]
)
def test_other_rows_are_refused_in_a_loop_where_they_broadcast(loss):
    model = OfGraphs()
    optimizer, data = torch.optim.SGD(model.parameters(), 0.1), [(INPUTS, torch.randn(3))] * 2
    fxstn.tune(model, optimizer, loss, data, data, [hp.Dropout("dropout")])

    def step():
        for inputs, target in data:
            optimizer.zero_grad()
            (model(*inputs).mean() + target.mean()).backward()
            optimizer.step()

    with pytest.raises(ValueError, match=REFUSED):
        step()


def test_one_target_for_two_views_trains_in_the_runner_and_in_a_loop():
    """A contrastive loss: rows of features for both views of an image, and a label for the image."""

    def contrast(output, target):
        first, second = output.chunk(2)
        return F.cross_entropy(first @ second.T, target)

    torch.manual_seed(0)
    batches = [(torch.randn(8, 5), torch.arange(4)) for _ in range(6)]
    for runs in (True, False):
        model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if runs:
            stn = fxstn.transform(model, [hp.Dropout()])
            fxstn.BilevelRunner(stn, contrast, batches, batches, progress=False).fit(1)
            continue
        tuner = fxstn.tune(model, optimizer, contrast, batches, batches, [hp.Dropout()])
        for x, y in batches:
            optimizer.zero_grad()
            contrast(model(x), y).backward()
            optimizer.step()
        assert tuner.steps == 6


def test_a_part_of_nodes_is_no_batch_of_graphs():
    for target in (CLASSES, torch.randn(4, 1)):
        batch = (INPUTS, target)
        assert first_part(batch, 0.5) is batch
    (nodes, _), targets = first_part((INPUTS, NODES), 0.5)
    assert (len(nodes), len(targets)) == (5, 5)
