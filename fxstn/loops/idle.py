"""Signs that a loop does not train what its tuner tunes: warnings, once each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.losses import takes_hparams
from fxstn.bilevel.network_problem import NetworkProblem
from fxstn.loops.last_forward import LastForward

IN_A_ROW = 3  # steps with several forwards each; one may be a look at a batch, or an evaluation
WHOLE_PASSES = 2  # over train_loader without a forward or a step
MANY = 500  # steps of a loop, in which an evaluation would have come where it knows of the tuner


class IdleLoop:
    """Watches what a loop does with a model.

    optimizers: those that the tuner knows.
    problem: over the network of the model.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], problem: NetworkProblem) -> None:
        self.model, self.optimizers = model, optimizers
        binding, names = problem.stn.recipe.plan.binding, problem.stn.hparams.names
        self._draws, reads = bool(binding.sites), takes_hparams(problem.training_windows.loss_fn)
        self._of_loss = [name for name, own in zip(names, binding.uses(), strict=True) if reads and not own]
        self.reads = False  # whether the loop has asked for strengths, which its own loss reads
        self._steps = False  # whether a step of an optimizer that the tuner knows was seen in this pass
        self._several = 0  # steps in a row with more than one forward before each
        self._trains: bool | None = None  # whether some step of the epoch was in train mode; None: no step
        self._versions, self._changes = self._writes(), False  # whether weights were written to in the last pass
        self._calls = 0  # forwards of the model
        self._elsewhere = 0  # whole passes in a row without one, and without a step
        self._warned: set[str] = set()  # what was warned of

    def _writes(self) -> int:
        """How often weights were written to."""
        return sum(parameter._version for parameter in self.model.parameters())

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_caller(text)

    def constant_weights(self) -> list[nn.Parameter]:
        """The weights that no optimizer steps: constants, whether they require a gradient or not."""
        groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers)
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in stepped]

    def begin_pass(self) -> None:
        """A pass over the training data begins."""
        self._versions, self._steps = self._writes(), False

    def leave_pass(self) -> None:
        """The loop leaves the pass."""
        self._changes = self._writes() != self._versions

    def note_step(self, forward: LastForward, unseen: bool) -> None:
        """A step of the optimizers that the tuner knows is under way.

        forward: the loop's last before the step.
        unseen: whether nobody sees which batches the loop has had.
        """
        self._steps, self._trains = True, self._trains or forward.training
        self._several = self._several + 1 if forward.forwards > 1 and unseen else 0
        if self._several == IN_A_ROW:
            self._warn(
                "unseen batches",
                f"the model had {forward.forwards} forwards before a step, and train_loader is no DataLoader: for each step "
                "the tuner takes its next batch alone; where these are of several batches, whose gradients add up, iterate "
                "over a DataLoader, or pass train_loader=None and call tuner.step(batch) after each batch",
            )

    def warn_of_other_steps(self) -> None:
        """Warn where weights were written to in a pass without a step of an optimizer that the tuner knows."""
        if self._changes and not self._steps:
            self._warn(
                "another",
                "the weights have changed in a pass over train_loader, and no optimizer that fxstn.tune knows has stepped: "
                "nothing is tuned; give tune the optimizer that steps",
            )

    def note_pass(self, steps: bool, whole: bool, calls: int) -> None:
        """A pass is over. Warn where another model seems to be trained in it.

        An evaluation, or an update of statistics, calls the model. One pass over the data alone may compute their mean, and the
        second one in a row is told. A loop under no_grad trains nothing.

        steps: whether a step was seen in it.
        whole: whether it has had all its batches.
        calls: forwards of the model so far.
        """
        elsewhere = whole and not steps and not self._changes and calls == self._calls and torch.is_grad_enabled()
        self._calls, self._elsewhere = calls, self._elsewhere + 1 if elsewhere else 0
        if self._elsewhere == WHOLE_PASSES:
            self._warn(
                "elsewhere",
                f"the loop has passed over train_loader {WHOLE_PASSES} times, and has neither called the model of fxstn.tune "
                "nor stepped its optimizer on a gradient: nothing is tuned; train that very model with that very optimizer, or "
                "call tuner.detach()",
            )

    def warn_of_no_evaluation(self, steps: int) -> None:
        """Warn where so many steps were done before a first evaluation, and nobody knows when it will come."""
        if steps == MANY:
            self._warn(
                "no evaluation",
                f"{MANY} steps are done, and no pass over the training data has ended: nothing was evaluated so far, and no "
                "regularisation rises before that; where a pass has no end, give fxstn.tune epoch_steps=, the steps from one "
                "evaluation to the next",
            )

    def warn_of_unread(self) -> None:
        """Warn of numbers of the loss that the loop has trained without."""
        if self._of_loss and not self.reads:
            self._warn(
                "unread",
                f"{', '.join(self._of_loss)}: the tuner's loss reads it, and the loop's own loss has not, so that the weights "
                "train without it; compute the loss of the loop with tuner.strengths(examples), as by "
                "fxstn.cross_entropy(output, target, tuner.strengths(len(target)))",
            )

    def warn_of_eval_mode(self, epoch: int) -> None:
        """Warn where all steps of an epoch were in eval mode, though there are operations that draw in train mode alone."""
        if self._trains is False and self._draws:
            self._warn(
                "eval mode",
                f"the model was in eval mode in all steps of epoch {epoch}: dropout and augmentations did nothing there, and "
                "the tuner tunes them as if they did; call model.train() before training",
            )
        self._trains = None
