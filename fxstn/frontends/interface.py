"""What a frontend is: a way from a module's forward to graphs. `symbolic`, `export` and `live` are three.

A further one is a class with these members, and one entry in `fxstn.transform.FRONTENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import fx, nn

from fxstn.frontends.inputs import Inputs, InputSpec
from fxstn.hp.binding import NOTHING_BOUND, Binding
from fxstn.ir.graph_kind import PLAIN_EVAL, GraphKind
from fxstn.ir.tangents import BatchAxes
from fxstn.ops.noise import shared_strengths
from fxstn.ops.response import refused_places


@dataclass(frozen=True)
class Plan:
    """What the passes know about the graph that they make.

    kind: which graph it is.
    binding: which λ belongs where. A graph in eval mode reads no λ.
    frozen: paths of the modules that stay in eval mode while the network trains.
    constant: names of the parameters that were not trained at transform, and have no response for this reason.
    batch_axes: where the examples of a batch are in every value; empty for a plain batch.
    recompute: whether the linearised output keeps its activations or computes them again in the backward pass.
    statistics: what batch norms normalise by in the linearised output: "batch" or "running".
    """

    kind: GraphKind = PLAIN_EVAL
    binding: Binding = NOTHING_BOUND
    frozen: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    batch_axes: BatchAxes = field(default_factory=dict)
    recompute: bool = False
    statistics: str = "batch"


DEFAULT_PLAN = Plan()
Pass = Callable[[fx.GraphModule, Plan], fx.GraphModule]


class Graph(Protocol):
    """What a network runs: an fx.GraphModule, or the forward itself in the same form."""

    @property
    def graph(self) -> fx.Graph: ...

    @property
    def code(self) -> str: ...

    def forward(self, *inputs: object, **named: Any) -> Any: ...

    def __call__(self, *inputs: object, **named: Any) -> Any: ...


class Root(Protocol):
    """The network, as far as a frontend needs it: its children are `model`, `hparams` and `response`."""

    @property
    def training(self) -> bool: ...

    @property
    def method(self) -> str: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def canonical(self, training: bool) -> fx.GraphModule: ...


class Frontend(Protocol):
    """One way of following a forward. It holds no module and no values, so that it can be copied and pickled with a network.

    name: what `transform(trace=...)` calls it.
    needs_examples: whether it can do nothing without example inputs.
    rewritable: whether what it captures is an fx.GraphModule, which passes rewrite; else the forward runs as it is.
    """

    name: ClassVar[str]
    needs_examples: ClassVar[bool]
    rewritable: ClassVar[bool]

    @property
    def derivatives(self) -> int:
        """Whether the forward takes derivatives itself, in a way that no graph holds; 0 for no."""

    def __init__(self, examples: InputSpec | None) -> None: ...

    def capture(self, model: nn.Module, training: bool, frozen: Sequence[str], inputs: Inputs | None) -> Any:
        """The forward as a graph that passes can read, `.graph` over a root with the child `model`.

        inputs: the example inputs; None where they are no longer there, as after unpickling.

        Leaves the model and the inputs as they were. Raises TransformError for what the graph would lose.
        """

    def captures(self, model: nn.Module, frozen: Sequence[str], inputs: Inputs | None) -> list[Any]:
        """What `capture` returns in train and in eval mode."""

    def for_sizes(self, examples: InputSpec) -> Self:
        """The same for inputs of other sizes, where a captured graph requires sizes of its inputs."""

    def bind(self, captured: Sequence[Any], binding: Binding) -> Self:
        """The frontend that emits the graphs of this binding. Raises TransformError for specs that it cannot place.

        captured: in train mode, and in eval mode.
        """

    def emit(self, root: Root, plan: Plan, passes: Sequence[Pass]) -> Graph:
        """One graph of a network.

        passes: what makes it from the canonical graph, where there is one.
        """

    def refused(self, graph: Graph, inputs: Inputs) -> list[str]:
        """The places where an emitted graph refuses one perturbation per example, on inputs like these."""

    def shared_strengths(self, graph: Graph) -> set[int]:
        """Which λ an emitted graph reads once for all examples, as far as it has run."""


class GraphFrontend:
    """What the frontends have in common whose captured graphs are rewritten by passes."""

    rewritable: ClassVar[bool] = True
    derivatives: ClassVar[int] = 0

    def capture(self, model: nn.Module, training: bool, frozen: Sequence[str], inputs: Inputs | None) -> fx.GraphModule:
        raise NotImplementedError

    def captures(self, model: nn.Module, frozen: Sequence[str], inputs: Inputs | None) -> list[fx.GraphModule]:
        return [self.capture(model, training, frozen, inputs) for training in (True, False)]

    def for_sizes(self, examples: InputSpec) -> Self:
        return self

    def bind(self, captured: Sequence[fx.GraphModule], binding: Binding) -> Self:
        return self

    def emit(self, root: Root, plan: Plan, passes: Sequence[Pass]) -> Graph:
        graph = root.canonical(plan.kind.training)
        for apply in passes:
            graph = apply(graph, plan)
        return graph

    def refused(self, graph: Graph, inputs: Inputs) -> list[str]:
        return refused_places(graph.graph)

    def shared_strengths(self, graph: Graph) -> set[int]:
        return shared_strengths(graph.graph)
