"""Which graph of a network: what it computes, and in which mode."""

from __future__ import annotations

from dataclasses import dataclass

_MODES = {"plain": ("train", "eval")}  # the plain graphs are called by their modes


@dataclass(frozen=True)
class GraphKind:
    """The name of one graph.

    objective: what the graph computes, a key of `fxstn.transform.PIPELINES`.
    training: whether it is made from the forward in train mode, with λ in it, or from that in eval mode.
    """

    objective: str
    training: bool

    @property
    def auxiliary(self) -> bool:
        """Whether the graph returns (output, auxiliary values): the training objectives read both."""
        return self.training and self.objective not in ("plain", "pushforward")

    @property
    def moves_weights(self) -> bool:
        """Whether the graph takes `delta`."""
        return self.objective not in ("plain", "general", "at_rest")

    def __str__(self) -> str:
        train, evaluation = _MODES.get(self.objective, (self.objective, f"{self.objective}_eval"))
        return train if self.training else evaluation


PLAIN_TRAIN, PLAIN_EVAL = GraphKind("plain", True), GraphKind("plain", False)
_EVALUATED = ("plain", "pushforward", "linearized", "perturbed")
_KINDS = {
    str(kind): kind
    for kind in (
        *(GraphKind(objective, training) for objective in _EVALUATED for training in (True, False)),
        GraphKind("general", True),
        GraphKind("trained", True),
        GraphKind("at_rest", False),
    )
}


def graph_kind(name: str) -> GraphKind:
    """The kind that a user calls `name`: "train", "pushforward_eval". Raises ValueError for a name that no graph has."""
    if name not in _KINDS:
        raise ValueError(f"no graph is called {name!r}; there are {', '.join(_KINDS)}")
    return _KINDS[name]
