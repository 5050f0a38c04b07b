"""Places where an operation can act: after inputs and module calls, at the ends of stages, where a function is called."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxstn.frontends.decompositions.recurrent import STATEFUL
from fxstn.frontends.decompositions.torchvision import RANDOM
from fxstn.hp import OPERATIONS
from fxstn.ir.errors import module_path, operation_name
from fxstn.ir.facts import overloads
from fxstn.ir.graphs import function_of, model_of, output_of, placeholders
from fxstn.ir.node_info import info_of
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.ops.noise import track_batch
from fxstn.rules import RULES, Rule


class Place(NamedTuple):
    """One place of an operation, in the words of `fxstn.hp.binding.Site`.

    node: the operation that is taken over, or the value after which one is inserted.
    insert: whether one is inserted.
    outside: an inserted operation acts for the readers outside this module call; None: for all readers.
    """

    node: str
    insert: bool = False
    outside: int | None = None


def is_module(node: fx.Node) -> bool:
    """Whether a random operation is all that the innermost module around it does."""
    scope = info_of(node).scope
    return node.target in OPERATIONS or bool(scope and issubclass(scope[-1].kind, (_DropoutNd, *RANDOM)))


def own_strengths(node: fx.Node) -> tuple:
    """The strengths that an operation of the model has itself."""
    return node.args[1:2] if node.target in DROPOUTS else node.args[1:]


class Ordinal(NamedTuple):
    """Which operation of its module a node is: the same for every call of the module.

    path: of the innermost module.
    operation: its name, "dropout" for every kind of dropout.
    number: which of its calls in one call of the module.
    """

    path: str
    operation: str
    number: int

    def name(self) -> str:
        """What patterns are matched against: 'path.dropout', 'path.dropout_1', …"""
        name = self.operation.rpartition(".")[2]
        return f"{self.path}.{name}_{self.number}".lstrip(".") if self.number else f"{self.path}.{name}".lstrip(".")


def ordinals(graph: fx.Graph) -> dict[fx.Node, Ordinal]:
    """The ordinal of every operation of a canonical graph. To take one of several results is none.

    In a live recording, which lacks operations, an operation that is no dropout knows its number itself.
    """
    result: dict[fx.Node, Ordinal] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or _takes_one_of_several(node):
            continue
        scope, address = info_of(node).scope, info_of(node).address
        operation = "dropout" if node.target in DROPOUTS else operation_name(node.target)
        key = (scope[-1].number if scope else 0, operation)
        number, counts[key] = counts[key], counts[key] + 1
        if address is not None and address[0] == "operation" and operation != "dropout":
            number = address[3]
        result[node] = Ordinal(module_path(node), operation, number)
    return result


def _takes_one_of_several(node: fx.Node) -> bool:
    """Whether a node is one of several results of the operation before it."""
    address = info_of(node).address
    if address is not None and address[0] == "operation":
        return address[-1] is not None
    return node.target is operator.getitem and _returns_several(node.args[0])


def results_of(module: fx.GraphModule, function: Callable) -> dict[str, list[fx.Node]]:
    """Where a function is called, by the module whose output is its result; by its ordinal's name where it is not."""
    nodes_at: dict[str, list[fx.Node]] = {}
    for node, ordinal in ordinals(module.graph).items():
        if node.target is function:
            ends = any(call.path == ordinal.path for call in info_of(node).exits)
            nodes_at.setdefault(ordinal.path if ends else ordinal.name(), []).append(node)
    return nodes_at


def input_places(module: fx.GraphModule, integers: Collection[str], but_indices: bool = False) -> list[Place]:
    """Places after the inputs.

    integers: names of inputs to leave out, because they hold no floating point numbers: nothing can act there.
    but_indices: leave out the inputs that are looked up in a table, too.
    """
    inputs = [node for node in placeholders(module.graph) if not node.args and _argument(node) not in integers]
    return [Place(node.name, True) for node in inputs if not (but_indices and _has_indices(node))]


def _argument(node: fx.Node) -> str:
    """The name of the argument that a placeholder stands for, or holds a part of."""
    address = info_of(node).address
    return str(address[1]) if address is not None else str(node.target).lstrip("*")


def _has_indices(node: fx.Node) -> bool:
    """Whether a value holds the indices of a lookup, in this or in another shape."""
    return any(_reads_table_at(user, node) or (_is_linear(user) and _has_indices(user)) for user in node.users)


def _reads_table_at(node: fx.Node, indices: fx.Node) -> bool:
    """Whether a node is a lookup in a table, such as F.embedding, at these indices."""
    rule = _rule_of(node)
    return rule is not None and node.args[:1] == (indices,) and any(use.role == "table" for use in rule.reads.values())


def _is_linear(node: fx.Node) -> bool:
    rule = _rule_of(node)
    return rule is not None and rule.kind == "linear"


def _rule_of(node: fx.Node) -> Rule | None:
    return RULES.get(function_of(node)) if node.op == "call_function" else None


def _outputs(module: fx.GraphModule) -> Iterator[tuple[fx.Node, int, str]]:
    """(value, number of a module call, path) for every value that a module call returns.

    A recurrent module returns its state, too. Of its values only the first that is used counts. Of others all that are read
    count.
    """
    complete: set[int] = set()
    for node in module.graph.nodes:
        for call, path, kind in info_of(node).exits:
            if not issubclass(kind, STATEFUL):
                yield from ((value, call, path) for value in _values(node) if value.users)
            elif call not in complete and node.users:
                complete.add(call)
                yield node, call, path


def places_after(module: fx.GraphModule, path: str) -> list[Place]:
    """Places after every call of the module at `path`; for the root, after its outputs."""
    if path == "":
        return [Place(node.name, True) for node in output_of(module.graph).all_input_nodes]
    return [Place(node.name, True, call) for node, call, called in _outputs(module) if called == path]


def stage_ends(module: fx.GraphModule) -> Iterator[tuple[str, list[Place]]]:
    """(path, places) at the end of each top-level stage in execution order, the last excepted.

    A stage is a top-level module with weights and what follows it without any: norm, activation, pooling, flatten. The path
    is that of its last module; that of the module with weights where several stages end in one module, a pool say. A module
    that is called several times, or returns several values, ends with all of them.
    """
    root, prefix = model_of(module), ""
    while len(children := dict(root.named_children())) == 1 and not list(root.parameters(recurse=False)):
        ((name, root),) = children.items()
        prefix += f"{name}."
    weighted = {
        prefix + name: child
        for name, child in root.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters()) and not isinstance(child, _NormBase)
    }

    def stage_of(node: fx.Node) -> str | None:
        return next((path for _, path, _ in info_of(node).scope if path in weighted), None)

    ends: dict[str, dict[int, list[fx.Node]]] = {}  # values by call, in the order of the last call of each path
    for node, call, path in _outputs(module):
        if path in weighted:
            values = ends.pop(path, {})
            values.setdefault(call, []).append(node)
            ends[path] = values
    stages: list[tuple[str, str, list[Place]]] = []
    for path, calls in list(ends.items())[:-1]:
        last, nodes = path, [node for values in calls.values() for node in values]
        if len(nodes) > 1:  # as `places_after`
            stages.append((path, path, [Place(node.name, True, call) for call in calls for node in calls[call]]))
            continue
        (node,) = nodes
        while (follower := _only_follower(node)) is not None and stage_of(follower) is None:
            node = follower
            last = next((p for _, p, _ in info_of(node).exits if p), last)
        stages.append((path, last, [Place(value.name, True) for value in _values(node)]))
    for path, last, places in stages:
        shared = sum(other == last for _, other, _ in stages) > 1
        yield path if shared else last, places


def _only_follower(node: fx.Node) -> fx.Node | None:
    """The single reader of a value, when it computes with that value and parameters alone."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    others = [source for source in user.all_input_nodes if source is not node]
    alone = all(source.op == "get_attr" or source.target is track_batch for source in others)
    follows = user.op == "call_function" and user.args[0] is node and alone
    # a write without gradients, say, is a node of this recording and has no address in other runs
    lost = info_of(node).address is not None and info_of(user).address is None
    return user if follows and not lost and not _has_several_results(user) else None


def _values(node: fx.Node) -> list[fx.Node]:
    """The value of a node; of an operation with several results those of them that are read."""
    return list(node.users) if node.op == "call_function" and _has_several_results(node) else [node]


def _returns_several(value: object) -> bool:
    """Whether the schemas of an operation say that it returns several values, as torch.max does along a dimension."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    schemas = [overload._schema for overload in overloads(function_of(value)) if overload._schema.returns]
    several = [len(schema.returns) > 1 or "List" in str(schema.returns[0].type) for schema in schemas]
    along = "dim" in value.kwargs or any(isinstance(x, int) for x in value.args[1:2])
    return any(several) and (all(several) or along)


def _has_several_results(node: fx.Node) -> bool:
    """Whether an operation returns several tensors, each of which is read for itself, by its place or its name."""
    several = _returns_several(node)
    by_place = [reader.target is operator.getitem and isinstance(reader.args[1], int) for reader in node.users]
    by_name = [several and reader.target is getattr for reader in node.users]
    return bool(node.users) and all(map(operator.or_, by_place, by_name))
