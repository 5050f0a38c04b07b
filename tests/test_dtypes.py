"""Networks in half precision and of several types: what learns is float32 at least, and tangents are those of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.bilevel.temporary import WeightAverages
from fxstn.ops.noise import weight_mask
from tests.nets import SmallConv, randomize_response

HALVES = [torch.bfloat16, torch.float16]
DECAY = [hp.WeightDecay(shared=True)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def learned(stn) -> list[nn.Parameter]:
    """λ, σ and Θ."""
    return [*stn.hparams.parameters(), *stn.response_parameters()]


class FrozenBackbone(nn.Module):
    """A backbone that is not trained, in bfloat16, under a float32 head, with a cast on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = mlp().bfloat16().requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.to(self.backbone[0].weight.dtype)).to(self.head[0].weight.dtype))


class WideNorm(nn.Module):
    """Linear layers in bfloat16 around a layer norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.norm = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3).bfloat16(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.before(x.to(self.before.weight.dtype)).to(self.norm.weight.dtype))
        return self.after(y.to(self.after.weight.dtype))


class WithIndices(nn.Module):
    """An integer parameter, before the weights and wider than they are."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(5, -1, -1), requires_grad=False)
        self.shift = nn.Parameter(torch.ones(6, dtype=torch.int64), requires_grad=False)
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, self.order] + self.shift)


class SingleAndDouble(nn.Module):
    """A float32 layer before one in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.Linear(6, 8), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.double_(torch.tanh(self.single(x.to(self.single.weight.dtype))).to(self.double_.weight.dtype))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.inputs(x)).mean(1))


def words() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU(), nn.Flatten(), nn.Linear(40, 3))


def normalized_weight() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def groups() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 3))


VECTORS, SEQUENCES, IMAGES, TOKENS = (8, 6), (8, 5, 6), (8, 3, 16, 16), (8, 5)
NETS = {
    "mlp": (mlp, VECTORS),
    "frozen backbone": (FrozenBackbone, VECTORS),
    "wide norm": (WideNorm, VECTORS),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCES),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCES),
    "attention": (Attention, SEQUENCES),
    "convolutions": (SmallConv, IMAGES),
    "group norm": (groups, IMAGES),
    "embedding": (words, TOKENS),
    "weight norm": (normalized_weight, VECTORS),
}
MIXED = ("frozen backbone", "wide norm")


def example(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 10, shape) if shape == TOKENS else torch.randn(shape)


def difference(model: nn.Module, stn, x: Tensor, delta: Tensor, step: float = 1e-5) -> Tensor:
    """The central difference of a model in float64 along Θ delta, at the same weights."""
    wide, original = copy.deepcopy(stn).double(), copy.deepcopy(model).double().train(stn.training)

    def moved(length: float) -> Tensor:
        weights = wide.best_response(length * delta.double())
        buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
        return functional_call(original, weights | buffers, (x.double() if x.is_floating_point() else x,))

    return (moved(step) - moved(-step)) / (2 * step)


# λ, σ, Θ and what is averaged


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("response", ["scaled", "structured"])
def test_lambda_and_theta_of_a_half_network_move_as_those_of_float32(dtype, response):
    stn = fxstn.transform(mlp().to(dtype), response=response)
    optimizer = torch.optim.Adam([{"params": [p]} for p in learned(stn)], lr=1e-3)
    before = [p.detach().clone() for p in learned(stn)]
    for _ in range(200):
        for parameter in learned(stn):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for parameter, start in zip(learned(stn), before, strict=True):
        torch.testing.assert_close(start - parameter, torch.full_like(start, 0.2), rtol=1e-3, atol=0)
        assert all(value.dtype == torch.float32 for value in optimizer.state[parameter].values())


@pytest.mark.parametrize(
    "convert",
    [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.empty(0).half())],
)
def test_a_conversion_after_transform_lowers_the_weights_alone(convert):
    stn = fxstn.transform(mlp(), response="structured")
    values = [p.detach().clone() for p in learned(stn)]
    x = torch.randn(4, 6)
    stn.train()(x)
    convert(stn)
    assert all(p.dtype == torch.float32 and torch.equal(p, v) for p, v in zip(learned(stn), values, strict=True))
    assert all(b.dtype in (torch.float32, torch.bool) for b in stn.hparams.buffers())
    dtypes = {p.dtype for p in stn.general_parameters()}
    assert len(dtypes) == 1
    assert dtypes < set(HALVES)
    x, target = x.to(dtypes.pop()), torch.arange(4) % 3
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss(stn, F.cross_entropy, x, target).backward()
    assert all(p.dtype == torch.float64 for p in stn.double().parameters())
    assert all(p.dtype == torch.float32 for p in stn.float().parameters())
    assert all(p.is_meta for p in stn.to("meta").parameters())


@pytest.mark.parametrize(("make", "expected"), [(SingleAndDouble, torch.float64), (FrozenBackbone, torch.float32)])
def test_the_widest_parameter_decides_what_lambda_is_in(make, expected):
    stn = fxstn.transform(make(), DECAY, example_inputs=torch.randn(4, 6))
    assert {p.dtype for p in stn.hparams.parameters()} == {expected}
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss(stn, F.cross_entropy, torch.randn(4, 6), torch.arange(4) % 3).backward()
    assert stn.hparams.unconstrained.grad.isfinite().all()


def test_a_float64_network_is_float64_throughout():
    stn = fxstn.transform(mlp().double(), response="structured")
    assert {t.dtype for t in (*stn.parameters(), *stn.buffers())} <= {torch.float64, torch.bool, torch.int64}


def test_averages_of_half_weights_count_small_changes():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    averages = WeightAverages([weight], 0.999)
    weight.data.fill_(2.0)
    for _ in range(100):
        averages.update()
    torch.testing.assert_close(averages.averages[0], torch.full((3,), 2 - 0.999**100))
    with averages.swapped():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.detach().float(), averages.averages[0], rtol=2**-8, atol=0)
    assert weight.eq(2).all()


def test_a_mask_of_half_weights_has_the_rate():
    """A draw in bfloat16 has steps of 2⁻⁸."""
    mask = weight_mask(torch.ones(1000, 1000, dtype=torch.bfloat16), torch.tensor(1e-3))
    assert mask.dtype == torch.bfloat16
    assert (mask == 0).float().mean().item() == pytest.approx(1e-3, rel=0.2)


# Tangents


@pytest.mark.parametrize(
    ("net", "response"),
    [
        *((net, "scaled") for net in NETS),
        *((net, "structured") for net in ("mlp", "frozen backbone", "lstm", "weight norm")),
    ],
)
def test_law_1_in_bfloat16_and_in_several_types(net, response):
    """A few roundings to 8 bits in a row, twice as many through time."""
    torch.manual_seed(0)
    make, shape = NETS[net]
    model, x = (make() if net in MIXED else make().bfloat16()), example(shape)
    if x.is_floating_point():
        x = x.bfloat16()
    inputs, delta = x.float() if net in MIXED else x, torch.tensor([1.0])
    stn = fxstn.transform(model, DECAY, example_inputs=inputs, response=response)
    randomize_response(stn)
    for training in (True, False):
        y, dy = stn.train(training).pushforward(inputs, delta=delta)
        _, by_example = stn.pushforward(inputs, delta=delta.expand(len(x), 1))
        assert dy.dtype == y.dtype
        expected = difference(model, stn, x, delta)
        for tangent in (dy, by_example):
            assert (tangent.double() - expected).norm() <= 12 * 2**-8 * expected.norm()


@pytest.mark.parametrize(
    ("make", "trace"),
    [
        (FrozenBackbone, "fx"),
        (FrozenBackbone, "export"),
        (FrozenBackbone, "live"),
        (WideNorm, "fx"),
        (WideNorm, "live"),
    ],
)
def test_a_network_of_several_types_is_trained_and_tuned_on_every_frontend(make, trace):
    x = torch.randn(16, 6)
    stn = fxstn.transform(make(), [hp.Dropout(init=0.3), hp.WeightDecay()], example_inputs=x[:4], trace=trace)
    before = {name: p.detach().clone() for name, p in stn.named_parameters()}
    batches = [(x[i : i + 8], torch.arange(8) % 3) for i in (0, 8)]
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        batches,
        batches,
        hyper=fxstn.HyperSettings(train_steps=1, tune_scale=True),
        response=fxstn.ResponseSettings(every=1),
        progress=False,
        clip_norm=1.0,
    )
    runner.fit(2)
    for name, p in stn.named_parameters():
        assert p.isfinite().all()
        assert torch.equal(p, before[name]) is name.startswith("model.backbone")
    assert runner.best_model()(x).isfinite().all()


@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize("method", ["centered", "stn"])
@pytest.mark.parametrize("net", ["mlp", "lstm", "wide norm"])
def test_a_finite_step_in_half_precision_is_the_network_with_these_weights(net, method, trace):
    torch.manual_seed(0)
    make, shape = NETS[net]
    model, x = (make() if net in MIXED else make().bfloat16()), torch.randn(shape).bfloat16()
    stn = fxstn.transform(model, DECAY, example_inputs=x, method=method, trace=trace, response="structured").eval()
    randomize_response(stn)
    y, _ = stn.perturbed_output(x, delta=torch.tensor([0.5]))
    weights = stn.best_response(torch.tensor([0.5]))
    assert all(w.dtype == p.dtype for w, p in zip(weights.values(), model.parameters(), strict=True))
    expected = functional_call(copy.deepcopy(model).eval(), weights, (x,))
    torch.testing.assert_close(y, expected, rtol=4 * 2**-8, atol=4 * 2**-8)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("by_example", [True, False])
def test_penalties_of_half_weights_are_those_in_float64(norm, by_example):
    torch.manual_seed(0)
    stn = fxstn.transform(nn.Sequential(nn.Linear(300, 300)).half(), [hp.WeightDecay(shared=True, norm=norm)])
    stn.model[0].weight.data.mul_(50)  # its squared norm is beyond float16
    randomize_response(stn)
    wide, condition = copy.deepcopy(stn).double(), torch.randn((4, 1) if by_example else (1,))
    for ours, exact in ((stn.penalty(), wide.penalty()), (stn.penalty(condition), wide.penalty(condition.double()))):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("response", ["scaled", "structured"])
def test_the_training_hypergradient_of_half_weights_is_that_in_float64(response):
    torch.manual_seed(0)
    stn = fxstn.transform(mlp().bfloat16(), response=response)
    randomize_response(stn)
    fxstn.general_loss(stn, F.cross_entropy, torch.randn(8, 6).bfloat16(), torch.arange(8) % 3).backward()
    wide = copy.deepcopy(stn)
    for parameter, original in zip(wide.double().general_parameters(), stn.general_parameters(), strict=True):
        parameter.grad = original.grad.double()
    torch.testing.assert_close(stn.hypergradient().double(), wide.hypergradient(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [(), (5,)])
def test_scales_are_in_the_type_of_theta_under_autocast(rows):
    stn = fxstn.transform(mlp(), [hp.WeightDecay()])
    nn.init.normal_(stn.response.flat_U)
    delta = torch.randn(*rows, len(stn.hparams))
    with torch.autocast("cpu", torch.bfloat16):
        scales = stn.response.flat_scales(delta)
    assert torch.equal(scales, delta @ stn.response.flat_U.T)


@pytest.mark.parametrize("response", ["scaled", "structured"])
@pytest.mark.parametrize("options", [{"shared": True}, {"shared": False}, {"shared": True, "norm": 1}], ids=str)
def test_penalties_are_summed_in_the_type_of_the_weights_under_autocast(response, options):
    torch.manual_seed(0)
    stn = fxstn.transform(mlp(), [hp.WeightDecay(**options)], response=response)
    randomize_response(stn)
    condition = torch.randn(4, len(stn.hparams))

    values = [stn.penalty(condition)]
    with torch.autocast("cpu", torch.bfloat16):
        values.append(stn.penalty(condition))
    parameters = list(stn.response_parameters())
    plain, low = (torch.autograd.grad(value, parameters, allow_unused=True) for value in values)
    torch.testing.assert_close([values[1], *low], [values[0], *plain], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_model_with_an_integer_parameter_is_trained(trace):
    batches = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]
    stn = fxstn.transform(WithIndices(), DECAY, example_inputs=batches[0][0], trace=trace)
    assert {x.dtype for x in learned(stn)} == {torch.float32}
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, batches, batches, progress=False)
    runner.fit(2)
    assert runner.problem.diagnostics(*batches[0], 0)["response_norm"] > 0
    assert torch.equal(runner.refit(batches).order, WithIndices().order)
    assert fxstn.verify(WithIndices(), batches[0][0], hparams=DECAY, trace=trace).ok
    doubled = stn.double().train()(batches[0][0].double())
    assert doubled.dtype == torch.float64


def test_a_model_with_an_integer_parameter_is_tuned_where_it_is():
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    model = WithIndices()
    optimizer = torch.optim.SGD(model.layers.parameters(), 0.1)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, [(x, y)], [(x, y)], DECAY)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    tuner.load_state_dict(tuner.state_dict())
    F.cross_entropy(model.double()(x.double()), y).backward()
    with pytest.raises(ValueError, match=r"moved from \(cpu, float32\) to \(cpu, float64\)"):
        optimizer.step()
