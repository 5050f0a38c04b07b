"""What a forward may return: objects of any type keep it, and what nothing can look into is refused by name."""

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.containers import leaves, mapped
from fxstn.ir.generators import forked_rng


class Net(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.a, self.dropout, self.b, self.output = nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 4), output

    def forward(self, x):
        return self.output(self.b(self.dropout(self.a(x))))


class Ordered(OrderedDict):
    """A dict that is made from one argument."""

    def __init__(self, logits):
        super().__init__(logits=logits)


class Attributes(dict):
    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__ = self


class Mirrored(OrderedDict):
    """As the outputs of transformers: every entry is an attribute too."""

    def __init__(self, **entries):
        super().__init__(**entries)
        vars(self).update(entries)


class Sequence(list):
    pass


class Pair(tuple):
    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


class Named(NamedTuple):
    logits: torch.Tensor
    extra: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    name: str = "four"


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


class Plain:
    def __init__(self, h):
        self.logits, self.inner = h, SimpleNamespace(double=2 * h)


class OwnSlots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


KINDS = {
    "ordered": (lambda h: Ordered(h), lambda o: o["logits"]),
    "attributes": (lambda h: Attributes(logits=h), lambda o: o.logits),
    "mirrored": (lambda h: Mirrored(logits=h, more=h + 1), lambda o: o.logits),
    "default": (lambda h: defaultdict(list, logits=h), lambda o: o["logits"]),
    "counter": (lambda h: Counter(logits=h), lambda o: o["logits"]),
    "list": (lambda h: Sequence([h]), lambda o: o[0]),
    "tuple": (lambda h: Pair(h, "name"), lambda o: o[0]),
    "named in a dict": (lambda h: {"a": Named(h, (h, None))}, lambda o: o["a"].logits),
    "dataclass in a list": (lambda h: [Frozen(h), Slotted(h)], lambda o: o[1].logits),
    "namespace": (lambda h: SimpleNamespace(logits=h), lambda o: o.logits),
    "plain": (Plain, lambda o: o.inner.double),
    "slots": (OwnSlots, lambda o: o.logits),
    "mixed": (lambda h: (h.detach(), Plain(h)), lambda o: o[1].logits),
    "deque": (lambda h: deque([h]), lambda o: o[0]),
    "results": (lambda h: h.topk(2), lambda o: o.values),
    "results in a dict": (lambda h: {"top": h.max(1), "h": h}, lambda o: o["top"].values[:, None]),
    "several": (lambda h: {"parts": h.chunk(2, 1)}, lambda o: o["parts"][1]),
    "some of several": (lambda h: h.split(1, 1)[1:3], lambda o: o[0]),
}


def types_in(output):
    """The types of an output and of everything in it."""
    children = []
    if isinstance(output, dict):
        children = list(output.values())
    elif isinstance(output, (tuple, list, deque)):
        children = list(output)
    elif not isinstance(output, torch.Tensor):
        children = list(getattr(output, "__dict__", {}).values())
    return type(output), [types_in(child) for child in children]


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_output_keeps_its_type_and_its_tangent(kind, trace):
    output, logits = KINDS[kind]
    torch.manual_seed(0)
    net, x, delta = Net(output).double(), torch.randn(5, 6).double(), torch.ones(1).double()
    with torch.no_grad():
        stn = fxstn.transform(net, [hp.Dropout("dropout")], example_inputs=x, trace=trace).eval()
        for parameter in stn.response_parameters():
            parameter.normal_(0, 0.3)
    (y, dy), tuned = stn.pushforward(x, delta=delta), stn.perturbed_output(x, delta=delta, training=True)[0]
    moved = torch.func.functional_call(net.eval(), stn.best_response(1e-6 * delta), (x,))
    expected = (logits(moved) - logits(net(x))) / 1e-6
    torch.testing.assert_close(logits(dy), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(y), logits(net(x)))
    assert types_in(y) == types_in(tuned) == types_in(stn(x)) == types_in(net(x))
    assert type(dy) is type(y)
    with forked_rng():
        loss = fxstn.response_loss(stn.train(), lambda o, _: logits(o).square().mean(), x, torch.zeros(5))
    gradients = torch.autograd.grad(loss, list(stn.response_parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_verify_compares_what_is_inside_of_any_object():
    x = torch.randn(5, 6)
    for output in (Plain, lambda h: Mirrored(logits=h), lambda h: (h, Sequence([h * 2])), lambda h: Frozen(h)):
        assert fxstn.verify(Net(output), x).ok
    with pytest.raises(ValueError, match=r"returns int64 \(5,\).*, without a float tensor .*; let the forward return"):
        fxstn.verify(Net(lambda h: h.argmax(1)), x)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda h: {"parts": [h, {h}]}, r"inside a set, at output\.parts\.1, .*; return them in tuples"),
        (lambda h: (h, lambda: h), r"inside a function, at output\.1"),
        (lambda h: type("Deque", (deque,), {})([h]), r"inside a Deque, at output"),
    ],
)
def test_a_tensor_where_nothing_can_look_is_refused_at_transform_by_every_frontend(output, message):
    with pytest.raises(fxstn.TransformError, match=message) as caught:
        fxstn.transform(Net(output), example_inputs=torch.randn(5, 6))
    assert [problem.frontend for problem in caught.value.problems] == ["fx", "export", "live"]
    assert all(problem.what.startswith("the forward returns tensors inside a ") for problem in caught.value.problems)


def test_a_distribution_keeps_its_type():
    x, delta = torch.randn(5, 6), torch.ones(1)
    stn = fxstn.transform(Net(lambda h: torch.distributions.Normal(h, h.exp())), example_inputs=x, trace="live").eval()
    y, dy = stn.pushforward(x, delta=delta)
    assert (type(y), type(dy)) == (torch.distributions.Normal, torch.distributions.Normal)
    torch.testing.assert_close(dy.scale, y.scale * dy.loc)


def test_a_set_of_constants_is_no_reason_to_refuse():
    stn = fxstn.transform(Net(lambda h: (h, {h.detach()})), example_inputs=torch.randn(5, 6), trace="live")
    assert stn.frontend == "live"


def test_a_graph_perturbs_each_example_of_a_model_that_returns_its_own_dict():
    x = torch.randn(5, 6)
    stn = fxstn.transform(Net(lambda h: Attributes(logits=h)), example_inputs=x)
    assert (stn.frontend, stn.per_example(x)) == ("fx", True)
    F.cross_entropy(stn(x).logits, torch.arange(5) % 4).backward()


Point = namedtuple("Point", "x y")


def test_mapped_makes_objects_anew_and_leaves_the_originals_alone():
    one, two = torch.ones(1), torch.zeros(1)
    original = Plain(one)
    original.me, original.point, original.config = original, Point(two, 3), Frozen(None)
    result = mapped(lambda leaf: leaf + 5 if isinstance(leaf, torch.Tensor) else leaf, original)
    assert result is not original
    assert result.me is result
    assert result.config is original.config
    assert (result.logits.item(), result.inner.double.item(), result.point) == (6, 7, Point(torch.tensor([5.0]), 3))
    assert (original.logits, original.point.x) == (one, two)
    mirrored = mapped(lambda leaf: leaf + 1, Mirrored(a=one, b=one))
    assert mirrored["a"] is mirrored.a
    assert mirrored["b"] is mirrored.b
    assert mirrored.a is not mirrored.b
    assert len(leaves(Mirrored(a=one, b=one))) == 2
    attributes = mapped(lambda leaf: leaf, Attributes(a=one))
    attributes.b = 2
    assert attributes == {"a": one, "b": 2}
