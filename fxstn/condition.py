"""Pass 3, condition: random operations read their strengths from λ, and new ones are inserted where the specs ask.

`bind` decides, once, which λ belongs to which site of the training graph; `condition` rewrites a graph accordingly.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxstn.errors import module_path
from fxstn.graphs import add_placeholder, copied, model_of, placeholders
from fxstn.hp import OPERATIONS, DropConnect, Dropout, Operation, Quantity, Scalar, Spec, WeightDecay
from fxstn.hyperize import layer_weights
from fxstn.layers.noise import alpha_dropout_coefficients, dropout_mask, track_batch, weight_mask
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
    """Where the training graph reads λ[indices], the strengths of one operation.

    node: the operation that is taken over; or, with insert=True, the value that gets one of its own, for those of its
    readers that lie outside module call number `outside` (None: for all of them). spec: whose operation; `hp.Dropout`'s
    depends on the node that is taken over.
    """

    indices: tuple[int, ...]
    path: str
    node: str
    spec: Spec
    insert: bool = False
    outside: int | None = None

    @property
    def index(self) -> int:
        """The one strength of a dropout."""
        (index,) = self.indices
        return index


@dataclass(frozen=True)
class Binding:
    """quantities: what is tuned, in the order of λ. penalties: (parameter name, index of its weight decay, norm). dropped:
    (parameter name, index of its DropConnect rate)."""

    quantities: tuple[Quantity, ...]
    sites: tuple[Site, ...]
    penalties: tuple[tuple[str, int, int], ...]
    dropped: tuple[tuple[str, int], ...] = ()


def operation_path(node: fx.Node) -> str:
    """What patterns are matched against: the module's path, or 'path.node' for a functional call inside a module."""
    scope = node.meta.get("scope", ())
    if node.target in OPERATIONS or (scope and issubclass(scope[-1][2], _DropoutNd)):
        return module_path(node)
    return f"{module_path(node)}.{node.name}".lstrip(".")


def bind(module: fx.GraphModule, specs: Sequence[Spec] | None) -> Binding:
    """Match specs (None: every random operation found, or else dropout inserted by stages) with a canonical training graph.

    Raises ValueError for a pattern that matches nothing, a module that is never called, a site asked for twice.
    """
    quantities: list[Quantity] = []
    sites: list[Site] = []
    penalties: list[tuple[str, int, int]] = []
    dropped: list[tuple[str, int]] = []

    def add(spec: Spec, path: str, starts: Mapping[str, float] | None = None) -> tuple[int, ...]:
        if not (spec.shared and len(quantities) > first):
            quantities.extend(spec.quantities(path, starts))
        return tuple(range(len(quantities) - len(spec.numbers), len(quantities)))

    for spec in _found(module) if specs is None else specs:
        first = len(quantities)
        if isinstance(spec, (Dropout, Operation)):
            for path, found, starts in _sites(module, spec):
                indices = add(spec, path, starts)
                sites += [Site(indices, path, place[0], spec, *place[1:]) for place in found]
        elif isinstance(spec, (WeightDecay, DropConnect)):
            owners: dict[str, list[str]] = {}
            for name in layer_weights(module):
                owners.setdefault(name.rpartition(".")[0], []).append(name)
            for path in spec.match(owners) if spec.where else owners:
                (index,) = add(spec, path)
                if isinstance(spec, WeightDecay):
                    penalties += [(name, index, spec.norm) for name in owners[path]]
                else:
                    dropped += [(name, index) for name in owners[path]]
        elif isinstance(spec, Scalar):
            add(spec, "")
        else:
            raise TypeError(f"{spec!r} is not a spec of fxstn.hp")
    asked = [
        (type(site.spec).__name__, site.path) for site in {(site.indices, site.path): site for site in sites}.values()
    ]
    asked += [(f"WeightDecay with norm {norm}", name) for name, _, norm in penalties]
    asked += [("DropConnect", name) for name, _ in dropped]
    if repeated := sorted({place for place in asked if asked.count(place) > 1}):
        places = ", ".join(f"{kind} is asked for twice at {path!r}" for kind, path in repeated)
        raise ValueError(f"{places}; match each site once")
    return Binding(tuple(quantities), tuple(sites), tuple(penalties), tuple(dropped))


def _found(module: fx.GraphModule) -> list[Spec]:
    """A spec for every kind of random operation in the model, in the order they act; dropout where there is none."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    kinds = dict.fromkeys(OPERATIONS[target] for target in targets if target in OPERATIONS)
    specs: list[Spec] = [kind() for kind in kinds]
    return [*specs, Dropout()] if not specs or not DROPOUTS.isdisjoint(targets) else specs


def _strengths(node: fx.Node) -> tuple:
    """The strengths that an operation of the model has itself."""
    return node.args[1:2] if node.target in DROPOUTS else node.args[1:]


def _sites(module: fx.GraphModule, spec: Spec) -> Iterator[tuple[str, list[tuple], Mapping[str, float] | None]]:
    """(path, its places as Site fields, starts or None for the spec's own) for each match of one spec."""
    existing: dict[str, list[fx.Node]] = {}
    dropout, inserts = isinstance(spec, Dropout), getattr(spec, "inserts", True)
    for node in module.graph.nodes:
        own = node.target in DROPOUTS if dropout else OPERATIONS.get(node.target) is type(spec)
        if node.op == "call_function" and own:
            existing.setdefault(operation_path(node), []).append(node)
    if not spec.where:
        for path, nodes in existing.items():
            starts = dict(zip(spec.numbers, map(float, _strengths(nodes[0])), strict=True))
            yield path, [(node.name,) for node in nodes], starts
        if not existing and inserts:
            yield "input", _input_places(module)[: None if dropout else 1], None
            for path, node in _stages(module) if dropout else ():
                yield path, [(node.name, True)], None
        elif not existing:
            raise ValueError(f"{spec!r}: the model has no such operation, and none is inserted")
        return
    modules = ["input", *(name for name, _ in model_of(module).named_modules())] if inserts else []
    matched = spec.match([*modules, *(path for path in existing if path not in modules)])
    to_insert = [path for path in matched if path not in existing and path != "input"]
    outermost = [p for p in to_insert if not any(_contains(q, p) for q in to_insert)]
    for path in matched:
        if path == "input":
            yield path, _input_places(module)[: None if dropout else 1], None
        elif path in existing:
            yield path, [(node.name,) for node in existing[path]], None
        elif path in outermost:
            yield path, _exits(module, path, spec), None


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (outer == "" or inner.startswith(outer + "."))


def _input_places(module: fx.GraphModule) -> list[tuple]:
    return [(node.name, True) for node in placeholders(module.graph) if not node.args]


def _exits(module: fx.GraphModule, path: str, spec: Spec) -> list[tuple]:
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
        raise ValueError(f"{spec!r}: the module '{path}' is not called when the model trains; name another")
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


def condition(module: fx.GraphModule, binding: Binding | None, layouts: Layouts = PLAIN) -> fx.GraphModule:
    """Random operations as an explicit draw and what is done with it, with strengths from `hparams(condition)` where tuned.

    Adds the input `condition`: None, (h,) or (batch, h), unconstrained units. binding: None for an evaluation graph, which
    tunes nothing. layouts: where the examples are.
    """
    module = copied(module)
    graph = module.graph
    sites = binding.sites if binding else ()
    by_name = {node.name: node for node in graph.nodes}
    placeholder = add_placeholder(graph, "condition")
    hparams: fx.Node | None = None
    last_input = placeholders(graph)[-1]

    def read(index: int, name: str, before: fx.Node) -> fx.Node:
        nonlocal hparams
        if hparams is None:
            with graph.inserting_after(last_input):
                hparams = graph.create_node("call_module", "hparams", (placeholder,), name="strengths")
        with graph.inserting_before(before):
            entry: Any = (..., index)
            return graph.create_node("call_function", operator.getitem, (hparams, entry), name=name.replace(".", "_"))

    def strengths(site: Site, before: fx.Node) -> tuple[tuple[Any, ...], Examples]:
        place = layouts.get(site.node, BATCH_FIRST)
        dropout = isinstance(site.spec, Dropout)
        known = place is not None and (dropout or place == BATCH_FIRST)
        found = []
        for index, number in zip(site.indices, site.spec.numbers, strict=True):
            value = read(index, f"{site.path or 'output'}_{'p' if dropout else number}", before)
            with graph.inserting_before(before):
                what = f"{'dropout' if dropout else number} at '{site.path}'"
                found.append(value if known else graph.call_function(for_all_examples, (value, 0, what)))
        return tuple(found), (place or BATCH_FIRST) if known else BATCH_FIRST

    taken = {site.node: site for site in sites if not site.insert}
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in DROPOUTS or node.target in OPERATIONS):
            site = taken.get(node.name)
            _draw(graph, node, *(strengths(site, node) if site else (_strengths(node), BATCH_FIRST)))
    inserted = [site for site in sites if site.insert]
    for site in reversed(inserted):  # of two after one value the first asked for acts first
        _insert(graph, by_name[site.node], site, strengths, last_input)
    for name, index in binding.dropped if binding else ():
        for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == f"model.{name}"]:
            _drop_weights(graph, node, read(index, f"{name}_p", node.next), name)
    graph.lint()
    return module


def _draw(graph: fx.Graph, node: fx.Node, strengths: tuple, place: Examples) -> None:
    """Replace a random operation by its draw and what is done with it, in place, name kept."""
    x, operation = node.args[0], OPERATIONS.get(node.target)  # type: ignore[arg-type]
    if operation is None:
        _draw_dropout(graph, node, strengths[0], place)
    elif all(strength == 0 for strength in strengths):
        node.target, node.args, node.kwargs = torch.clone, (x,), {}
        node.meta["handed_through"] = True
    else:
        with graph.inserting_before(node):
            arguments: tuple = (x, *strengths)
            drawn = graph.create_node(
                "call_function", operation.draw, arguments, dict(node.kwargs), f"{node.name}_draw"
            )
        drawn.meta = {"scope": node.meta.get("scope", ())}
        node.target, node.args = operation.apply, (x, drawn)
        node.kwargs = node.kwargs if getattr(operation.apply, "staged", False) else {}  # torch's own take no settings


def _draw_dropout(graph: fx.Graph, node: fx.Node, p: fx.Node | float, place: Examples) -> None:
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


def _drop_weights(graph: fx.Graph, weight: fx.Node, p: fx.Node, name: str) -> None:
    """Give a parameter's value one mask for the whole batch; a copy of the parameter's node later in the graph gets another."""
    readers = list(weight.users)
    with graph.inserting_after(p):
        mask = graph.create_node("call_function", weight_mask, (weight, p), name=f"{name}_mask".replace(".", "_"))
    with graph.inserting_after(mask):
        product = graph.create_node(
            "call_function", operator.mul, (weight, mask), name=f"{name}_kept".replace(".", "_")
        )
    for node in (p, mask, product):
        node.meta = {"scope": weight.meta.get("scope", ())}
    for reader in readers:
        reader.replace_input_with(weight, product)


def _insert(graph: fx.Graph, value: fx.Node, site: Site, strengths: Any, last_input: fx.Node) -> None:
    """Give a value an operation of its own for its readers outside of one module call."""
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
    spec = site.spec
    function: Any = F.dropout
    arguments: tuple[Any, ...] = (value, 0.0, True)
    settings: dict[str, Any] = {}
    if isinstance(spec, Operation):
        function, arguments, settings = spec.function, (value, *[0.0] * len(spec.numbers)), spec.settings
    with graph.inserting_before(anchor):
        name = f"{site.path or 'output'}_{function.__name__}".replace(".", "_")
        result = graph.create_node("call_function", function, arguments, settings, name)
    result.meta = {"scope": scope, "stack_trace": value.meta.get("stack_trace")}
    _draw(graph, result, *strengths(site, result))
    for reader in readers:
        reader.replace_input_with(value, result)
