"""The test table: one line per rule. tests/test_rules.py checks every line in the same way."""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch.utils._pytree import tree_leaves, tree_map

from fxstn.ir.assignment import assigned, overwritten
from fxstn.ir.grouped import grouped_product
from fxstn.ops.attention import attention_scores, attention_values
from fxstn.ops.geometry import resample
from fxstn.ops.heads import (
    join_heads,
    join_windows,
    joint_mask,
    mask_windows,
    split_heads,
    split_windows,
)
from fxstn.ops.recurrent import from_time_major, joined_states, recurrent_layer, state_of, time_major, zero_state
from fxstn.ops.synced import synced_batch_norm

Tensor = torch.Tensor
SPECIAL = ("zeros", "rows", "ties", "infinite")  # points of `special_points` in tests/test_rules.py
X = object()  # stands in Case.args and Case.kwargs where a drawn tensor goes


@dataclass(frozen=True)
class Case:
    """function(*args, **kwargs), each X in them replaced by the next tensor of the given shapes.

    Tensors without an X of their own come first. domain: interval that entries are drawn from, kinks excluded by
    distance. varying: positions among the tensors of those that get a tangent; None for all. away: points at which the
    function has a kink. integer: round the entries. imaginary: draw complex entries. forward: whether torch has a
    forward-mode derivative to compare with (a test checks that it has none where this is False). backward: the same of
    reverse mode. twice: the same of the tangent's own derivative in the primal values. without: names of
    special points left out (infinities end the process in grid_sample). hermitian: tangents are matrices equal to
    their conjugate transposes, as torch's derivatives take them.
    """

    function: Any
    shapes: tuple = ((3, 4),)
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    domain: tuple[float, float] = (-2.0, 2.0)
    varying: tuple[int, ...] | None = None
    away: tuple[float, ...] = ()
    integer: bool = False
    imaginary: bool = False
    forward: bool = True
    backward: bool = True
    twice: bool = True
    without: tuple[str, ...] = ()
    hermitian: bool = False

    def possible(self, direction: Tensor) -> Tensor:
        """A direction that a case may move along."""
        return (direction + direction.mH) / 2 if self.hermitian else direction

    def placed(self, values: list, rest: Any = None) -> tuple[tuple, dict]:
        """(args, kwargs) with `values` where the tensors go and what else there is, or `rest` of it, in its place."""
        remaining = iter(values)
        leading = len(self.shapes) - sum(leaf is X for leaf in tree_leaves((self.args, self.kwargs)))
        structure = ((*[X] * leading, *self.args), self.kwargs)
        return tree_map(lambda leaf: next(remaining) if leaf is X else rest(leaf) if rest else leaf, structure)


def derivatives(function: Any) -> dict[str, bool]:
    """`forward` and `backward` of a case, where they depend on torch's version."""
    x = torch.ones(2, 2)
    pull_back = torch.func.vjp(function, x)[1]
    modes = {"forward": lambda: torch.func.jvp(function, (x,), (x,)), "backward": lambda: pull_back(function(x))}
    found = dict.fromkeys(modes, False)
    for mode, derive in modes.items():
        with suppress(RuntimeError):
            derive()
            found[mode] = True
    return found


SEQUENCE = ((2, 3, 8),)
IMAGE = ((2, 3, 6, 6),)
VOLUME = ((2, 3, 4, 4, 4),)
MATRIX = ((3, 4),)
POSITIVE = (0.3, 2.0)
PAIR = ((3, 4), (3, 4))
BROADCAST = ((3, 4), (4,))
NARROW = (-0.9, 0.9)
ALIGNED = {"align_corners": False}
QKV = ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 2))
GROUPED = ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 2))
LSTM = ((16, 3), (16,), (16, 4), (16,))
WINDOW = torch.hann_window(16, dtype=torch.float64)
MOMENTS = (torch.var, torch.std, torch.var_mean, torch.std_mean)
INDEX = torch.tensor([2, 0, 3])
PICKED = torch.tensor([[0, 2], [1, 3], [3, 0]])
CLASSES = torch.tensor([1, 3, 0])
MASK = torch.tensor([[True, False, False, True], [False, True, False, False], [True, True, True, True]])
KEPT = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])  # the second query sees nothing
BOXES = torch.tensor([[0, 0.6, 0.4, 4.1, 3.3], [0, 1.2, 1.1, 5.2, 4.6], [1, 0.3, 2.1, 3.9, 5.4]], dtype=torch.float64)

LABELS = torch.tensor([[1, 2], [3, 1], [2, 2]])
PARTS = torch.tensor([1, 2])
SPANS = torch.tensor([[1, 2], [2, 1]])
GRAPH = torch.tensor([[0, 1.5, 0], [0.5, 0, 2.0], [3.0, 0, 1.0]], dtype=torch.float64).to_sparse().coalesce()
GRID_SAMPLE = derivatives(lambda x: F.grid_sample(x[None, None], torch.zeros(1, 1, 1, 2), align_corners=False))[
    "forward"
]
CTC = {"forward": False, "backward": False, "twice": False}  # torch's backward is that of a softmax and the loss
SPARSE = {"forward": False}
TURNED = torch.tensor([[[0.9, 0.3, 0.7], [-0.2, 1.1, -0.4]], [[1.0, 0, 0], [0, 1.0, 0]]], dtype=torch.float64)
# whether an infinite power makes lp_pool a maximum; in torch 2.9 it makes it 1
INFINITE_POWER = F.lp_pool2d(torch.full((1, 1, 2, 2), 0.5), float("inf"), 2).item() == 0.5

CASES = [
    # singular matrices are a test of their own: torch's gradient of their determinant is 0, or perturbed
    *(Case(f, shapes=((2, 3, 3),), domain=POSITIVE, without=SPECIAL) for f in (torch.det, torch.linalg.det)),
    Case(torch.linalg.det, shapes=((3, 3),), imaginary=True, without=SPECIAL),
    # elementwise
    Case(operator.neg),
    Case(torch.exp),
    Case(torch.expm1),
    Case(torch.log, domain=POSITIVE),
    Case(torch.log1p, domain=POSITIVE),
    Case(torch.log2, domain=POSITIVE),
    Case(torch.sqrt, domain=POSITIVE),
    Case(torch.rsqrt, domain=POSITIVE),
    Case(torch.square),
    Case(torch.reciprocal, domain=POSITIVE),
    Case(torch.abs, away=(0.0,)),
    Case(torch.sin),
    Case(torch.cos),
    Case(torch.atan),
    Case(torch.erf),
    Case(torch.sinh),
    Case(torch.cosh),
    Case(torch.sigmoid),
    Case(torch.tanh),
    Case(torch.clamp, args=(-1.0, 0.5), away=(-1.0, 0.5)),
    Case(torch.nan_to_num),
    Case(torch.real),
    *(Case(f, domain=POSITIVE) for f in (torch.log10, torch.lgamma, torch.digamma)),
    *(Case(f) for f in (torch.exp2, torch.asinh, torch.erfc, torch.sinc, torch.deg2rad, torch.rad2deg)),
    *(Case(f, domain=NARROW) for f in (torch.tan, torch.asin, torch.acos, torch.atanh, torch.erfinv)),
    Case(torch.acosh, domain=(1.2, 3.0)),
    Case(torch.frac, domain=(0.1, 0.9)),
    Case(torch.logit, domain=(0.1, 0.9)),
    Case(torch.logit, args=(0.2,), domain=(0.05, 0.95), away=(0.2, 0.8)),
    Case(operator.pos),
    Case(torch.positive),
    # complex numbers
    *(Case(f, imaginary=True) for f in (torch.real, torch.imag, torch.conj, torch.resolve_conj, torch.abs)),
    Case(torch.view_as_real, imaginary=True),
    *(Case(f, imaginary=True) for f in (torch.sigmoid, torch.tanh, torch.acosh, F.softsign)),
    *(Case(f, imaginary=True) for f in (*MOMENTS, torch.norm, torch.linalg.vector_norm, torch.linalg.norm)),
    *(Case(f, args=(2, 1, True), imaginary=True) for f in (torch.norm, torch.linalg.vector_norm, torch.linalg.norm)),
    *(Case(torch.linalg.vector_norm, args=(p, -1), imaginary=True) for p in (1, 3, float("inf"), -float("inf"))),
    *(Case(f, args=(1,), kwargs={"correction": 0, "keepdim": True}, imaginary=True) for f in MOMENTS),
    Case(torch.linalg.norm, args=("fro", (0, 1)), imaginary=True),
    Case(F.normalize, imaginary=True),
    Case(F.pairwise_distance, PAIR, imaginary=True),
    *(Case(F.l1_loss, PAIR, kwargs={"reduction": r}, imaginary=True) for r in ("none", "mean")),
    Case(F.triplet_margin_loss, (*PAIR, (3, 4)), kwargs={"margin": 3.0}, imaginary=True),
    Case(F.rms_norm, shapes=((2, 3, 4), (4,)), args=(X, (4,), X), imaginary=True),
    Case(operator.pow, shapes=PAIR, imaginary=True),
    *(Case(operator.pow, args=args, imaginary=True) for args in ((3,), (1 + 2j,), (2.0, X), (1j, X))),
    Case(torch.float_power, shapes=PAIR, imaginary=True),
    Case(torch.index_fill, args=(1, INDEX, 1 + 2j), imaginary=True),
    Case(torch.view_as_complex, shapes=((3, 4, 2),)),
    Case(torch.complex, shapes=PAIR),
    Case(torch.complex, shapes=PAIR, varying=(1,)),
    Case(torch.angle),
    Case(torch.angle, imaginary=True),
    Case(torch.polar, shapes=PAIR, domain=POSITIVE),
    Case(operator.mul, shapes=PAIR, imaginary=True),
    *(Case(f) for f in (torch.fft.rfft, torch.fft.rfftn, torch.fft.fftshift, torch.fft.ifftshift)),
    Case(torch.fft.rfft2, shapes=SEQUENCE),
    *(
        Case(f, imaginary=True)
        for f in (torch.fft.fft, torch.fft.ifft, torch.fft.irfft, torch.fft.fftn, torch.fft.ifftn)
    ),
    *(Case(f, shapes=SEQUENCE, imaginary=True) for f in (torch.fft.fft2, torch.fft.ifft2, torch.fft.irfft2)),
    Case(torch.fft.irfftn, imaginary=True, kwargs={"s": (3, 5), "norm": "ortho"}),
    # activations
    Case(F.relu, away=(0.0,)),
    Case(F.relu6, domain=(-2.0, 8.0), away=(0.0, 6.0)),
    Case(F.silu),
    Case(F.mish),
    Case(F.gelu),
    Case(F.gelu, kwargs={"approximate": "tanh"}),
    Case(F.softplus),
    Case(F.softplus, args=(2.0, 20.0)),
    Case(F.softsign, away=(0.0,)),
    Case(F.tanhshrink),
    Case(F.logsigmoid),
    Case(F.leaky_relu, args=(0.1,), away=(0.0,)),
    Case(F.leaky_relu, kwargs={"negative_slope": 0.2}, away=(0.0,)),
    Case(F.elu, kwargs={"alpha": 0.7}, away=(0.0,)),
    Case(
        F.celu, kwargs={"alpha": 0.5}, away=(0.0,)
    ),  # torch's own derivative rounds 1/alpha to float32: take a power of 2
    Case(F.selu, away=(0.0,)),
    Case(F.hardtanh, args=(-1.0, 1.5), away=(-1.0, 1.5)),
    Case(F.hardswish, domain=(-5.0, 5.0), away=(-3.0, 3.0)),
    Case(F.hardsigmoid, domain=(-5.0, 5.0), away=(-3.0, 3.0)),
    Case(F.threshold, args=(0.1, 20.0), away=(0.1,)),
    Case(F.softshrink, away=(-0.5, 0.5)),
    Case(F.hardshrink, away=(-0.5, 0.5)),
    Case(torch.softmax, args=(1,)),
    Case(torch._safe_softmax, args=(1,)),
    Case(torch.log_softmax, args=(1,)),
    Case(F.softmin, args=(1,)),
    Case(F.softmin, kwargs={"dtype": torch.float64, "dim": 0}),
    Case(F.gumbel_softmax, args=(0.7,)),
    Case(F.glu),
    Case(F.glu, shapes=IMAGE, args=(2,)),
    Case(F.prelu, shapes=((2, 3, 4), (3,)), away=(0.0,)),
    Case(F.prelu, shapes=((2, 3, 4), (1,)), away=(0.0,)),
    Case(F.prelu, shapes=((4,), (1,)), away=(0.0,), varying=(1,)),
    Case(F.prelu, shapes=((), (1,)), away=(0.0,)),
    Case(F.rrelu, away=(0.0,)),
    Case(F.rrelu, kwargs={"training": True}, away=(0.0,)),
    # two and more arguments
    Case(operator.add, shapes=((3, 4), (3, 4))),
    Case(operator.add, shapes=((3, 4), (4,)), varying=(1,)),
    Case(operator.add, shapes=((4,), (3, 4)), varying=(0,)),
    Case(operator.add, args=(2.0,)),
    Case(operator.sub, shapes=((3, 4), (4,))),
    Case(operator.sub, shapes=((3, 4), (4,)), varying=(1,)),
    Case(operator.mul, shapes=((3, 4), (3, 1))),
    Case(operator.mul, shapes=((3, 4), (3, 4)), varying=(0,)),
    Case(operator.truediv, shapes=((3, 4), (3, 4)), domain=POSITIVE),
    Case(operator.truediv, args=(3.0,)),
    Case(operator.pow, args=(3,)),
    Case(torch.remainder, args=(0.7,), domain=(0.1, 0.6)),
    Case(operator.pow, shapes=((3, 4), (3, 4)), domain=POSITIVE),
    Case(operator.pow, args=(2.0, X), varying=(0,)),
    Case(torch.float_power, shapes=PAIR, domain=POSITIVE),
    Case(torch.float_power, args=(3,)),
    Case(torch.remainder, shapes=BROADCAST, domain=POSITIVE),
    *(Case(f, shapes=BROADCAST, domain=POSITIVE) for f in (torch.fmod, torch.hypot, torch.atan2, torch.xlogy)),
    Case(torch.copysign, shapes=PAIR, away=(0.0,), varying=(0,)),
    Case(torch.copysign, args=(-1.0,), away=(0.0,)),
    *(Case(f, shapes=BROADCAST) for f in (torch.logaddexp, torch.logaddexp2, torch.rsub)),
    Case(torch.rsub, args=(2.0,), kwargs={"alpha": 3.0}),
    *(Case(f, shapes=BROADCAST) for f in (torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.max, torch.min)),
    Case(torch.maximum, shapes=BROADCAST, varying=(1,)),
    Case(torch.max, shapes=PAIR, varying=(1,)),
    Case(torch.clamp, shapes=((3, 4), (4,), (3, 1))),
    Case(torch.clamp, shapes=((3, 4), (3, 4)), kwargs={"max": X, "min": None}),
    Case(torch.clamp, shapes=((3, 4), (3, 4)), kwargs={"min": X}),
    *(Case(f, shapes=BROADCAST) for f in (torch.clamp_min, torch.clamp_max)),
    *(Case(f, args=(0.5,), away=(0.5,)) for f in (torch.clamp_min, torch.clamp_max)),
    Case(torch.lerp, shapes=((3, 4), (3, 4), (4,))),
    Case(torch.lerp, shapes=PAIR, args=(0.3,), varying=(1,)),
    Case(torch.addcmul, shapes=((3, 4), (3, 1), (4,)), kwargs={"value": 0.5}),
    Case(torch.addcmul, shapes=((4,), (3, 1), (4,)), varying=(0,)),
    Case(torch.addcmul, shapes=(*PAIR, (3, 4)), kwargs={"tensor1": X, "tensor2": X, "value": 2.0}),
    Case(torch.maximum, shapes=PAIR, kwargs={"other": X}, varying=(0,)),
    Case(torch.maximum, shapes=PAIR, kwargs={"other": X}, varying=(1,)),
    Case(torch.addcdiv, shapes=((3, 4), (3, 1), (4,)), domain=POSITIVE, kwargs={"value": 0.5}),
    Case(torch.where, shapes=PAIR, args=(MASK, X, X)),
    Case(torch.where, shapes=((3, 1),), args=(MASK, X, 0.0)),
    Case(torch.where, shapes=((), (3, 4)), args=(MASK[:1], X, X), varying=(0,)),
    # products
    Case(operator.matmul, shapes=((3, 4), (4, 2))),
    Case(torch.mm, shapes=((3, 4), (4, 2)), varying=(1,)),
    Case(torch.bmm, shapes=((2, 3, 4), (2, 4, 2))),
    Case(grouped_product, shapes=((5, 8), (2, 8, 8)), args=(X, X, torch.tensor([2, 5], dtype=torch.int32))),
    Case(torch.bmm, shapes=((2, 3, 4), (2, 4, 2)), kwargs={"mat2": X}),
    Case(torch.bmm, shapes=((2, 3, 4), (2, 4, 2)), kwargs={"mat2": X}, varying=(0,)),
    Case(torch.mv, shapes=((3, 4), (4,))),
    *(Case(f, shapes=((4,), (4,))) for f in (torch.dot, torch.vdot, torch.outer)),
    Case(torch.inner, shapes=((3, 4), (2, 4))),
    Case(torch.kron, shapes=((2, 3), (2, 2))),
    Case(torch.linalg.vecdot, shapes=PAIR, kwargs={"dim": 0}),
    Case(torch.linalg.cross, shapes=((4, 3), (4, 3))),
    Case(torch.tensordot, shapes=((2, 3, 4), (4, 3, 5)), kwargs={"dims": ([1, 2], [1, 0])}),
    Case(torch.einsum, shapes=((2, 3, 4), (2, 5, 4)), args=("bqc,bkc->bqk", X, X)),
    Case(torch.einsum, shapes=((3, 4), (4,), (4, 2)), args=("ij,j,jk->ik", [X, X, X])),
    Case(torch.einsum, shapes=((3, 4), (4,), (4, 2)), args=("ij,j,jk->ik", X, X, X), varying=(1,)),
    Case(torch.einsum, shapes=((3, 3),), args=("...ii->...", X)),
    Case(F.bilinear, shapes=((3, 4), (3, 2), (5, 4, 2), (5,))),
    Case(F.bilinear, shapes=((3, 4), (3, 2), (5, 4, 2), (5,)), varying=(3,)),
    # attention
    Case(F.scaled_dot_product_attention, shapes=QKV),
    Case(F.scaled_dot_product_attention, shapes=QKV, kwargs={"scale": 0.3}, varying=(1,)),
    Case(F.scaled_dot_product_attention, shapes=QKV, kwargs={"is_causal": True}, varying=(0, 2)),
    Case(F.scaled_dot_product_attention, shapes=(*QKV, (3, 5))),
    Case(F.scaled_dot_product_attention, shapes=(*QKV, (3, 5)), kwargs={"attn_mask": X}),
    Case(F.scaled_dot_product_attention, shapes=(*QKV, (3, 5)), varying=(3,)),
    Case(F.scaled_dot_product_attention, shapes=QKV, args=(X, X, X, KEPT)),
    Case(F.scaled_dot_product_attention, shapes=QKV, kwargs={"attn_mask": KEPT.double().log()}),
    Case(F.scaled_dot_product_attention, shapes=GROUPED, kwargs={"enable_gqa": True}),
    Case(F.scaled_dot_product_attention, shapes=GROUPED, kwargs={"enable_gqa": True}, varying=(1,)),
    # normalisation
    Case(F.layer_norm, shapes=((2, 3, 4), (4,), (4,)), args=(X, (4,), X, X)),
    Case(F.layer_norm, shapes=((2, 3, 4),), args=((3, 4),)),
    Case(F.layer_norm, shapes=((2, 3, 4), (4,), (4,)), args=(X, (4,), X, X), varying=(0,)),
    Case(F.layer_norm, shapes=((2, 3, 4), (4,), (4,)), args=(X, (4,)), kwargs={"weight": X, "bias": X}, varying=(2,)),
    Case(F.group_norm, shapes=((2, 4, 3, 3), (4,), (4,)), args=(X, 2, X, X)),
    Case(F.group_norm, shapes=((2, 4, 3, 3), (4,), (4,)), args=(X, 2, X, X), varying=(0,)),
    Case(F.group_norm, shapes=((2, 4),), args=(2,)),
    Case(F.instance_norm, shapes=IMAGE),
    Case(F.instance_norm, shapes=(*IMAGE, (3,), (3,)), kwargs={"weight": X, "bias": X}),
    Case(F.instance_norm, shapes=(*IMAGE, *[(3,)] * 4), args=(X, X, X, X, X, False), domain=POSITIVE, varying=(0, 3)),
    Case(F.rms_norm, shapes=((2, 3, 4), (4,)), args=(X, (4,), X)),
    Case(F.rms_norm, shapes=((2, 3, 4), (4,)), args=(X, (4,), X), varying=(0,)),
    Case(F.rms_norm, shapes=((2, 3, 4),), args=((3, 4),), kwargs={"eps": 1e-3}),
    Case(F.local_response_norm, shapes=((2, 5, 3, 3),), args=(3,), kwargs={"alpha": 0.5}),
    Case(F.local_response_norm, shapes=((2, 5, 3),), args=(2,), kwargs={"alpha": 0.5, "k": 2.0}),
    Case(F.normalize, kwargs={"dim": -1}),
    Case(F.normalize, args=(1.0, 0), away=(0.0,)),
    Case(F.normalize, kwargs={"eps": 100.0}),
    Case(F.cosine_similarity, shapes=PAIR),
    Case(F.cosine_similarity, shapes=((3, 1, 4), (2, 4)), kwargs={"dim": -1}),
    Case(F.cosine_similarity, shapes=PAIR, varying=(0,)),
    Case(F.cosine_similarity, shapes=((3, 4), (4,))),
    Case(F.cosine_similarity, shapes=((2, 3, 4), (3, 4))),
    Case(F.cosine_similarity, shapes=((5, 1), (1, 7))),
    Case(F.cosine_similarity, shapes=((5, 3), (1, 3)), kwargs={"dim": 0}, varying=(1,)),
    Case(F.cosine_similarity, shapes=((1, 2, 3), (2, 1, 3)), kwargs={"dim": -2}),
    # reductions
    Case(torch.cumprod, args=(1,)),
    Case(torch.cumprod, shapes=((2, 5, 3),), args=(-2,)),
    *(
        Case(torch.scatter_reduce, shapes=((3, 4), (3, 2)), args=(X, 1, PICKED, X, how), forward=how != "prod")
        for how in ("sum", "mean", "amax", "prod")
    ),
    Case(torch.linalg.eigh, ((2, 3, 3),), without=SPECIAL, hermitian=True),
    Case(torch.linalg.eigh, ((3, 3),), ("U",), without=SPECIAL, hermitian=True),
    *(Case(f, shapes=((),), args=(0,)) for f in (torch.cumprod, torch.prod, torch.amax, torch.amin)),
    Case(torch.linalg.matrix_norm),
    Case(torch.linalg.matrix_norm, kwargs={"ord": 2, "dim": (1, 0)}),
    Case(torch.renorm, args=(2, 0, 1.0)),
    *(Case(f, shapes=IMAGE, args=((2, 3),), kwargs={"keepdim": True}) for f in MOMENTS),
    *(Case(f, shapes=IMAGE, args=(1,), kwargs={"correction": 0}) for f in MOMENTS),
    *(Case(f, args=(False,)) for f in MOMENTS),
    *(Case(f) for f in MOMENTS),
    *(Case(f, args=(2, 1, True)) for f in (torch.norm, torch.linalg.vector_norm, torch.linalg.norm)),
    *(Case(f) for f in (torch.norm, torch.linalg.vector_norm, torch.linalg.norm)),
    *(Case(torch.linalg.vector_norm, args=(p, -1), away=(0.0,)) for p in (1, 3, 0.5, float("inf"), -float("inf"))),
    Case(torch.norm, shapes=IMAGE, kwargs={"p": "fro", "dim": (1, 2)}),
    Case(torch.linalg.norm, args=("fro", (0, 1))),
    Case(torch.linalg.norm, args=(2, (0, 1))),
    Case(torch.logsumexp, args=(1,)),
    Case(torch.logsumexp, shapes=IMAGE, args=((1, 3),), kwargs={"keepdim": True}),
    *(Case(torch.prod, args=args) for args in ((), (1,), (0, True))),
    Case(torch.prod, args=(1,), kwargs={"keepdim": True}),
    *(Case(f, args=args) for f in (torch.max, torch.min, torch.median) for args in ((), (1,), (0, True))),
    *(Case(f, shapes=IMAGE, args=args) for f in (torch.amax, torch.amin) for args in ((), ((1, -1),), (2, True))),
    *(
        Case(torch.aminmax, kwargs=kwargs, **derivatives(torch.aminmax))
        for kwargs in ({}, {"keepdim": True}, {"dim": 1}, {"dim": 0, "keepdim": True})
    ),
    Case(torch.kthvalue, args=(2,)),
    Case(torch.kthvalue, args=(2, 0, True)),
    Case(torch.mode, kwargs={"dim": 0}),
    Case(torch.topk, args=(2,), kwargs={"dim": 1}),
    Case(torch.sort, args=(0, True)),
    Case(torch.trace, shapes=((3, 3),)),
    # picking and placing
    Case(torch.gather, args=(1, PICKED)),
    Case(torch.take_along_dim, args=(PICKED, 1)),
    Case(torch.index_select, args=(1, INDEX)),
    Case(torch.take, args=(torch.tensor([[0, 11], [3, 3]]),)),
    Case(torch.masked_select, args=(MASK,)),
    Case(torch.masked_fill, args=(MASK, -1e9)),
    Case(torch.masked_fill, shapes=((3, 4), ()), args=(X, MASK, X)),
    Case(torch.masked_fill, shapes=((3, 4), ()), args=(X, MASK, X), varying=(1,)),
    Case(torch.masked_scatter, shapes=((3, 4), (12,)), args=(X, MASK, X)),
    Case(operator.getitem, args=(MASK,)),
    Case(operator.getitem, args=((slice(None), INDEX),)),
    Case(operator.getitem, args=((INDEX[:2], INDEX[1:]),)),
    *(Case(f, shapes=((3, 4), (3, 2)), args=(X, 1, PICKED, X)) for f in (torch.scatter, torch.scatter_add)),
    *(
        Case(f, shapes=((3, 4), (3, 2)), args=(X, 1, PICKED, X), varying=(1,))
        for f in (torch.scatter, torch.scatter_add)
    ),
    Case(torch.scatter, args=(1, PICKED, 0.5)),
    Case(torch.scatter, args=(1, PICKED), kwargs={"value": 0.5}),
    Case(torch.index_add, shapes=((3, 4), (3, 3)), args=(X, 1, INDEX, X), kwargs={"alpha": 2.0}),
    Case(torch.index_copy, shapes=((3, 4), (3, 2)), args=(X, 1, INDEX[:2], X)),
    Case(torch.index_fill, shapes=((3, 4), ()), args=(X, 1, INDEX, X)),
    Case(torch.index_fill, args=(1, INDEX, 0.5)),
    Case(torch.index_put, shapes=((3, 4), (2,)), args=(X, (INDEX[:2], INDEX[1:]), X)),
    Case(torch.index_put, shapes=((3, 4), (2,)), args=(X, (INDEX[:2], INDEX[1:]), X, True), varying=(1,)),
    Case(torch.slice_scatter, shapes=((3, 4), (3, 2)), kwargs={"dim": 1, "start": 1, "end": 3}),
    Case(torch.select_scatter, shapes=((3, 4), (3,)), args=(1, 2)),
    Case(torch.diagonal_scatter, shapes=((3, 4), (3,))),
    Case(assigned, shapes=((3, 4), (3,)), args=(X, (slice(None), 1), X)),
    Case(assigned, shapes=((3, 4), (3,)), args=(X, (slice(None), 1), X), varying=(1,)),
    Case(assigned, args=(MASK, 0.5)),
    Case(overwritten, shapes=((3, 4), (4,))),
    Case(overwritten, shapes=((3, 4), (4,)), varying=(1,)),
    *(Case(f, args=(1,)) for f in (torch.tril, torch.triu, torch.diag, torch.diagonal)),
    Case(torch.diag_embed),
    Case(torch.repeat_interleave, args=(2,), kwargs={"dim": 1}),
    Case(torch.repeat_interleave, args=(torch.tensor([1, 0, 2]), 0)),
    # shapes
    Case(torch.clone),
    Case(Tensor.contiguous),
    Case(Tensor.double),
    Case(Tensor.float, varying=()),
    Case(Tensor.to, args=(torch.float64,)),
    Case(Tensor.to, args=("cpu",), kwargs={"dtype": torch.float64}),
    Case(Tensor.to, shapes=((3, 4), (2,)), varying=(0,)),
    Case(Tensor.type, args=(torch.float64,)),
    Case(Tensor.type_as, shapes=((3, 4), (2,)), varying=(0,)),
    Case(Tensor.cpu),
    *(Case(f, varying=()) for f in (Tensor.half, Tensor.bfloat16, Tensor.cuda)),
    Case(torch.flatten, shapes=IMAGE, args=(1,)),
    Case(torch.reshape, args=((2, 6),)),
    Case(Tensor.view, args=(2, 6)),
    *(Case(f, shapes=((),), args=((),)) for f in (Tensor.view, Tensor.expand, Tensor.repeat)),
    Case(torch.permute, shapes=IMAGE, args=((0, 2, 3, 1),)),
    Case(torch.transpose, args=(0, 1)),
    Case(torch.swapaxes, args=(0, 1)),
    Case(torch.movedim, shapes=IMAGE, args=(1, 3)),
    Case(torch.t),
    Case(torch.unsqueeze, args=(1,)),
    Case(torch.squeeze, shapes=((3, 1, 4),), args=(1,)),
    Case(torch.unflatten, args=(1, (2, 2))),
    Case(Tensor.unflatten, args=(1, (2, 2))),
    Case(Tensor.expand, shapes=((3, 1),), args=(3, 5)),
    Case(Tensor.expand_as, shapes=((3, 1), (3, 5)), varying=(0,)),
    Case(Tensor.view_as, shapes=((3, 4), (2, 6)), varying=(0,)),
    Case(Tensor.reshape_as, shapes=((3, 4), (2, 6)), varying=(0,)),
    Case(Tensor.repeat, args=(1, 2)),
    Case(Tensor.unfold, args=(1, 2, 1)),
    Case(torch.broadcast_to, shapes=((3, 1),), args=((3, 5),)),
    Case(torch.tile, args=((1, 2),)),
    Case(torch.flip, args=((1,),)),
    *(Case(f) for f in (torch.fliplr, torch.flipud, torch.rot90, torch.adjoint, torch.ravel)),
    *(Case(f, shapes=((4,),)) for f in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)),
    *(Case(f, shapes=((3, 4), (3, 4)), args=([X, X],)) for f in (torch.hstack, torch.vstack, torch.dstack)),
    Case(torch.column_stack, shapes=((3,), (3, 2)), args=([X, X],), varying=(0,)),
    Case(torch.block_diag, shapes=((3, 4), (2,))),
    Case(torch.broadcast_tensors, shapes=((3, 1), (4,)), varying=(1,)),
    Case(torch.meshgrid, shapes=((3,), (4,)), kwargs={"indexing": "ij"}),
    Case(torch.meshgrid, shapes=((3,), (4,)), args=([X, X],), kwargs={"indexing": "xy"}),
    Case(torch.hsplit, args=(2,)),
    Case(torch.vsplit, shapes=((4, 2),), args=(2,)),
    Case(torch.dsplit, shapes=((2, 3, 4),), args=([1],)),
    Case(torch.roll, args=(1, 1)),
    Case(torch.narrow, args=(1, 1, 2)),
    Case(torch.select, args=(1, 2)),
    Case(torch.cat, shapes=((3, 2), (3, 4)), args=([X, X], 1)),
    Case(torch.cat, shapes=((3, 2), (3, 4)), args=([X, X], 1), varying=(1,)),
    Case(torch.stack, shapes=PAIR, args=([X, X], 1), varying=(0,)),
    Case(torch.chunk, args=(2, 1)),
    Case(torch.split, args=(3, 1)),
    Case(torch.tensor_split, args=(2, 1)),
    Case(torch.unbind, args=(1,)),
    Case(operator.getitem, shapes=IMAGE, args=((slice(None), 1, ..., slice(0, None, 2)),)),
    Case(torch.mean, shapes=IMAGE, args=((2, 3),), kwargs={"keepdim": True}),
    Case(torch.sum, args=(1,)),
    Case(torch.cumsum, args=(1,)),
    Case(F.pad, shapes=IMAGE, args=((1, 2, 0, 1),), kwargs={"value": 3.0}),
    Case(F.pad, shapes=IMAGE, args=((1, 1, 1, 1),), kwargs={"mode": "reflect"}),
    Case(F.pad, shapes=IMAGE, args=((1, 1, 2, 0), "replicate")),
    Case(F.pad, shapes=IMAGE, args=((1, 1, 2, 0), "circular")),
    Case(F.pixel_shuffle, shapes=((2, 4, 3, 3),), args=(2,)),
    Case(F.pixel_unshuffle, shapes=IMAGE, args=(2,)),
    Case(torch.channel_shuffle, shapes=((2, 4, 3, 3),), args=(2,)),
    # resampling
    *(Case(F.interpolate, shapes=IMAGE, kwargs={"scale_factor": 1.7, "mode": m}) for m in ("nearest", "area")),
    *(Case(F.interpolate, shapes=IMAGE, args=((4, 9),), kwargs={"mode": m}) for m in ("nearest-exact", "bicubic")),
    Case(F.interpolate, shapes=IMAGE, args=(9,), kwargs={"mode": "bilinear", "align_corners": True}),
    *(
        Case(F.interpolate, shapes=IMAGE, args=(4,), kwargs={"mode": m, "antialias": True})
        for m in ("bilinear", "bicubic")
    ),
    Case(F.interpolate, shapes=SEQUENCE, args=(5,), kwargs={"mode": "linear"}),
    Case(F.interpolate, shapes=VOLUME, args=((3, 6, 5),), kwargs={"mode": "trilinear"}),
    *(
        Case(
            F.grid_sample,
            (*IMAGE, (2, 4, 5, 2)),
            (mode, padding),
            {"align_corners": aligned},
            domain,
            forward=GRID_SAMPLE,
            without=("infinite",),
        )
        for mode, padding, aligned, domain in (
            ("bilinear", "zeros", False, (-1.3, 1.3)),
            ("bilinear", "border", True, (-1.3, 1.3)),
            ("bilinear", "reflection", False, (-3.0, 3.0)),
            ("bilinear", "reflection", True, (-3.0, 3.0)),
            ("bicubic", "zeros", True, (-1.3, 1.3)),
            ("bicubic", "border", False, (-1.3, 1.3)),
            ("bicubic", "reflection", False, (-3.0, 3.0)),
            ("nearest", "zeros", False, (-1.3, 1.3)),
        )
    ),
    *(
        Case(
            F.grid_sample,
            (*VOLUME, (2, 3, 2, 2, 3)),
            ("bilinear", padding),
            ALIGNED,
            (-1.5, 1.5),
            forward=GRID_SAMPLE,
            without=("infinite",),
        )
        for padding in ("zeros", "reflection")
    ),
    Case(
        F.grid_sample,
        shapes=(*IMAGE, (2, 4, 5, 2)),
        kwargs=ALIGNED,
        domain=NARROW,
        varying=(1,),
        forward=GRID_SAMPLE,
        without=("infinite",),
    ),
    *(
        Case(resample, IMAGE, (TURNED,), {"mode": mode, "fill": fill}, forward=GRID_SAMPLE)
        for mode in ("nearest", "bilinear")
        for fill in (None, (0.5, 1.0, -1.0))
    ),
    Case(
        F.grid_sample,
        shapes=(*IMAGE, (2, 4, 5, 2)),
        kwargs=ALIGNED,
        domain=NARROW,
        varying=(0,),
        forward=GRID_SAMPLE,
        without=("infinite",),
    ),
    Case(F.affine_grid, shapes=((2, 2, 3),), args=((2, 3, 4, 5),), kwargs=ALIGNED),
    Case(F.unfold, shapes=IMAGE, args=(3,), kwargs={"padding": 1, "stride": 2}),
    Case(F.fold, shapes=((2, 12, 9),), args=((4, 4), 2), kwargs={"stride": 1}),
    Case(torch.ops.aten.col2im.default, shapes=((2, 12, 9),), args=((4, 4), (2, 2), (1, 1), (0, 0), (1, 1))),
    # pooling
    Case(F.avg_pool1d, shapes=((2, 3, 8),), args=(2,)),
    Case(F.avg_pool2d, shapes=IMAGE, args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.avg_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.adaptive_avg_pool1d, shapes=((2, 3, 8),), args=(3,)),
    Case(F.adaptive_avg_pool2d, shapes=IMAGE, args=((4, 2),)),
    Case(F.adaptive_avg_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.max_pool1d, shapes=((2, 3, 8),), args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.max_pool2d, shapes=IMAGE, args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.max_pool2d, shapes=IMAGE, args=(2,), kwargs={"ceil_mode": True, "dilation": 2}),
    Case(F.max_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.adaptive_max_pool1d, shapes=((2, 3, 8),), args=(3,)),
    Case(F.adaptive_max_pool2d, shapes=IMAGE, args=((4, 2),)),
    Case(F.adaptive_max_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.max_pool2d, shapes=IMAGE, args=(2,), kwargs={"return_indices": True}),
    Case(F.fractional_max_pool2d, shapes=IMAGE, args=(2,), kwargs={"output_size": 3}),
    Case(F.fractional_max_pool3d, shapes=VOLUME, args=(2,), kwargs={"output_size": 2}),
    Case(F.lp_pool1d, shapes=SEQUENCE, args=(2, 2)),
    Case(F.lp_pool2d, shapes=IMAGE, args=(3, (2, 3)), kwargs={"stride": 2, "ceil_mode": True}, domain=POSITIVE),
    *([Case(F.lp_pool2d, shapes=IMAGE, args=(float("inf"), 2))] if INFINITE_POWER else []),
    Case(F.lp_pool3d, shapes=VOLUME, args=(2, 2)),
    Case(F.max_unpool1d, shapes=((1, 1, 2),), args=(torch.tensor([[[1, 2]]]), 2)),
    Case(F.max_unpool2d, shapes=((1, 1, 1, 2),), args=(torch.tensor([[[[1, 2]]]]), 2)),
    Case(F.max_unpool3d, shapes=((1, 1, 1, 1, 2),), args=(torch.tensor([[[[[1, 2]]]]]), 2)),
    # assignments
    Case(assigned, ((3, 4), (3, 2)), (X, (slice(None), slice(1, 3)), X)),
    Case(assigned, args=((..., 1), 2.0)),
    Case(assigned, ((3, 4), ()), (X, torch.eye(3, 4, dtype=torch.bool), X)),
    Case(overwritten, ((3, 4), (4,))),
    # torchvision
    Case(torchvision.ops.roi_align, IMAGE, (BOXES, 3, 0.8, 2, True), forward=False),
    Case(torchvision.ops.roi_align, IMAGE, ([BOXES[:2, 1:], BOXES[2:, 1:]],), {"output_size": (2, 3)}, forward=False),
    Case(torch.ops.torchvision.roi_align, IMAGE, (BOXES, 1.0, 2, 2, 0, False), forward=False),
    Case(torch.ops.torchvision.roi_pool, IMAGE, (BOXES, 1.0, 2, 2), forward=False),
    Case(torchvision.ops.roi_pool, IMAGE, (BOXES, 2), forward=False),
    Case(torchvision.ops.roi_pool, IMAGE, ([BOXES[:2, 1:], BOXES[2:, 1:]], (2, 3)), forward=False),
    Case(torchvision.ops.ps_roi_align, ((2, 8, 6, 6),), (BOXES, 2), forward=False),
    Case(torchvision.ops.ps_roi_pool, ((2, 8, 6, 6),), (BOXES, 2), forward=False),
    Case(torch.ops.torchvision.ps_roi_align, ((2, 8, 6, 6),), (BOXES, 1.0, 2, 2, 2), forward=False),
    Case(torch.ops.torchvision.ps_roi_pool, ((2, 8, 6, 6),), (BOXES, 1.0, 2, 2), forward=False),
    Case(
        torch.ops.torchvision.deform_conv2d,
        shapes=((2, 4, 5, 5), (6, 4, 3, 3), (2, 18, 5, 5), (2, 9, 5, 5), (6,)),
        args=(X, X, X, X, X, 1, 1, 1, 1, 1, 1, 1, 1, True),
        forward=False,
        twice=False,
    ),
    Case(
        torch.ops.torchvision.deform_conv2d,
        shapes=((2, 4, 6, 5), (6, 2, 3, 2), (2, 24, 2, 2), (2, 12, 2, 2), (6,)),
        args=(X, X, X, X, X, 2, 3, 1, 0, 2, 1, 2, 2, False),
        varying=(2,),
        forward=False,
    ),
    # losses and distances
    *(Case(F.cross_entropy, args=(CLASSES,), kwargs={"reduction": r}) for r in ("mean", "sum", "none")),
    Case(F.cross_entropy, PAIR, kwargs={"label_smoothing": 0.1, "reduction": "none"}, domain=POSITIVE),
    Case(
        F.cross_entropy, ((2, 4, 3), (4,)), (X, CLASSES[:2, None].expand(2, 3), X), {"reduction": "none"}, varying=(0,)
    ),
    *(
        Case(f, ((5, 3, 4),), (LABELS, (5, 4, 3), (2, 1, 1), 0, how), domain=(-2, -0.5), **CTC)
        for f, reductions in ((F.ctc_loss, ("none", "mean", "sum")), (torch.ctc_loss, (0, 1, 2)))
        for how in reductions
    ),
    Case(
        F.ctc_loss, ((5, 4),), (LABELS[0], torch.tensor(5), torch.tensor(2)), {"reduction": "none"}, (-2, -0.5), **CTC
    ),
    # sparse matrices, and segments
    Case(torch.sparse.mm, ((3, 2),), (GRAPH, X), **SPARSE),
    Case(torch.sparse.addmm, ((3, 2), (3, 2)), (X, GRAPH, X), {"beta": 0.5, "alpha": 2.0}, **SPARSE),
    Case(torch.sparse_coo_tensor, ((5,),), (GRAPH.indices(), X, (3, 3)), {"check_invariants": True}, **SPARSE),
    Case(torch.Tensor.to_dense, forward=False),
    *(Case(torch.segment_reduce, MATRIX, (how,), {"lengths": PARTS}, forward=False) for how in ("mean", "max", "min")),
    Case(torch.segment_reduce, MATRIX, ("sum",), {"lengths": torch.tensor([1, 0, 2])}, forward=False),
    Case(torch.segment_reduce, MATRIX, ("max",), {"offsets": torch.tensor([0, 1, 3])}, forward=False),
    *(
        Case(torch.segment_reduce, SEQUENCE, (how,), {"lengths": SPANS, "axis": 1}, forward=False)
        for how in ("sum", "mean", "max", "min")
    ),
    Case(
        torch.segment_reduce,
        SEQUENCE,
        ("max",),
        {"offsets": torch.tensor([[0, 1, 3], [0, 2, 3]]), "axis": 1},
        forward=False,
    ),
    Case(torch.segment_reduce, MATRIX, ("max",), {"lengths": torch.tensor([1, 1]), "unsafe": True}, forward=False),
    Case(F.nll_loss, args=(CLASSES,)),
    *(Case(f, PAIR, kwargs={"reduction": "none"}) for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)),
    *(Case(f, PAIR, varying=(0,)) for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)),
    *(Case(f, PAIR, domain=(0.1, 0.9)) for f in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)),
    Case(F.binary_cross_entropy_with_logits, PAIR, kwargs={"target": X, "reduction": "none"}, varying=(1,)),
    Case(F.kl_div, PAIR, kwargs={"reduction": "batchmean"}, domain=POSITIVE),
    Case(F.gaussian_nll_loss, (*PAIR, (3, 4)), domain=POSITIVE, kwargs={"reduction": "none"}),
    Case(F.poisson_nll_loss, PAIR, domain=POSITIVE),
    *(Case(f, PAIR, varying=(0,), away=(0.0,)) for f in (F.soft_margin_loss, F.hinge_embedding_loss)),
    Case(F.margin_ranking_loss, (*PAIR, (3, 4)), varying=(0, 1), kwargs={"margin": 0.5}),
    Case(F.multilabel_margin_loss, args=(torch.tensor([[0, 1, -1, 2]] * 3),), forward=False, twice=False),
    Case(F.multi_margin_loss, args=(CLASSES,), kwargs={"reduction": "none"}, forward=False, twice=False),
    Case(F.multilabel_soft_margin_loss, args=(MASK.double(),), kwargs={"reduction": "none"}),
    Case(F.cosine_embedding_loss, PAIR, (torch.tensor([1, -1, 1]),), {"reduction": "none"}),
    # labels that vary, which are compared with 1 and −1
    *(Case(F.hinge_embedding_loss, PAIR, kwargs={"reduction": r}, away=(0.0, 1.0, -1.0)) for r in ("mean", "none")),
    Case(F.cosine_embedding_loss, (*PAIR, (3,)), kwargs={"reduction": "none"}),
    Case(F.triplet_margin_loss, (*PAIR, (3, 4)), kwargs={"reduction": "none"}),
    *(
        Case(F.triplet_margin_loss, ((2, 5, 5), last, (2, 5, 5)), kwargs={"reduction": "none"})
        for last in ((2, 5, 5), (2, 1, 5), (1, 1, 5))
    ),
    Case(F.triplet_margin_loss, ((2, 4, 3),) * 3, kwargs={"reduction": "none"}, varying=(2,)),
    Case(F.cosine_embedding_loss, ((3, 4), (1, 4)), (torch.tensor([1, -1, 1]),), {"reduction": "none"}),
    Case(F.multilabel_soft_margin_loss, ((3, 3, 4),), (MASK.double().expand(3, 3, 4),), {"reduction": "none"}),
    Case(F.margin_ranking_loss, ((3, 4), (1, 4), (3, 1)), kwargs={"margin": 0.5, "reduction": "none"}, varying=(0, 1)),
    Case(F.cross_entropy, ((3, 4, 3),), (torch.tensor([[0, 3, 1], [2, 1, 0], [3, 3, 2]]),), {"reduction": "none"}),
    Case(F.cross_entropy, ((3, 3), (3, 3)), kwargs={"reduction": "none"}, domain=POSITIVE),
    Case(F.pairwise_distance, PAIR),
    Case(F.pairwise_distance, PAIR, kwargs={"p": 3.0, "keepdim": True}, varying=(1,)),
    *(Case(torch.cdist, ((2, 3, 4), (2, 5, 4)), kwargs={"p": p}, forward=False) for p in (2.0, 1.0, 3.0)),
    Case(torch.cdist, ((3, 4), (5, 4)), varying=(1,), forward=False),
    # layers: tangents of input, weight and bias; structured ones are checked in test_tangents.py
    Case(F.linear, shapes=((3, 4), (5, 4), (5,)), varying=(0,)),
    Case(torch.conv1d, shapes=((2, 4, 7), (6, 2, 3), (6,)), kwargs={"groups": 2, "padding": 1}, varying=(0,)),
    Case(torch.conv2d, shapes=((2, 3, 6, 6), (4, 3, 3, 3)), kwargs={"stride": 2, "dilation": 2}, varying=(0,)),
    Case(torch.conv3d, shapes=((2, 2, 4, 4, 4), (3, 2, 2, 2, 2)), varying=(0,)),
    Case(torch.conv2d, shapes=((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    Case(torch.conv_transpose1d, shapes=((2, 4, 7), (4, 3, 3), (6,)), args=(2, 1, 1, 2)),
    Case(torch.conv_transpose2d, shapes=((2, 3, 4, 4), (3, 2, 3, 3)), args=(None, 2), varying=(0,)),
    Case(F.embedding, ((6, 4),), (INDEX, X)),
    Case(F.embedding_bag, ((6, 4),), (PICKED, X), {"mode": "sum"}, forward=False),
    Case(
        F.embedding_bag,
        ((6, 4), (3, 2)),
        (PICKED, X),
        {"mode": "sum", "per_sample_weights": X},
        forward=False,
        twice=False,
    ),
    Case(torch._weight_norm, ((4, 3, 2), (4, 1, 1)), (0,), forward=False),
    Case(torch._weight_norm, ((4, 3), ()), (-1,), varying=(0,), forward=False),
    Case(split_heads, ((2, 3, 8),), (4, True)),
    Case(split_heads, ((3, 8),), (4, False)),
    Case(join_heads, ((2, 4, 3, 2),), (False,)),
    Case(attention_scores, QKV[:2], (None, False, None, False)),
    # recurrent: (mode, x, h, c, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr)
    Case(recurrent_layer, ((5, 2, 3), *[(2, 4)] * 2, *LSTM), ("lstm", *[X] * 7)),
    Case(recurrent_layer, ((5, 2, 3), (2, 2), (2, 4), (16, 3), (16,), (16, 2), (16,), (2, 4)), ("lstm", *[X] * 8)),
    Case(recurrent_layer, ((5, 2, 3), (2, 4), (12, 3), (12,), (12, 4), (12,)), ("gru", X, X, None, *[X] * 4)),
    Case(recurrent_layer, ((5, 2, 3), (2, 4), (4, 3), (4, 4)), ("rnn_tanh", X, X, None, X, None, X, None)),
    Case(recurrent_layer, ((1, 2, 3), (2, 4), (4, 3), (4, 4)), ("rnn_relu", X, X, None, X, None, X, None)),
    Case(time_major, ((2, 3, 4),), (True,)),
    Case(time_major, ((3, 4),), (False,)),
    Case(from_time_major, ((3, 2, 4),), (3, True)),
    Case(from_time_major, ((3, 1, 4),), (2, False)),
    Case(torch._pack_padded_sequence, ((4, 3, 2),), (torch.tensor([4, 2, 1]), False), forward=False),
    Case(torch._pad_packed_sequence, ((7, 2),), (torch.tensor([3, 2, 1, 1]), True, 0.5, 5), forward=False),
    Case(state_of, ((3, 2, 4),), (1,)),
    Case(state_of, ((3, 4),), (2,)),
    Case(joined_states, ((2, 4), (2, 4)), ([X, X], 3)),
    Case(joined_states, ((1, 4), (1, 4)), ([X, X], 2)),
    Case(attention_scores, (*GROUPED[:2], (3, 5)), (X, False, 0.3, True), varying=(1, 2)),
    Case(attention_scores, (*QKV[:2], (2, 1, 3, 5)), (X, False, None, False), varying=(0,)),
    Case(attention_values, GROUPED[2:], (torch.ones(1, 4, 1, 1), True)),
    Case(attention_values, (GROUPED[2], GROUPED[0]), (X, X, True)),
    Case(split_windows, ((2, 5, 6, 3),), ([2, 4], [1, 2])),
    Case(join_windows, ((2 * 6, 8, 3), (2, 5, 6, 3)), (X, X, [2, 4], [1, 2])),
    Case(mask_windows, ((2 * 6, 1, 8, 8), (2, 5, 6, 3)), (X, X, [2, 4], [1, 2])),
    Case(torch.conv_transpose3d, shapes=((2, 2, 3, 3, 3), (2, 3, 2, 2, 2)), varying=(1,)),
    Case(F.batch_norm, shapes=((5, 3, 4), (3,), (3,), (3,), (3,)), args=(False,), domain=POSITIVE, varying=(0,)),
    Case(F.batch_norm, ((5, 3, 4), (3,), (3,), (3,), (3,)), (False,), domain=POSITIVE, varying=(0, 3, 4)),
    Case(F.batch_norm, ((5, 3, 4), (3,), (3,)), (X, None, None, X, X, True)),
    Case(F.batch_norm, ((5, 3), (3,), (3,)), (X, None, None, X, X, True), varying=(0,)),
    Case(synced_batch_norm, ((5, 3, 4), (3,), (3,), (3,), (3,)), (False,), domain=POSITIVE, varying=(0, 3, 4)),
    Case(synced_batch_norm, ((5, 3, 4), (3,), (3,)), (X, None, None, X, X, True)),
    *(Case(getattr, args=(name,)) for name in ("T", "mT", "H", "mH")),
    *(Case(getattr, args=(name,), imaginary=True) for name in ("real", "imag")),
]

# Piecewise constant or cut off on purpose: a tangent goes in, ZERO comes out.
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
COMPARISONS += (torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge)
BITS = {"domain": (0, 1), "integer": True, "shapes": ((3,), (3,))}
ZERO_CASES = [
    *(Case(f) for f in (torch.detach, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.signbit)),
    *(Case(f) for f in (torch.argmax, torch.argmin, torch.argsort, torch.nonzero, torch.argwhere, torch.count_nonzero)),
    *(
        Case(f)
        for f in (torch.isnan, torch.isinf, torch.isfinite, torch.isneginf, torch.isposinf, torch.any, torch.all)
    ),
    *(Case(f, args=(0.3,)) for f in (*COMPARISONS, operator.floordiv, torch.floor_divide, torch.bernoulli)),
    Case(zero_state, ((5, 2, 3),), (4,)),
    *(Case(f, shapes=PAIR) for f in (torch.isclose, torch.allclose, torch.equal, torch.isin, torch.heaviside)),
    Case(torch.div, args=(0.3,), kwargs={"rounding_mode": "floor"}),
    *(Case(f, **BITS) for f in (operator.and_, operator.or_, operator.xor)),
    Case(operator.invert, domain=(0, 1), integer=True),
    Case(F.one_hot, shapes=((3,),), args=(5,), domain=(0, 4), integer=True),
    *(Case(f, shapes=PAIR) for f in (torch.logical_and, torch.logical_or, torch.logical_xor)),
    *(Case(f) for f in (torch.logical_not, torch.unique, torch.unique_consecutive)),
    *(Case(f, shapes=((3,), (4,))) for f in (torch.searchsorted,)),
    Case(torch.bucketize, shapes=((4,), (3,))),
    Case(torch.multinomial, args=(2,), domain=POSITIVE),
    Case(torch.normal, shapes=((1, 2, 3), (5, 2, 3)), domain=POSITIVE),
    *(Case(f) for f in (Tensor.int, Tensor.long, Tensor.short, Tensor.bool, Tensor.byte, Tensor.char)),
    Case(Tensor.to, args=(torch.int64,)),
    Case(Tensor.to, kwargs={"dtype": torch.bool}),
    *(Case(f) for f in (Tensor.size, Tensor.dim, Tensor.numel, torch.numel, Tensor.stride, Tensor.is_contiguous)),
    Case(Tensor.storage_offset),
    *(Case(f) for f in (Tensor.get_device, Tensor.element_size, Tensor.is_floating_point, torch.is_floating_point)),
    Case(torch.is_complex),
    *(Case(f) for f in (torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.empty_like)),
    Case(torch.full_like, args=(1.0,)),
    Case(torch.randint_like, args=(3,)),
    *(Case(f, args=((2,),)) for f in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty)),
    Case(Tensor.new_full, args=((2,), 1.0)),
    Case(Tensor.new_tensor, args=([1.0],)),
    Case(joint_mask, ((2, 4, 3, 2),), (None, torch.zeros(2, 5))),
    Case(torch.where),
    *(
        Case(getattr, args=(name,))
        for name in ("shape", "dtype", "device", "ndim", "itemsize", "is_cuda", "layout", "data")
    ),
    *(Case(f, shapes=((3, 4), (3,)), args=(0.5,), domain=POSITIVE) for f in (torchvision.ops.nms,)),
    Case(torch.ops.torchvision.nms, shapes=((3, 4), (3,)), args=(0.5,), domain=POSITIVE),
]

# No rule of their own: by torch.func.jvp of the one operation.
FALLBACK_CASES = [
    Case(torch.cummax, args=(1,)),
    # equal values: torch.func sorts them in another order
    *(Case(f, args=(0.3,), without=SPECIAL) for f in (torch.quantile, torch.nanquantile)),
    Case(torch.logcumsumexp, args=(1,), twice=False, without=("infinite",)),  # torch's second derivative is NaN
    *(Case(f) for f in (torch.nanmean, torch.nansum, torch.diff, torch.nanmedian, torch.cov, torch.i0)),
    Case(torch.cumulative_trapezoid),
    Case(torch.diff, shapes=((3, 4), (3, 1)), args=(X, 1, 1), kwargs={"prepend": X}),
    *(Case(f, shapes=((3, 3),), domain=POSITIVE) for f in (torch.linalg.inv, torch.matrix_exp)),
    Case(torch.linalg.solve, shapes=((3, 3), (3, 2)), domain=POSITIVE),
    Case(torch.linalg.multi_dot, shapes=((3, 4), (4, 2)), args=([X, X],)),
    Case(torch.linalg.multi_dot, shapes=((3, 4), (4, 2)), args=([X, X],), varying=(1,)),
    Case(torch.cartesian_prod, shapes=((3,), (4,))),
    Case(torch.stft, shapes=((2, 64),), args=(16,), kwargs={"return_complex": True, "window": WINDOW}),
]
