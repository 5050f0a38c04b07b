"""Gradients of what a loss reads besides the parameters of its step, such as the weights of a module that is the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor, nn

from fxstn.bilevel.faults import warn_caller


def _leaves(total: Tensor) -> Iterator[Tensor]:
    """The tensors to whose gradients a backward pass adds."""
    seen, stack = set[Any](), [total.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        stack += [following for following, _ in node.next_functions]


class ForeignGradients:
    """Leaves the gradients of foreign tensors as they are: a step's backward pass would add to them.

    The first backward pass of each kind of step shows which tensors these are.
    """

    def __init__(self) -> None:
        self._foreign: dict[str, list[ref[Tensor]]] = {}
        self._warned = False

    @contextmanager
    def spare(
        self, names: Sequence[str], total: Tensor, parameters: Callable[[str], Iterable[Tensor]]
    ) -> Iterator[None]:
        """Around the backward pass of a loss.

        names: of the optimizers that step next.
        total: the loss.
        parameters: those of an optimizer.
        """
        if names[0] not in self._foreign:
            own = {id(parameter) for name in names for parameter in parameters(name)}
            self._foreign[names[0]] = [ref(leaf) for leaf in _leaves(total) if id(leaf) not in own]
        before = [(leaf, leaf.grad) for leaf in self._alive(names[0])]
        for leaf, _ in before:
            leaf.grad = None
        try:
            yield
        finally:
            for leaf, gradient in before:
                leaf.grad = gradient

    def _alive(self, name: str) -> list[Tensor]:
        """Inputs that are differentiated are of one step alone."""
        return [leaf for reference in self._foreign.get(name, ()) if (leaf := reference()) is not None]

    def warn_of_untrained(self, names: Sequence[str]) -> None:
        """Warn once, where a run that owns its loop trains with a loss whose own parameters it does not train."""
        if self._warned or names[0] not in self._foreign:
            return
        self._warned = True
        parameters = [leaf for leaf in self._alive(names[0]) if isinstance(leaf, nn.Parameter)]
        if parameters:
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters[:3])
            warn_caller(
                f"the training loss reads {len(parameters)} parameters that are not the model's (of shape {shapes}), and "
                "nothing trains them: make the loss a part of the model, whose forward returns it, or freeze them with "
                "requires_grad_(False)",
                UserWarning,
            )
