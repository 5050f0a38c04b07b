"""Forwards that take derivatives themselves, as physics-informed networks do: tangents by torch's forward mode.

Live duals keep primal values free of graphs, so that such a forward has nothing to differentiate there. Here the whole forward
runs once on parameters that carry their tangents, and torch differentiates its derivatives, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.frontends.live.calls import DERIVATIVES, Call
from fxstn.frontends.live.sites import RuntimeSites
from fxstn.frontends.live.tangent_table import differentiable
from fxstn.frontends.live.tracer import LiveTracer
from fxstn.ir.containers import leaves, mapped, tensors_in
from fxstn.ir.vocabulary import LINKS
from fxstn.ops.forward_mode import jvp
from fxstn.ops.kernels import zeros_tangent


class Derivatives(IntEnum):
    """What a forward takes: none, by reverse mode or under vmap, or by a forward mode of its own, which torch nests apart."""

    NONE = 0
    REVERSE = 1
    FORWARD = 2


def derivatives_in(call: Call) -> Derivatives:
    """What one operation of a forward takes, or is part of."""
    if call.original in DERIVATIVES:
        return Derivatives.REVERSE
    wrapped = any(differentiable(x) and is_functorch_wrapped_tensor(x) for x in tensors_in((call.args, call.kwargs)))
    kinds = [level.key() for level in get_interpreter_stack() or ()] if wrapped else []
    if TransformType.Jvp in kinds:
        return Derivatives.FORWARD
    return Derivatives.REVERSE if wrapped else Derivatives.NONE


class LinkTracer(LiveTracer):
    """Knows which values come from softmax or sigmoid, and from what."""

    def __init__(self, model: nn.Module, sites: RuntimeSites, strengths: Tensor | None) -> None:
        super().__init__(model, sites, strengths)
        self.links = WeakTensorKeyDictionary()

    def apply(self, call: Call) -> object:
        result = super().apply(call)
        if call.function in LINKS and isinstance(result, Tensor):
            self.links[result] = call
        return result


def with_tangents(
    model: nn.Module,
    tangents: Mapping[str, Tensor],
    kind: Derivatives,
    run: Callable[[dict[int, Tensor]], list[Tensor]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Results of a forward and their tangents, None where nothing varies.

    tangents: of parameters, by name.
    run: runs the forward with other tensors in place of parameters, {id of a parameter: tensor}.

    Raises what torch raises where an operation has no forward-mode derivative.
    """
    values = {name: p.detach().requires_grad_(differentiable(p)) for name, p in model.named_parameters()}
    ids = {name: id(p) for name, p in model.named_parameters()}

    def at(moved: Mapping[str, Tensor]) -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the fused kernels have no forward mode
            return run({ids[name]: moved.get(name, value) for name, value in values.items()})

    names = list(tangents)
    if kind is Derivatives.FORWARD:
        function = lambda *moved: at(dict(zip(names, moved, strict=True)))  # noqa: E731
        moved = jvp(function, tuple(values[n] for n in names), tuple(tangents.values()))
        return [(y.detach(), dy) for y, dy in zip(moved[0], moved[1], strict=True)]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(values[name], tangent) for name, tangent in tangents.items()}
        pairs = map(forward_ad.unpack_dual, at(duals))
        return [(pair.primal.detach(), pair.tangent) for pair in pairs]


def float_leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and differentiable(leaf)]


def both(output: object, pairs: list[tuple[Tensor, Tensor | None]]) -> tuple[object, object]:
    """(y, dy) in the structure of an output: real zeros where nothing varies, None for leaves that are not float."""
    primals, changes = iter(pairs), iter(pairs)

    def is_float(leaf: object) -> bool:
        return isinstance(leaf, Tensor) and differentiable(leaf)

    def tangent(leaf: object) -> object:
        if not is_float(leaf):
            return None
        y, dy = next(changes)
        return zeros_tangent(y) if dy is None else dy

    return mapped(lambda leaf: next(primals)[0] if is_float(leaf) else leaf, output), mapped(tangent, output)


def linearized(output: object, pairs: list[tuple[Tensor, Tensor | None]], links: list[Call | None]) -> object:
    """y + dy, or what softmax and sigmoid make of the linearised values before them (paper, Eq. 3.13).

    pairs: for each float leaf its value and tangent, or those of the argument of its link.
    """

    def moved(pair: tuple[Tensor, Tensor | None], link: Call | None) -> Tensor:
        y, dy = pair
        value = y if dy is None else y + dy
        return value if link is None else cast(Tensor, link.original(value, *link.args[1:], **link.kwargs))

    values = iter([moved(*entry) for entry in zip(pairs, links, strict=True)])
    return mapped(lambda leaf: next(values) if isinstance(leaf, Tensor) and differentiable(leaf) else leaf, output)
