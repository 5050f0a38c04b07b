"""Operations of emitted graphs that belong to no kind of layer: tangents of results and of losses, and of any one operation."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxstn.ir.containers import rebuilt
from fxstn.ir.staging import staged
from fxstn.ops import forward_mode
from fxstn.ops.complex_numbers import holds_complex, real_product
from fxstn.ops.linear_maps import differentiates, self_adjoint


@self_adjoint
def softmax_jacobian(tangent: Tensor, y: Tensor, dim: int) -> Tensor:
    """y ⊙ (dx − Σ y dx) along `dim`: the symmetric Jacobian of a softmax whose result is y."""
    return torch.ops.aten._softmax_backward_data(tangent.to(y.dtype), y, dim, y.dtype)


@staged
def pick(tangent: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """Entries of `tangent` that max pooling chose: indices into its last `spatial` dimensions, flattened."""
    return tangent.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view_as(indices)


@staged
def change_of_norm(unit: Tensor, tangent: Tensor, dim: int) -> Tensor:
    """Re Σ conj(u) dv over every axis but `dim`, kept as axes of size 1; over all of them for dim = −1, as torch's weight norm
    counts: the tangent of ‖v‖, u = v/‖v‖."""
    axes = [axis for axis in range(unit.dim()) if axis != dim]
    return real_product(unit, tangent).sum(axes, keepdim=True)


@staged
def regions(boxes: Tensor | list[Tensor]) -> Tensor:
    """Regions as one tensor, (regions, 5), the image's number before each box.

    boxes: that tensor itself, or one (boxes, 4) for each image.
    """
    if isinstance(boxes, Tensor):
        return boxes
    return torch.cat([torch.nn.functional.pad(of_image, (1, 0), value=i) for i, of_image in enumerate(boxes)])


@staged
def pick_regions(tangent: Tensor, rois: Tensor, indices: Tensor) -> Tensor:
    """Entries of `tangent` that region max pooling chose.

    tangent: (batch, channels, H, W).
    rois: (regions, 5), the image's number first.
    indices: (regions, channels, h, w) into H·W; −1 for an empty bin, which is 0.

    Returns (regions, channels, h, w).
    """
    images = tangent[rois[:, 0].long()].flatten(2)
    chosen = images.gather(2, indices.flatten(2).clamp(min=0).long()).view_as(indices)
    return chosen * (indices >= 0)


@staged
def cast_tangent(tangent: Tensor, output: Tensor) -> Tensor:
    """A tangent converted as its primal was: to the type and device of `output`, zeros where that holds integers."""
    if output.is_floating_point() or output.is_complex():
        return tangent.to(output)
    return torch.zeros_like(tangent, device=output.device)


@staged
def abs_tangent(tangent: Tensor, x: Tensor) -> Tensor:
    """Tangent of |x|: sgn(x) dx, for complex x the real part of conj(x/|x|) dx."""
    return real_product(torch.sgn(x), tangent)


@staged
def along_channels(value: Tensor, output: Tensor) -> Tensor:
    """View (channels,) so that it broadcasts along dimension 1 of `output` (dimension 0 of a vector); () as it is.

    An output of no dimension has one channel.
    """
    if value.dim() == 0 or output.dim() == 0:
        return value.reshape(())
    return value.view(-1, *[1] * max(0, output.dim() - 2))


@staged
def expand_like(tangent: Tensor, output: Tensor) -> Tensor:
    """Broadcast a tangent to the shape of the result it belongs to; complex where that is."""
    if output.is_complex() and not tangent.is_complex():
        tangent = tangent.to(output.dtype)
    return tangent if tangent.shape == output.shape else tangent.expand_as(output)


@staged
def expand_to_both(x: Tensor, other: Tensor) -> Tensor:
    """x in the shape that it and another tensor broadcast to."""
    return x if x.shape == other.shape else x.expand(torch.broadcast_shapes(x.shape, other.shape))


@staged
def change_by_exponent(tangent: Tensor, y: Tensor, base: Tensor | complex, exponent: Tensor) -> Tensor:
    """y log(base) dn: the tangent of y = base^n in the exponent n, 0 where 0 has a power of at least 0."""
    if not y.is_complex():
        assert not isinstance(base, complex)
        return tangent * torch.where((base == 0) & (exponent >= 0), 0, torch.xlogy(y, base))
    base, exponent = (torch.as_tensor(value, dtype=y.dtype, device=y.device) for value in (base, exponent))
    still = (base == 0) & (exponent.imag == 0) & (exponent.real >= 0)
    return tangent * torch.where(still, 0, y * torch.log(base))


@staged
def zeros_tangent(output: object) -> object:
    """Real zeros for a floating-point output that depends on no weight; None for anything else.

    Several results of one operation get several.
    """
    if isinstance(output, Tensor):
        return torch.zeros_like(output) if output.is_floating_point() else None
    if isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        return rebuilt(output, [zeros_tangent(entry) for entry in output])
    return None


@staged
def plus_tangent(y: Any, dy: Any) -> object:
    """y + dy of the results of one operation, one by one; y itself where dy is None."""
    if isinstance(y, (tuple, list)) and dy is not None:
        return rebuilt(y, [plus_tangent(*pair) for pair in zip(y, dy, strict=True)])
    return y if dy is None else y + dy


@staged
def as_results_of(y: Any, entries: Iterable[object]) -> object:
    """The entries in a sequence of the type that an operation returned, such as torch.return_types.max."""
    return rebuilt(y, entries)


@functools.cache
def separable_loss(function: Callable[..., Any], classes: int | None = None) -> Callable[..., Any]:
    """A staged (args, kwargs, tangents) → (y, dy) of a loss, a sum or mean over examples or one value for each.

    classes: the axis of the first argument along which the entries of one loss lie; None: there is none.

    dy = Σ ∇y · dx by the loss's own backward: where each entry of an argument belongs to one loss only, one reverse pass of
    Σ y gives all of them. Where it does not, as in arguments that broadcast, it is `node_jvp`. Entries of tangents are None
    where an argument is constant. The arguments are constants for autograd, unless it records derivatives in them. With complex
    arguments it is torch.func.jvp: ∇y is a conjugate then, and y may be complex, which has no ∇y.
    """
    by_forward_mode = node_jvp(function)

    def of_one_loss(i: int, x: Tensor, y: Tensor) -> bool:
        if i == 0 and classes is not None and x.dim() == y.dim() + 1:
            return True
        return not y.dim() or x.shape == y.shape

    def loss(args: tuple, kwargs: dict, tangents: tuple) -> tuple[Tensor, Tensor]:
        if holds_complex(args, kwargs):
            y, dy = by_forward_mode(args, kwargs, tangents, {})
            return y, dy
        varying = [i for i, tangent in enumerate(tangents) if tangent is not None]
        full, again = list(args), differentiates(args, kwargs)
        with torch.enable_grad():
            for i in varying:
                own = again and args[i].requires_grad
                full[i] = args[i].view_as(args[i]) if own else args[i].detach().requires_grad_()
            y = function(*full, **kwargs)
            if not all(of_one_loss(i, full[i], y) for i in varying):
                return node_jvp(function, by_reverse=True)(args, kwargs, tangents, {})
            gradients = torch.autograd.grad(y.sum(), [full[i] for i in varying], create_graph=again)
        terms: list[Tensor] = []
        for i, gradient in zip(varying, gradients, strict=True):
            term = gradient * tangents[i]
            if y.dim() == 0:
                term = term.sum()
            elif classes is not None and term.dim() > y.dim():
                term = term.sum(classes)
            terms.append(term)
        return y if again else y.detach(), functools.reduce(operator.add, terms)

    loss.__name__ = f"loss_{getattr(function, '__name__', 'node')}"
    return staged(compiled=False)(loss)  # torch.compile does not follow a backward pass within a graph


@dataclass(frozen=True)
class _Slot:
    """Stands for a varying value in the arguments of a function."""

    index: int


def _is_size(value: object) -> bool:
    """Whether a value has to stay as it is: Tensor.new takes a plain tuple of the same entries for data."""
    return isinstance(value, torch.Size)


def _with_slots(value: Any, tangent: object, varying: list[tuple[Tensor, Tensor]]) -> object:
    """`value` with a slot for each part that has a tangent.

    tangent: structured like `value`, None where it is constant.
    varying: where (part, tangent) of each slot is appended.
    """
    if isinstance(tangent, (list, tuple)) and not _is_size(value):
        return rebuilt(value, [_with_slots(v, t, varying) for v, t in zip(value, tangent, strict=True)])
    if isinstance(tangent, dict):
        return {name: _with_slots(part, tangent.get(name), varying) for name, part in value.items()}
    if not isinstance(tangent, Tensor):
        return value
    varying.append((value, tangent))
    return _Slot(len(varying) - 1)


def _twice_reversed(
    function: Callable[..., Any], primals: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """(y, dy) by the derivative in u of uᵀ J, which autograd can differentiate in the primals.

    It cannot always in torch.func.jvp, which keeps what an operation has factorised (linalg.det, linalg.solve) as a constant.
    """
    slots: list[object] = []

    def varying(*values: Tensor) -> tuple[list[Tensor], Any]:
        y = function(*values)
        leaves = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
        slots[:] = [leaf.is_floating_point() or leaf.is_complex() for leaf in leaves]
        return list(itertools.compress(leaves, slots)), y

    both: Any = torch.func.vjp(varying, *primals, has_aux=True)
    results, pull, y = both
    transpose = torch.func.vjp(pull, [torch.ones_like(result) for result in results])[1]  # linear: at any point
    changes, on = iter(transpose(directions)[0]), iter(slots)
    return y, tree_map(lambda leaf: next(changes) if next(on) else torch.zeros_like(leaf), y)


@functools.cache
def node_jvp(function: Callable[..., Any], by_reverse: bool = False) -> Callable[..., Any]:
    """A staged (args, kwargs, tangents, named) → (y, dy) by torch.func.jvp of this one operation, where no rule exists.

    by_reverse: by reversing twice, in place of torch.func.jvp.
    tangents and named: structured like args and kwargs, None where an argument is constant.
    """

    def jvp(args: tuple, kwargs: dict, tangents: tuple, named: dict) -> tuple[Any, Any]:
        varying: list[tuple[Tensor, Tensor]] = []
        positional = [_with_slots(value, tangent, varying) for value, tangent in zip(args, tangents, strict=False)]
        positional += args[len(tangents) :]
        keywords = _with_slots(kwargs, named, varying)

        def of_varying(*values: Tensor) -> Any:
            fill = lambda leaf: values[leaf.index] if isinstance(leaf, _Slot) else leaf  # noqa: E731
            full, full_kwargs = tree_map(fill, (positional, keywords), is_leaf=_is_size)
            return function(*full, **full_kwargs)

        primals, directions = (tuple(pair[i] for pair in varying) for i in (0, 1))
        if by_reverse or differentiates(args, kwargs):
            return _twice_reversed(of_varying, primals, directions)
        return forward_mode.jvp(of_varying, primals, directions)

    jvp.__name__ = f"jvp_{getattr(function, '__name__', 'node')}"
    return staged(derivative_of=function)(jvp)


def of_real_numbers(
    function: Callable[..., Any], position: int, partial: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A staged partial of a rule, partial(dx, y, *arguments), which holds for real numbers alone.

    Where a number is complex it is torch.func.jvp of the operation.

    position: of the argument that dx belongs to.
    """
    by_forward_mode = node_jvp(function)

    def change(tangent: Tensor, y: Tensor, *args: object, **kwargs: object) -> Tensor:
        if not holds_complex(args, kwargs):
            return partial(tangent, y, *args, **kwargs)
        return by_forward_mode(args, kwargs, (*[None] * position, tangent), {})[1]

    change.__name__ = f"change_of_{getattr(function, '__name__', 'node')}"
    return staged(change)
