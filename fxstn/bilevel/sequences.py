"""Networks that carry a state from one window of their sequences to the next: truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.bilevel.counts import LossValue
from fxstn.bilevel.losses import LossFunction, takes_hparams
from fxstn.ops.batch_axis import batch_size

WindowState = tuple[Tensor, ...]  # the state before or after a window
InitialState = Callable[[int], WindowState]  # number of examples → first state


class CarriedState:
    """The state of one series of windows, and the loss that keeps it.

    loss_fn: of the output alone.
    initial: batch size → the state before the first window. None: a network without state, for which nothing changes.

    The network is called as forward(*inputs, *state) → (output, state). A state is a tuple of tensors with one row per example.
    Row i of a window goes on where row i of the window before ended. A step is

        inputs = carried.inputs(x)          # x and the state
        general_loss(stn, carried.loss, inputs, target).backward()
        carried.advance()                   # the next window begins with the state after this one, cut off from its graph
        response_loss(stn, carried.loss, inputs, target).backward()
    """

    def __init__(self, loss_fn: LossFunction, initial: InitialState | None) -> None:
        self.loss_fn, self.initial = loss_fn, initial
        self.state: WindowState | None = None
        self._after: WindowState | None = None
        self.loss: LossFunction = loss_fn
        if initial is not None:
            self.loss = self._loss_with_hparams if takes_hparams(loss_fn) else self._loss

    def _loss(self, result: object, target: object) -> LossValue:
        return self.loss_fn(self.output(result), target)

    def _loss_with_hparams(self, result: object, target: object, hparams: dict[str, Tensor] | None = None) -> LossValue:
        return self.loss_fn(self.output(result), target, hparams=hparams)

    def output(self, result: object) -> object:
        """The output alone; `advance` goes on with the state.

        result: what the network returns.

        Raises TypeError where the network does not return (output, state).
        """
        if self.initial is None:
            return result
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            kind = f"{type(result).__name__}{f' of length {len(result)}' if isinstance(result, (tuple, list)) else ''}"
            raise TypeError(f"a network with initial_state must return (output, state), got a {kind}")
        output, state = result
        self._after = tuple(tree_map_only(Tensor, Tensor.detach, tree_leaves(state)))
        return output

    def inputs(self, inputs: object) -> object:
        """The inputs of a window and the state before it, a tuple.

        Raises ValueError where the state has another number of rows than the inputs, TypeError for inputs by name.
        """
        if self.initial is None:
            return inputs
        if isinstance(inputs, Mapping):
            raise TypeError(
                f"inputs by name ({', '.join(map(str, inputs))}) cannot be joined with a state, which follows by position; "
                "give a tuple: unpack= of the runner makes one"
            )
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
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
        """Go on with the state that the last loss saw; on a GPU with a copy, which no replay of a CUDA graph writes over."""
        after = self._after
        self.state = None if after is None else tuple(state.clone() if state.is_cuda else state for state in after)

    def reset(self) -> None:
        """The next window is a first one."""
        self.state = self._after = None
