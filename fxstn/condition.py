"""Pass 3, condition: dropout reads its strength from λ, and new dropout is inserted where the specs ask for it.

`bind` decides, once, which λ belongs to which site of the training graph; `condition` rewrites a graph accordingly.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxstn.errors import module_path
from fxstn.graphs import add_placeholder, copied, model_of, placeholders
from fxstn.hp import Dropout, Quantity, Scalar, Spec, WeightDecay, start_inside
from fxstn.hyperize import layer_weights
from fxstn.layers.noise import alpha_dropout_coefficients, dropout_mask, track_batch
from fxstn.layers.response import for_all_examples
from fxstn.layout import PLAIN, Layouts
from fxstn.mutation import DROPOUTS
from fxstn.tangents import BATCH_FIRST, Examples

SPATIAL: dict[Any, int] = {
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
    F.feature_alpha_dropout: 2,
}  # whole channels are dropped
ALPHA = {F.alpha_dropout, F.feature_alpha_dropout}


_SEVERAL = {torch.unbind, torch.chunk, torch.split, torch.tensor_split}  # results, none of which ends a stage


@dataclass(frozen=True)
class Site:
    """Where the training graph reads λ[index].

    node: the dropout that is taken over; or, with insert=True, the value that gets a dropout of its own, for those of
    its readers that lie outside module call number `outside` (None: for all of them).
    """

    index: int
    path: str
    node: str
    insert: bool = False
    outside: int | None = None


@dataclass(frozen=True)
class Binding:
    """quantities: what is tuned, in the order of λ. penalties: (parameter name, index of its weight decay)."""

    quantities: tuple[Quantity, ...]
    sites: tuple[Site, ...]
    penalties: tuple[tuple[str, int], ...]


def dropout_path(node: fx.Node) -> str:
    """What patterns are matched against: the module's path, or 'path.node' for a functional call inside a module."""
    scope = node.meta.get("scope", ())
    if scope and issubclass(scope[-1][2], _DropoutNd):
        return scope[-1][1]
    return f"{module_path(node)}.{node.name}".lstrip(".")


def bind(module: fx.GraphModule, specs: Sequence[Spec] | None) -> Binding:
    """Match specs (None: every dropout found, or inserted by stages) with the sites of a canonical training graph.

    Raises ValueError for a pattern that matches nothing, a module that is never called, a site asked for twice.
    """
    quantities: list[Quantity] = []
    sites: list[Site] = []
    penalties: list[tuple[str, int]] = []

    def add(spec: Spec, path: str, init: float | None = None) -> int:
        if not (spec.shared and len(quantities) > first):
            quantities.append(spec.quantity(path, init))
        return len(quantities) - 1

    for spec in [Dropout()] if specs is None else specs:
        first = len(quantities)
        if isinstance(spec, Dropout):
            for path, found, init in _dropout_sites(module, spec):
                index = add(spec, path, init)
                sites += [Site(index, path, *place) for place in found]
        elif isinstance(spec, WeightDecay):
            weights = layer_weights(module)
            owners: dict[str, list[str]] = {}
            for name in weights:
                owners.setdefault(name.rpartition(".")[0], []).append(name)
            for path in spec.match(owners):
                index = add(spec, path)
                penalties += [(name, index) for name in owners[path]]
        elif isinstance(spec, Scalar):
            add(spec, "")
        else:
            raise TypeError(f"{spec!r} is not a spec of fxstn.hp")
    dropped = [path for _, path in dict.fromkeys((site.index, site.path) for site in sites)]
    for kind, taken in (("dropout", dropped), ("weight decay", [name for name, _ in penalties])):
        if repeated := sorted({name for name in taken if taken.count(name) > 1}):
            raise ValueError(f"{kind} is asked for twice at {', '.join(map(repr, repeated))}; match each site once")
    return Binding(tuple(quantities), tuple(sites), tuple(penalties))


def _dropout_sites(module: fx.GraphModule, spec: Dropout) -> Iterator[tuple[str, list[tuple], float | None]]:
    """(path, its places as Site fields, start or None for the spec's own) for each hyperparameter of one spec."""
    existing: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in DROPOUTS:
            existing.setdefault(dropout_path(node), []).append(node)
    if not spec.where:
        if existing:
            for path, nodes in existing.items():
                yield path, [(node.name,) for node in nodes], start_inside(float(nodes[0].args[1]), spec)  # type: ignore[arg-type]
        else:
            yield "input", _input_places(module), None
            for path, node in _stages(module):
                yield path, [(node.name, True)], None
        return
    names = ["input", *(name for name, _ in model_of(module).named_modules())]
    matched = spec.match([*names, *(path for path in existing if path not in names)])
    to_insert = [path for path in matched if path not in existing and path != "input"]
    outermost = [p for p in to_insert if not any(_contains(q, p) for q in to_insert)]
    for path in matched:
        if path == "input":
            yield path, _input_places(module), None
        elif path in existing:
            yield path, [(node.name,) for node in existing[path]], None
        elif path in outermost:
            yield path, _exits(module, path), None


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (outer == "" or inner.startswith(outer + "."))


def _input_places(module: fx.GraphModule) -> list[tuple]:
    return [(node.name, True) for node in placeholders(module.graph) if not node.args]


def _exits(module: fx.GraphModule, path: str) -> list[tuple]:
    """Places after every call of the module at `path`; for the root, its outputs."""
    if path == "":
        output = next(node for node in module.graph.nodes if node.op == "output")
        return [(node.name, True) for node in output.all_input_nodes]
    places = [
        (node.name, True, call)
        for node in module.graph.nodes
        for call, called, _ in node.meta.get("exits", ())
        if called == path
    ]
    if not places:
        raise ValueError(f"hp.Dropout: the module '{path}' is not called when the model trains; name another")
    return places


def _stages(module: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """(path, value) at the end of each top-level stage in execution order, the last excepted.

    A stage is a top-level module with weights and what follows it without any: norm, activation, pooling, flatten.
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
        return next((path for _, path, _ in node.meta.get("scope", ()) if path in weighted), None)

    ends: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        for _, path, _ in node.meta.get("exits", ()):
            if path in weighted:
                ends.pop(path, None)
                ends[path] = node
    for path, node in list(ends.items())[:-1]:
        last = path
        while (follower := _only_follower(node)) is not None and stage_of(follower) is None:
            node = follower
            last = next((p for _, p, _ in node.meta.get("exits", ()) if p), last)
        yield last, node


def _only_follower(node: fx.Node) -> fx.Node | None:
    """The single reader of a value, when it computes with that value and parameters alone."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    others = [source for source in user.all_input_nodes if source is not node]
    alone = all(source.op == "get_attr" or source.target is track_batch for source in others)
    several = user.target in _SEVERAL
    return user if user.op == "call_function" and user.args[0] is node and alone and not several else None


def condition(module: fx.GraphModule, sites: Sequence[Site], layouts: Layouts = PLAIN) -> fx.GraphModule:
    """Dropout as an explicit draw of noise and a product, with strengths from `hparams(condition)` where tuned.

    Adds the input `condition`: None, (h,) or (batch, h), unconstrained units. layouts: where the examples are.
    """
    module = copied(module)
    graph = module.graph
    by_name = {node.name: node for node in graph.nodes}
    placeholder = add_placeholder(graph, "condition")
    strengths: fx.Node | None = None
    last_input = placeholders(graph)[-1]

    def strength(site: Site, before: fx.Node) -> tuple[fx.Node, Examples]:
        nonlocal strengths
        if strengths is None:
            with graph.inserting_after(last_input):
                strengths = graph.create_node("call_module", "hparams", (placeholder,), name="strengths")
        with graph.inserting_before(before):
            name = f"{site.path or 'output'}_p".replace(".", "_")
            index: Any = (..., site.index)
            p = graph.create_node("call_function", operator.getitem, (strengths, index), name=name)
            place = layouts.get(site.node, BATCH_FIRST)
            if place is None:
                p = graph.call_function(for_all_examples, (p, 0, f"dropout at '{site.path}'"))
            return p, place or BATCH_FIRST

    taken = {site.node: site for site in sites if not site.insert}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in DROPOUTS:
            site = taken.get(node.name)
            _draw(graph, node, *(strength(site, node) if site else (node.args[1], BATCH_FIRST)))  # type: ignore[arg-type]
    for site in sites:
        if site.insert:
            _insert(graph, by_name[site.node], site, strength, last_input)
    graph.lint()
    return module


def _draw(graph: fx.Graph, node: fx.Node, p: fx.Node | float, place: Examples) -> None:
    """Replace a dropout node by its noise and the product with it, in place, name kept."""
    x, spatial = node.args[0], SPATIAL.get(node.target, 0)
    with graph.inserting_before(node):
        draw = alpha_dropout_coefficients if node.target in ALPHA else dropout_mask
        arguments: tuple = (x, p, spatial) if spatial or place != BATCH_FIRST else (x, p)
        arguments += ((place.axis, place.left, place.right),) if place != BATCH_FIRST else ()
        noise = graph.create_node("call_function", draw, arguments, name=f"{node.name}_mask")
        noise.meta = {"scope": node.meta.get("scope", ())}
        if node.target in ALPHA:
            multiplier = graph.call_function(operator.getitem, (noise, 0))
            shift = graph.call_function(operator.getitem, (noise, 1))
            product = graph.call_function(operator.mul, (x, multiplier))
            node.target, node.args, node.kwargs = operator.add, (product, shift), {}
        else:
            node.target, node.args, node.kwargs = operator.mul, (x, noise), {}


def _insert(graph: fx.Graph, value: fx.Node, site: Site, strength: object, last_input: fx.Node) -> None:
    """Give a value a dropout of its own for its readers outside of one module call."""
    after = last_input if value.op == "placeholder" else value
    readers = [
        user
        for user in value.users
        if site.outside is None or all(call != site.outside for call, _, _ in user.meta.get("scope", ()))
    ]
    scope = tuple(entry for entry in value.meta.get("scope", ()) if entry[0] != site.outside)
    anchor = after.next
    while anchor.op == "placeholder" or anchor.target == "hparams":
        anchor = anchor.next
    with graph.inserting_before(anchor):
        name = f"{site.path or 'output'}_dropout".replace(".", "_")
        result = graph.create_node("call_function", F.dropout, (value, 0.0, True), name=name)
    result.meta = {"scope": scope, "stack_trace": value.meta.get("stack_trace")}
    _draw(graph, result, *strength(site, result))  # type: ignore[operator]
    for reader in readers:
        reader.replace_input_with(value, result)
