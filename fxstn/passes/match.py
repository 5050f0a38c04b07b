"""What the specs ask for, matched with a graph: `bind` decides, once, which λ belongs to which of its sites."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import cast

from torch import fx
from torch.fx.node import Argument

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
from fxstn.hp.hyperparameter import CHOSEN
from fxstn.ir.errors import operation_name
from fxstn.ir.graphs import function_of, model_of
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.passes.names import ModelNames
from fxstn.passes.parameter_uses import layer_weights
from fxstn.passes.places import (
    Ordinal,
    Place,
    input_places,
    is_module,
    ordinals,
    own_strengths,
    places_after,
    results_of,
    stage_ends,
)

Match = tuple[str, list[Place], Mapping[str, float] | None]


def bind(module: fx.GraphModule, specs: Sequence[Spec] | None, integers: Collection[str] = ()) -> Binding:
    """Match specs with a canonical training graph.

    specs: None asks for every random operation of the model, or else for dropout at the ends of its stages.
    integers: names of the inputs that are known to hold no floating point numbers.

    Raises ValueError for a pattern that matches nothing, a module that is never called, a site asked for twice.
    """
    specs = _default_specs(module) if specs is None else specs
    shared = Counter(name for spec in specs if spec.shared for name in spec.numbers)
    collector = _Collector(module, shared, integers)
    for spec in specs:
        collector.add(spec)
    collector.check_repeated()
    return collector.binding()


class _Collector:
    """What the specs of one binding come to, one spec after the other.

    shared: how many of them share a number of this name. Those of several specs are called by their patterns, too.
    integers: of `bind`.
    """

    def __init__(self, module: fx.GraphModule, shared: Mapping[str, int], integers: Collection[str]) -> None:
        self.module, self.shared, self.integers = module, shared, integers
        self.hyperparameters: list[Hyperparameter] = []
        self.sites: list[Site] = []
        self.penalties: list[tuple[str, int, int]] = []
        self.dropped: list[tuple[str, int]] = []
        self.jacobian: list[tuple[int, int | None]] = []

    def add(self, spec: Spec) -> None:
        first, at_first = len(self.hyperparameters), dict[str, float]()
        pattern = " ".join(spec.where) if any(self.shared[name] > 1 for name in spec.numbers) else ""

        def indices(path: str, starts: Mapping[str, float] | None = None) -> tuple[int, ...]:
            """Those of λ at one match. The matches of a shared spec have the same."""
            if not spec.shared or len(self.hyperparameters) == first:
                names = [hyperparameter.name for hyperparameter in self.hyperparameters]
                self.hyperparameters.extend(spec.hyperparameters(pattern if spec.shared else path, starts, names))
                at_first.update(starts or {})
            elif starts and at_first and starts != at_first:
                _warn_of_another_start(spec, path, at_first, starts)
                at_first.clear()  # said once
            end = len(self.hyperparameters)
            return tuple(range(end - len(spec.numbers), end))

        match spec:
            case Dropout() | Operation() | Activity():
                for path, places, starts in _matches(self.module, spec, self.integers):
                    own = indices(path, starts)
                    self.sites += [Site(own, path, place.node, spec, place.insert, place.outside) for place in places]
            case WeightDecay():
                for path, names in _weights(self.module, spec):
                    (index,) = indices(path)
                    self.penalties += [(name, index, spec.norm) for name in names]
            case DropConnect():
                for path, names in _weights(self.module, spec):
                    (index,) = indices(path)
                    self.dropped += [(name, index) for name in names]
            case JacobianNorm():
                self.jacobian.append((indices("")[0], spec.projections))
            case Scalar():
                indices("")
            case _:
                raise TypeError(
                    f"hparams holds {spec!r}, which is no spec of fxstn.hp; write hp.Dropout() say, in a list"
                )

    def check_repeated(self) -> None:
        """Raises ValueError where two specs, or two patterns of one, ask for the same."""
        matches = {(site.indices, site.path): site for site in self.sites}.values()
        requests = [(type(site.spec).__name__, site.path) for site in matches]
        requests += [(f"WeightDecay with norm {norm}", name) for name, _, norm in self.penalties]
        requests += [("DropConnect", name) for name, _ in self.dropped]
        if repeated := sorted({request for request in requests if requests.count(request) > 1}):
            text = ", ".join(f"{kind} is asked for twice at {path!r}" for kind, path in repeated)
            raise ValueError(f"{text}; match each site once")

    def binding(self) -> Binding:
        order = {node.name: position for position, node in enumerate(self.module.graph.nodes)}
        auxiliary = [site for site in self.sites if isinstance(site.spec, Auxiliary)]
        auxiliary.sort(key=lambda site: order[site.node])
        specs = tuple(cast(Auxiliary, site.spec) for site in auxiliary)
        terms = LossTerms(tuple(self.penalties), specs, tuple(self.jacobian))
        return Binding(tuple(self.hyperparameters), tuple(self.sites), tuple(self.dropped), tuple(auxiliary), terms)


def _warn_of_another_start(spec: Spec, path: str, at_first: Mapping[str, float], starts: Mapping[str, float]) -> None:
    """Warn where one λ takes the place of strengths that differ, unless the user says where it begins."""
    free = [name for name in starts.keys() & at_first.keys() if spec.numbers[name].origin != CHOSEN]
    if other := [name for name in spec.numbers if name in free and starts[name] != at_first[name]]:
        warnings.warn(
            f"{spec!r} with shared=True begins at {at_first[other[0]]:g}, as the first module has it; '{path}' has "
            f"{starts[other[0]]:g}: give init=, or leave shared out",
            stacklevel=2,
        )


def _default_specs(module: fx.GraphModule) -> list[Spec]:
    """A spec for every kind of random operation in the model, in the order they act; dropout where there is none."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    kinds = dict.fromkeys(OPERATIONS[target] for target in targets if target in OPERATIONS)
    specs: list[Spec] = [kind() for kind in kinds]
    return [*specs, Dropout()] if not specs or not DROPOUTS.isdisjoint(targets) else specs


def _weights(module: fx.GraphModule, spec: Spec) -> Iterator[tuple[str, list[str]]]:
    """(path, its weights) for each match of one spec.

    A match is a layer, or one tensor of a layer that does not match itself, or one parameter of such a tensor. Embeddings have
    weight decay where a pattern is their whole name. Exempt weights are left out, and undecayed ones
    unless the spec names no others.
    """
    names = ModelNames(model_of(module))
    tables = {name: names.levels(name) for name in layer_weights(module, "table") if isinstance(spec, WeightDecay)}
    named = [name for name, levels in tables.items() if not set(chain(*levels)).isdisjoint(spec.where)]
    weights = {name: names.levels(name) for name in (*layer_weights(module), *named)}
    shown = ", ".join(repr(layers[0] or name) for name, (layers, *_) in tables.items())
    what = f" (embeddings need a whole name: {shown})" if tables else ""
    every = dict.fromkeys(name for levels in weights.values() for level in levels for name in level)
    matched = set(spec.match(every, what) if spec.where else every)
    paths = {
        name: next((level[0] for level in levels if not matched.isdisjoint(level)), None)
        for name, levels in weights.items()
    }
    exempt, undecayed = (spec.exempt, spec.undecayed) if isinstance(spec, WeightDecay) else ((), ())
    own = {name: path for name, path in paths.items() if path is not None and name not in exempt}
    matches: dict[str, list[str]] = {}
    for name in [name for name in own if name not in undecayed] or own:
        matches.setdefault(own[name], []).append(name)
    yield from matches.items()


def _matched_names(
    module: fx.GraphModule, spec: Spec, paths: Iterable[str], what: str = ""
) -> dict[str, Collection[str]]:
    """{path: its names that a pattern matches}, of those that have any."""
    names = ModelNames(model_of(module))
    of = {path: names.of(path) for path in paths}
    matched = set(spec.match(chain(*of.values()), what))
    return {path: matched.intersection(own) for path, own in of.items() if not matched.isdisjoint(own)}


def _matches(module: fx.GraphModule, spec: Spec, integers: Collection[str]) -> Iterator[Match]:
    """(path, its places, starts or None for the spec's own) for each match of one spec."""
    if isinstance(spec, Operation) and spec.follows:
        yield from _matching_results(module, spec)
    elif spec.where:
        yield from _matching_patterns(module, spec, integers)
    else:
        yield from _matches_by_default(module, spec, integers)


def _matching_results(module: fx.GraphModule, spec: Operation) -> Iterator[Match]:
    """Where the function is called that an operation follows."""
    assert spec.follows is not None
    results, function = results_of(module, spec.follows), operation_name(spec.follows)
    if not results:
        raise ValueError(f"{spec!r}: the model calls no {function} when it trains, and it acts on nothing else")
    what = f", a module whose output is the result of {function}"
    for path in _matched_names(module, spec, results, what) if spec.where else results:
        yield path, [Place(node.name, True) for node in results[path]], None


def _matches_by_default(module: fx.GraphModule, spec: Spec, integers: Collection[str]) -> Iterator[Match]:
    """Operations of the spec's kind that the model has, at their own strengths; where it has none, the usual places."""
    existing = _existing(module, spec)
    for path, nodes in existing.items():
        yield _own(module, spec, path, nodes)
    if existing:
        return
    if not _inserts(spec):
        raise ValueError(f"{spec!r}: the model has no such operation, and none is inserted")
    if places := _at_input(module, spec, integers, but_indices=isinstance(spec, Dropout)):
        yield "input", places, None
    if isinstance(spec, Dropout):
        yield from ((path, places, None) for path, places in stage_ends(module))


def _own(module: fx.GraphModule, spec: Spec, path: str, nodes: list[fx.Node]) -> Match:
    """The match of operations of the model: at the strengths of the first."""
    strengths = zip(spec.numbers, own_strengths(nodes[0]), strict=True)
    starts = {name: number for name, value in strengths if (number := _number(module, value)) is not None}
    return path, [Place(node.name) for node in nodes], starts


def _number(module: fx.GraphModule, strength: Argument) -> float | None:
    """A strength of the model's own; None for one that the forward computes."""
    if isinstance(strength, fx.Node):
        return float(operator.attrgetter(str(strength.target))(module)) if strength.op == "get_attr" else None
    return float(cast(float, strength))


def _matching_patterns(module: fx.GraphModule, spec: Spec, integers: Collection[str]) -> Iterator[Match]:
    """Operations of the spec's kind that a pattern matches; after other modules one is inserted, the outermost only.

    A module of several names is within another one where it is so by each name that a pattern matches.
    """
    existing = _existing(module, spec)
    modules = ["input", *(name for name, _ in model_of(module).named_modules())] if _inserts(spec) else []
    matched = _matched_names(module, spec, dict.fromkeys((*modules, *existing)))
    to_insert = [name for path, names in matched.items() if path not in existing and path != "input" for name in names]
    for path in matched:
        if path == "input":
            if not (places := _at_input(module, spec, integers)):
                raise ValueError(f"{spec!r}: no input holds floating point numbers, and it acts on nothing else; name a "
                                 "module, such as an embedding")  # fmt: skip
            yield path, places, None
        elif path in existing:
            yield _own(module, spec, path, existing[path])
        elif not all(any(_contains(other, name) for other in to_insert) for name in matched[path]):
            if not (places := places_after(module, path)):
                raise ValueError(f"{spec!r}: the module '{path}' is not called when the model trains; name another")
            yield path, places, None


def _existing(module: fx.GraphModule, spec: Spec) -> dict[str, list[fx.Node]]:
    """The operations of the model that the spec can take over, by path.

    Functional dropouts in the module 'a' are at 'a.dropout', 'a.dropout_1' and so on, for all calls of 'a'.
    """
    modules = {name for name, _ in model_of(module).named_modules()}
    nodes_at: dict[str, list[fx.Node]] = {}
    paths: dict[Ordinal, str] = {}
    for node, ordinal in ordinals(module.graph).items():
        if node.target in DROPOUTS if isinstance(spec, Dropout) else OPERATIONS.get(function_of(node)) is type(spec):
            if is_module(node):
                path = ordinal.path
            elif ordinal in paths:
                path = paths[ordinal]
            else:
                later = (ordinal._replace(number=number).name() for number in count(ordinal.number))
                paths[ordinal] = path = next(name for name in later if name not in modules and name not in nodes_at)
            nodes_at.setdefault(path, []).append(node)
    return nodes_at


def _inserts(spec: Spec) -> bool:
    return getattr(spec, "inserts", True)


def _at_input(module: fx.GraphModule, spec: Spec, integers: Collection[str], but_indices: bool = False) -> list[Place]:
    """All inputs are dropped from, and the first is augmented."""
    return input_places(module, integers, but_indices)[: None if isinstance(spec, Dropout) else 1]


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (outer == "" or inner.startswith(outer + "."))
