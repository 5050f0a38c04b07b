"""Which module of a model owns each operation that reads λ: what a forward that is not a graph has to know."""

from __future__ import annotations

from collections import Counter

from torch import fx

from fxstn.frontends.decompositions.layer_drop import LOOPS
from fxstn.frontends.decompositions.recurrent import STATEFUL
from fxstn.frontends.site_mode import Draw, ModuleSites
from fxstn.hp import OPERATIONS, Activity, Dropout, LayerDrop, Mixing, Operation
from fxstn.hp.binding import Binding, Site
from fxstn.hp.terms import Auxiliary
from fxstn.ir.graphs import function_of, output_of
from fxstn.ir.node_info import ModuleCall, info_of
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.passes.places import ordinals

_ROOT = ModuleCall(0, "", type(None))
_ELSEWHERE = "fxstn.transform with BilevelRunner"


def module_sites(graph: fx.Graph, binding: Binding) -> dict[str, ModuleSites]:
    """The sites of a binding by the path of the module that owns them.

    graph: canonical, of train mode, which the binding was made for.

    Raises ValueError for what only a graph can do: masks of weights, values that enter the loss, mixed targets.
    """
    _refuse(binding)
    owners = _Owners(graph)
    for site in binding.sites:
        if site.insert:
            owners.insert(site)
        else:
            owners.take_over(site)
    return owners.sites


def _refuse(binding: Binding) -> None:
    specs = [type(site.spec) for site in binding.sites if isinstance(site.spec, (Activity, Auxiliary, Mixing))]
    names = [f"hp.{spec.__name__}" for spec in specs]
    names += ["hp.DropConnect"] * bool(binding.dropped) + ["hp.JacobianNorm"] * bool(binding.terms.jacobian)
    if names:
        raise ValueError(
            f"{names[0]} needs more than the output of the model's own forward, which is what a loop of one's own has; "
            f"leave it out, or use {_ELSEWHERE}"
        )


class _Owners:
    """Collects the sites of a graph by module."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.sites = {"": ModuleSites(root=True)}
        self.ordinals = ordinals(graph)
        self.calls: dict[str, set[int]] = {}  # {module path: its calls}
        for node in graph.nodes:
            for call in info_of(node).scope:
                self.calls.setdefault(call.path, set()).add(call.number)
        self.counts = Counter(ordinal.path for ordinal in set(self.ordinals.values()) if ordinal.operation == "dropout")

    def call_of(self, node: fx.Node) -> ModuleCall:
        """The innermost module call that makes a node."""
        scope = info_of(node).scope
        return scope[-1] if scope else _ROOT

    def owner(self, path: str) -> ModuleSites:
        return self.sites.setdefault(path, ModuleSites())

    def take_over(self, site: Site) -> None:
        """A random operation that the model has."""
        node, call = self.nodes[site.node], self.call_of(self.nodes[site.node])
        own = self.owner(call.path)
        if node.target in DROPOUTS:
            own.dropouts[self.ordinals[node].number] = site.index
            own.count = self.counts[call.path]
            return
        draw = Draw(site.indices, function_of(node), dict(node.kwargs))
        if isinstance(site.spec, LayerDrop):
            owner = next(outer for outer in reversed(info_of(node).scope) if outer.kind in LOOPS)
            self.owner(owner.path).loop = LOOPS[owner.kind]
            own.residual = draw
            return
        others = [n for n in self.nodes.values() if n.target in OPERATIONS and self.call_of(n) == call]
        if not call.path or len(others) != 1:
            raise ValueError(
                f"{type(site.spec).__name__} at {site.path!r} is not a module alone; put it into nn.Sequential, or use "
                f"{_ELSEWHERE}"
            )
        own.whole = draw

    def insert(self, site: Site) -> None:
        """An operation after a value of the model."""
        node, spec = self.nodes[site.node], site.spec
        draw = Draw(site.indices)
        if isinstance(spec, Operation):
            draw = Draw(site.indices, spec.function, dict(spec.settings))
            if spec.follows is not None:
                call = self.call_of(node)
                self.owner(call.path).lookups[self.ordinals[node][1:]] = type(spec), draw
                return
        else:
            assert isinstance(spec, Dropout)
        if node.op == "placeholder":
            self.owner("").inputs.setdefault(str(node.target).lstrip("*"), []).append(draw)
            return
        exits = [call for call in info_of(node).exits if call.path and self._acts_after(call, site)]
        if exits:
            call = exits[-1]
            leaf = info_of(node).positions.get(call.number, 0 if issubclass(call.kind, STATEFUL) else None)
            self._append(self.owner(call.path).exits, (leaf, draw))
        elif not site.path and node in output_of(self.graph).all_input_nodes:
            self._append(self.owner("").exits, (None, draw))
        elif site.outside is None and (exits := [call for call in info_of(node).exits if call.path]):
            call = exits[-1]
            calls = sorted(self.calls[call.path])
            of_calls = self.owner(call.path).exits_of_calls
            if not of_calls:
                of_calls.extend([] for _ in calls)
            of_calls[calls.index(call.number)].append((info_of(node).positions.get(call.number), draw))
            self.owner("").counts = True
        else:
            call = self.call_of(node)
            if len(self.calls.get(call.path, ())) > 1:
                raise ValueError(
                    f"{type(spec).__name__} at {site.path!r} acts within module {call.path!r}, which is called several times; "
                    f"name a module that is called there alone, or use {_ELSEWHERE}"
                )
            # one of several results is no call of a forward: nothing is drawn there, and the comparison with the graph sees it
            if node in self.ordinals:
                self._append(self.owner(call.path).results.setdefault(self.ordinals[node][1:], []), draw)

    def _acts_after(self, call: ModuleCall, site: Site) -> bool:
        """Whether an operation after the output of a module call is that of the site."""
        return call.number == site.outside or (site.outside is None and len(self.calls[call.path]) == 1)

    def _append(self, draws: list, draw: object) -> None:
        """Enter what happens at all calls of a module, once."""
        if draw not in draws:
            draws.append(draw)
