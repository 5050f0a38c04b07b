"""Where the examples are in every value, and which inputs hold examples at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.tangents import BATCH_FIRST, SHARED
from tests.nets import randomize_response

LENGTH = 5


class Masked(nn.Module):
    """Attention with a mask that all examples share, given as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT + mask, -1) @ v).mean(1)


class Embedded(nn.Module):
    """A table of positions as an input, through a layer that sees no example."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, table):
        return self.out(F.relu(x + self.position(table)).mean(1))


class Paired(nn.Module):
    """Two inputs, both of them batches."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(LENGTH, 2)

    def forward(self, x, y):
        return self.left(x).mean(1) * self.right(y)


def mask() -> torch.Tensor:
    return torch.zeros(LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e9)


CASES = {
    "mask": (Masked(), mask),
    "table": (Embedded(), lambda: torch.randn(LENGTH, 3)),
}


def prepared(net: nn.Module, *inputs: torch.Tensor):
    stn = fxstn.transform(net.double(), [hp.Scalar("a", 0.5, 0, 1)]).eval()
    randomize_response(stn)
    stn.locate_examples(*inputs)
    return stn, {training: dict(stn._graphs.batch_axes[training]) for training in (True, False)}


@pytest.mark.parametrize(("net", "other"), CASES.values(), ids=CASES)
def test_an_input_as_long_as_the_batch_is_not_taken_for_one(net, other):
    """The axes are those of a batch of another size."""
    other = other().double()
    _, axes = prepared(net, torch.randn(LENGTH, LENGTH, 4).double(), other)
    _, expected = prepared(net, torch.randn(LENGTH + 2, LENGTH, 4).double(), other)
    assert axes == expected
    assert BATCH_FIRST in axes[False].values()


def test_a_shared_mask_leaves_rows_what_their_delta_makes_of_all():
    stn, _ = prepared(Masked(), x := torch.randn(LENGTH, LENGTH, 4).double(), m := mask().double())
    assert stn.per_example(x, m)
    delta = torch.randn(LENGTH, 1).double()
    _, rows = stn.pushforward(x, m, delta=delta)
    for i in range(LENGTH):
        torch.testing.assert_close(rows[i], stn.pushforward(x, m, delta=delta[i])[1][i])


def test_two_inputs_that_are_both_batches():
    _, axes = prepared(Paired(), torch.randn(LENGTH, 3, 4).double(), torch.randn(LENGTH, LENGTH).double())
    assert axes[False]["left"] == axes[False]["right"] == BATCH_FIRST


ERRORS = {error.__name__: error for error in (
    RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError, OSError
)}  # fmt: skip


@torch.fx.wrap
def checked(x, error):
    if len(x) != LENGTH:
        raise ERRORS[error](f"the batch has {len(x)} examples")
    return x


class OneSize(nn.Module):
    """Written for one batch size."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 2), error

    def forward(self, x):
        return checked(self.layer(x), self.error)


@pytest.mark.parametrize("error", [error for error in ERRORS if error != "OSError"])
def test_a_model_for_one_batch_size_runs_with_that(error):
    _, axes = prepared(OneSize(error), torch.randn(LENGTH, 4).double())
    assert axes[False]["layer"] == BATCH_FIRST


def test_an_error_that_is_not_about_sizes_is_raised():
    with pytest.raises(OSError, match="the batch has 3 examples"):
        prepared(OneSize("OSError"), torch.randn(LENGTH, 4).double())


class Positions(nn.Module):
    """An embedding of positions, which no example is in."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.out = nn.Embedding(7, 4), nn.Embedding(LENGTH, 4), nn.Linear(4, 2)

    def forward(self, words):
        return self.out(torch.tanh(self.word(words) + self.position(torch.arange(words.shape[1]))))


class Started(nn.Module):
    """A layer of a state that begins with zeros, a row for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(x + self.state(x.new_zeros((x.shape[0], 3)))))


class Typed(nn.Module):
    """An embedding of token types that are all zero, as of a stored row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("types", torch.zeros(1, 9, dtype=torch.long))
        self.word, self.kind, self.out = nn.Embedding(7, 4), nn.Embedding(2, 4), nn.Linear(4, 2)

    def forward(self, words):
        types = self.types[:, : words.shape[1]].expand(words.shape[0], -1)
        return self.out(torch.tanh(self.word(words) + self.kind(types)))


class Classed(nn.Module):
    """A class token before the others, repeated for each example, with the batch along dimension 1 behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.out = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.cat([self.mix(self.token.repeat(x.shape[0], 1, 1)), x], 1).transpose(0, 1)
        return self.out(torch.tanh(self.mix(x)))[0]


EQUAL_ROWS = {
    "state of zeros": (Started(), lambda: torch.randn(4, 4).double()),
    "stored token types": (Typed(), lambda: torch.randint(7, (4, LENGTH))),
    "class token": (Classed(), lambda: torch.randn(4, 3, 4).double()),
}


class Stored(Positions):
    """An embedding of stored position ids, (1, length), of which a network takes as many as it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ids", torch.arange(LENGTH)[None])

    def forward(self, words):
        return self.out(torch.tanh(self.word(words) + self.position(self.ids[:, : words.shape[1]])))


class Biased(nn.Module):
    """Attention with a bias for each distance, from a table or, as in Swin v2, from a small network."""

    def __init__(self, computed: bool, fused: bool) -> None:
        super().__init__()
        self.word, self.qkv, self.out = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 2)
        self.table, self.first, self.second = nn.Embedding(2 * LENGTH, 2), nn.Linear(1, 3), nn.Linear(3, 2)
        self.computed, self.fused = computed, fused

    def forward(self, words):
        x = self.word(words)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        distances = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        if self.computed:
            bias = 4 * torch.sigmoid(self.second(F.gelu(self.first(distances[..., None].to(x)))))
        else:
            bias = self.table(distances + LENGTH)
        bias = bias.permute(2, 0, 1)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        else:
            x = torch.softmax(q @ k.mT + bias, -1) @ v
        return self.out(x.transpose(1, 2).flatten(2))


class Repeated(nn.Module):
    """Keys of positions, mixed among themselves and repeated for each example, whose heads are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.table, self.norm = nn.Embedding(7, 4), nn.Embedding(3, 4), nn.LayerNorm(4)
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, words):
        heads = lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1)  # noqa: E731
        keys = heads(self.key(self.norm(self.table.weight))[None]).repeat(words.shape[0], 1, 1)
        x = torch.bmm(heads(self.query(self.word(words))), keys.mT)
        return self.out(torch.tanh(x.unflatten(0, (-1, 2)).sum(1)))


class Asked(nn.Module):
    """Queries that see each other before they see an example, expanded and batched along dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.mix, self.key, self.out = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x):
        q = F.silu(self.mix(self.asked.weight))
        q = torch.cat([q, torch.softmax(q @ q.T, -1) @ q])[:, None].expand(-1, x.shape[0], -1)
        k, v = self.key(x).transpose(0, 1).chunk(2, -1)
        return (
            self.out(torch.einsum("bqk,kbc->qbc", torch.softmax(torch.einsum("qbc,kbc->bqk", q, k), -1), v))
            .mT.mean(0)
            .T
        )


class Placed(nn.Module):
    """Gains and shifts of a map, from a convolution of coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm, self.layer, self.out = (
            nn.Conv2d(2, 8, 1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(3, 4, 1),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        grid = torch.meshgrid(torch.arange(x.shape[2]).to(x), torch.arange(x.shape[3]).to(x), indexing="ij")
        gain, shift = F.silu(self.norm(self.map(torch.stack(grid)[None]))).chunk(2, 1)
        return self.out(torch.tanh(self.layer(x) * (1 + gain) + shift).mean((2, 3)))


def words() -> torch.Tensor:
    return torch.randint(7, (4, LENGTH))


SHARED_VALUES = {
    "positions": (Positions, words),
    "stored positions": (Stored, words),
    "bias": (lambda: Biased(computed=False, fused=False), words),
    "fused bias": (lambda: Biased(computed=False, fused=True), words),
    "computed bias": (lambda: Biased(computed=True, fused=False), words),
    "repeated keys": (Repeated, words),
    "queries": (Asked, lambda: torch.randn(4, 3, 4).double()),
    "coordinates": (Placed, lambda: torch.randn(4, 3, 4, 4).double()),
}


OTHER_METHODS = [("fused bias", "centered"), ("repeated keys", "stn")]


@pytest.mark.parametrize(("kind", "method"), [*((kind, "delta") for kind in SHARED_VALUES), *OTHER_METHODS])
def test_what_all_examples_share_moves_for_each_by_its_own_perturbation(kind, method):
    torch.manual_seed(0)
    net, inputs = SHARED_VALUES[kind]
    stn = fxstn.transform(net().double(), [hp.Scalar("a", 0.5, 0, 1)], method=method).eval()
    randomize_response(stn)
    x = inputs()
    assert stn.per_example(x)
    assert SHARED in stn._graphs.batch_axes[False].values()
    run = stn.pushforward if method == "delta" else stn.perturbed_output
    which, delta = (1 if method == "delta" else 0), torch.randn(len(x), 1).double()
    rows = run(x, delta=delta)[which]
    alone = [run(x, delta=row)[which][i] for i, row in enumerate(delta)]
    torch.testing.assert_close(rows, torch.stack(alone))
    weight = torch.randn_like(rows)
    torch.testing.assert_close(
        torch.autograd.grad((rows * weight).sum(), stn.response.flat_U),
        torch.autograd.grad((torch.stack(alone) * weight).sum(), stn.response.flat_U),
    )


class Standardised(nn.Module):
    """A bias of positions before a batch norm, which joins the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift, self.out = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, x):
        gain = self.shift(torch.ones(1).to(x))
        return self.out(F.batch_norm(self.layer(x), None, None, gain, None, True))


def test_what_cannot_be_one_for_each_example_is_refused_with_the_reason():
    stn = fxstn.transform(Standardised().double(), [hp.Scalar("a", 0.5, 0, 1)], response="structured")
    x = torch.randn(4, 4).double()
    with pytest.warns(UserWarning, match="refused at module 'shift', where"):
        assert not stn.per_example(x)
    with pytest.raises(ValueError, match=r"module 'shift', where F\.batch_norm joins the examples"):
        stn.pushforward(x, delta=torch.randn(4, 1).double())


def assert_rows_are_their_own(stn: nn.Module, *inputs: torch.Tensor) -> None:
    """Row i of dy is what delta_i makes of all examples."""
    assert stn.per_example(*inputs)
    delta = torch.randn(len(inputs[0]), 1).double()
    _, rows = stn.pushforward(*inputs, delta=delta)
    assert rows.abs().sum() > 0
    for i, row in enumerate(rows):
        torch.testing.assert_close(row, stn.pushforward(*inputs, delta=delta[i])[1][i])


@pytest.mark.parametrize(("net", "inputs"), EQUAL_ROWS.values(), ids=EQUAL_ROWS)
def test_rows_that_are_the_same_for_all_examples_have_an_example_each(net, inputs):
    stn, _ = prepared(net, x := inputs())
    assert_rows_are_their_own(stn, x)


class Numbered(Positions):
    """Position ids as an input, one row for all."""

    def forward(self, words, ids):
        return self.out(torch.tanh(self.word(words) + self.position(ids)))


def test_a_first_batch_of_one_example_does_not_say_which_inputs_are_batches():
    stn = fxstn.transform(Numbered().double(), [hp.Scalar("a", 0.5, 0, 1)]).eval()
    randomize_response(stn)
    ids = torch.arange(LENGTH)[None]
    stn.pushforward(torch.randint(7, (1, LENGTH)), ids, delta=torch.randn(1, 1).double())
    assert_rows_are_their_own(stn, torch.randint(7, (4, LENGTH)), ids)
