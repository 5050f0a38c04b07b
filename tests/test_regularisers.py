"""Regularisers as models and other libraries write them: found, named, tuned on every frontend, with exact tangents."""

from __future__ import annotations

import copy
import pickle
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import ops

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.layer_drop import LOOPS
from fxstn.frontends.decompositions.recognition import RECOGNISED
from fxstn.frontends.decompositions.torchvision import RANDOM
from fxstn.frontends.model_forwards import restore_modules
from fxstn.ops.drop_block import block_mask, block_multiplier
from tests.test_conditioned import conditioned
from tests.test_drop_path import DropPath

FRONTENDS = ["fx", "export", "live"]


# Dropout in a forward


class Attribute(nn.Module):
    """A forward, given as a function of the module, the output of its layer, its rate and its mode."""

    def __init__(self, p, forward):
        super().__init__()
        self.dropout, self.config, self.body = p, SimpleNamespace(dropout=p), forward
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.body(self, self.lin(x))


def attended(s, x, *by_position, **named):
    h = x.view(-1, 1, 4, 2)
    return F.scaled_dot_product_attention(h, h, h, *by_position, **named).reshape(-1, 8)


def attended_by_hand(s, x):
    h = x.view(-1, 4, 2)
    return (F.dropout(torch.softmax(h @ h.mT, -1), p=s.dropout if s.training else 0.0) @ h).reshape(-1, 8)


SPELLINGS = {
    "by_name": lambda s, x: F.dropout(x, p=s.dropout, training=s.training).relu(),
    "by_config": lambda s, x: F.dropout(x, s.config.dropout, s.training).relu(),
    "in_place": lambda s, x: F.dropout(x.tanh(), s.dropout, s.training, inplace=True) * 1,
    "of_torch": lambda s, x: torch.dropout(x, s.dropout, s.training).relu(),
    "if_training": lambda s, x: F.dropout(x, s.dropout).relu() if s.training and s.dropout > 0 else x.relu(),
    "attention": lambda s, x: attended(s, x, dropout_p=s.dropout if s.training else 0.0),
    "causal": lambda s, x: attended(s, x, None, s.dropout if s.training else 0.0, True),
    "attention_by_hand": attended_by_hand,
    "of_weights": lambda s, x: F.linear(x, F.dropout(s.lin.weight, s.dropout, s.training)),
    "alpha": lambda s, x: F.alpha_dropout(x, s.dropout, s.training).relu(),
    "channels": lambda s, x: torch.feature_dropout(x.view(-1, 4, 2), s.dropout, s.training).reshape(-1, 8),
}  # fmt: skip


def spelled():
    torch.manual_seed(0)
    modules = {name: Attribute(0.1 + i / 50, body) for i, (name, body) in enumerate(SPELLINGS.items())}
    net = nn.Sequential()
    net.add_module("first", nn.Linear(6, 8))
    for name, module in modules.items():
        net.add_module(name, module)
    net.add_module("last", nn.Linear(8, 3))
    return net


@pytest.mark.parametrize("trace", FRONTENDS)
def test_every_spelling_of_dropout_is_found_named_and_tuned(trace):
    x, net = torch.randn(5, 6), spelled()
    stn = fxstn.transform(net, trace=trace, example_inputs=x)
    assert [name.partition(".")[0] for name in stn.hparams.names] == list(SPELLINGS)
    assert list(stn.hparams.values().values()) == pytest.approx([0.1 + i / 50 for i in range(len(SPELLINGS))])
    assert fxstn.verify(net, x, trace=trace).ok


class Ends(nn.Module):
    """Two functional calls, of which one is the module's output, and a module that is called like them."""

    def __init__(self, p=0.2):
        super().__init__()
        self.lin, self.p = nn.Linear(6, 6), p

    def forward(self, x):
        return F.dropout(F.dropout(self.lin(x), self.p, self.training).relu(), self.p, self.training)


@pytest.mark.parametrize("trace", FRONTENDS)
def test_calls_of_a_function_are_numbered_within_their_module(trace):
    net, x = nn.Sequential(nn.Sequential(Ends(0.1)), Ends(0.2), nn.Linear(6, 2)), torch.randn(4, 6)
    stn = fxstn.transform(net, trace=trace, example_inputs=x)
    assert list(stn.hparams.values().values()) == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert stn.hparams.names == ("0.0.dropout", "0.0.dropout_1.dropout", "1.dropout", "1.dropout_1.dropout")
    chosen = fxstn.transform(net, [hp.Dropout("1.dropout*", init=0.3)], trace=trace, example_inputs=x)
    assert chosen.hparams.values() == pytest.approx({"1.dropout": 0.3, "1.dropout_1.dropout": 0.3})


def test_a_pattern_may_match_a_module_and_the_dropout_in_it():
    class Block(nn.Sequential):
        def __init__(self, **modules):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

    net = Block(block=Block(lin=nn.Linear(6, 6), dropout=nn.Dropout(0.2), act=nn.Tanh()), head=nn.Linear(6, 2))
    stn = fxstn.transform(net, [hp.Dropout("block*")])
    assert stn.hparams.names == ("block.dropout", "block.dropout.dropout")  # after the block; its own
    assert fxstn.transform(net).hparams.names == ("block.dropout",)


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_a_rate_may_be_a_buffer(trace):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 3)
            self.register_buffer("rate", torch.tensor(0.3))

        def forward(self, x):
            return F.dropout(self.lin(x), self.rate, self.training).tanh()

    stn = fxstn.transform(Held(), trace=trace, example_inputs=torch.randn(4, 6))
    assert stn.hparams.values() == pytest.approx({"dropout": 0.3})


# Random operations on every frontend


class Around(nn.Module):
    """A random module between a convolution and a linear layer."""

    def __init__(self, module):
        super().__init__()
        self.conv, self.drop, self.lin = nn.Conv2d(3, 4, 3, padding=1), module, nn.Linear(4, 5)

    def forward(self, x):
        return self.lin(self.drop(self.conv(x).relu() * 1).mean((2, 3)))


OPERATIONS = {
    "DropPath": (lambda: DropPath(0.2), "stochastic_depth"),
    "DropBlock2d in place": (lambda: ops.DropBlock2d(0.2, 3, inplace=True), "drop_block"),
}


@pytest.mark.parametrize("trace", FRONTENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_random_operation_is_tuned_on_every_frontend(name, trace):
    module, number = OPERATIONS[name]
    x, net = torch.rand(6, 3, 7, 9), Around(module())
    stn = fxstn.transform(net, trace=trace, example_inputs=x)
    assert stn.hparams.values() == pytest.approx({f"drop.{number}": 0.2})
    assert fxstn.verify(net, x, trace=trace).ok
    rows = [row for row in fxstn.explain(stn, example_inputs=x).rows if row.rule == "conditioned"]
    assert [(row.module, row.operation, row.became) for row in rows] == [
        ("drop", number, f"strength from λ: drop.{number}")
    ]
    stn.train().hparams.set({f"drop.{number}": 0.0})  # at a strength of 0 nothing is drawn
    torch.testing.assert_close(stn(x), net.lin(net.conv(x).relu().mean((2, 3))))
    assert torch.equal(stn.eval()(x), net.eval()(x))


@pytest.mark.parametrize("trace", FRONTENDS)
def test_the_strength_that_is_tuned_is_the_one_that_is_drawn_at(trace):
    stn = fxstn.transform(Around(DropPath(0.2)), trace=trace, example_inputs=torch.rand(4, 3, 3, 3)).train()
    stn.hparams.set({"drop.stochastic_depth": 0.75})
    stn.model.conv.bias.data.fill_(3.0)
    torch.manual_seed(0)
    dropped = torch.isclose(stn(torch.zeros(4000, 3, 3, 3)), stn.model.lin.bias).all(1).double().mean()
    assert float(dropped) == pytest.approx(0.75, abs=0.03)


# DropBlock


@pytest.mark.parametrize("dims", [2, 3])
def test_blocks_are_those_of_torchvision(dims):
    """Equal shares of dropped entries, scales and shapes: whole squares (cubes) of the block's side, for each channel."""
    torch.manual_seed(0)
    x = torch.ones(64, 4, *[10] * dims)
    module = (ops.DropBlock2d if dims == 2 else ops.DropBlock3d)(0.3, 3)
    mine, theirs = block_multiplier(x, 0.3, True, block_size=3, gamma_scale=1.0, coupled=False, inside=True), module(x)
    for y in (mine, theirs):
        assert y.mean() == pytest.approx(1, abs=1e-4)
        assert len(y.unique()) == 2
        covered = (y == 0).float()
        pool = (F.max_pool2d, F.max_pool3d)[dims - 2]
        places = 1 - pool(1 - covered, 3, 1)  # where a whole block is covered
        assert torch.equal(pool(F.pad(places, [2] * 2 * dims), 3, 1), covered)
    share, other = ((y == 0).float().flatten(1).mean(1) for y in (mine, theirs))
    assert share.mean() == pytest.approx(other.mean().item(), abs=4 * (share.std() / 8 * 2**0.5).item())


def test_blocks_may_be_cut_at_the_borders_shared_by_channels_and_longer_than_the_map():
    torch.manual_seed(0)
    x = torch.ones(200, 3, 6, 9)
    covered = block_mask(x, 0.2, block_size=4, gamma_scale=1.0, coupled=True, inside=False)
    assert covered.shape == (200, 1, 6, 9)
    corners = covered[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    assert 0 < corners.min() <= corners.max() < covered.mean()
    assert block_mask(x, 0.2, block_size=99, gamma_scale=1.0, coupled=True, inside=True).shape == (200, 1, 6, 9)
    rates = torch.tensor([0.0, 0.4]).repeat(100)
    multiplier = block_multiplier(x, rates, True, block_size=3, gamma_scale=1.0, coupled=True, inside=False)
    assert torch.equal(multiplier[::2], torch.ones(100, 1, 6, 9))
    assert (multiplier[1::2] == 0).float().mean() > 0.3
    torch.testing.assert_close(multiplier.flatten(1).mean(1)[1::2], torch.ones(100))


def test_drop_block_is_inserted_after_feature_maps_alone():
    net, x = Around(nn.Identity()), torch.rand(4, 3, 7, 7)
    assert fxstn.verify(net, x, hparams=[hp.DropBlock("conv", block_size=3)]).ok
    with pytest.raises(fxstn.TransformError, match=r"hp\.DropBlock: a value of shape \(4, 5\) has no blocks"):
        fxstn.transform(net, [hp.DropBlock("lin")], example_inputs=x, trace="fx")


# Dropout in classes of other libraries


class Stable(nn.Module):
    """Entries by a mask of its own, with a number that is no probability."""

    def __init__(self, p):
        super().__init__()
        self.drop_prob, self.count = p, 0

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        return x.masked_fill(torch.bernoulli(torch.full_like(x, self.drop_prob)).bool(), 0) / (1 - self.drop_prob)


class Axes(nn.Module):
    """One draw for all entries along some axes."""

    def __init__(self, p, axes):
        super().__init__()
        self.p, self.axes = p, axes

    def forward(self, x):
        if not self.training:
            return x
        axes = range(2, x.dim()) if self.axes == "space" else self.axes
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return x * x.new_empty(shape).bernoulli_(1 - self.p) / (1 - self.p)


class Blocks(nn.Module):
    """DropBlock, with blocks that are cut at the borders."""

    def __init__(self, rate, size, gamma_scale=1.0, coupled=True, inplace=False):
        super().__init__()
        self.rate, self.size, self.gamma_scale, self.coupled, self.inplace = rate, size, gamma_scale, coupled, inplace

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        b, c, h, w = x.shape
        gamma = self.gamma_scale * self.rate * h * w / self.size**2 / ((h - self.size + 1) * (w - self.size + 1))
        with torch.no_grad():
            seeds = torch.empty(b, 1 if self.coupled else c, h, w).bernoulli_(gamma).to(x)
            mask = 1 - F.max_pool2d(seeds, self.size, 1, self.size // 2)[..., -h:, -w:]
            mask *= mask.numel() / mask.sum()
        return x.mul_(mask) if self.inplace else x * mask


class Weird(Stable):
    """It drops entries, but twice as many as its number says."""

    def forward(self, x):
        return x if not self.training else x * (torch.rand_like(x) > 2 * self.drop_prob) / (1 - self.drop_prob)


KINDS = {
    "entries": (Stable(0.2), "drop.dropout", {}),
    "channels": (Axes(0.2, "space"), "drop.dropout", {}),
    "examples": (Axes(0.2, (1, 2, 3)), "drop.stochastic_depth", {}),
    "times": (Axes(0.2, (1,)), "drop.locked_dropout", {"axis": 1}),
    "blocks": (Blocks(0.2, 3), "drop.drop_block", {"block_size": 3, "coupled": True, "gamma_scale": 1.0}),
    "even blocks": (
        Blocks(0.2, 4, 0.5, False),
        "drop.drop_block",
        {"block_size": 4, "coupled": False, "gamma_scale": 0.5},
    ),
    "in place": (Blocks(0.2, 3, inplace=True), "drop.drop_block", {"inside": False, "scaled": True}),
}


@pytest.mark.parametrize("name", KINDS)
def test_dropout_of_another_library_is_recognised_by_what_it_does(name):
    module, number, settings = KINDS[name]
    net, x = Around(module), torch.rand(4, 3, 7, 9)
    stn = fxstn.transform(net, example_inputs=x)
    assert stn.hparams.values() == pytest.approx({number: 0.2})
    nodes = [node for node in stn.canonical(True).graph.nodes if node.args[1:2] == (0.2,)]
    assert [{**node.kwargs, **settings} for node in nodes] == [node.kwargs for node in nodes]
    assert len(nodes) == 1
    assert fxstn.verify(net, x).ok


@pytest.mark.parametrize("trace", ["export", "live"])
@pytest.mark.parametrize("name", ["times"])
def test_and_so_it_is_on_every_frontend(name, trace):
    module, number, _ = KINDS[name]
    net, x = Around(module), torch.rand(4, 3, 7, 9)
    assert fxstn.transform(net, example_inputs=x, trace=trace).hparams.values() == pytest.approx({number: 0.2})
    assert fxstn.verify(net, x, trace=trace).ok


def test_what_does_something_else_stays_as_it_is():
    net, x = Around(Weird(0.2)), torch.rand(4, 3, 7, 9)
    stn = fxstn.transform(net, [hp.Dropout("conv")], example_inputs=x)
    rows = [row for row in fxstn.explain(stn, example_inputs=x).rows if row.rule == "fixed noise"]
    assert [(row.module, row.became) for row in rows] == [("drop", "kept as the model draws it, not tuned")]


def test_modules_of_timm_are_tuned():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    for module, number in ((layers.DropPath(0.2), "stochastic_depth"), (layers.DropBlock2d(0.2, 3), "drop_block")):
        net, x = Around(module), torch.rand(4, 3, 7, 9)
        assert fxstn.transform(net, example_inputs=x).hparams.values() == pytest.approx({f"drop.{number}": 0.2})
        assert fxstn.verify(net, x).ok


# LayerDrop


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.drop = nn.Linear(8, 8), nn.Dropout(0.1)

    def forward(self, x, scale=1.0):
        return (x + scale * self.drop(torch.tanh(self.lin(x))), None)


class Encoder(nn.Module):
    """A loop over layers that are skipped at random, as in Hugging Face's encoders.

    skip: whether to skip a layer, at a rate.
    """

    def __init__(self, skip, rate=0.3):
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(3))
        self.dropout, self.config, self.skips = 0.1, SimpleNamespace(layerdrop=rate, num_layers=3), skip

    def forward(self, x):
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            if self.training and self.config.layerdrop > 0 and self.skips(self.config.layerdrop):
                continue
            x = layer(x, scale=0.5)[0]
        return x


SKIPS = {
    "a tensor": lambda rate: torch.rand([]) < rate,
    "of Python": lambda rate: random.random() < rate,
}


def encoding(skip, rate=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Encoder(skip, rate), nn.Linear(8, 3))


@pytest.fixture
def loops():
    """The classes that are recognised in a test are forgotten."""
    yield
    LOOPS.clear()


@pytest.mark.parametrize("skip", SKIPS)
def test_layers_that_are_skipped_at_random_are_tuned(skip, loops):
    net, x = encoding(SKIPS[skip]), torch.randn(5, 6)
    stn = fxstn.transform(net, example_inputs=x)
    expected = {f"1.layers.{i}.layer_drop": 0.3 for i in range(3)}
    expected |= {"1.dropout.dropout": 0.1} | {f"1.layers.{i}.drop.dropout": 0.1 for i in range(3)}
    assert {name: round(value, 5) for name, value in stn.hparams.values().items()} == {
        name.replace("1.dropout.dropout", "1.dropout"): value for name, value in expected.items()
    }
    assert fxstn.verify(net, x).ok
    assert stn.model[1].config.layerdrop == 0.3
    assert all("forward" not in vars(module) for module in stn.model.modules())


@pytest.mark.parametrize("trace", FRONTENDS)
def test_a_layer_is_skipped_by_example_with_the_probability_that_is_tuned(trace, loops):
    x = torch.zeros(4000, 6)
    stn = fxstn.transform(encoding(SKIPS["a tensor"]), trace=trace, example_inputs=x[:4]).train()
    stn.hparams.set(dict.fromkeys(stn.hparams.names, 0.0) | {"1.layers.1.layer_drop": 0.6})
    plain = copy.deepcopy(stn.model).eval()
    with torch.no_grad():
        h = plain[0](x[:1])
        for i in (0, 2):
            h = plain[1].layers[i](h, scale=0.5)[0]
        torch.manual_seed(0)
        share = torch.isclose(stn(x), plain[2](h)).all(1).double().mean()
    assert float(share) == pytest.approx(0.6, abs=0.03)
    assert torch.equal(stn.eval()(x), plain(x))


def test_a_models_own_forward_skips_at_the_strengths_that_are_tuned(loops):
    net, x = encoding(SKIPS["a tensor"]), torch.randn(64, 6)
    network, strengths = conditioned(net, x, None, "live")
    network.hparams.set(dict.fromkeys(network.hparams.names, 0.4))
    strengths.copy_(network.hparams())
    results = []
    for run in (lambda: network.conditioned_output(x)[0], lambda: net(x)):
        torch.manual_seed(1)
        results.append(run().detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not torch.allclose(*results[:1], net.eval()(x))
    assert net[1].config.layerdrop == 0.3
    restore_modules(net)
    assert all("forward" not in vars(module) for module in net.modules())


class Shrinking(Encoder):
    """Its layers change the shape: a skipped one is no layer that adds nothing."""

    def __init__(self, skip):
        super().__init__(skip)
        self.layers = nn.ModuleList(nn.AvgPool1d(2, 1) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            if not (self.training and self.skips(self.config.layerdrop)):
                x = layer(x)
        return x.mean(-1, keepdim=True)


def test_a_forward_that_calls_other_modules_at_random_is_warned_of(loops):
    net, x = (
        nn.Sequential(nn.Linear(6, 8), Shrinking(lambda rate: numpy.random.uniform(0, 1) < rate), nn.Linear(1, 3)),
        torch.randn(5, 6),
    )
    with pytest.warns(
        UserWarning, match=r"the forward calls '1\.layers\.0', .* for some random draws and not for others"
    ):
        stn = fxstn.transform(net, example_inputs=x)
    assert stn.frontend == "live"
    assert not any("layer_drop" in name for name in stn.hparams.names)
    assert LOOPS == {}


def test_loops_of_transformers_are_tuned(loops):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8,
             "decoder_ffn_dim": 8, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 20}  # fmt: skip
    config = library.BartConfig(**sizes, max_position_embeddings=9, encoder_layerdrop=0.2, decoder_layerdrop=0.3)
    net, x = library.BartModel(config).train(), {"input_ids": torch.randint(3, 20, (2, 5))}
    values = fxstn.transform(net, example_inputs=x).hparams.values()
    rates = {name: rate for name, rate in values.items() if "layer_drop" in name}
    assert rates == pytest.approx(
        {"encoder.layers.0.layer_drop": 0.2, "encoder.layers.1.layer_drop": 0.2, "decoder.layers.0.layer_drop": 0.3}
    )


# What is not tuned is told


class PatchDropout(nn.Module):
    """Leaves out tokens, as timm's: the shape of its output depends on the mode."""

    def __init__(self, prob):
        super().__init__()
        self.prob = prob

    def forward(self, x):
        if not self.training or self.prob == 0:
            return x
        order = torch.argsort(torch.randn(x.shape[:2]), dim=1)[:, : max(1, int(x.shape[1] * (1 - self.prob)))]
        return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.patches, self.head = nn.Linear(6, 8), PatchDropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.patches(self.embed(x).tanh()).mean(1))


@pytest.mark.parametrize("trace", ["export", "live"])
def test_tokens_that_are_left_out_stay_so_and_are_told(trace):
    net, x = Tokens(), torch.randn(4, 6, 6)
    stn = fxstn.transform(net, [hp.Dropout("embed")], trace=trace, example_inputs=x).train()
    rows = [row for row in fxstn.explain(stn, example_inputs=x).rows if row.rule == "fixed noise"]
    assert [(row.module, row.became) for row in rows] == [("patches", "kept as the model draws it, not tuned")]
    assert fxstn.verify(net, x, hparams=[hp.Dropout("embed")], trace=trace).ok
    stn.hparams.set({"embed.dropout": 0.0})
    outputs = torch.stack([stn(x) for _ in range(20)])
    halves = stn.model.head(stn.model.embed(x).tanh()).std(1)
    assert (outputs.std(0) > 0.05 * halves).all()  # drawn anew each time
    assert torch.equal(stn.eval()(x), net.eval()(x))


@pytest.mark.parametrize("trace", FRONTENDS)
def test_a_draw_that_has_a_tangent_by_jvp_is_told(trace):
    class Native(nn.Linear):
        def forward(self, x):
            return torch.native_dropout(super().forward(x), 0.2, self.training)[0]

    net, x = nn.Sequential(nn.Linear(6, 8), Native(8, 3)), torch.randn(4, 6)
    stn = fxstn.transform(net, [hp.Dropout("0")], trace=trace, example_inputs=x)
    rows = fxstn.explain(stn, example_inputs=x).rows
    told = [(row.module, row.operation, row.became) for row in rows if row.rule == "fixed noise"]
    assert told == [("1", "torch.native_dropout", "kept as the model draws it, not tuned")]


# Another process, which has tried no module


def forgotten():
    """Nothing that was recognised is known any longer."""
    for kind in RECOGNISED:
        del DECOMPOSITIONS[kind]
        RANDOM.discard(kind)
    RECOGNISED.clear()
    LOOPS.clear()


def skips_by_tensor(rate):
    return torch.rand([]) < rate


@pytest.mark.parametrize("trace", FRONTENDS)
def test_a_network_that_is_loaded_in_another_process_draws_at_its_strengths(trace, loops):
    net, x = nn.Sequential(encoding(skips_by_tensor), DropPath(0.2), nn.Linear(3, 3)), torch.randn(64, 6)
    stn = fxstn.transform(net, trace=trace, example_inputs=x).train()
    stn.hparams.set(dict.fromkeys(stn.hparams.names, 0.5))
    torch.manual_seed(1)
    expected, saved = stn(x), pickle.dumps(stn)
    forgotten()
    loaded = pickle.loads(saved).train()
    torch.manual_seed(1)
    assert torch.equal(loaded(x), expected)
