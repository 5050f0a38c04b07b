"""Which values computed from parameters alone keep an axis of them: slices, joins, transposed, normalised or added weights.

A response scales a parameter along one axis. An operation that treats the entries along an axis of its operand apart,
g(W)[r] = g_r(W[r]), passes such a tangent on: g'(W)[s ⊙ R] = s ⊙ g'(W)[R]. Whether it does is found by trying: change some
rows of one operand and see what changes. Each parameter and each axis is followed by itself, so that W + B A has a part scaled
by rows, of W and of B, and one scaled by columns, of A.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.graphs import filled_in, function_of, map_leaves, model_of
from fxstn.ir.staging import draws
from fxstn.ir.tangents import WHOLE, ZERO
from fxstn.ir.vocabulary import is_size
from fxstn.passes.moved_rows import Runs, decode, joined, steps_of, with_rows_moved
from fxstn.passes.probe import changed
from fxstn.rules import RULES, NoRule, apply_rule

SIZES = (2, 3, 32, 48)  # in place of sizes of inputs, which are not known: what holds for two does not depend on them


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a value's tangent that comes from one parameter scaled along one axis.

    parameter: its name.
    of: the axis of the parameter, or WHOLE; that of the value is then WHOLE, too.
    axis: that of the value. Position p along it depends on one row of the parameter.
    runs: these rows (start, stop), joined.
    element: which of several results it is in; None for a single tensor.
    origins: (operand, part of its tangent) of all that it is computed from.
    """

    parameter: str
    of: int
    axis: int
    runs: Runs
    element: int | None = None
    origins: tuple[tuple[fx.Node, Part], ...] = ()

    @property
    def place(self) -> tuple[int, Runs, int | None]:
        return self.axis, self.runs, self.element


@dataclass
class Structure:
    """What of a canonical graph depends on some parameters and on no input.

    parts: {value: the parts of its tangent that keep an axis}.
    ranks: {value: its number of dimensions}, 0 for several results in one.
    lost: {(parameter, axis): the operation that mixes the entries along it}.
    constants: what has no tangent.
    shared: layers whose input is computed from parameters. Their results count as activations.
    """

    parts: dict[fx.Node, list[Part]] = field(default_factory=dict)
    ranks: dict[fx.Node, int] = field(default_factory=dict)
    lost: dict[tuple[str, int], fx.Node] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)
    shared: set[fx.Node] = field(default_factory=set)


def structure_of(module: fx.GraphModule, axes: Mapping[str, Iterable[int]]) -> Structure:
    """Follows parameters through all that is computed from parameters alone.

    axes: {name of a parameter: the axes to try}. As a WHOLE it goes through whatever has a rule.

    An operation that mixes all axes of what it reads, and a layer with an input of its own, ends the way: what it returns
    counts as an activation.
    """
    with forked_rng(), torch.no_grad():
        return _Walk(module, axes).run()


class _Walk:
    """One walk through a graph.

    size: what stands for sizes of inputs at present.
    values: {size: {node that depends on no input: its value}}, computed when they are needed.
    sized: nodes that depend on sizes of inputs.
    """

    def __init__(self, module: fx.GraphModule, axes: Mapping[str, Iterable[int]]) -> None:
        self.module, self.axes = module, {f"model.{name}": (name, tuple(own)) for name, own in axes.items()}
        self.size = SIZES[0]
        self.values: dict[int, dict[fx.Node, Any]] = {size: {} for size in SIZES}
        self.sized: set[fx.Node] = set()
        self.result = Structure()
        self.constant = self.result.constants

    def run(self) -> Structure:
        parts = self.result.parts
        for number, node in enumerate(self.module.graph.nodes):
            if self._is_made_up(node) or not self.sized.isdisjoint(node.all_input_nodes):
                self.sized.add(node)
            if node.op == "get_attr":
                if node.target in self.axes:
                    self._enter(node)
                else:
                    self.constant.add(node)
            elif node.op != "call_function":
                continue
            elif is_size(node) or (draws(node.target) and node.args[0] in parts):
                self.constant.add(node)
            elif all(source in parts or source in self.constant for source in node.all_input_nodes):
                if not any(source in parts for source in node.all_input_nodes) or _has_no_tangent(node):
                    self.constant.add(node)
                elif _is_layer_of(node, parts):
                    self.result.shared.add(node)
                else:
                    self._follow(node, number)
        return self.result

    def _enter(self, node: fx.Node) -> None:
        name, axes = self.axes[str(node.target)]
        shape = model_of(self.module).get_parameter(name).shape
        self.result.ranks[node] = len(shape)
        rows = {axis: 1 if axis == WHOLE else shape[axis] for axis in axes}
        self.result.parts[node] = [Part(name, axis, axis, ((0, size),)) for axis, size in rows.items() if size]

    def _follow(self, node: fx.Node, number: int) -> None:
        """Enter what a node keeps of the axes of its operands, unless that cannot be found out, or is nothing."""
        parts: list[Part] = []
        lost: list[Part] = []
        for source in dict.fromkeys(s for s in node.all_input_nodes if s in self.result.parts):
            for part in self.result.parts[source]:
                if node.target is operator.getitem and part.element is not None:
                    parts += [_moved_on(part, source, part.axis, part.runs)] if node.args[1] == part.element else []
                    continue
                try:
                    own = self._passed_on(node, source, part, number)
                except NoRule:
                    own = None
                except Exception:
                    self.result.lost |= {(p.parameter, p.of): node for p in lost}
                    return
                parts += own or []
                lost += [part] if own is None else []
        if not parts:
            return
        self.result.lost |= {(part.parameter, part.of): node for part in lost}
        self.result.parts[node] = _merged(parts)
        (value,) = self._at_sizes(node, 1, lambda: self.value(node))
        self.result.ranks[node] = value.dim() if isinstance(value, Tensor) else 0

    def _passed_on(self, node: fx.Node, source: fx.Node, part: Part, number: int) -> list[Part] | None:
        """What keeps an axis of one operand in the results of a node, at all sizes of inputs; None where one mixes it."""
        if part.of == WHOLE:
            return self._at_sizes(node, 1, lambda: self._whole(node, source, part))[0]
        results = self._at_sizes(node, 2, lambda: self._parts_after(node, source, part, number))
        places = [None if own is None else [one.place for one in own] for own in results]
        return results[0] if places[0] == places[-1] else None

    def _at_sizes(self, node: fx.Node, most: int, look: Callable[[], T]) -> list[T]:
        """What is seen for the first few sizes of inputs that a node can be computed for: one at least, or its error."""
        results: list[T] = []
        sizes = SIZES if node in self.sized else SIZES[:1]
        for self.size in sizes:
            try:
                results.append(look())
            except Exception:  # a size that is made up may not fit
                if self.size == sizes[-1] and not results:
                    raise
            if len(results) == most:
                break
        return results

    def _parts_after(self, node: fx.Node, source: fx.Node, part: Part, number: int) -> list[Part] | None:
        base = self.value(source)
        whole = part.runs == ((0, 1),)  # all of it has one scale, along any axis
        rows = 1 if whole else base.shape[part.axis]
        bits = max(1, (rows - 1).bit_length())
        moves: list[list[tuple[Tensor, Tensor]]] = []
        steps = steps_of(base)
        unmoved = _tensors(self._computed(node, number, source, base))
        for bit in range(bits):
            others = [with_rows_moved(None if whole else part.axis, bit, on, base, steps) for on in (1, 0)]
            pair = [_tensors(self._computed(node, number, source, other)) for other in others]
            moves.append([(changed(y, a), changed(y, b)) for y, a, b in zip(unmoved, *pair, strict=True)])
        single = isinstance(self.value(node), Tensor)
        rows_of = [row for start, stop in part.runs for row in range(start, stop)]
        result: list[Part] = []
        for i, own in enumerate(zip(*moves, strict=True)):
            if not any(move.any() for pair in own for move in pair):
                continue
            if whole and own[0][0].dim():
                axis = min(part.axis, own[0][0].dim() - 1)
                result.append(_moved_on(part, source, axis, part.runs, None if single else i))
                continue
            decoded = decode(list(own), rows, part.axis)
            if decoded is None or (runs := joined([rows_of[position] for position in decoded[1]])) is None:
                return None
            result.append(_moved_on(part, source, decoded[0], runs, None if single else i))
        return result

    def _whole(self, node: fx.Node, source: fx.Node, part: Part) -> list[Part] | None:
        """The parts of the results that vary with one operand, by the rule. Raises NoRule where there is none."""
        values = {other: self.value(other) for other in node.all_input_nodes}
        args, named = (
            map_leaves(structure, lambda leaf: values[source] if leaf is source else ZERO)
            for structure in (tuple(ZERO if isinstance(a, slice) else a for a in node.args), dict(node.kwargs))
        )
        filled = filled_in(node.args, values), filled_in(node.kwargs, values)
        _, dy = apply_rule(function_of(node), args, *filled, named)
        if isinstance(dy, (tuple, list)):
            return [_moved_on(part, source, WHOLE, part.runs, i) for i, entry in enumerate(dy) if entry is not ZERO]
        return [] if dy is ZERO else [_moved_on(part, source, WHOLE, part.runs)]

    def value(self, node: fx.Node) -> Any:
        values = self.values[self.size]
        if node not in values:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.module).detach()
            elif self._is_made_up(node):
                value = self._made_up(node)
            elif draws(node.target):
                value = torch.ones_like(self.value(node.all_input_nodes[0]))
            else:
                value = self._computed(node, 0)
            if node in self.sized and isinstance(value, int) and value <= 0:
                raise ValueError(f"an input of size {self.size} is too small for {node.name}")
            values[node] = value
        return values[node]

    def _is_made_up(self, node: fx.Node) -> bool:
        """Whether a node is a size, the type or the device of a value that depends on inputs."""
        known = (source in self.constant or source in self.result.parts for source in node.all_input_nodes)
        return node.op == "call_function" and is_size(node) and not all(known)

    def _made_up(self, node: fx.Node) -> Any:
        what = node.args[1] if node.target is getattr else ""
        if what in ("dtype", "device"):
            return getattr(next(model_of(self.module).parameters()), str(what))
        several = what == "shape" or (node.target is Tensor.size and len(node.args) == 1)
        return torch.Size([self.size] * 8) if several else self.size

    def _computed(self, node: fx.Node, number: int, source: fx.Node | None = None, moved: Tensor | None = None) -> Any:
        """What a node computes, with another value of one operand."""
        values = {
            other: moved if other is source and moved is not None else self.value(other)
            for other in node.all_input_nodes
        }
        values = {other: value.clone() if isinstance(value, Tensor) else value for other, value in values.items()}
        reseed(number)
        return function_of(node)(*filled_in(node.args, values), **filled_in(node.kwargs, values))


def _moved_on(part: Part, source: fx.Node, axis: int, runs: Runs, element: int | None = None) -> Part:
    """What becomes of a part in an operation that reads `source`."""
    return Part(part.parameter, part.of, axis, runs, element, ((source, part),))


def _has_no_tangent(node: fx.Node) -> bool:
    return node.target in RULES and RULES[function_of(node)].kind == "zero"


def _is_layer_of(node: fx.Node, parts: Mapping[fx.Node, object]) -> bool:
    """Whether a node is a layer or a norm of a learned input: that and its weights are computed from parameters."""
    rule = RULES.get(function_of(node))
    own = [
        position for position, argument in enumerate(node.args) if isinstance(argument, fx.Node) and argument in parts
    ]
    return rule is not None and len({position in rule.reads for position in own}) == 2


def _merged(parts: list[Part]) -> list[Part]:
    """Parts of one parameter and place, which come from several operands, as one."""
    result: dict[tuple, Part] = {}
    for part in parts:
        key = (part.parameter, part.of, *part.place)
        if key in result:
            part = replace(part, origins=(*result[key].origins, *part.origins))
        result[key] = part
    return list(result.values())


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)) and all(isinstance(entry, Tensor) for entry in value):
        return list(value)
    raise TypeError("no tensors")
