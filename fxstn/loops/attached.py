"""AttachedTuner: the method inside a loop that somebody else runs. The hooks of the optimizer and the loader do the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxstn.bilevel import distributed
from fxstn.bilevel.faults import BadLoss
from fxstn.bilevel.network_problem import NetworkProblem
from fxstn.bilevel.records import options_of
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.sources import length_of
from fxstn.bilevel.starts import StartWeights
from fxstn.bilevel.state import State, Stateful
from fxstn.bilevel.tuner import Tuner
from fxstn.bilevel.validation import validation_stream
from fxstn.frontends.model_forwards import restore_modules
from fxstn.frontends.preservation import Preservation
from fxstn.loops.checks import check_place, place_of
from fxstn.loops.decay import TunedDecay
from fxstn.loops.forwards import BatchReader
from fxstn.loops.gradients import leave_out, note_gradient
from fxstn.loops.idle import IdleLoop
from fxstn.loops.last_forward import LastForward
from fxstn.loops.observed import LoopLoaders, known_length
from fxstn.loops.rates import SeenRates
from fxstn.loops.refit import RefittableLoop
from fxstn.loops.remembered import RememberedBatches, batches_to_come
from fxstn.loops.seen_batches import SeenBatches
from fxstn.loops.step_hooks import ZeroGradHook, gradient_factor, hook_steps, sets_up_state
from fxstn.loops.tuner_state import load_state, parts_of, state_of
from fxstn.ops.response import frozen


class AttachedTuner(RefittableLoop):
    """Tunes λ in a loop of the user's own; `fxstn.tune` makes it.

    model: the user's, whose forward draws at λ.
    problem: over a network that shares the model's modules.
    optimizers: of the model. A step of w₀ is one of each, or of those that step before the next batch.
    data: (train_loader, valid_loader). The first yields the batches that the loop trains on; None: `step` gets them.
    strengths: (h,), what the model's forward reads.
    reader: of the batches of both loaders.
    epoch_steps: optimizer steps from one evaluation to the next. None: those of a pass over train_loader.

    loaders: of the loop, whose passes it sees.
    """

    _free = ("epoch_steps", "refit_history")
    _lasting = "tuner.state_dict() is for the checkpoint of the loop, and tuner.report(path) writes a page"
    _anew = "call detach(), and fxstn.tune again"

    def __init__(
        self,
        model: nn.Module,
        problem: NetworkProblem,
        settings: Settings,
        optimizers: Sequence[Optimizer],
        data: tuple[Iterable[object] | None, Iterable[object]],
        epoch_steps: int | None,
        strengths: Tensor,
        reader: BatchReader,
        seed: int,
    ) -> None:
        self.model, self.problem, self.stn, self._stepping = model, problem, (network := problem.stn), list(optimizers)
        self.train_loader, self.valid_loader = train_loader, valid_loader = data
        self.metrics = {}
        self.epoch_steps, self._strengths, self._reader, self._seed = epoch_steps, strengths, reader, seed
        self.device, self._place = network.hparams.unconstrained.device, place_of(model)
        self._decay = TunedDecay(network.terms.penalties, network.model, optimizers, network.hparams)
        network.decay_metric = self._decay.metric
        self._valid = validation_stream(valid_loader, seed, in_order=False)
        self._recent = RememberedBatches(train_loader, settings.hyper.recalibrate, self._batches_to_come)
        self._tuner = Tuner(problem, network, settings, self.device, self._recent, self._valid, seed, weights=False)
        self._tuner.note_data(*data)
        self.updates, self.settings = self._tuner.updates, settings.texts()
        self.optimizers, self.history = self.updates.optimizers, self._tuner.history
        self._rates, self._idle = SeenRates(optimizers), IdleLoop(model, optimizers, problem)
        passes = self._idle.begin_pass, self._idle.leave_pass, self._end_pass
        self._last_forward = LastForward(self._tuner, model)
        facts = lambda: length_of(self.train_loader), self._last_forward.all_forwards
        self._seen = SeenBatches(optimizers, *passes, self._end_step, *facts)
        self._starts, self._groups = StartWeights(model), [options_of(optimizer) for optimizer in optimizers]
        self._stepped: set[int] = set()  # optimizers that have stepped, of the step of w₀ under way
        self._due = self._sets_up = False  # a step of w₀ waits for its batch; one sets up an optimizer's state
        self._begun = False  # whether the start has been evaluated, or lies behind
        self.loaders = LoopLoaders(train_loader, self._seen)
        if train_loader is not None and self.loaders.beside is not None:
            self.epoch_steps = epoch_steps or known_length(train_loader)
        hooks = (self._before_step, self._after_step, self._decay.added_loss)  # last: a tuner that fails leaves none
        self._handles: list[RemovableHandle | ZeroGradHook] = []
        for optimizer in self._stepping:
            self._handles += [*hook_steps(optimizer, *hooks), ZeroGradHook(optimizer, self._seen.drop_gradients)]
        self._tuner.begin_epoch()

    def _batches_to_come(self) -> int:
        return batches_to_come(self._tuner.means.steps, self._seen, self.train_loader, self.epoch_steps)

    # What the loop tells

    def end_pass(self) -> None:
        """A pass over the training data ends. Nothing happens where no step was taken in it."""
        self._seen.end_pass()

    def close_epoch(self) -> None:
        """End an epoch whose pass over train_loader the loop has left, or has had to its last batch."""
        if self._seen.complete:
            self._seen.close()

    def _end_pass(self) -> None:
        steps = self._tuner.means.steps > self._seen.late
        if steps and self.epoch_steps is None:
            self.end_epoch()
        elif not steps:
            self._idle.warn_of_other_steps()
        self._idle.note_pass(bool(steps), self._seen.count == length_of(self.train_loader), self._last_forward.calls)

    def step(self, batch: object) -> None:
        """Do what is due after a step of w₀; to be called after optimizer.step() where there is no train_loader.

        batch: that the step trained on, or one like it. Where the optimizer has not stepped, it waits for the next step: in a
            loop that accumulates gradients, call `step` after each batch. A GradScaler's skipped step is none.

        Raises ValueError where the tuner sees the batches of a train_loader itself.
        """
        if self.train_loader is not None:
            raise ValueError(
                "the tuner sees the batches of train_loader itself: leave out step(batch), or pass train_loader=None"
            )
        self._end_step()
        if batches := self._seen.tell(batch, self._due):
            self._due = False
            self._advance(batches)

    def end_epoch(self) -> None:
        """Evaluate, limit λ by the generalisation gap, and add a row to the history.

        It happens by itself after each pass over train_loader, and after each `epoch_steps` steps. Without a step of w₀ since
        then nothing happens.
        """
        tuner, rows = self._tuner, len(self.history)
        if not tuner.means.steps:
            return
        self._rates.end_epoch()
        self._idle.warn_of_eval_mode(tuner.epoch)
        self._idle.warn_of_unread()
        with self._in_the_loops_mode(of_steps=False):
            tuner.end_epoch(self.valid_loader)
        self._refresh()  # λ may have gone back
        self._recent.batches.clear()  # an epoch is evaluated by its own batches
        self._seen.late = 0
        tuner.begin_epoch()
        for callback in tuner.settings.callbacks if len(self.history) > rows else ():
            callback(self)

    def _evaluate_start(self) -> None:
        """Evaluate the model before its first step, once: the values that a run ends with are those of the start where no epoch
        is better. A loop that goes on from a state knows the start's loss already."""
        if self._begun:
            return
        self._begun = True
        if not self._tuner.counters.steps and not len(self.history):
            with self._in_the_loops_mode(of_steps=False):
                self.history.start_loss = self._tuner.evaluator.loss_before_training(self.valid_loader)

    # Hooks of the optimizers

    def _before_step(self, optimizer: Optimizer, first: bool) -> None:
        self._sets_up = not self._last_forward.forwards and sets_up_state(optimizer)
        if self._sets_up:
            return
        if first and id(optimizer) in self._stepped:
            self._end_step()
        if first and not self._stepped:
            check_place(self.model, self._place)
            self._evaluate_start()
            self._rates.note()
            self._idle.note_step(self._last_forward, self.loaders.beside is not None)
            note_gradient(self._tuner, self._decay, gradient_factor(optimizer))
        self._decay.before_step(optimizer, first)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._sets_up:
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._stepping):
            self._end_step()

    def _end_step(self) -> None:
        """End the step of w₀ under way, if there is one. A GradScaler leaves out optimizers whose gradients overflowed."""
        if not self._stepped:
            return
        self._stepped.clear()
        if self.train_loader is None:
            self._due = True
            self._seen.hold()
            return
        if (beside := self.loaders.beside) is not None:
            self._seen.see(beside.next()[0])
        if not (batches := self._seen.take()):
            raise ValueError(
                "the optimizer has stepped, and train_loader has yielded no batch for it: pass the loader that the loop "
                "iterates over, after accelerator.prepare say, and another one that it iterates over for a while, as of "
                "accelerator.skip_first_batches, to tuner.follow(loader); or, also where the loop reads all batches before it "
                "trains, train_loader=None, and call tuner.step(batch) after each step"
            )
        self._advance(batches)

    def _advance(self, batches: list[object]) -> None:
        """Do what is due after a step of w₀ on these batches."""
        tuner = self._tuner
        self._last_forward.follow()
        self._recent.batches.extend(batches)
        with torch.enable_grad(), self._in_the_loops_mode():  # the optimizer may step in a backward pass, say
            prepared = [tuner.prepare(batch, "train_loader", tuner.time) for batch in batches]
            tuner.stepper.note_entries(prepared)
            tuner.after_step(prepared, {})
        self._refresh()
        if self.epoch_steps is not None and tuner.means.steps >= self.epoch_steps:
            self.end_epoch()
        elif self.train_loader is not None and not len(self.history) and length_of(self.train_loader) is None:
            self._idle.warn_of_no_evaluation(tuner.means.steps)

    @contextmanager
    def _in_the_loops_mode(self, of_steps: bool = True) -> Iterator[None]:
        """Inside, the network is in the mode of the loop's forward, and weights without an optimizer are constants. A loss that
        is no number ends this, with a warning.

        of_steps: False for an evaluation, which draws the same each time and leaves the model's hidden state as it was.
        """
        self.stn.training = self._last_forward.training
        noise = self._reader.seeded(self._seed, self._tuner.counters.steps if of_steps else -1)
        try:
            unchanged = nullcontext() if of_steps else Preservation(self.model, None, but=self.model.parameters())
            with self.loaders.unobserved(), frozen(self._idle.constant_weights()), noise, unchanged:
                yield
        except BadLoss as fault:
            leave_out(self._tuner, fault)

    def _refresh(self) -> None:
        """Let the model's forward draw at λ as it is."""
        with torch.no_grad():
            self._strengths.copy_(self.stn.hparams())

    # Results

    def strengths(self, examples: int) -> dict[str, Tensor]:
        """{name: (examples,)}, for a training loss of your own that takes `hparams`, such as `fxstn.cross_entropy`.

        Raises ValueError for a number of examples that is none.
        """
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"strengths: examples={examples!r} must be the number of examples in the batch, 1 or more")
        self._idle.reads = True
        return self.stn.hparams.named(self._strengths.expand(examples, -1))

    def detach(self) -> nn.Module:
        """Leave a plain model, and return it: no hook, no forward of its own, a loader of its own class. The values stay to be
        read. A wrapper such as DistributedDataParallel stays around it, and is not returned.

        A pass over train_loader that the loop has left before its end is an epoch, which ends here.
        """
        self.close_epoch()
        if len(self.history) and not distributed.rank():
            self._tuner.monitors.read_end(self.history.rows, self.history.start_loss)
        for handle in self._handles:
            handle.remove()
        restore_modules(self.model)
        self.loaders.restore()
        return self.model

    # State

    def state_dict(self) -> State:
        """Everything that a tuner goes on from: Θ, λ, σ, their optimizers, counters, places, history. Nothing of the model."""
        self._end_step()
        return state_of(self.stn, list(self.history.names), self._parts())

    def _parts(self) -> dict[str, Stateful]:
        assert self._starts is not None
        own = dict[str, Stateful](valid=self._valid, rates=self._rates, seen=self._seen, recent=self._recent)
        return parts_of(self._tuner, self._last_forward) | own | {"loaders": self.loaders, "starts": self._starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError, and changes nothing, where it is of another format, model or choice of λ."""
        load_state(state, self.stn, list(self.history.names), self._parts(), self.device)
        self._refresh()
