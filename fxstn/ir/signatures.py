"""Spellings whose arguments differ from the canonical function's, each written as a function with its own signature.

Three tables by name: METHODS, of Tensor methods alone; RAW, of ATen and of the builtins in `torch` that share ATen's
signatures; ANY, wherever the name comes from. An ATen overload may have an entry of its own, "to.dtype"; so may a name with
an underscore, which works in place.
"""

from __future__ import annotations

import functools
import operator
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxstn.ir.assignment import assigned, overwritten
from fxstn.ir.grouped import grouped_product

Tensor = torch.Tensor


@dataclass(frozen=True)
class Spelled:
    """function(*args, **kwargs) in the canonical spelling. An argument may be a Spelled itself: compute it first.

    in_place: whether the original spelling writes the result into its first argument.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False


class Unspellable(Exception):
    """A mutation without a functional counterpart; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Signature = Callable[..., Spelled]
Value = object  # a node, a tensor or a number: handed through
METHODS: dict[str, Signature] = {}
RAW: dict[str, Signature] = {}
ANY: dict[str, Signature] = {}


def spell(function: Callable[..., object], *args: Value, **kwargs: Value) -> Spelled:
    return Spelled(function, args, kwargs)


def called(table: dict[str, Signature], *names: str) -> Callable[[Signature], Signature]:
    def enter(signature: Signature) -> Signature:
        table.update(dict.fromkeys(names, signature))
        return signature

    return enter


def _of_several(function: Callable[..., object], *tensors: Value) -> Spelled:
    """A function of *tensors, which is an operator of a list of them."""
    first = tensors[0] if len(tensors) == 1 else None
    return spell(function, *(first if isinstance(first, (tuple, list)) else tensors))


for _function in (torch.block_diag, torch.cartesian_prod, torch.broadcast_tensors):
    ANY[_function.__name__] = functools.partial(_of_several, _function)

for _function in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d):
    RAW[_function.__name__] = functools.partial(spell, _function)


# Arithmetic


def _times(factor: Value, value: Value) -> Value:
    return value if isinstance(factor, (int, float)) and factor == 1 else spell(operator.mul, value, factor)


def _sum(first: Value, second: Spelled, beta: Value = 1, alpha: Value = 1) -> Spelled:
    """beta · first + alpha · second. As in torch, a beta of 0 leaves `first` out, even where it is not finite."""
    if isinstance(beta, (int, float)) and beta == 0:
        return second if isinstance(alpha, (int, float)) and alpha == 1 else spell(operator.mul, second, alpha)
    return spell(operator.add, _times(beta, first), _times(alpha, second))


@called(ANY, "div", "divide", "true_divide")
def _div(input: Value, other: Value, rounding_mode: str | None = None) -> Spelled:
    if rounding_mode is None:
        return spell(operator.truediv, input, other)
    return spell(torch.div, input, other, rounding_mode=rounding_mode)


@called(ANY, "multi_dot", "linalg_multi_dot")
def _chain(tensors: Iterable[Value]) -> Spelled:
    """A product of several matrices, from the left."""
    *before, last = tensors
    return spell(operator.matmul, _chain(before) if len(before) > 1 else before[0], last)


def _equation(operands: tuple) -> tuple[str, tuple]:
    """(equation, tensors) of torch.einsum(x, [0, 1], w, [1, 2], [0, 2])."""
    lists = [*operands[1::2], *operands[-1:][: len(operands) % 2]]
    terms = ["".join("..." if index is Ellipsis else string.ascii_letters[index] for index in own) for own in lists]
    count = len(operands) // 2
    return ",".join(terms[:count]) + "".join(f"->{term}" for term in terms[count:]), operands[: 2 * count : 2]


@called(ANY, "einsum")
def _einsum(equation: Value, *operands: Value, tensors: Value = None, path: Value = None) -> Spelled:
    if operands and isinstance(operands[0], (list, tuple)) and not isinstance(equation, str):
        equation, operands = _equation((equation, *operands))
    operands = operands if tensors is None else (tensors,)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    return spell(torch.einsum, equation, *operands)


@called(ANY, "tensordot")
def _tensordot(a: Value, b: Value, dims: Value = 2, dims_other: Value = None) -> Spelled:
    """dims_other: of b, where dims are those of a alone, as ATen has it."""
    return spell(torch.tensordot, a, b, dims if dims_other is None else (dims, dims_other))


@called(ANY, "norm")
def _norm(
    input: Value, p: Value = "fro", dim: Value = None, keepdim: Value = False, out: None = None, dtype: Value = None
) -> Spelled:
    kwargs = {} if dtype is None else {"dtype": dtype}
    if p == "nuc":
        return spell(torch.linalg.matrix_norm, input, p, (-2, -1) if dim is None else dim, keepdim, **kwargs)
    return spell(torch.linalg.vector_norm, input, 2.0 if p in ("fro", None) else p, dim, keepdim, **kwargs)


ANY |= {
    "mul": lambda input, other: spell(operator.mul, input, other),
    "multiply": lambda input, other: spell(operator.mul, input, other),
    "pow": lambda input, exponent: spell(operator.pow, input, exponent),
    "matmul": lambda input, other: spell(operator.matmul, input, other),
    "add": lambda input, other, alpha=1: spell(operator.add, input, _times(alpha, other)),
    **dict.fromkeys(
        ["sub", "subtract"], lambda input, other, alpha=1: spell(operator.sub, input, _times(alpha, other))
    ),
    "rsub": lambda input, other, alpha=1: spell(operator.sub, other, _times(alpha, input)),
    "addmm": lambda input, mat1, mat2, **scales: _sum(input, spell(torch.mm, mat1, mat2), **scales),
    "baddbmm": lambda input, batch1, batch2, **scales: _sum(input, spell(torch.bmm, batch1, batch2), **scales),
    "addmv": lambda input, mat, vec, **scales: _sum(input, spell(torch.mv, mat, vec), **scales),
    "addr": lambda input, vec1, vec2, **scales: _sum(input, spell(torch.outer, vec1, vec2), **scales),
    "addbmm": lambda input, batch1, batch2, **scales: _sum(
        input, spell(torch.sum, spell(torch.bmm, batch1, batch2), 0), **scales
    ),
    "addmm.dtype": lambda *arguments, **scales: spell(torch.ops.aten.addmm.dtype, *arguments, **scales),
    "baddbmm.dtype": lambda *arguments, **scales: spell(torch.ops.aten.baddbmm.dtype, *arguments, **scales),
    "_grouped_mm": lambda *arguments, **settings: spell(grouped_product, *arguments, **settings),
    "addcmul": lambda input, tensor1, tensor2, value=1: _sum(input, spell(operator.mul, tensor1, tensor2), 1, value),
    "addcdiv": lambda input, tensor1, tensor2, value=1: _sum(
        input, spell(operator.truediv, tensor1, tensor2), 1, value
    ),
    "clamp_min": lambda input, min: spell(torch.clamp, input, min, None),
    "clamp_max": lambda input, max: spell(torch.clamp, input, None, max),
}

# Assignments


@called(ANY, "bernoulli_")
def _bernoulli(input: Value, p: Value = 0.5, generator: Value = None) -> Spelled:
    """In place p is the probability; torch.bernoulli(input) takes the input's entries for it."""
    if isinstance(p, (int, float)):
        return spell(torch.bernoulli, input, p)
    return spell(torch.bernoulli, spell(Tensor.expand_as, p, input))


@called(ANY, "fill")
def _fill(input: Value, value: Value) -> Spelled:
    return spell(torch.full_like, input, value) if isinstance(value, (int, float)) else spell(overwritten, input, value)


@called(ANY, "setitem", "__setitem__")
def _setitem(input: Value, index: Value, value: Value) -> Spelled:
    return spell(assigned, input, index, value)


ANY["copy"] = lambda input, src, non_blocking=False: spell(overwritten, input, src)
ANY["zero"] = lambda input: spell(torch.zeros_like, input)

# Views, indices and conversions


@called(RAW, "slice")
def _slice(input: Value, dim: int = 0, start: Value = None, end: Value = None, step: Value = 1) -> Spelled:
    last = None if isinstance(end, int) and end == torch.iinfo(torch.int64).max else end
    first = None if isinstance(start, int) and start == 0 else start
    piece = slice(first, last, None if isinstance(step, int) and step == 1 else step)
    if dim >= 0:
        return spell(operator.getitem, input, (*[slice(None)] * dim, piece))
    return spell(operator.getitem, input, (..., piece, *[slice(None)] * (-dim - 1)))


@called(RAW, "index")
def _index(input: Value, indices: Iterable[Value]) -> Spelled:
    return spell(operator.getitem, input, tuple(slice(None) if index is None else index for index in indices))


@called(RAW, "to.dtype_layout", "_to_copy")
def _to_layout(input: Value, *, dtype: Value = None, layout: Value = None, device: Value = None, **_: Value) -> Spelled:
    return spell(Tensor.to, input, *(value for value in (device, dtype) if value is not None))


RAW |= {
    **dict.fromkeys(["alias", "lift_fresh_copy", "lift_fresh", "lift"], lambda input: spell(torch.clone, input)),
    "numpy_T": lambda input: spell(getattr, input, "T"),
    "mT": lambda input: spell(getattr, input, "mT"),
    "mH": lambda input: spell(getattr, input, "mH"),
    "matrix_H": lambda input: spell(getattr, input, "H"),
    "to.dtype": lambda input, dtype, *_, **__: spell(Tensor.to, input, dtype),
    "to.device": lambda input, device, dtype, *_, **__: spell(Tensor.to, input, device, dtype),
    "to.other": lambda input, other, *_, **__: spell(Tensor.to, input, other),
}


@called(METHODS, "new")
def _new(input: Value, *values: Value, **settings: Value) -> Spelled:
    """Of this size, unless the value is data or another tensor. A single node of a graph may be any of these."""
    size = settings.get("size", values[0] if len(values) == 1 else values or 0)
    is_size = "size" in settings or len(values) != 1 or isinstance(size, (int, torch.SymInt, torch.Size))
    if not is_size or settings.keys() - {"size", "device"}:
        return spell(Tensor.new, input, *values, **settings)
    return spell(Tensor.new_empty, input, size, **{name: settings[name] for name in settings if name != "size"})


RAW["polygamma_"] = METHODS["polygamma"] = lambda input, n: spell(torch.polygamma, n, input)
METHODS["where"] = lambda input, condition, other: spell(torch.where, condition, input, other)
METHODS["__len__"] = lambda input: spell(Tensor.size, input, 0)
for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": torch.remainder, "pow": operator.pow, "matmul": operator.matmul,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}.items():  # fmt: skip
    METHODS[f"__r{_name}__"] = functools.partial(lambda f, input, other: spell(f, other, input), _function)
