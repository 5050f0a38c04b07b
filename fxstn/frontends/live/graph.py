"""The graphs of a live network: the original forward, run as it is, under a mode that carries what each one needs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.frontends.guards import mode_of, module_state, restore
from fxstn.frontends.interface import Root
from fxstn.frontends.live.containers import attributes, mapped, reachable
from fxstn.frontends.live.duals import Duals, Note
from fxstn.frontends.live.record import Recorded
from fxstn.frontends.live.tracer import Following, Position, Sites
from fxstn.hp.binding import Binding
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.node_info import info_of
from fxstn.ir.tangents import Scaled
from fxstn.ops.response import Response, for_all_examples, parameter_changes

_WHERE = "a forward that runs as it is"


def located(
    binding: Binding, addresses: Mapping[str, tuple], last: Mapping[str, int], positions: Mapping[tuple[str, int], int]
) -> Sites:
    """The sites of a recorded graph by address, which other runs of the same Python have too.

    addresses: of the nodes that sites name; last: number of the last call of each of their modules, from 0; positions:
    {(node, number of a module call): which leaf of its output the node is}.
    """
    sites = Sites()
    for site in binding.sites:
        kind, *address = addresses[site.node]
        if kind == "argument":
            sites.arguments[address[0]] = site.index
        elif site.insert and (site.outside is not None or not site.path):
            leaf = None if site.outside is None else positions.get((site.node, site.outside))
            if (place := Position(site.index, leaf)) not in sites.exits.setdefault(site.path, []):  # once for all calls
                sites.exits[site.path].append(place)
        elif kind == "exit":
            sites.exits.setdefault(address[0], []).append(Position(site.index, address[1]))
        else:
            path, operation, order, occurrence, element = address
            places = sites.inserted if site.insert else sites.taken
            places.setdefault((path, operation, order), {})[occurrence] = Position(site.index, element)
            sites.last[path] = last[path]
    return sites


def addresses(
    recorded: Recorded, binding: Binding
) -> tuple[dict[str, tuple], dict[str, int], dict[tuple[str, int], int]]:
    """What `located` takes: addresses of the nodes that the binding's sites name, the last calls of their modules, and which
    leaves of module outputs they are."""
    names = {site.node for site in binding.sites}
    known = {node.name: address for node in recorded.graph.nodes if (address := info_of(node).address) is not None}
    last: dict[str, int] = {}
    for kind, path, *rest in known.values():
        if kind == "operation":
            last[path] = max(last.get(path, 0), rest[2])
    found = {name: known[name] for name in names}
    nodes = [node for node in recorded.graph.nodes if node.name in names]
    positions = {(n.name, call): leaf for n in nodes for call, leaf in info_of(n).positions.items()}
    return found, {path: last[path] for kind, path, *_ in found.values() if kind == "operation"}, positions


@contextmanager
def borrowed(
    model: nn.Module, training: bool, frozen: Collection[str], replaced: Mapping[int, Tensor], keep: bool
) -> Iterator[None]:
    """The model in train or eval mode with some parameters and buffers, by id, replaced for one run.

    keep: whether buffers and attributes that the forward assigns stay assigned, as after a training step.
    """
    with mode_of(model, training, frozen):
        before = {} if keep else module_state(model)
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    own = [(held, name, x) for name, x in held.items() if x is not None and id(x) in replaced]
                    swapped += own
                    held.update({name: replaced[id(x)] for _, name, x in own})  # type: ignore[misc]
            yield
        finally:
            for held, name, x in swapped:
                held[name] = x
            restore(before)


@contextmanager
def lent(tensors: Iterable[Tensor]) -> Iterator[None]:
    """These tensors have their memory back afterwards, which live duals leave as it was: they write into a copy."""
    before = [(x, x.data) for x in tensors if not isinstance(x, nn.Parameter)]
    try:
        yield
    finally:
        for x, alias in before:
            x.data = alias


class LiveGraph:
    """One graph of a live network, called as graph(*inputs, condition=None, delta=None).

    root: holds the children model, response and hparams. One perturbation for the
    whole batch only: condition and delta of shape (h,); ValueError for others.
    """

    def __init__(self, root: Root, kind: GraphKind, sites: Sites, frozen: Collection[str]) -> None:
        self.root, self.kind, self.frozen = root, kind, frozen
        self.objective, self.training = kind.objective, kind.training
        self.sites = sites if self.training else Sites()

    @property
    def model(self) -> nn.Module:
        return self.root.get_submodule("model")

    @property
    def graph(self) -> fx.Graph:
        """What can be said without running it: the inputs, and that the perturbation is for the whole batch."""
        graph = fx.Graph()
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        parameters = inspect.signature(self.model.forward).parameters.values()
        inputs = [graph.placeholder(stars.get(p.kind, "") + p.name) for p in parameters]
        moved = [graph.placeholder(name, default_value=None) for name in ("condition", "delta")]
        shared = [graph.call_function(for_all_examples, (value, 1, _WHERE)) for value in moved]
        graph.output(graph.call_function(self.__call__, (*inputs, *shared)))
        return graph

    @property
    def code(self) -> str:
        """What runs: the source of the model's own forward. Raises OSError where Python does not have it."""
        return inspect.getsource(type(self.model).forward)

    def __repr__(self) -> str:
        beside = {"pushforward": ", tangents carried beside it", "linearized": ", tangents carried beside it and added"}
        weights = ", at the weights that the response predicts" if self.objective in ("perturbed", "trained") else ""
        mode = "train" if self.training else "eval"
        called = f"{type(self.model).__name__}.forward in {mode} mode, run as it is"
        return f"LiveGraph({self.kind}: {called}{beside.get(self.objective, '')}{weights})"

    def forward(self, *inputs: Any, condition: Tensor | None = None, delta: Tensor | None = None, **named: Any) -> Any:
        if self.objective in ("pushforward", "linearized"):
            return self.duals(inputs, named, condition, delta)
        replaced: dict[int, Tensor] = {}
        if self.objective in ("perturbed", "trained"):
            replaced = self._moved(delta)
        if self.objective == "perturbed":
            replaced |= {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        mode = Following(self.model, self.sites, self._strengths(condition))
        keep = self.objective != "perturbed"
        with borrowed(self.model, self.training, self.frozen, replaced, keep):
            return mode.run(inputs, named)

    __call__ = forward

    def duals(
        self,
        inputs: tuple,
        named: dict[str, Any],
        condition: Tensor | None,
        delta: Tensor | None,
        log: list[Note] | None = None,
    ) -> Any:
        """(y, dy), or y + dy; log as for `Duals`."""
        buffers = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        parameters, strengths = self._tangents(delta), self._strengths(condition)
        strengths = None if strengths is None else strengths.detach()
        with borrowed(self.model, self.training, self.frozen, buffers, keep=False):
            if self.objective == "linearized" and not self.training:
                for name, module in self.model.named_modules():  # as fxstn.passes.statistics.choose_statistics
                    module.training = isinstance(module, _BatchNorm) and name not in self.frozen
            mode = Duals(self.model, parameters, self.sites, strengths, log)
            given = {id(x): x for _, x in (*reachable((inputs, named), ""), *attributes(self.model))}
            mode.made(given.values())
            with lent(given.values()), torch.enable_grad():
                output = mode.run(inputs, named)
                mode.finish(output)
                result = (
                    mode.linearized(output) if self.objective == "linearized" else (output, mode.tangents_of(output))
                )
                return mapped(lambda leaf: leaf.data if id(leaf) in given else leaf, result)

    def _strengths(self, condition: Tensor | None) -> Tensor | None:
        return self.root.get_submodule("hparams")(condition) if self.training else None

    def _responses(self) -> Iterator[tuple[str, Response]]:
        for name, module in self.root.get_submodule("response").named_modules():
            if isinstance(module, Response):
                yield name, module

    def _tangents(self, delta: Tensor | None) -> dict[str, Scaled]:
        if delta is None:
            raise TypeError(f"the graph '{self.kind}' takes delta, of shape (h,)")
        delta = for_all_examples(delta, 1, _WHERE)
        find = self.model.get_parameter
        return {name: Scaled(r(delta), r.direction(find(name)), r.axis) for name, r in self._responses()}

    def _moved(self, delta: Tensor | None) -> dict[int, Tensor]:
        """Weights w₀ + Θ·delta, by the id of w₀."""
        if delta is None:
            raise TypeError(f"the graph '{self.kind}' takes delta, of shape (h,)")
        delta = for_all_examples(delta, 1, _WHERE)
        changes = parameter_changes(self.root.get_submodule("response"), self.model, delta)
        parameters = dict(self.model.named_parameters())
        return {id(parameters[name]): parameters[name] + change for name, change in changes.items()}
