"""The statistics of the last evaluation: they belong to its weights, and a resumed run evaluates with them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fxstn.bilevel.batches import Batch
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import State
from fxstn.bilevel.temporary import swapped_tensors


class EvaluatedStatistics:
    """Buffers that `BilevelProblem.recalibrated` set in the last evaluation. A part with a state, the same in all processes.

    problem: whose buffers they are.
    steps: returns the number of inner steps done.

    A checkpoint holds no training batches. Without these buffers a resumed run would estimate them on other batches, and
    evaluate the same weights to another loss. They hold until a step is done or a parameter is written to.
    """

    def __init__(self, problem: BilevelProblem, steps: Callable[[], int]) -> None:
        self.problem, self.steps = problem, steps
        self._buffers: dict[str, Tensor] = {}
        self._step = -1  # inner steps done at the last evaluation
        self._versions: list[int] = []

    def _parameter_versions(self) -> list[int]:
        """How often each parameter was written to."""
        return [parameter._version for parameter in self.problem.parameters()]

    def hold(self) -> bool:
        """Whether the buffers are of the parameters as they are now, outside of an evaluation."""
        return self._step == self.steps() and self._versions == self._parameter_versions()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the problem has the buffers of the last evaluation."""
        tensors = dict(self.problem.named_buffers())
        with swapped_tensors([tensors[name] for name in self._buffers], list(self._buffers.values())):
            yield

    @contextmanager
    def estimated(self, recent: Iterable[Batch]) -> Iterator[None]:
        """Inside, the problem has buffers of some training batches, which are kept."""
        tensors = dict(self.problem.named_buffers())
        before = {name: tensor._version for name, tensor in tensors.items()}
        with self.problem.recalibrated(recent):
            changed = {name: tensor for name, tensor in tensors.items() if tensor._version != before[name]}
            self._buffers = {name: tensor.detach().clone() for name, tensor in changed.items()}
            self._step = self.steps()
            yield

    @contextmanager
    def unaffected(self) -> Iterator[None]:
        """Inside, parameters may change; they must be as before at the end, and the buffers then hold as before."""
        hold = self.hold()
        try:
            yield
        finally:
            if hold:
                self.note_parameters()

    def note_parameters(self) -> None:
        """Note that the parameters are as the last evaluation had them; to be called after it has restored them."""
        self._versions = self._parameter_versions()

    def state_dict(self) -> State:
        return {"buffers": dict(self._buffers), "step": self._step} if self.hold() else {"buffers": {}, "step": -1}

    def load_state_dict(self, state: State) -> None:
        device = {name: tensor.device for name, tensor in self.problem.named_buffers()}
        self._buffers = {name: tensor.to(device[name]) for name, tensor in state["buffers"].items()}
        self._step = state["step"]
        self.note_parameters()
