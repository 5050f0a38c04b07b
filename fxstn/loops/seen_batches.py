"""The training batches of the step of somebody else's loop that is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from fxstn.bilevel.state import State
from fxstn.loops.read_ahead import ReadAhead


class GradientMark:
    """Which tensor a gradient is, and how often it was written to; without keeping it. gradient: None for none."""

    def __init__(self, gradient: Tensor | None) -> None:
        self._tensor = None if gradient is None else ref(gradient)
        self._version = 0 if gradient is None else gradient._version

    def shows(self, gradient: Tensor | None) -> bool:
        """Whether it is this very tensor, with nothing written to it since; or none, as then."""
        if gradient is None or self._tensor is None:
            return gradient is None and self._tensor is None
        return self._tensor() is gradient and self._version == gradient._version


class SeenBatches:
    """The batches of the step of w₀ under way, as a loader yields them. Part of a tuner's state.

    optimizers: of the loop. Their gradients say which batches a step is made of: not those that the loop passes over, or whose
        gradients it drops.
    begins, leaves, ends: functions, called when a pass begins, when the loop leaves it, and when it counts as over.
    ends_step: function, called before the next batch, and at the end of a pass: the loop is done with the steps on what it had.
    length: function, the number of batches of a pass; None where it is not known.
    forwards: of `ReadAhead`.

    A pass within a pass, such as an evaluation on training batches, is none of the loop, unless it takes a step there.

    passing: whether a pass over the loader is under way.
    count: batches of this pass so far.
    most: batches of the largest step.
    late: steps of this epoch outside of a pass, as in a loop that takes batches ahead.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        begins: Callable[[], None],
        leaves: Callable[[], None],
        ends: Callable[[], None],
        ends_step: Callable[[], None],
        length: Callable[[], int | None],
        forwards: Callable[[], int],
    ) -> None:
        self.optimizers, self.begins, self.leaves, self.ends = optimizers, begins, leaves, ends
        self.ends_step, self.length, self._ahead = ends_step, length, ReadAhead(forwards)
        self.passing, self.count, self.late, self.most = False, 0, 0, 0
        self._pass: object = None  # the one under way
        self._left = False  # whether the loop has left it
        self._look: tuple[object, object] | None = None  # the last batch of a pass within it, and that pass
        self._now, self._last = list[object](), list[object]()  # of the step under way, of the last one
        self._of_step = list[object]()  # of a step that is done, whose last batch the loop has yet to tell
        self._is_over = False  # whether the loop was done with the last batch when it was noted
        self._idle = 0  # batches of this pass that no step was made of
        self._steps = 0  # in this pass
        self._mark = GradientMark(None)  # before the last batch

    # Passes

    def begin_pass(self, of: object = None) -> None:
        """A pass begins. One that was broken off ends here. of: which one it is."""
        if self.passing and not self._left and of is not self._pass:
            return
        self.close()
        self.begins()
        self.passing, self._pass, self._left, self._look = True, of, False, None
        self.count = self._idle = self._steps = 0
        self._now.clear()
        self._ahead.begin_pass()

    def see(self, batch: object, of: object = None) -> None:
        """A pass yields a batch, and the loop is done with the one before."""
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # the loop may take the labels out of its own
        if self.passing and of is not self._pass:
            self._look = batch, of
            return
        self.ends_step()
        if not self.passing:
            self.passing, self._pass, self._left = True, of, False
        self._look, self._is_over = None, False
        self._settle()
        self._now += self._ahead.read(batch)
        self.count += 1

    def leave_pass(self, of: object) -> None:
        """The loop has left a pass before its end."""
        if of is self._pass and not self._left:
            self._left = True
            self.leaves()
        if self._look is not None and self._look[1] is of:
            self._look = None

    def end_pass(self, of: object = None) -> None:
        """A pass has no more batches."""
        if self.passing and (of is None or of is self._pass):
            self._ahead.end_pass()
        self.leave_pass(self._pass if of is None else of)
        if self._left:
            self.close()

    def close(self) -> None:
        """End a pass that the loop has left, or is about to begin anew."""
        if self.passing:
            self.leave_pass(self._pass)
            self.ends_step()
            self.passing, self._pass = False, None
            self.ends()

    @property
    def left(self) -> bool:
        """Whether the loop has left a pass that has not ended yet."""
        return self.passing and self._left

    @property
    def complete(self) -> bool:
        """Whether the loop has left the pass under way, or has trained on its last batch without asking for another one."""
        trained = not self._ahead and (not self._now or not self._mark.shows(self._gradient()))
        return self.passing and (self._left or (trained and self.count == self.length()))

    # Steps

    def tell(self, batch: object, stepped: bool) -> list[object]:
        """The loop tells a batch that it has trained on. The batches of the step, where it has taken one with it; else []."""
        self.passing, self._left, self._is_over = True, False, True
        self._now.append(dict(batch) if isinstance(batch, Mapping) else batch)
        if stepped:
            self._now, self._of_step = [*self._of_step, *self._now], []
            return self._take()
        self._settle()
        return []

    def hold(self) -> None:
        """A step is done, and the loop has yet to tell its last batch: gradients that it drops now are those of the step."""
        self._of_step, self._now = [*self._of_step, *self._now], []

    def take(self) -> list[object]:
        """The batches of a step that is done; [] where none was seen.

        Where the loop has taken its last batches ahead, and its pass is over, they are those of the step before.
        """
        if self._look is not None:  # the loop goes on in this pass, and will not come back to the one around it
            batch, of = self._look
            self.close()
            self.begin_pass(of)
            self.see(batch, of)
        return self._take()

    def _take(self) -> list[object]:
        self._now += [] if self.passing else self._ahead.late()
        self.late += not self.passing
        self._steps += self.passing
        ahead = self.late <= max(self.most, self._idle)
        whole = not self.passing and not self._steps and self._idle > max(1, self.most)  # the loop has read all ahead
        batches = [] if whole else self._now or (self._last if ahead else [])
        self._now, self._last, self.most = [], batches, max(self.most, len(batches))
        return batches

    def _gradient(self) -> Tensor | None:
        """Some gradient of the loop, the same one in all steps of it."""
        gradients = (
            weight.grad for part in self.optimizers for group in part.param_groups for weight in group["params"]
        )
        return next((gradient for gradient in gradients if gradient is not None and not gradient.is_sparse), None)

    def _settle(self) -> None:
        """Leave out batches that have no part in the gradient that there is now."""
        gradient, before = self._gradient(), self._mark
        self._mark, count = GradientMark(gradient), len(self._now)
        if gradient is None:
            self._now.clear()
        elif self._now and before.shows(gradient):
            self._now.pop()  # no backward pass
        self._idle += count - len(self._now)

    @contextmanager
    def drop_gradients(self) -> Iterator[None]:
        """Around what drops all gradients: batches before have no part in the next step. The last one has, where its backward
        pass is still to come."""
        if self._is_over or not self._mark.shows(self._gradient()):
            self._last, self._now = self._now[-1:] or self._last, []  # a closure drops gradients within a step
        else:
            del self._now[:-1]
        yield
        self._mark = GradientMark(self._gradient())

    def state_dict(self) -> State:
        return {"most": self.most, "left": self.complete, "ahead": self._ahead.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; a pass that was complete by then ends when the next one begins."""
        self.most, self.passing, self._left = state["most"], state["left"], state["left"]
        self._pass = object() if self.passing else None
        self._ahead.load_state_dict(state["ahead"])
