"""What a BilevelRunner trains: parameters of four kinds and the loss of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.bilevel.batches import Batch
from fxstn.bilevel.counts import LossValue
from fxstn.bilevel.state import State, on_device
from fxstn.bilevel.temporary import eval_mode
from fxstn.ir.copies import deep_copy

Evaluation = Callable[[Any, Any], tuple[LossValue, Any]]  # (inputs, target) → (loss, output)


class BilevelProblem(nn.Module):
    """A bilevel problem of your own, for `BilevelRunner(problem, train_loader, valid_loader)`: subclass it.

    It is a module, which holds its parameters and moves to a device. The methods say what is trained on which loss.
    Needed: general_parameters, hyper_parameters, general_loss, hyper_loss, validation_loss.

    Each loss takes (inputs, target) as the loader yields them and returns a scalar, the mean over the batch, or (sum, count);
    validation_loss returns (such a loss, the output).
    The runner calls .backward() on the mean and steps the optimizer of the parameters named like it. So gradients must reach
    these parameters and no others: freeze or detach the rest. The runner checks the first step of each kind.
    Example: examples/label_noise.py; in words: docs/guides/own.md.
    """

    joint = False  # whether the general step moves the response parameters, too
    draws_in_python = True  # whether losses may draw from the global generators of Python and NumPy, besides torch's

    def general_parameters(self) -> Iterable[nn.Parameter]:
        """w₀, learned on general_loss."""
        raise NotImplementedError

    def response_parameters(self) -> Iterable[nn.Parameter]:
        """Θ, learned on response_loss. None, unless there are any."""
        return ()

    def hyper_parameters(self) -> Iterable[nn.Parameter]:
        """λ, learned on hyper_loss."""
        raise NotImplementedError

    def scale_parameters(self) -> Iterable[nn.Parameter]:
        """σ, learned on hyper_loss by an optimizer of its own. None, unless there are any."""
        return ()

    def general_loss(self, inputs: Any, target: Any) -> LossValue:
        """The training loss, a scalar. inputs, target: a batch of the training loader."""
        raise NotImplementedError

    def response_loss(self, inputs: Any, target: Any) -> LossValue:
        """The loss of the response parameters, a scalar. inputs, target: the batch that general_loss saw last."""
        raise NotImplementedError

    def hyper_loss(self, inputs: Any, target: Any) -> LossValue:
        """The validation loss as λ sees it, a scalar. inputs, target: a batch of the validation loader."""
        raise NotImplementedError

    def validation_loss(self, inputs: Any, target: Any) -> tuple[LossValue, Any]:
        """(loss, output), as reported and selected on. The runner calls it without gradients and in eval mode.

        inputs, target: a batch of the validation loader.
        """
        raise NotImplementedError

    def values(self) -> dict[str, float]:
        """{name: value} of the hyperparameters: columns of the history."""
        return {}

    def ranges(self) -> dict[str, tuple[float, float]]:
        """{name: (low, high)} of the `values` that have a range."""
        return {}

    def scales(self) -> dict[str, float]:
        """{name of the hyperparameter: σ}."""
        return {}

    def regularizing(self) -> Sequence[bool]:
        """For each number of the one λ, in order, whether a higher value is a stronger regularisation.

        The generalisation gap limits the steps of these (`fxstn.optim.set_gap`). Empty: nothing is known, and nothing limited.
        """
        return ()

    def follow_gap(self, gap: float | None) -> None:
        """Learn the generalisation gap's share of the validation loss, in [0, 1], after each evaluation. None: not measured."""

    def positions(self, unconstrained: Tensor) -> Tensor:
        """Where in its range each number of λ is, in [0, 1] and in the shape of λ: torch.sigmoid(unconstrained) for logits.

        Near an end, steps towards it need more certainty (`fxstn.optim.SettlingAdam`). The default, 0.5: no number has ends.
        """
        return torch.full_like(unconstrained, 0.5)

    def add_decay(self) -> None:
        """Add to the gradients of w₀ those of weight decay that general_loss leaves out, once in a step.

        The gradients have their true size, and are the same in all processes.
        """

    def training_hypergradient(self) -> Tensor | None:
        """The derivative in λ of the training loss, from the gradients of w₀. None: nothing to correct (`inner_correction`)."""
        return None

    def begins(self, stream: str) -> None:
        """Prepare for a new pass over a loader.

        stream: "train" or "valid".
        """

    def begins_step(self, seed: int) -> None:
        """Prepare for a response or a hyper step.

        seed: the same in all processes, another one for each step; for noise that the processes have in common.
        """

    def evaluation_module(self) -> nn.Module:
        """What is in eval mode during a pass of `evaluation` over a loader."""
        return self

    def evaluation(self) -> Evaluation:
        """validation_loss for one pass over a loader, without gradients and in eval mode."""

        def evaluate(inputs: object, target: object) -> tuple[LossValue, object]:
            with eval_mode(self):
                return self.validation_loss(inputs, target)

        return evaluate

    def norm_without_statistics(self, inputs: Any) -> str:
        """A batch norm that has a single value per channel in hyper_loss of these inputs, and cannot normalise it. "": there is
        none.

        The hyper step leaves such a batch out.
        """
        return ""

    def recalibrated(self, batches: Iterable[Batch]) -> AbstractContextManager[None]:
        """A context for an evaluation: statistics, such as those of batch norms, are those of some training batches."""
        return nullcontext()

    def diagnostics(self, inputs: Any, target: Any, seed: int) -> dict[str, float]:
        """Further columns of the history, measured after each epoch.

        inputs, target: a batch of the validation loader.
        seed: the number of the epoch.
        """
        return {}

    def local_state(self) -> State:
        """What the next step depends on besides parameters and buffers, for a checkpoint.

        Tensors, numbers, strings, None, and lists, tuples and dicts of them. Each process has its own.
        """
        return {}

    def load_local_state(self, state: State) -> None:
        """Go on from a state that local_state returned. Its tensors are on the device of the run."""

    def export(self) -> nn.Module:
        """The model that is kept of the best epoch; `BilevelRunner.best_model` returns it."""
        return deep_copy(self)


class LocalProblemState:
    """What a process has of a problem besides parameters and buffers. A part with a state in each process."""

    def __init__(self, problem: BilevelProblem, device: torch.device) -> None:
        self.problem, self.device = problem, device

    def state_dict(self) -> State:
        return self.problem.local_state()

    def load_state_dict(self, state: State) -> None:
        self.problem.load_local_state(on_device(state, self.device))

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        """Nothing: `begins` prepares the problem for an epoch."""
