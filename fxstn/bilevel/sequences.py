"""Networks that carry a state from one window of their sequences to the next: truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.bilevel.objectives import LossFunction, as_tuple, takes_hparams
from fxstn.ops.batch_axis import batch_size

State = tuple[Tensor, ...]


class Carried:
    """The state of one stream of windows, and the loss that keeps it.

    The protocol: forward(*inputs, *state) → (output, state), where state is a tuple of tensors with one row per example, and
    row i of a window goes on where row i of the window before ended. initial(batch) → the state before the first window; None:
    a network without state, for which nothing here changes anything. A step is

        inputs = carried.inputs(x)          # x and the state
        general_loss(stn, carried.loss, inputs, target).backward()
        carried.advance()                   # the next window begins with the state after this one, cut off from its graph
        response_loss(stn, carried.loss, inputs, target).backward()

    loss: loss_fn of the output alone.
    """

    def __init__(self, loss_fn: LossFunction, initial: Callable[[int], State] | None) -> None:
        self.loss_fn, self.initial = loss_fn, initial
        self.state: State | None = None
        self._after: State | None = None
        self.loss: LossFunction = loss_fn
        if initial is not None:
            self.loss = self._loss_with_hparams if takes_hparams(loss_fn) else self._loss

    def _loss(self, result: Any, target: Any) -> Tensor:
        return self.loss_fn(self.output(result), target)

    def _loss_with_hparams(self, result: Any, target: Any, hparams: Any = None) -> Tensor:
        return self.loss_fn(self.output(result), target, hparams=hparams)

    def output(self, result: Any) -> Any:
        """The output alone, of what the network returns; its state is what `advance` goes on with.

        Raises TypeError where the network does not return (output, state)."""
        if self.initial is None:
            return result
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            kind = f"{type(result).__name__}{f' of length {len(result)}' if isinstance(result, (tuple, list)) else ''}"
            raise TypeError(f"a network with initial_state must return (output, state), got a {kind}")
        output, state = result
        self._after = tuple(tree_map_only(Tensor, Tensor.detach, tree_leaves(state)))
        return output

    def inputs(self, inputs: Any) -> Any:
        """The inputs of a window and the state before it, a tuple. Raises ValueError where that has another number of rows."""
        if self.initial is None:
            return inputs
        inputs = as_tuple(inputs)
        rows = batch_size(inputs)
        if self.state is None:
            device = next(leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            self.state = tuple(state.to(device) for state in self.initial(rows))
        if any(len(state) != rows for state in self.state):
            raise ValueError(
                f"a window has {rows} examples, and the state has {[len(state) for state in self.state]} rows: initial_state "
                "and the network must return states with one row per example, and all windows must have as many examples"
            )
        return (*inputs, *self.state)

    def advance(self) -> None:
        """Go on with the state that the last loss saw."""
        self.state = self._after

    def reset(self) -> None:
        """The next window is a first one."""
        self.state = self._after = None
