"""The frontend "live": the forward runs as it is, with tangents carried beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, cast

from torch import nn

from fxstn.frontends.inputs import Inputs, InputSpec
from fxstn.frontends.interface import Graph, Pass, Plan, Root
from fxstn.frontends.live.forward_mode import Derivatives
from fxstn.frontends.live.graph import LiveGraph
from fxstn.frontends.live.record import Recording, record
from fxstn.frontends.live.sites import Addresses, find_addresses, runtime_sites
from fxstn.hp import Dropout
from fxstn.hp.binding import Binding
from fxstn.ir.errors import Diagnostic, TransformError


@dataclass(frozen=True)
class Live:
    """Runs a forward as it is.

    addresses: where its runs read λ, known once the binding is.
    derivatives: which derivatives the forward takes itself.
    """

    examples: InputSpec | None = None
    addresses: Addresses = field(default_factory=Addresses)
    derivatives: Derivatives = Derivatives.NONE
    name: ClassVar[str] = "live"
    needs_examples: ClassVar[bool] = True
    rewritable: ClassVar[bool] = False

    def capture(
        self, model: nn.Module, training: bool, frozen: Collection[str] = (), inputs: Inputs | None = None
    ) -> Recording:
        """One run on the inputs, recorded for the passes that only read. Raises TransformError as `record`."""
        if inputs is None:
            raise ValueError(
                "a forward that runs as it is has no graph of its own, without example inputs to run it on"
            )
        return record(model, training, frozen, inputs)

    def captures(self, model: nn.Module, frozen: Collection[str], inputs: Inputs | None) -> list[Recording]:
        return [self.capture(model, training, frozen, inputs) for training in (True, False)]

    def for_sizes(self, examples: InputSpec) -> Self:
        return self

    def bind(self, captured: Sequence[Recording], binding: Binding) -> Self:
        inserted = any(site.insert and type(site.spec) is not Dropout for site in binding.sites)
        if binding.dropped or binding.terms.jacobian or binding.auxiliary or inserted:
            what = "an operation other than dropout that the model does not have itself, which needs a graph,"
            raise TransformError([Diagnostic("", what, "", "use hp.Dropout")])
        derivatives = max(recording.derivatives for recording in captured)
        return replace(self, addresses=find_addresses(captured[0].graph, binding), derivatives=derivatives)

    def emit(self, root: Root, plan: Plan, passes: Sequence[Pass]) -> LiveGraph:
        sites = runtime_sites(plan.binding, self.addresses)
        return LiveGraph(root, plan.kind, sites, plan.frozen, self.derivatives)

    def refused(self, graph: Graph, inputs: Inputs) -> list[str]:
        return cast(LiveGraph, graph).refused_places(inputs)

    def shared_strengths(self, graph: Graph) -> set[int]:
        return cast(LiveGraph, graph).shared_strengths
