"""What the training objectives have besides the loss: mixed targets, penalties on activations and on the Jacobian."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.ir.staging import draws
from fxstn.ops.color import as_float
from fxstn.ops.mixing import lesser_share, mixed_target
from fxstn.ops.penalty import squared_jacobian

MIXING = [hp.MixUp, hp.CutMix]


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.rand(8, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 7 * 9, 5))


def linear_network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, outputs)).double()


def moved(stn: fxstn.SelfTuningNetwork, scale: float = 0.3) -> fxstn.SelfTuningNetwork:
    """A response that is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.normal_(0, scale)
    return stn


# Mixing


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_mixup_equals_torchvision(dtype):
    x, labels = images(dtype), torch.arange(8) % 5
    drawn = (torch.arange(8).roll(1), torch.full((8,), 0.3))
    transform = v2.MixUp(num_classes=5)
    params = {"lam": 0.7, "labels": labels, "batch_size": 8}
    expected = as_float(x).roll(1, 0).mul(0.3).add(as_float(x).mul(0.7))
    ours = hp.MixUp.apply(x, drawn)
    assert ours.dtype == dtype
    tolerance = 0.5 / 255 + 1e-6 if dtype == torch.uint8 else 1e-6
    assert (as_float(ours) - expected).abs().max() <= tolerance
    if dtype == torch.float32:
        torch.testing.assert_close(ours, transform.transform(x, params), rtol=0, atol=1e-6)
    target = mixed_target(labels, torch.zeros(8, 5), *drawn)
    theirs = transform._mixup_label(F.one_hot(labels, 5), lam=0.7)
    torch.testing.assert_close(target, theirs, rtol=0, atol=1e-6)


def test_cutmix_equals_torchvision():
    torch.manual_seed(0)
    x = images()
    box, partner, share = hp.CutMix.draw(x, 1.0)
    transform = v2.CutMix(num_classes=5)
    for i in range(len(x)):
        rows, columns = box[i, 0].any(1).nonzero().flatten(), box[i, 0].any(0).nonzero().flatten()
        edges = (0, 0, 0, 0)
        if len(rows):
            edges = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        pair = torch.stack([x[i], x[partner[i]]])
        params = {"box": edges, "lam_adjusted": 1 - share[i].item(), "labels": torch.tensor([0, 1]), "batch_size": 2}
        torch.testing.assert_close(hp.CutMix.apply(x, (box, partner, share))[i], transform.transform(pair, params)[0])
        area = (edges[2] - edges[0]) * (edges[3] - edges[1])
        assert share[i].item() == pytest.approx(area / 99)


@pytest.mark.parametrize("alpha", [0.03, 0.2, 1.0, 2.0])
def test_shares_are_those_of_a_beta_variable(alpha):
    torch.manual_seed(0)
    share = lesser_share(torch.empty(4000, 1), alpha)
    b = scipy.stats.beta(alpha, alpha)
    assert share.min() >= 0
    assert share.max() <= 0.5
    # b and 1 − b are equally likely, so that P(lesser ≤ s) = 2 P(b ≤ s); the least shares are rounded to 0
    none = 2 * b.cdf(1e-20)
    assert scipy.stats.binomtest(int((share < 1e-20).sum()), len(share), none).pvalue > 0.01
    some = share[share >= 1e-20].double().numpy()
    assert scipy.stats.kstest(some, lambda s: (2 * b.cdf(s) - none) / (1 - none)).pvalue > 0.01


def test_cutmix_boxes_have_torchvisions_area():
    torch.manual_seed(0)
    _, partner, share = hp.CutMix.draw(torch.empty(4000, 1, 32, 32), 1.0)
    assert sorted(partner.tolist()) == list(range(4000))
    theirs = v2.CutMix(num_classes=2)
    greater = iter(1 - lesser_share(torch.empty(4000, 1), 1.0))
    theirs._dist = SimpleNamespace(sample=lambda shape: next(greater))
    params = [theirs.make_params([torch.empty(2, 1, 32, 32)]) for _ in range(4000)]
    assert scipy.stats.ks_2samp(share.numpy(), [1 - p["lam_adjusted"] for p in params]).pvalue > 0.01


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_mixing_at_strength_zero_is_the_identity(kind, dtype):
    torch.manual_seed(0)
    x = images(dtype)
    alpha = torch.tensor([0.0, 1.0] * 4)
    drawn = kind.draw(x, alpha)
    y = kind.apply(x, drawn)
    assert torch.equal(y[::2], x[::2])
    assert not torch.equal(y[1::2], x[1::2])
    assert (drawn[-1][::2] == 0).all()


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_the_loss_gets_images_and_targets_of_one_draw(kind, method):
    """Reference: the model's own loss on the images and targets mixed by hand with the draw of the same seed."""
    model, x, labels = classifier(), images(), torch.arange(8) % 5
    stn = fxstn.transform(model, [kind(init=1.0)], method=method).train()
    torch.manual_seed(3)
    epsilon = stn.hparams.sample(8)
    alpha = stn.hparams.values()[f"input.{kind.__name__.lower()}"]
    if method == "stn":
        alpha = stn.hparams(epsilon)[:, 0].detach()
    else:
        torch.manual_seed(3)
    drawn = kind.draw(x, alpha)
    target = mixed_target(labels, torch.zeros(8, 5), *drawn[-2:])
    torch.manual_seed(3)
    loss = fxstn.general_loss(stn, F.cross_entropy, x, labels)  # a fresh response moves no weights, for "stn" either
    torch.testing.assert_close(loss, F.cross_entropy(model(kind.apply(x, drawn)), target))
    mixed = (1 - drawn[-1]) * F.cross_entropy(model(kind.apply(x, drawn)), labels, reduction="none")
    mixed += drawn[-1] * F.cross_entropy(model(kind.apply(x, drawn)), labels[drawn[-2]], reduction="none")
    torch.testing.assert_close(F.cross_entropy(model(kind.apply(x, drawn)), target), mixed.mean())


@pytest.mark.parametrize("method", ["delta", "centered"])
def test_the_response_step_mixes_each_pair_at_a_share_of_its_own(method):
    model, x, labels = classifier(), images(), torch.arange(8) % 5
    stn = moved(fxstn.transform(model, [hp.MixUp(init=1.0)], method=method)).train()
    torch.manual_seed(3)
    epsilon = stn.hparams.sample(8).detach()
    drawn = hp.MixUp.draw(x, stn.hparams(epsilon)[:, 0])
    mixed = hp.MixUp.apply(x, drawn)
    rows = []
    for i in range(8):
        if method == "centered":
            rows.append(functional_call(model, stn.best_response(epsilon[i]), (mixed[i : i + 1],)))
            continue
        weights = dict(model.named_parameters())
        change = {name: w - weights[name] for name, w in stn.best_response(epsilon[i]).items()}
        y, dy = torch.func.jvp(lambda w, i=i: functional_call(model, w, (mixed[i : i + 1],)), (weights,), (change,))
        rows.append(y + dy)
    target = mixed_target(labels, torch.zeros(8, 5), *drawn)
    torch.manual_seed(3)
    loss = fxstn.response_loss(stn, F.cross_entropy, x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(rows), target), rtol=1e-4, atol=1e-4)


def test_two_mixings_act_on_targets_in_the_order_in_which_they_act_on_images():
    torch.manual_seed(0)
    x, labels = images(), torch.arange(8) % 5
    stn = fxstn.transform(classifier(), [hp.CutMix("1", init=1.0), hp.MixUp("input", init=1.0), hp.Cutout()])
    drawn = [node.target.__name__ for node in stn.graph("general").graph.nodes if draws(node.target)]
    assert drawn == ["draw_mix_up", "draw_cutout", "draw_cut_mix"]
    torch.manual_seed(0)
    output, (first, second) = stn.train().conditioned_output(x)
    assert len(first) == 2
    assert len(second) == 3
    expected = mixed_target(mixed_target(labels, output, *first), output, *second[-2:])
    torch.manual_seed(0)
    torch.testing.assert_close(fxstn.general_loss(stn, F.cross_entropy, x, labels), F.cross_entropy(output, expected))


def test_the_contracts_graphs_return_the_models_own_output():
    stn = fxstn.transform(classifier(), [hp.MixUp(), hp.ActivationDecay("1")], example_inputs=images()).train()
    assert stn.graph("train")(images()).shape == stn(images()).shape == (8, 5)
    y, dy = stn.pushforward(images(), delta=torch.ones(2))
    assert y.shape == dy.shape == (8, 5)
    assert stn.eval().graph("eval")(images()).shape == (8, 5)
    torch.testing.assert_close(stn(images()), stn.model(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("target", "output", "expected"),
    [
        (torch.tensor([0, 2]), torch.zeros(2, 3), [[0.75, 0, 0.25], [0.25, 0, 0.75]]),
        (torch.tensor([1.0, 3.0]), torch.zeros(2), [1.5, 2.5]),
        (torch.tensor([[0, 1], [1, 1]]), torch.zeros(2, 2, 2), [[[0.75, 0], [0.25, 1]], [[0.25, 0], [0.75, 1]]]),
        (torch.tensor([[1], [0]]), torch.zeros(2, 1), [[0.75], [0.25]]),
    ],
    ids=["classes", "numbers", "classes per pixel", "binary"],
)
def test_targets_of_every_kind_are_mixed(target, output, expected):
    mixed = mixed_target(target, output, torch.tensor([1, 0]), torch.tensor([0.25, 0.25]))
    assert mixed.tolist() == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, -100]), "must be 0 to 2, the output's classes, got -100 to 0"),
        (torch.tensor([0, 1, 2]), r"tensors with 2 examples; got a tensor of shape \(3,\)"),
        (["cat", "dog"], "got str"),
    ],
)
def test_targets_that_cannot_be_mixed_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        mixed_target(target, torch.zeros(2, 3), torch.tensor([1, 0]), torch.tensor([0.25, 0.25]))


# Penalties


def test_activation_decay_is_the_mean_square_of_a_modules_output():
    model, x, labels = classifier(), images(), torch.arange(8) % 5
    stn = fxstn.transform(model, [hp.ActivationDecay("0", "3", init=0.5)]).train()
    h = model[0](x)
    expected = F.cross_entropy(model(x), labels) + 0.5 * (h.square().mean() + model(x).square().mean())
    torch.testing.assert_close(fxstn.general_loss(stn, F.cross_entropy, x, labels), expected)


@pytest.mark.parametrize("method", ["delta", "centered"])
def test_activation_decay_in_the_response_step_is_that_of_moved_activations(method):
    """Each example at its own coefficient and its own weights, by finite differences of the original up to h."""
    model, x = classifier().double(), images(torch.float64)
    part = model[:2]

    def moves(delta):
        return {name: w for name, w in stn.best_response(delta).items() if name.startswith("0")}

    stn = moved(fxstn.transform(model, [hp.ActivationDecay("1", init=0.5, scale=0.5)], method=method), 0.05).train()
    torch.manual_seed(3)
    epsilon = stn.hparams.sample(8).detach()
    total = []
    for i in range(8):

        def activation(step, i=i):
            return functional_call(part, moves(step * epsilon[i]), (x[i : i + 1],))

        h = activation(1.0)
        if method == "delta":
            h = activation(0.0) + (activation(1e-5) - activation(-1e-5)) / 2e-5
        total.append(stn.hparams(epsilon)[i, 0] * h.square().mean())
    torch.manual_seed(3)
    loss = fxstn.response_loss(stn, lambda output, target: 0 * output.sum(), x, torch.zeros(8))
    torch.testing.assert_close(loss, torch.stack(total).mean(), rtol=1e-8, atol=1e-8)


class SmallAttention(nn.Module):
    """Two tokens of each example attend to each other; the softmax is written out, or torch's own attention."""

    def __init__(self, fused):
        super().__init__()
        self.inner, self.outer, self.fused = nn.Linear(2, 9), nn.Linear(6, 3), fused

    def forward(self, x):
        q, k, v = self.inner(x.view(-1, 2, 2)).chunk(3, -1)
        written = lambda: torch.softmax(q @ k.transpose(-2, -1), -1) @ v  # noqa: E731
        return self.outer((F.scaled_dot_product_attention(q, k, v) if self.fused else written()).flatten(1))


def network_of(*layers):
    return lambda: nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3))


SMOOTH = {
    "linear": linear_network,
    "tanh": network_of(nn.Tanh()),
    "gelu and layer norm": network_of(nn.GELU(), nn.LayerNorm(6)),
    "silu and group norm": network_of(nn.SiLU(), nn.GroupNorm(2, 6)),
    "mish and rms norm": network_of(nn.Mish(), nn.RMSNorm(6)),
    "softmax attention": lambda: SmallAttention(False),
    "fused attention": lambda: SmallAttention(True),
}


@pytest.mark.parametrize("method", ["delta", "centered"])
@pytest.mark.parametrize("kind", SMOOTH)
def test_the_jacobians_norm_equals_that_of_materialised_weights(kind, method):
    """Each example has weights of its own; linearised in them for "delta"."""
    torch.manual_seed(0)
    model = SMOOTH[kind]().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    stn = moved(fxstn.transform(model, [hp.JacobianNorm(init=0.5, projections=None)], method=method)).train()
    weights = dict(model.named_parameters())

    def penalty(delta, row):
        output = lambda weights, row: functional_call(model, weights, (row[None],))[0]  # noqa: E731
        moves = {name: value - weights[name] for name, value in stn.best_response(delta).items()}
        if method == "centered":
            return jacrev(output, 1)({name: w + moves[name] for name, w in weights.items()}, row).square().sum()
        constants = {name: w.detach() for name, w in weights.items()}
        jacobian = lambda weights: jacrev(output, 1)(weights, row)  # noqa: E731
        return sum(torch.func.jvp(jacobian, (constants,), (moves,))).square().sum()

    def mean(strengths, epsilon):
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack([s * penalty(e, row) for s, e, row in zip(strengths, epsilon, x, strict=True)]).mean()

    nothing = lambda output, target: 0 * output.sum()  # noqa: E731
    still = mean(stn.hparams(None).expand(6), torch.zeros(6, 1))
    torch.testing.assert_close(fxstn.general_loss(stn, nothing, x, torch.zeros(6)), still, rtol=1e-9, atol=1e-9)
    torch.manual_seed(3)
    epsilon = stn.hparams.sample(6).detach()
    expected = mean(stn.hparams(epsilon)[:, 0], epsilon)
    theta = list(stn.response_parameters())
    gradients = torch.autograd.grad(expected, theta, allow_unused=True, materialize_grads=True)
    torch.manual_seed(3)
    loss = fxstn.response_loss(stn, nothing, x, torch.zeros(6))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    loss.backward()
    for parameter, gradient in zip(theta, gradients, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
    assert all(parameter.grad is None for parameter in stn.general_parameters())


def test_one_projection_is_exact_for_one_output():
    torch.manual_seed(0)
    model, x = linear_network(1), torch.randn(5, 4, dtype=torch.float64)
    exact = torch.stack([jacrev(model)(row).square().sum() for row in x]).mean()
    stn = fxstn.transform(model, [hp.JacobianNorm(init=1.0, projections=1)]).train()
    torch.testing.assert_close(
        fxstn.general_loss(stn, lambda output, target: 0 * output.sum(), x, torch.zeros(5)), exact
    )


def test_random_projections_estimate_the_jacobians_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    exact = torch.stack([jacrev(model)(row).square().sum() for row in x]).mean()
    nothing = lambda output, target: 0 * output.sum()  # noqa: E731

    def found(projections):
        stn = fxstn.transform(model, [hp.JacobianNorm(init=1.0, projections=projections)]).train()
        return fxstn.general_loss(stn, nothing, x, torch.zeros(5))

    torch.testing.assert_close(found(None), exact)
    assert found(2000).item() == pytest.approx(exact.item(), rel=0.05)
    assert abs(found(1).item() - exact.item()) > 1e-6 * exact.item()


def test_an_operation_without_a_second_derivative_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    stn = fxstn.transform(linear_network(), [hp.JacobianNorm()]).train()
    x = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="needs floating point inputs"):
        squared_jacobian(torch.zeros(2, 3), (x,), 1)
    leaf, weight = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        squared_jacobian(Once.apply(leaf) * weight, (leaf,), 1).sum().backward()
    with pytest.raises(ValueError, match=r"hp\.JacobianNorm cannot be compiled"):
        stn.compile(backend="aot_eager")


# Everything at once


SPECS = {
    "mixup": lambda: [hp.MixUp(), hp.CutMix("0"), hp.Dropout("1")],
    "activation": lambda: [hp.ActivationDecay("0", "1"), hp.Dropout("1")],
    "jacobian": lambda: [hp.JacobianNorm(), hp.Dropout("1"), hp.WeightDecay("3")],
}


@pytest.mark.parametrize("name", SPECS)
def test_the_tangent_is_the_derivative_with_every_term(name):
    report = fxstn.verify(classifier(), images(), hparams=SPECS[name]())
    assert report.ok, report


@pytest.mark.parametrize("name", SPECS)
def test_the_runner_trains_with_every_term(name):
    torch.manual_seed(0)
    stn = fxstn.transform(classifier(), SPECS[name]())
    twin = pickle.loads(pickle.dumps(stn))
    batches = [(images(), torch.arange(8) % 5)] * 4
    histories = []
    for network in (stn, twin):
        torch.manual_seed(0)
        runner = fxstn.BilevelRunner(
            network,
            nn.CrossEntropyLoss(),
            batches,
            batches[:1],
            hyper=fxstn.HyperSettings(train_steps=2),
            response=fxstn.ResponseSettings(every=1),
        )
        histories.append(runner.fit(2).rows)
    assert len(histories[0]) == 2
    for row in histories[0]:
        assert not any(map(math.isnan, row.values()))
    strip = [[{**row, "seconds": 0} for row in rows] for rows in histories]
    assert strip[0] == strip[1]
    assert set(stn.model.state_dict()) == set(classifier().state_dict())


@pytest.mark.parametrize("name", ["mixup", "activation"])
def test_the_graphs_with_asides_compile(name):
    stn = fxstn.transform(classifier(), SPECS[name]()).train()
    stn.compile(backend="aot_eager")  # fullgraph=True
    labels = torch.arange(8) % 5
    fxstn.general_loss(stn, F.cross_entropy, images(), labels).backward()
    fxstn.response_loss(stn, F.cross_entropy, images(), labels).backward()
    assert all(parameter.grad is not None for parameter in stn.response_parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (hp.ActivationDecay, TypeError, "needs the names of modules"),
        (
            lambda: hp.ActivationDecay("1", low=0.0),
            ValueError,
            "need 0 < low < high < inf for activation_decay, or low=0 with",
        ),
        (lambda: hp.JacobianNorm(projections=0), ValueError, "projections=0 must be at least 1"),
        (lambda: hp.MixUp(high=3.0), ValueError, "need 0 <= low < high <= 2 for mixup"),
        (lambda: hp.Cutout(perturb="epoch"), ValueError, "perturb='epoch' is neither 'example' nor 'batch'"),
        (lambda: hp.Cutout(perturb={"size": "batch"}), ValueError, "its numbers are 'holes', 'length'"),
        (lambda: hp.DropConnect(perturb="example"), ValueError, "has one value for all examples of a batch"),
        (
            lambda: fxstn.transform(classifier(), [hp.MixUp(), hp.MixUp("input")]),
            ValueError,
            "MixUp is asked for twice",
        ),
        (lambda: fxstn.register_operation(hp.MixUp, v2.MixUp), ValueError, "cannot stand for a module"),
    ],
)
def test_a_bad_request_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_each_hyperparameter_is_perturbed_as_its_spec_says():
    specs = [
        hp.ColorJitter(perturb={"hue": "batch"}),
        hp.Dropout("1", perturb="batch"),
        hp.Flip(),
        hp.WeightDecay(perturb="batch"),
        hp.Scalar("temperature", 1.0, 0.5, 2.0, perturb="batch"),
    ]
    stn = fxstn.transform(classifier(), specs)
    torch.manual_seed(0)
    sample = stn.hparams.sample(6)
    distinct = {name: len(column.unique()) for name, column in zip(stn.hparams.names, sample.unbind(1), strict=True)}
    shared = {name for name, count in distinct.items() if count == 1}
    assert shared == {"input.hue", "1.dropout", "0.weight_decay", "3.weight_decay", "temperature"}
    assert all(distinct[name] == 6 for name in set(distinct) - shared)
    assert sample[0, stn.hparams.names.index("input.hue")] != 0


class Branching(nn.Module):
    """Only torch.export follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        h = self.conv(x).relu()
        return self.head((h * 2 if h.shape[2] > 3 else h).mean((2, 3)))


@pytest.mark.parametrize(
    "spec", [hp.Cutout, hp.MixUp, hp.JacobianNorm, hp.DropConnect, lambda: hp.ActivationDecay("conv")],
    ids=["cutout", "mixup", "jacobian", "drop_connect", "activation"],
)  # fmt: skip
def test_every_term_works_where_export_follows_the_model(spec):
    stn = moved(fxstn.transform(Branching(), [spec()], example_inputs=images())).train()
    assert stn.frontend == "export"
    labels = torch.arange(8) % 5
    fxstn.general_loss(stn, F.cross_entropy, images(), labels).backward()
    fxstn.response_loss(stn, F.cross_entropy, images(), labels).backward()
    fxstn.hyper_loss(stn, F.cross_entropy, images(), labels).backward()
    assert stn.hparams.unconstrained.grad.abs().sum() > 0
    assert any(parameter.grad.abs().sum() > 0 for parameter in stn.response_parameters())


def test_a_model_that_only_runs_as_it_is_refuses_what_needs_a_graph():
    for spec in (hp.MixUp(), hp.ActivationDecay("conv"), hp.JacobianNorm()):
        with pytest.raises(fxstn.TransformError, match="which needs a graph"):
            fxstn.transform(Branching(), [spec], example_inputs=images(), trace="live")


def test_an_augmentation_is_tuned_where_export_or_live_follows_the_model():
    for trace in ("export", "live"):
        model = nn.Sequential(v2.RandomHorizontalFlip(0.5), Branching())
        stn = fxstn.transform(model, example_inputs=images(), trace=trace)
        assert stn.hparams.values() == pytest.approx({"0.flip": 0.5})
        assert torch.equal(stn.eval()(images()), stn.model[1].eval()(images()))  # off in eval mode


def test_an_augmentation_that_keeps_its_strength_is_warned_of():
    model = nn.Sequential(v2.RandomRotation(20, expand=True), Branching())
    with pytest.warns(
        UserWarning, match=r"'0' keeps its strength: no operation of fxstn does .* because fx: .*expand=True"
    ):
        stn = fxstn.transform(model, example_inputs=images())
    assert stn.frontend == "live"
    assert "input.dropout" in stn.hparams.names


def test_an_error_in_an_operation_of_ones_own_is_shown():
    class Fade(hp.Operation):
        numbers = {"p": hp.Hyperparameter(0.1, 0, 1)}  # noqa: RUF012

        @staticmethod
        def draw(x, p):
            return by_exampel(p, x)  # noqa: F821

        @staticmethod
        def apply(x, drawn):
            return x * (1 - drawn)

    class Faded(nn.Module):
        p = 0.2

        def forward(self, x):
            return x * (1 - self.p)

    fxstn.register_operation(Fade, Faded)
    with pytest.raises(fxstn.TransformError, match=r"fx: .*NameError: name 'by_exampel' is not"):
        fxstn.transform(
            nn.Sequential(Faded(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(252, 5)), example_inputs=images()
        )


def test_explain_lists_the_penalties():
    specs = [hp.WeightDecay("3"), hp.ActivationDecay("1"), hp.JacobianNorm(), hp.MixUp()]
    rows = [row for row in fxstn.explain(classifier(), specs).rows if row.rule == "conditioned"]
    assert [(row.module, row.operation, row.became) for row in rows] == [
        ("", "mix_up", "strength from λ: input.mixup"),
        ("3.weight", "L2 penalty", "strength from λ: 3.weight_decay"),
        ("1", "activation penalty", "strength from λ: 1.activation_decay"),
        ("", "Jacobian penalty", "strength from λ: jacobian_norm"),
    ]
