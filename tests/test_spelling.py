"""One canonical function per operation, however it is spelled; the value is that of the original spelling."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fxstn
from fxstn import hp
from fxstn.ir.spelling import Spelled, Unspellable, respell

Tensor, aten = torch.Tensor, torch.ops.aten


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) + 0.3


def compute(value):
    """What a Spelled computes, those inside it first."""
    if isinstance(value, Spelled):
        return value.function(*map(compute, value.args), **{k: compute(v) for k, v in value.kwargs.items()})
    return value


X, Y, W, V, IMAGE = draw(3, 4), draw(3, 4), draw(5, 4), draw(4), draw(2, 4, 6, 6)
MASK, INDEX = X > 0.7, torch.tensor([2, 0])
KERNEL = draw(6, 4, 3, 3)

SPELLINGS = {
    operator.add: [
        ("add", X, Y), (torch.add, X, Y), (Tensor.add, X, 2), (Tensor.__add__, X, Y), (Tensor.__radd__, X, Y),
        (aten.add.Tensor, X, Y), (aten.add.Scalar, X, 2), (torch.addmm, V, X, draw(4, 4)),
        (aten.baddbmm.default, draw(2, 3, 3), draw(2, 3, 4), draw(2, 4, 3)), (torch.addmv, draw(5), W, V),
        (torch.addbmm, draw(3, 3), draw(2, 3, 4), draw(2, 4, 3)), (torch.addr, draw(4, 4), V, V),
    ],
    operator.sub: [(Tensor.__rsub__, X, 2), (torch.rsub, X, Y), (aten.rsub.Scalar, X, 2, 3), ("subtract", X, Y)],
    operator.truediv: [("div", X, Y), (Tensor.__rdiv__, X, 2), (aten.div.Tensor, X, Y), (torch.true_divide, X, 2)],
    operator.pow: [(Tensor.__rpow__, X, 2), ("pow", X, 2), (Tensor.pow, X, 2), (aten.pow.Tensor_Scalar, X, 2)],
    operator.floordiv: [("floor_divide", X, 2), (Tensor.__rfloordiv__, X, 2), (aten.floor_divide.default, X, Y)],
    operator.matmul: [("matmul", X, W.T), (torch.matmul, X, W.T), (aten.matmul.default, X, W.T),
                      (torch.linalg.multi_dot, [X, W.T, W])],
    operator.gt: [("gt", X, 0.5), (torch.gt, X, Y), (Tensor.__gt__, X, Y), (aten.gt.Scalar, X, 0.5)],
    operator.eq: [("eq", X, Y), (Tensor.__eq__, X, Y), (aten.eq.Tensor, X, Y)],
    operator.and_: [(Tensor.__and__, MASK, MASK), (torch.bitwise_and, MASK, MASK), (aten.__and__.Tensor, MASK, MASK)],
    operator.invert: [(Tensor.__invert__, MASK), ("bitwise_not", MASK), (aten.bitwise_not.default, MASK)],
    operator.neg: [("neg", X), (torch.negative, X), (aten.neg.default, X)],
    operator.getitem: [
        (Tensor.__getitem__, X, (slice(None), 1)), (aten.slice.Tensor, X, 1, 1, 3), (aten.slice.Tensor, X, 0, 0, 2**63 - 1),
        (aten.slice.Tensor, X, -2, 0, 2), (aten.index.Tensor, X, [None, INDEX]), (aten.index.Tensor, X, [INDEX]),
    ],
    torch.remainder: [(operator.mod, X, 0.4), (Tensor.__rmod__, X, 2), (aten.remainder.Scalar, X, 0.4)],
    F.relu: [("relu", X), (torch.relu, X), (aten.relu.default, X)],
    F.silu: [(aten.silu.default, X), (torch._C._nn.silu, X)],
    F.mse_loss: [(aten.mse_loss.default, X, Y), (aten.mse_loss.default, X, Y, 2), (F.mse_loss, X, Y)],
    F.cross_entropy: [(aten.cross_entropy_loss.default, X, Y, V, 0, -100, 0.1)],
    F.nll_loss: [(aten.nll_loss_nd.default, X, torch.tensor([0, 2, 1]), V, 2, 1)],
    F.kl_div: [(aten.kl_div.default, X, Y, 0)],
    F.margin_ranking_loss: [(aten.margin_ranking_loss.default, X, Y, X.sign(), 0.5, 2)],
    torch.broadcast_tensors: [(aten.broadcast_tensors.default, [X, V])],
    F.gelu: [(F.gelu, X), (aten.gelu.default, X), (torch._C._nn.gelu, X)],
    F.elu: [(aten.elu.default, X, 0.7), (F.elu, X, 0.7)],
    F.hardtanh: [(aten.hardtanh.default, X, 0.4, 0.8), (torch._C._nn.hardtanh, X, 0.4, 0.8)],
    F.leaky_relu: [(aten.leaky_relu.default, X, 0.2)],
    F.logsigmoid: [(aten.log_sigmoid.default, X), (F.logsigmoid, X)],
    F.glu: [(aten.glu.default, X, 1)],
    torch.abs: [("absolute", X), (Tensor.__abs__, X), (aten.abs.default, X)],
    torch.sigmoid: [(F.sigmoid, X), (torch.special.expit, X), (aten.sigmoid.default, X)],
    torch.softmax: [(F.softmax, X, 1), ("softmax", X, -1), (torch.softmax, X, 1), (aten.softmax.int, X, 1)],
    torch.log_softmax: [(F.log_softmax, X, 1), (aten.log_softmax.int, X, 1), (torch.special.log_softmax, X, 1)],
    torch.clamp: [("clip", X, 0.4, 0.6), ("clamp_min", X, 0.5), (aten.clamp_max.default, X, 0.5), (torch.clamp_min, X, 0.5)],
    torch.linalg.vector_norm: [
        ("norm", X), (torch.norm, X), (Tensor.norm, X, 2, -1), (Tensor.norm, X, 1, (0, 1)), (torch.norm, X, float("inf")),
        (aten.linalg_vector_norm.default, X, 2.0, [-1], True),
    ],
    torch.cat: [(torch.concat, [X, Y], 1), (aten.cat.default, [X, Y], 1)],
    torch.stack: [(aten.stack.default, [X, Y], 1)],
    torch.split: [("split", X, 2, 1), (aten.split.Tensor, X, 2, 1), (aten.split_with_sizes.default, X, [1, 3], 1)],
    torch.einsum: [
        (torch.einsum, X, [0, 1], W, [2, 1], [0, 2]), (torch.einsum, X, [..., 1], V, [1]), (torch.einsum, "ij,kj->ik", X, W),
        (torch.einsum, "ij,kj->ik", [X, W]), (aten.einsum.default, "ij,kj->ik", [X, W]),
    ],
    torch.reshape: [("reshape", X, 2, 6), (Tensor.reshape, X, (2, 6)), (aten.reshape.default, X, [2, 6])],
    torch.permute: [("permute", X, 1, 0), (torch.permute, X, (1, 0)), (aten.permute.default, X, [1, 0])],
    Tensor.view: [("view", X.sum(), ()), (aten.view.default, X.sum(), []),
                  ("view", X, 2, 6), ("view", X, (2, 6)), (aten.view.default, X, [2, 6])],
    Tensor.expand: [("expand", draw(3, 1), 3, 5), (aten.expand.default, draw(3, 1), [3, 5]), ("expand", X.sum(), ()),
                    (aten.expand.default, X.sum(), [])],
    Tensor.repeat: [("repeat", X, 1, 2), (aten.repeat.default, X, [1, 2]), ("repeat", X.sum(), ())],
    Tensor.to: [("to", X, torch.float32), (aten.to.dtype, X, torch.float32), (aten._to_copy.default, X),
                (aten.to.device, X, torch.device("cpu"), torch.float32)],
    Tensor.float: [("float", X)],
    Tensor.size: [("size", X, 1), (aten.sym_size.int, X, 1), (Tensor.size, X), (Tensor.__len__, X)],
    getattr: [(Tensor.shape.__get__, X), (Tensor.T.__get__, X), (Tensor.device.__get__, X), (aten.numpy_T.default, X)],
    torch.detach: [(Tensor.data.__get__, X), ("detach", X), (aten.detach.default, X)],
    torch.clone: [(aten.alias.default, X), (aten.lift_fresh_copy.default, X), ("clone", X)],
    torch.flatten: [("flatten", IMAGE, 1), (aten.flatten.using_ints, IMAGE, 1)],
    torch.transpose: [("transpose", X, 0, 1), (aten.transpose.int, X, 0, 1)],
    torch.select: [(aten.select.int, X, 1, 2), ("select", X, 1, 2)],
    torch.where: [("where", X, MASK, Y), (torch.where, MASK, X, Y), (aten.where.self, MASK, X, Y)],
    torch.masked_fill: [("masked_fill", X, MASK, 0.0), (aten.masked_fill.Scalar, X, MASK, 0.0)],
    torch.mean: [("mean", X, 1), (aten.mean.dim, X, [1]), (aten.mean.default, X)],
    torch.var: [("var", X, 1), (aten.var.correction, X, [1]), (aten.var.dim, X, [1])],
    torch.max: [("max", X), (aten.max.dim, X, 1)],
    torch.arange: [(aten.arange.default, 4), (aten.arange.start, 1, 4)],
    F.linear: [(F.linear, X, W), (aten.linear.default, X, W, None), (torch._C._nn.linear, X, W)],
    torch.conv2d: [(F.conv2d, IMAGE, KERNEL), (aten.conv2d.default, IMAGE, KERNEL, None, [2, 2], [1, 1]),
                   (aten.conv2d.padding, IMAGE, KERNEL, None, [1, 1], "same")],
    F.batch_norm: [
        (torch.batch_norm, X, V, V, V, V, False, 0.1, 1e-5, True), (F.batch_norm, X, V, V),
        (aten.batch_norm.default, X, V, V, None, None, True, 0.1, 1e-5, False),
    ],
    F.instance_norm: [(aten.instance_norm.default, IMAGE, V, V, None, None, True, 0.1, 1e-5, True)],
    F.layer_norm: [(torch.layer_norm, X, (4,), V, V), (aten.layer_norm.default, X, [4], V, V, 1e-5, False)],
    F.group_norm: [(torch.group_norm, IMAGE, 2, V, V), (aten.group_norm.default, IMAGE, 2, V, V, 1e-5, False)],
    F.embedding: [(torch.embedding, W, INDEX), (aten.embedding.default, W, INDEX, 1), (F.embedding, INDEX, W)],
    F.dropout: [(torch.dropout, X, 0.3, False), (aten.dropout.default, X, 0.3, False), (F.dropout, X, 0.3, False, False)],
    F.max_pool2d: [(aten.max_pool2d.default, IMAGE, [2, 2]), (torch.max_pool2d, IMAGE, 2), (F.max_pool2d, IMAGE, 2),
                   (aten.max_pool2d_with_indices.default, IMAGE, [2, 2]), (F.max_pool2d_with_indices, IMAGE, 2)],
    F.adaptive_max_pool2d: [(aten.adaptive_max_pool2d.default, IMAGE, [2, 2]), (F.adaptive_max_pool2d, IMAGE, 2)],
    F.adaptive_avg_pool2d: [(aten.adaptive_avg_pool2d.default, IMAGE, [2, 2])],
    F.avg_pool2d: [(aten.avg_pool2d.default, IMAGE, [2, 2])],
    F.pad: [(aten.pad.default, X, [1, 1]), (aten.constant_pad_nd.default, X, [1, 1], 2.0),
            (aten.reflection_pad2d.default, IMAGE, [1, 1, 1, 1])],
    F.interpolate: [
        (aten.upsample_nearest2d.vec, IMAGE, None, [2.0, 2.0]), (aten.upsample_bilinear2d.vec, IMAGE, [3, 9], False, None),
        (aten._upsample_bilinear2d_aa.vec, IMAGE, [3, 3], True, None),
        (aten._upsample_nearest_exact2d.vec, IMAGE, [3, 9], None),
        (aten.upsample_bicubic2d.vec, IMAGE, None, True, [2.0, 2.0]),
    ],
    F.scaled_dot_product_attention: [(aten.scaled_dot_product_attention.default, IMAGE, IMAGE, IMAGE, None, 0.0, True)],
    torch.bernoulli: [("bernoulli", MASK.double())],
    F.grid_sample: [(torch.grid_sampler, IMAGE, draw(2, 3, 3, 2), 0, 1, False)],
    F.affine_grid: [(torch.affine_grid_generator, draw(2, 2, 3), [2, 4, 3, 3], True)],
    torch.asin: [("arcsin", X - 0.3), (torch.arcsin, X - 0.3)],
    torch.erf: [(torch.special.erf, X)],
    torch.polygamma: [("polygamma", X, 1), (Tensor.polygamma, X, 1), (torch.polygamma, 1, X), (aten.polygamma.default, 1, X)],
    torch.movedim: [("moveaxis", X, 0, 1)],
    torch.atleast_2d: [(torch.atleast_2d, V), (aten.atleast_2d.default, V), (aten.atleast_2d.Sequence, [V, X])],
    torch.cdist: [(torch.cdist, X, W, 1.0), (aten.cdist.default, X, W), (aten.cdist.default, X, W, 2.0, None),
                  (aten.cdist.default, X, W, 2.0, 1), (aten.cdist.default, X, W, 3.0, 2)],
    torch.lstm: [(aten.lstm.input, draw(2, 3, 4), [draw(1, 2, 5)] * 2, [draw(20, 4), draw(20, 5)], False, 1, 0.0, False,
                  False, True)],
}  # fmt: skip
CASES = [(function, *case) for function, cases in SPELLINGS.items() for case in cases]
NAMES = [
    f"{i}-{getattr(case[0], '__name__', case[0])}-{getattr(case[1], '__name__', case[1])}"
    for i, case in enumerate(CASES)
]


def original(target, args, kwargs):
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def same(a, b):
    leaves = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    assert leaves
    for x, y in leaves:
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
        else:
            assert x == y


def check(target, args, kwargs=None):
    """The spelling computes what the original does, and is its own spelling."""
    spelled = respell(target, args, kwargs or {})
    assert not spelled.in_place
    same(compute(spelled), original(target, args, kwargs or {}))
    again = respell(spelled.function, spelled.args, spelled.kwargs)
    assert (again.function, len(again.args), set(again.kwargs)) == (
        spelled.function, len(spelled.args), set(spelled.kwargs)
    )  # fmt: skip
    return spelled


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_spelling_becomes_its_canonical_function_with_the_same_value(case):
    function, target, *args = case
    assert check(target, tuple(args)).function == function


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "arguments", "left"),
    [
        ("flatten", (IMAGE,), {"start_dim": 1}, (IMAGE, 1), {}),
        ("transpose", (X,), {"dim0": 0, "dim1": 1}, (X, 0, 1), {}),
        (torch.matmul, (X,), {"other": W.T}, (X, W.T), {}),
        (torch.bmm, (), {"input": draw(2, 3, 4), "mat2": draw(2, 4, 3)}, (draw(2, 3, 4), draw(2, 4, 3)), {}),
        (torch.where, (MASK,), {"input": X, "other": Y}, (MASK, X, Y), {}),
        (torch.mean, (X,), {"keepdim": True, "dim": 1}, (X, 1, True), {}),
        ("sum", (X,), {"axis": 1}, (X, 1), {}),
        (F.pad, (X, (1, 1)), {"value": 3.0}, (X, (1, 1)), {"value": 3.0}),
        (F.normalize, (), {"input": X, "dim": 1}, (X,), {"dim": 1}),
        *(
            (
                f,
                (X, "sum"),
                {"lengths": torch.tensor([1, 2]), "axis": 0},
                (X, "sum"),
                {"lengths": torch.tensor([1, 2]), "axis": 0},
            )
            for f in (torch.segment_reduce, aten.segment_reduce.default)
        ),
    ],
)
def test_keywords_go_where_torchs_signature_has_them(target, args, kwargs, arguments, left):
    spelled = check(target, args, kwargs)
    same(spelled.args, arguments)
    same(spelled.kwargs, left) if left else None
    assert set(spelled.kwargs) == set(left)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("add_", (X, Y), {"alpha": 2}), (Tensor.mul_, (X, Y), {}), (operator.iadd, (X, Y), {}), (torch.relu_, (X,), {}),
        (Tensor.__iadd__, (X, Y), {}), (Tensor.__itruediv__, (X, 2), {}), (operator.imod, (X, 0.4), {}),
        (aten.add_.Tensor, (X, Y), {"alpha": 2}), (aten.hardtanh_.default, (X, 0.4, 0.6), {}),
        ("masked_fill_", (X, MASK, 0), {}),
        (F.relu, (X,), {"inplace": True}), (F.leaky_relu, (X, 0.1, True), {}), ("clamp_min_", (X, 0.5), {}),
        (F.hardtanh, (X, 0.4, 0.6, True), {}), ("zero_", (X,), {}), ("fill_", (X, 2.0), {}), ("copy_", (X, V), {}),
        (aten.copy_.default, (X.float(), V), {}), ("pow_", (X, 2), {}), ("index_put_", (X, (INDEX,), V), {}),
        (operator.setitem, (X, (slice(None), 0), 1.0), {}), (Tensor.__setitem__, (X, MASK, 1.0), {}),
        (aten.fill_.Tensor, (X, torch.tensor(2.0)), {}),
        ("detach_", (X,), {}), (aten.detach_.default, (X,), {}),
        ("bernoulli_", (X,), {}), (aten.bernoulli_.float, (X, 0.2), {}), ("bernoulli_", (X, V / 2), {}),
        ("polygamma_", (X, 1), {}), (aten.polygamma_.default, (X, 1), {}), (Tensor.polygamma_, (X, 2), {}),
        ("addcmul_", (X, X, Y), {"value": 2}), ("squeeze_", (X[:1], 0), {}),
    ],
)  # fmt: skip
def test_an_operation_in_place_is_its_counterpart_by_values(target, args, kwargs):
    spelled = respell(target, args, kwargs)
    assert spelled.in_place
    torch.manual_seed(0)
    value = compute(spelled)
    torch.manual_seed(0)
    mutated = args[0].clone()
    original(target, (mutated, *args[1:]), kwargs)
    same(value, mutated)


@pytest.mark.parametrize("name", ["and_", "or_", "not_", "is_", "is_not", "invert", "index"])
def test_an_operator_works_in_place_only_where_python_says_so(name):
    """Python's keywords give some operators an underscore at the end, which in torch means in place."""
    function = getattr(operator, name)
    spelled = respell(function, (MASK, MASK) if name in ("and_", "or_", "is_", "is_not") else (MASK,), {})
    assert spelled.function is function
    assert not spelled.in_place


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_masks_that_are_joined_stay_as_they_are(trace):
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            positive = y > 0
            both, either = positive & (x > 0), positive | (x > 0)
            return y * positive, y * both, y * either

    net, x = Masks(), torch.randn(5, 4)
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1)], example_inputs=x, trace=trace)
    same(stn(x), net(x))


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("normal_", (X,), {}), ("uniform_", (X,), {}),
        (Tensor.exponential_, (X,), {}), (torch.exp, (X,), {"out": Y}), (Tensor.data.__set__, (X, Y), {}),
        (aten.uniform_.default, (X,), {}), ("requires_grad_", (X,), {}),
    ],
)  # fmt: skip
def test_a_mutation_without_a_counterpart_is_refused(target, args, kwargs):
    with pytest.raises(Unspellable, match=r"changes a tensor in place|writes into a tensor"):
        respell(target, args, kwargs)


@pytest.mark.parametrize("target", [len, F.mse_loss, aten.upsample_nearest1d_backward.default, torch.meshgrid, check])
def test_what_has_one_spelling_or_no_counterpart_stays(target):
    assert respell(target, (X,), {}).function is target


def test_what_a_function_mode_sees_computes_the_same():
    class Respelled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            spelled = respell(function, args, kwargs or {})
            assert not isinstance(spelled.function, str)
            return compute(spelled)

    def forward(x):
        y = F.relu(2 - x / 3 + x @ x.T[:, :3].mT) ** 2
        y = F.layer_norm(torch.cat([y, 1 / x], 1), (6,))
        y = F.max_pool1d(y[None], 2)[0].softmax(-1).view(x.shape[0], -1)
        return torch.where(y > 0.2, y.norm(dim=1, keepdim=True), torch.einsum("ij->ji", y).t())

    x, seen = draw(3, 3), []
    expected = forward(x)
    with Respelled():
        found = forward(x)
    assert len(seen) > 15
    assert torch.equal(found, expected)
