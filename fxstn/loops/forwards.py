"""How a batch goes through a user's model: forward(model, batch) → (output, target), also over the graphs of a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxstn.bilevel.batches import as_dict
from fxstn.bilevel.counts import LossValue
from fxstn.bilevel.distributed import APART, rank
from fxstn.bilevel.evaluation import LOSS_ERRORS
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.losses import LossFunction, takes_hparams
from fxstn.bilevel.noise import seed_of_step
from fxstn.bilevel.target_rows import checked_rows, hparams_of_rows
from fxstn.bilevel.targets import of_batch, refuse_moves
from fxstn.frontends.conditioned import ConditionedForward
from fxstn.frontends.inputs import Inputs
from fxstn.ir.generators import GlobalRandomState
from fxstn.ir.input_errors import explained_loss_errors, first_line
from fxstn.loops.draws import Draws, with_draws
from fxstn.ops.batch_axis import batch_size

_READS = 2**20  # batches that are read with one number
Forward = Callable[[Any, Any], tuple[Any, Any]]  # (model, batch) → (output, target)


def default_forward(model: Any, batch: Any) -> tuple[Any, Any]:
    """(output, target) of a batch (inputs, target), (input, …, target), or a dict of keyword inputs with "labels".

    inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    A model with a method `unpack_batch` (fxstn.DetectionLosses) splits the batch itself. Raises TypeError for another batch.
    """
    inputs, target = getattr(model, "unpack_batch", split_batch)(batch)
    return _called(model, inputs), target


def own_loss(model: Any, batch: Any) -> tuple[Any, Any]:
    """(the loss that the model itself computes, the batch), for a model that takes the target among its inputs.

    A dict is passed by keywords, a tuple by position. The loss is the output's `loss`, or its only scalar.
    """
    return loss_in(_called(model, batch)), batch


def _called(model: Any, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, target) of a batch."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, target = batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs), target
    kind = f"a dict with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise TypeError(
        f"a batch is (inputs, target) or a dict with 'labels', and this is {kind}; give forward=, a function (model, batch) → "
        "(output, target)"
    )


def logits_of(output: Any) -> Any:
    """The logits of an output that has them by name; else the output itself."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits


class LossOfOutput:
    """A loss of a model's output. Where it does not take that, it gets its `logits`, as of a ModelOutput of Hugging Face.

    loss_fn: loss_fn(output, target) → loss. The first call for a type of outputs shows what it takes.

    Raises TypeError where it takes neither.
    """

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn
        self._takes_logits: dict[type, bool] = {}

    def __call__(self, output: object, target: object, **hparams: object) -> LossValue:
        logits, kind = logits_of(output), type(output)
        if logits is output:
            return self.loss_fn(output, target, **hparams)
        if kind in self._takes_logits or torch.compiler.is_compiling():  # which follows no error
            return self.loss_fn(logits if self._takes_logits.get(kind, True) else output, target, **hparams)
        try:
            loss = self.loss_fn(output, target, **hparams)
            self._takes_logits[kind] = False
        except LOSS_ERRORS as error:
            loss = self._of_logits(logits, target, kind, error, hparams)
            self._takes_logits[kind] = True
        return loss

    def _of_logits(
        self, logits: object, target: object, kind: type, error: Exception, hparams: dict[str, object]
    ) -> LossValue:
        try:
            return self.loss_fn(logits, target, **hparams)
        except LOSS_ERRORS as other:
            whole, part = (f"({type(each).__name__}: {first_line(each)})" for each in (error, other))
            raise TypeError(
                f"loss_fn takes neither the model's output, a {kind.__name__} {whole}, nor its logits {part}; give forward=, "
                "a function (model, batch) → (output, target), whose output loss_fn takes"
            ) from error


def loss_in(output: Any) -> Any:
    """The loss in an output: the output itself, its `loss`, or its only scalar. Raises TypeError where there is none."""
    if isinstance(output, Tensor) and not output.dim():
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    if isinstance(output, Sequence):
        scalars = [leaf for leaf in output if isinstance(leaf, Tensor) and not leaf.dim()]
        if len(scalars) == 1:
            return scalars[0]
    raise TypeError(
        f"loss_fn=None takes the loss that the model returns, and it returns a {type(output).__name__} without one; give "
        "loss_fn"
    )


class _Called(Exception):
    """The call of a model within a forward."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs


class _StandIn:
    """Has everything of a model, but for the call."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Recorder(_StandIn):
    """Tells what a forward calls the model with."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Called(Inputs(args, kwargs))


class _Replay(_StandIn):
    """Returns an output that a graph of the network has computed."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        super().__init__(model)
        self._output = output
        self.inputs: Inputs | None = None  # what the model is called with

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.inputs is not None:
            raise TypeError(
                "forward calls the model twice for one batch; a tuner follows one call: join the inputs to one batch"
            )
        self.inputs = Inputs(args, kwargs)
        return self._output


def inputs_of(forward: Forward, model: nn.Module, batch: Any) -> Inputs:
    """What a forward calls the model with.

    Raises TypeError where it does not call the model.
    """
    try:
        forward(_Recorder(model), batch)
    except _Called as call:
        return call.inputs
    raise TypeError("forward(model, batch) does not call its model; it returns (model(inputs), target)")


class BatchReader:
    """Reads the batches of a user's loop: batch → (what the model is called with, the batch), on the model's device.

    forward: function (model, batch) → (output, target). Where it draws random numbers, the batch has its `Draws` with it.
    """

    def __init__(self, forward: Forward, model: nn.Module) -> None:
        self.forward, self.model = forward, model
        self._draws = forward not in (default_forward, own_loss) or hasattr(model, "unpack_batch")
        self._seed: int | None = None
        self._read = 0  # batches since the seed was set

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        device = next(self.model.parameters()).device
        moved = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), as_dict(batch))
        if not self._draws:
            return inputs_of(self.forward, self.model, moved), moved
        draws = Draws(self._next_seed())
        with draws.again():
            before = GlobalRandomState.current()
            inputs = inputs_of(self.forward, self.model, moved)
            drawn = not before.still_holds()
        return inputs, ((moved, draws) if drawn else moved)

    @contextmanager
    def seeded(self, seed: int, number: int) -> Iterator[None]:
        """Inside, what the forward draws depends on this seed, on a number, on the process, and on how many batches were read
        before. Outside it depends on torch's generator, as in a loop."""
        own = seed + 1 + APART * rank()  # 1: the tuner's steps draw from seeds of the same kind
        self._seed, self._read = seed_of_step(own, number * _READS), 0
        try:
            yield
        finally:
            self._seed = None

    def _next_seed(self) -> int:
        if self._seed is None:
            return int(torch.randint(2**62, ()))
        self._read += 1
        return seed_of_step(self._seed, self._read)


def _without_calls(loss_fn: LossFunction, model: nn.Module) -> LossFunction:
    """The loss function; a warning says once that it calls the model, as a gradient penalty does."""
    warned = False

    def calls() -> int:
        forward = vars(model).get("forward")
        return forward.forwards if isinstance(forward, ConditionedForward) else 0

    @functools.wraps(loss_fn)
    def loss(*args: object, **hparams: object) -> LossValue:
        nonlocal warned
        before = calls()
        value = loss_fn(*args, **hparams)
        if not warned and calls() > before:
            warned = True
            warn_caller(
                "loss_fn calls the model, which has no part in what the tuner learns of the weights' response to λ: "
                "compute it in the model's forward, which returns it beside its output",
                UserWarning,
            )
        return value

    return loss


def loss_of(forward: Forward, model: nn.Module, loss_fn: LossFunction | None) -> LossFunction:
    """The loss as a function of what the model returns, and of the batch.

    Raises ValueError for a target that has neither the rows of the model's inputs nor those of the output.
    """
    forward = with_draws(forward)
    if loss_fn is None:
        return of_batch(lambda output, batch: forward(_Replay(model, output), batch)[0])
    loss = LossOfOutput(_without_calls(loss_fn, model))

    def rows_of(output: object, batch: object) -> tuple[object, object, int]:
        """(output, target, rows of the target) of a batch."""
        replay = _Replay(model, output)
        output, target = _pair(forward(replay, batch))
        return output, target, checked_rows(target, output, batch_size(replay.inputs))

    if takes_hparams(loss_fn):

        def with_hparams(output: Any, batch: Any, hparams: dict[str, Tensor] | None = None) -> LossValue:
            output, target, rows = rows_of(output, batch)
            with _explained(output, target):
                return loss(output, target, hparams=hparams_of_rows(hparams, rows))

        return of_batch(with_hparams)

    def without_hparams(output: object, batch: object) -> LossValue:
        output, target, _ = rows_of(output, batch)
        with _explained(output, target):
            return loss(output, target)

    return of_batch(without_hparams)


def _explained(output: object, target: object) -> AbstractContextManager[None]:
    """Around a loss of this pair: its errors show the target alone, and not the whole batch."""
    return nullcontext() if torch.compiler.is_compiling() else explained_loss_errors(logits_of(output), target)


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"forward(model, batch) must return (output, target), got a {type(result).__name__}")
    output, target = result
    refuse_moves(target)
    return output, target
