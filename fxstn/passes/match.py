"""What the specs ask for, matched with a graph: `bind` decides, once, which λ belongs to which of its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxstn.frontends.decompositions.recurrent import STATEFUL
from fxstn.hp import (
    OPERATIONS,
    Activity,
    Auxiliary,
    DropConnect,
    Dropout,
    Hyperparameter,
    JacobianNorm,
    LossTerms,
    Operation,
    Scalar,
    Spec,
    WeightDecay,
)
from fxstn.hp.binding import Binding, Site
from fxstn.ir.errors import module_path, operation_name
from fxstn.ir.graphs import function_of, model_of, placeholders
from fxstn.ir.node_info import info_of
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.ops.noise import track_batch
from fxstn.passes.hyperize import layer_weights
from fxstn.rules import RULES, Rule

_SEVERAL = {torch.unbind, torch.chunk, torch.split, torch.tensor_split}  # results, none of which ends a stage


def operation_path(node: fx.Node) -> str:
    """What patterns are matched against: the module's path, or 'path.node' for a functional call inside a module."""
    scope = info_of(node).scope
    if node.target in OPERATIONS or (scope and issubclass(scope[-1].kind, _DropoutNd)):
        return module_path(node)
    return f"{module_path(node)}.{node.name}".lstrip(".")


def bind(module: fx.GraphModule, specs: Sequence[Spec] | None) -> Binding:
    """Match specs (None: every random operation found, or else dropout inserted by stages) with a canonical training graph.

    Raises ValueError for a pattern that matches nothing, a module that is never called, a site asked for twice, TypeError for
    what is no list of specs.
    """
    hyperparameters: list[Hyperparameter] = []
    sites: list[Site] = []
    penalties: list[tuple[str, int, int]] = []
    jacobian: list[tuple[int, int | None]] = []
    dropped: list[tuple[str, int]] = []

    def add(spec: Spec, path: str, starts: Mapping[str, float] | None = None) -> tuple[int, ...]:
        if not (spec.shared and len(hyperparameters) > first):
            hyperparameters.extend(spec.hyperparameters(path, starts))
        return tuple(range(len(hyperparameters) - len(spec.numbers), len(hyperparameters)))

    if specs is not None and not isinstance(specs, (list, tuple)):
        raise TypeError(f"hparams={specs!r} must be a list of specs, such as [hp.Dropout()], or None")
    for spec in _default_specs(module) if specs is None else specs:
        first = len(hyperparameters)
        if isinstance(spec, (Dropout, Operation, Activity)):
            for path, places, starts in _sites(module, spec):
                indices = add(spec, path, starts)
                sites += [Site(indices, path, place[0], spec, *place[1:]) for place in places]
        elif isinstance(spec, (WeightDecay, DropConnect)):
            for path, names in _weights(module, spec):
                (index,) = add(spec, path)
                if isinstance(spec, WeightDecay):
                    penalties += [(name, index, spec.norm) for name in names]
                else:
                    dropped += [(name, index) for name in names]
        elif isinstance(spec, JacobianNorm):
            jacobian.append((add(spec, "")[0], spec.projections))
        elif isinstance(spec, Scalar):
            add(spec, "")
        else:
            raise TypeError(f"hparams holds {spec!r}, which is no spec of fxstn.hp; write hp.Dropout() say, in a list")
    requests = [
        (type(site.spec).__name__, site.path) for site in {(site.indices, site.path): site for site in sites}.values()
    ]
    requests += [(f"WeightDecay with norm {norm}", name) for name, _, norm in penalties]
    requests += [("DropConnect", name) for name, _ in dropped]
    if repeated := sorted({place for place in requests if requests.count(place) > 1}):
        text = ", ".join(f"{kind} is asked for twice at {path!r}" for kind, path in repeated)
        raise ValueError(f"{text}; match each site once")
    order = {node.name: position for position, node in enumerate(module.graph.nodes)}
    auxiliary = sorted((site for site in sites if isinstance(site.spec, Auxiliary)), key=lambda site: order[site.node])
    terms = LossTerms(tuple(penalties), tuple(site.spec for site in auxiliary), tuple(jacobian))  # type: ignore[misc]
    return Binding(tuple(hyperparameters), tuple(sites), tuple(dropped), tuple(auxiliary), terms)


def _default_specs(module: fx.GraphModule) -> list[Spec]:
    """A spec for every kind of random operation in the model, in the order they act; dropout where there is none."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    kinds = dict.fromkeys(OPERATIONS[target] for target in targets if target in OPERATIONS)
    specs: list[Spec] = [kind() for kind in kinds]
    return [*specs, Dropout()] if not specs or not DROPOUTS.isdisjoint(targets) else specs


def own_strengths(node: fx.Node) -> tuple:
    """The strengths that an operation of the model has itself."""
    return node.args[1:2] if node.target in DROPOUTS else node.args[1:]


def _weights(module: fx.GraphModule, spec: Spec) -> Iterator[tuple[str, list[str]]]:
    """(path, its weights) for each match of one spec: a layer, or one weight of a layer that is not matched itself."""
    layers: dict[str, list[str]] = {}
    for name in layer_weights(module):
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    paths = [path for layer, names in layers.items() for path in (layer, *names)]
    matched = spec.match(paths) if spec.where else list(layers)
    for path in matched:
        if path in layers:
            yield path, layers[path]
        elif path.rpartition(".")[0] not in matched:
            yield path, [path]


def _sites(module: fx.GraphModule, spec: Spec) -> Iterator[tuple[str, list[tuple], Mapping[str, float] | None]]:
    """(path, its places as Site fields, starts or None for the spec's own) for each match of one spec."""
    if isinstance(spec, Operation) and spec.follows:
        results = _results(module, spec.follows)
        function = operation_name(spec.follows)
        if not results:
            raise ValueError(f"{spec!r}: the model calls no {function} when it trains, and it acts on nothing else")
        what = f", a module whose output is the result of {function}"
        for path in spec.match(results, what) if spec.where else results:
            yield path, [(node.name, True) for node in results[path]], None
        return
    existing: dict[str, list[fx.Node]] = {}
    dropout, inserts = isinstance(spec, Dropout), getattr(spec, "inserts", True)
    for node in module.graph.nodes:
        own = node.target in DROPOUTS if dropout else OPERATIONS.get(node.target) is type(spec)
        if node.op == "call_function" and own:
            existing.setdefault(operation_path(node), []).append(node)
    if not spec.where:
        for path, nodes in existing.items():
            starts = dict(zip(spec.numbers, map(float, own_strengths(nodes[0])), strict=True))
            yield path, [(node.name,) for node in nodes], starts
        if not existing and inserts:
            if places := _input_places(module, but_indices=dropout)[: None if dropout else 1]:
                yield "input", places, None
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


def _results(module: fx.GraphModule, function: Callable) -> dict[str, list[fx.Node]]:
    """Where a function is called, by the module whose output is its result; by 'path.node' where it is not."""
    nodes_at: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is function:
            path = module_path(node)
            ends = any(call.path == path for call in info_of(node).exits)
            nodes_at.setdefault(path if ends else operation_path(node), []).append(node)
    return nodes_at


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (outer == "" or inner.startswith(outer + "."))


def _input_places(module: fx.GraphModule, but_indices: bool = False) -> list[tuple]:
    """Places at the inputs; but_indices: without those that are looked up in a table, where nothing can be dropped."""
    inputs = [node for node in placeholders(module.graph) if not node.args]
    return [(node.name, True) for node in inputs if not (but_indices and _looked_up(node))]


def _looked_up(node: fx.Node) -> bool:
    """Whether a value has the indices of a lookup, as it is or in another shape."""
    return any(_looks_up(user, node) or (_is_linear(user) and _looked_up(user)) for user in node.users)


def _looks_up(node: fx.Node, indices: fx.Node) -> bool:
    rule = _rule_of(node)
    return rule is not None and node.args[:1] == (indices,) and any(use.role == "table" for use in rule.reads.values())


def _is_linear(node: fx.Node) -> bool:
    rule = _rule_of(node)
    return rule is not None and rule.kind == "linear"


def _rule_of(node: fx.Node) -> Rule | None:
    return RULES.get(function_of(node)) if node.op == "call_function" else None


def _left(module: fx.GraphModule) -> Iterator[tuple[fx.Node, int, str]]:
    """(value, number of a module call, path) for every value that a module call puts out; of a recurrent module, whose state
    comes out too, the first that is used."""
    whole: set[int] = set()
    for node in module.graph.nodes:
        for call, path, kind in info_of(node).exits:
            if not issubclass(kind, STATEFUL):
                yield node, call, path
            elif call not in whole and node.users:
                whole.add(call)
                yield node, call, path


def _exits(module: fx.GraphModule, path: str, spec: Spec) -> list[tuple]:
    """Places after every call of the module at `path`; for the root, its outputs."""
    if path == "":
        output = next(node for node in module.graph.nodes if node.op == "output")
        return [(node.name, True) for node in output.all_input_nodes]
    places = [(node.name, True, call) for node, call, called in _left(module) if called == path]
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
        return next((path for _, path, _ in info_of(node).scope if path in weighted), None)

    ends: dict[str, fx.Node] = {}
    for node, _, path in _left(module):
        if path in weighted:
            ends.pop(path, None)
            ends[path] = node
    for path, node in list(ends.items())[:-1]:
        last = path
        while (follower := _only_follower(node)) is not None and stage_of(follower) is None:
            node = follower
            last = next((p for _, p, _ in info_of(node).exits if p), last)
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
