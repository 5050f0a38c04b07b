"""Which values computed from parameters alone keep an axis of them: slices, joins, transposed, normalised or added weights.

A response scales a parameter along one axis. An operation that treats the entries along an axis of its operand apart,
g(W)[r] = g_r(W[r]), passes such a tangent on: g'(W)[s ⊙ R] = s ⊙ g'(W)[R]. Whether it does is found by trying: change some
rows of one operand and see what changes. Each parameter and each axis is followed by itself, so that W + B A has a part scaled
by rows, of W and of B, and one scaled by columns, of A.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxstn.ir.graphs import filled_in, forked_rng, function_of, model_of, reseed
from fxstn.ir.staging import draws
from fxstn.ir.vocabulary import is_size
from fxstn.passes.probe import changed
from fxstn.rules import RULES

MOST_RUNS = 64
SIZE = 2  # in place of sizes of inputs, which are not known
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a value's tangent that comes from one parameter scaled along one axis.

    parameter: its name.
    of: the axis of the parameter.
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

    axes: {name of a parameter: the axes to try}.

    An operation that mixes all axes of what it reads, and a layer with an input of its own, ends the way: what it returns
    counts as an activation.
    """
    with forked_rng(), torch.no_grad():
        return _Walk(module, axes).run()


class _Walk:
    """One walk through a graph.

    values: of nodes that depend on no input, computed when they are needed; sizes of inputs are made up.
    """

    def __init__(self, module: fx.GraphModule, axes: Mapping[str, Iterable[int]]) -> None:
        self.module, self.axes = module, {f"model.{name}": (name, tuple(own)) for name, own in axes.items()}
        self.values: dict[fx.Node, Any] = {}
        self.result = Structure()
        self.constant = self.result.constants

    def run(self) -> Structure:
        parts = self.result.parts
        for number, node in enumerate(self.module.graph.nodes):
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
        self.result.parts[node] = [Part(name, axis, axis, ((0, shape[axis]),)) for axis in axes if shape[axis]]

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
                except Exception:  # sizes that are made up may not fit
                    self.result.lost |= {(p.parameter, p.of): node for p in lost}
                    return
                parts += own or []
                lost += [part] if own is None else []
        if not parts:
            return
        self.result.lost |= {(part.parameter, part.of): node for part in lost}
        self.result.parts[node] = _merged(parts)
        value = self.value(node)
        self.result.ranks[node] = value.dim() if isinstance(value, Tensor) else 0

    def _passed_on(self, node: fx.Node, source: fx.Node, part: Part, number: int) -> list[Part] | None:
        """The parts of the results of a node that keep an axis of one operand; None where one mixes it."""
        base = self.value(source)
        rows = base.shape[part.axis]
        bits = max(1, (rows - 1).bit_length())
        moves: list[list[tuple[Tensor, Tensor]]] = []
        unmoved = _tensors(self._computed(node, number, source, base))
        for bit in range(bits):
            pair = [
                _tensors(self._computed(node, number, source, _with_rows_moved(part.axis, bit, on, base)))
                for on in (1, 0)
            ]
            moves.append([(changed(y, a), changed(y, b)) for y, a, b in zip(unmoved, *pair, strict=True)])
        single = isinstance(self.value(node), Tensor)
        rows_of = [row for start, stop in part.runs for row in range(start, stop)]
        result: list[Part] = []
        for i, own in enumerate(zip(*moves, strict=True)):
            if not any(move.any() for pair in own for move in pair):
                continue
            decoded = _decode(list(own), rows, part.axis)
            if decoded is None or (runs := _joined([rows_of[position] for position in decoded[1]])) is None:
                return None
            result.append(_moved_on(part, source, decoded[0], runs, None if single else i))
        return result

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.module).detach()
            elif is_size(node) and not all(s in self.constant or s in self.result.parts for s in node.all_input_nodes):
                value = self._made_up(node)
            elif draws(node.target):
                value = torch.ones_like(self.value(node.all_input_nodes[0]))
            else:
                value = self._computed(node, 0)
            self.values[node] = value
        return self.values[node]

    def _made_up(self, node: fx.Node) -> Any:
        """A size of a value that depends on inputs, or its type or device."""
        what = node.args[1] if node.target is getattr else ""
        if what in ("dtype", "device"):
            return getattr(next(model_of(self.module).parameters()), str(what))
        return (
            torch.Size([SIZE] * 8) if what == "shape" or (node.target is Tensor.size and len(node.args) == 1) else SIZE
        )

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


def _with_rows_moved(axis: int, bit: int, on: int, value: Tensor) -> Tensor:
    """A value with the rows moved whose number has one bit set (`on` 1) or clear (0)."""
    numbers = torch.arange(value.shape[axis], device=value.device)
    chosen = ((numbers >> bit) & 1) == on
    noise = torch.empty_like(value).uniform_(0.5, 1.5) * (value.abs().mean() + 0.1)
    return value + noise * chosen.view([-1 if i == axis else 1 for i in range(value.dim())])


def _decode(moves: list[tuple[Tensor, Tensor]], rows: int, preferred: int) -> tuple[int, list[int]] | None:
    """(axis, row of each position along it) where each moves with one row only; None where there is no such axis.

    A position that depends on no row goes on where the last one was.
    """
    rank = moves[0][0].dim()
    for axis in sorted(range(rank), key=lambda candidate: candidate != preferred):
        sets, clears = (  # each (bits, positions)
            torch.stack([move[i].movedim(axis, 0).reshape(move[i].shape[axis], -1).any(1) for move in moves])
            for i in (0, 1)
        )
        if (sets & clears).any():
            continue
        depends = (sets | clears).any(0).tolist()
        numbers = (sets.long() << torch.arange(len(moves), device=sets.device)[:, None]).sum(0).tolist()
        result: list[int] = []
        for number, known in zip(numbers, depends, strict=True):
            result.append(number if known else (result[-1] + 1) % rows if result else 0)
        if all(number < rows for number in result):
            return axis, result
    return None


def _joined(rows: list[int]) -> Runs | None:
    """Consecutive rows as runs; None for too many."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple(runs) if len(runs) <= MOST_RUNS else None
