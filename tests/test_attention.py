"""Attention and transformers: the same outputs as the original, exact tangents, every projection responds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.ops import attention_tangent
from tests.nets import randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]
D, HEADS = 8, 2


def causal(x):
    return torch.full((6, 6), -torch.inf, dtype=x.dtype).triu(1)


def padding():
    return torch.arange(6) >= torch.tensor([[6], [5], [3]])


class Attend(nn.Module):
    """nn.MultiheadAttention called in one way, then a linear layer. weights: return the weights as well."""

    def __init__(self, call, **settings):
        super().__init__()
        self.call = call
        self.attention, self.head = nn.MultiheadAttention(D, HEADS, **settings), nn.Linear(D, 3)

    def forward(self, x):
        y, weights = self.call(self.attention, x)
        return self.head(y) if weights is None else (self.head(y), weights)


class Functional(nn.Module):
    """scaled_dot_product_attention on projections, as most code outside of torch writes it."""

    def __init__(self, dropout=0.0, **settings):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.dropout, self.settings = dropout, settings

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, **self.settings)
        return self.out(y.transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)


class Pair(nn.Module):
    """A transformer with source and target made from one input."""

    def __init__(self, **settings):
        super().__init__()
        layers = {"custom_encoder": encoder(**settings)}  # torch's own warns of nested tensors
        self.net = nn.Transformer(D, HEADS, 1, 1, 16, batch_first=True, **layers, **settings)

    def forward(self, x):
        return self.net(x, torch.cos(x), tgt_mask=causal(x))


def itself(a, x, **kwargs):
    return a(x, x, x, **kwargs)


NETS = {
    "self": lambda: Attend(lambda a, x: itself(a, x, need_weights=False), batch_first=True),
    "time-major": lambda: Attend(
        lambda a, x: (itself(a, x.transpose(0, 1), need_weights=False)[0].transpose(0, 1), None)
    ),
    "weights": lambda: Attend(itself, batch_first=True),
    "weights of each head": lambda: Attend(
        lambda a, x: itself(a, x, average_attn_weights=False), batch_first=True, bias=False
    ),
    "cross": lambda: Attend(lambda a, x: a(x, x.cos(), x.sin(), need_weights=False), batch_first=True),
    "other dimensions": lambda: Attend(
        lambda a, x: a(x, x[..., :3], x[..., :5], need_weights=False), batch_first=True, kdim=3, vdim=5
    ),
    "causal": lambda: Attend(
        lambda a, x: itself(a, x, attn_mask=causal(x), is_causal=True, need_weights=False), batch_first=True
    ),
    "mask of each head": lambda: Attend(
        lambda a, x: itself(a, x, attn_mask=causal(x).expand(3 * HEADS, 6, 6), need_weights=False),
        batch_first=True,
    ),
    "padding": lambda: Attend(
        lambda a, x: itself(a, x, key_padding_mask=padding(), need_weights=False), batch_first=True
    ),
    "both masks": lambda: Attend(
        lambda a, x: itself(a, x, key_padding_mask=padding(), attn_mask=causal(x).isinf()), batch_first=True
    ),
    "dropout": lambda: Attend(lambda a, x: itself(a, x, need_weights=False), batch_first=True, dropout=0.3),
    "dropout of weights": lambda: Attend(itself, batch_first=True, dropout=0.3),
    "functional": Functional,
    "functional with dropout": lambda: Functional(0.3, is_causal=True, scale=0.4),
    "grouped heads": Grouped,
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "transformer": Pair,
    "transformer, norm first": lambda: Pair(norm_first=True, dropout=0.2),
    "windows": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), ShiftedWindowAttention(D, [4, 1], [2, 0], HEADS, dropout=0.1)
    ),
    "windows, version 2": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), ShiftedWindowAttentionV2(D, [2, 2], [1, 1], HEADS, attention_dropout=0.1)
    ),
}
FIXED_BATCH = {"padding", "both masks", "mask of each head"}


@pytest.mark.parametrize("name", NETS)
def test_the_tangent_of_attention_is_the_derivative_of_the_original(name):
    net, x = NETS[name](), torch.randn(3, 6, D)
    for specs in ([hp.Scalar("a", 0.5, 0, 1)], None):
        report = fxstn.verify(net, x, hparams=specs)
        assert report.ok, f"{specs}\n{report}"


@pytest.mark.parametrize("name", [name for name in NETS if "dropout" not in name])
def test_the_graph_computes_what_the_original_does(name):
    net, x = NETS[name]().train(), torch.randn(3, 6, D)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.MultiheadAttention, ShiftedWindowAttention)):
            module.dropout = 0.0
        if isinstance(module, ShiftedWindowAttention):
            module.attention_dropout = 0.0
    expected = copy.deepcopy(net)(x)
    stn = fxstn.transform(net, SCALAR).train()
    torch.testing.assert_close(stn(x), expected)
    torch.testing.assert_close(stn.graph("eval")(x), net.eval()(x))


@pytest.mark.parametrize("name", [name for name in NETS if name not in FIXED_BATCH and name != "windows, version 2"])
def test_rows_of_a_per_example_delta_are_the_shared_results(name):
    stn = fxstn.transform(NETS[name]().double(), SCALAR).eval()
    randomize_response(stn)
    x, delta = torch.randn(4, 6, D).double(), torch.randn(4, 1).double()
    assert stn.per_example(x)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(4):
        _, shared = stn.pushforward(x, delta=delta[i])
        for row, one in zip(*(y if isinstance(y, tuple) else (y,) for y in (rows, shared)), strict=True):
            torch.testing.assert_close(row[i], one[i], rtol=1e-9, atol=1e-12)


def test_every_projection_responds():
    stn = fxstn.transform(encoder(), SCALAR, response="structured")
    assert {name for name, p in stn.model.named_parameters() if p.dim() > 1} == {
        name.removesuffix(".R") for name, p in stn.response.named_parameters() if name.endswith("R") and p.dim() > 1
    }


def test_probabilities_of_attention_are_dropped_at_a_rate_from_lambda():
    stn = fxstn.transform(NETS["dropout"]())
    assert stn.hparams.names == ("attention.dropout",)
    assert next(iter(stn.hparams.values().values())) == pytest.approx(0.3)


SEEN = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])  # the second query sees nothing
QKV = ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 2))


@pytest.mark.parametrize(
    ("shapes", "mask", "settings"),
    [
        (QKV, None, {}),
        (QKV, None, {"scale": 0.3}),
        (QKV, None, {"is_causal": True}),
        (QKV, SEEN, {}),
        (QKV, SEEN.double().log(), {}),
        (QKV, torch.randn(2, 1, 3, 5, dtype=torch.float64), {"scale": 2.0}),
        (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 2)), SEEN, {"enable_gqa": True}),
        (((3, 4), (5, 4), (5, 2)), None, {"is_causal": True}),
    ],
)
def test_attention_with_dropout_is_torchs_own_written_out(shapes, mask, settings):
    """The value of torch's kernel, and the gradients, at a rate so small that nothing is dropped."""
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    written_out = DECOMPOSITIONS[F.scaled_dot_product_attention](*tensors, mask, 1e-12, **settings)
    expected = F.scaled_dot_product_attention(*tensors, mask, 0.0, **settings)
    torch.testing.assert_close(written_out, expected, rtol=1e-9, atol=1e-10)
    g = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, tensors, g) for y in (written_out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_attention_without_dropout_stays_one_operation():
    x = torch.randn(2, 3, 4)
    assert DECOMPOSITIONS[F.scaled_dot_product_attention](x, x, x) is NotImplemented


# The tangent, where the primal is constant


HEADS_APART = [(2, 6, 4, 3), (2, 7, 4, 3), (2, 7, 4, 5)]  # (batch, length, heads, width), as a layer has them
SHARED_HEADS = [(2, 6, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)]


@pytest.mark.parametrize("pieces", [1, 3], ids="{} at once".format)
@pytest.mark.parametrize("varying", ["qkv", "q", "k", "v", "kv"])
@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        (HEADS_APART, {}),
        (HEADS_APART, {"is_causal": True}),
        (HEADS_APART[1:2] + HEADS_APART[:1] * 2, {"is_causal": True, "scale": 0.3}),
        (HEADS_APART, {"attn_mask": torch.arange(7) < torch.tensor([[[[7]]], [[[4]]]])}),
        (HEADS_APART, {"attn_mask": torch.randn(6, 7, generator=torch.Generator().manual_seed(0)).double()}),
        (SHARED_HEADS, {"enable_gqa": True}),
        (SHARED_HEADS, {"enable_gqa": True, "is_causal": True}),
    ],
    ids=["plain", "causal", "fewer columns", "padding", "added", "grouped", "grouped, causal"],
)
def test_the_tangent_of_attention_is_torchs_jvp_and_its_gradient_torchs_vjp(
    shapes, settings, varying, pieces, monkeypatch
):
    columns, rows = shapes[1][1], shapes[0][1]
    monkeypatch.setattr(attention_tangent, "AT_ONCE", -(-rows // pieces) * 2 * 4 * columns)
    primals = [torch.randn(shape, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    tangents = [torch.randn_like(x) for x in primals]
    wanted = [name in varying for name in "qkv"]

    def attend(*primals):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward mode
            return F.scaled_dot_product_attention(*primals, **settings)

    zeroed = [x if own else torch.zeros_like(x) for x, own in zip(tangents, wanted, strict=True)]
    y, dy = torch.func.jvp(attend, tuple(primals), tuple(zeroed))
    own = [x.requires_grad_() if needs else None for x, needs in zip(tangents, wanted, strict=True)]
    scale, causal, grouped = (settings.get(name) for name in ("scale", "is_causal", "enable_gqa"))
    result = attention_tangent.attention_and_tangent(
        *primals, settings.get("attn_mask"), tuple(own), None, bool(causal), scale, bool(grouped)
    )
    torch.testing.assert_close(result, (y, dy), rtol=1e-9, atol=1e-10)

    g = torch.randn_like(dy)
    needed = [x for x in own if x is not None]
    expected = [x for x, needs in zip(torch.func.vjp(attend, *primals)[1](g), wanted, strict=True) if needs]
    torch.testing.assert_close(list(torch.autograd.grad(result[1], needed, g)), expected, rtol=1e-9, atol=1e-10)


def test_a_response_step_keeps_nothing_as_large_as_the_probabilities():
    length, sizes = 50, []

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(D, 3 * D)

        def forward(self, x):
            heads = self.project(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)  # (batch, HEADS, 3, length, width)
            return F.scaled_dot_product_attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])

    stn, x = fxstn.transform(Layer(), SCALAR), torch.randn(3, length, D)
    randomize_response(stn)
    for weight in stn.general_parameters():
        weight.requires_grad_(False)

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = stn.pushforward(x, delta=torch.randn(len(x), 1))[1]
    result.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stn.response_parameters())
    assert max(sizes) < 3 * HEADS * length**2
    assert len(sizes) > 5


# Rows with nothing to attend to


class Product(nn.Module):
    """scaled_dot_product_attention with a mask, (True: attended to)."""

    def __init__(self, dropout, mask):
        super().__init__()
        self.project, self.dropout, self.mask = nn.Linear(D, D), dropout, mask

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(self.project(x), x.cos(), x.sin(), self.mask(x), dropout_p=p)


class Encoder(nn.Module):
    def __init__(self, dropout, hidden):
        super().__init__()
        self.layer, self.hidden = nn.TransformerEncoderLayer(D, HEADS, 16, dropout=dropout, batch_first=True), hidden

    def forward(self, x):
        return self.layer(x, src_key_padding_mask=self.hidden(x))


def sees_nothing(name, kind, dropout):
    """A network in which the second example sees nothing and the others four positions, by a bool or by a float mask."""

    def hidden(x):
        number = torch.ones_like(x[..., 0]).cumsum(0)
        mask = (number == 2) | (torch.arange(6) >= 4)
        return mask if kind == "bool" else torch.zeros_like(number).masked_fill(mask, -torch.inf)

    def mask(x):
        return (~hidden(x) if kind == "bool" else hidden(x)).unsqueeze(1)

    if name == "function":
        return Product(dropout, mask)
    if name == "encoder layer":
        return Encoder(dropout, hidden)
    keywords = {"need_weights": name == "weights"}
    return Attend(lambda a, x: itself(a, x, key_padding_mask=hidden(x), **keywords), batch_first=True, dropout=dropout)


WAYS = [(name, kind) for name in ("function", "encoder layer", "multi-head", "weights") for kind in ("bool", "float")]


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_a_row_that_sees_nothing_is_as_in_torch(name, kind, trace):
    x, net = torch.randn(3, 6, D), sees_nothing(name, kind, 1e-12)  # the path of dropout, of which nothing is dropped
    expected = copy.deepcopy(net).train()(x)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, trace=trace).train()
    torch.testing.assert_close(stn(x), expected, equal_nan=True)
    assert torch.isnan(expected[0] if name == "weights" else expected).any() == (name == "weights")


@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize(("name", "kind"), [way for way in WAYS if way[0] != "weights"])
def test_the_tangent_of_a_row_that_sees_nothing_is_the_derivative_of_the_original(name, kind, trace):
    report = fxstn.verify(sees_nothing(name, kind, 0.3), torch.randn(3, 6, D), hparams=SCALAR, trace=trace)
    assert report.ok, report
