"""The parts of a run that have a state: gathered into a checkpoint, and loaded from one that was saved with other settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxstn.bilevel import distributed, specs
from fxstn.bilevel.best_model import BestModel
from fxstn.bilevel.cadence import Counters
from fxstn.bilevel.complete_state import CompleteState
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.history import History
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import LocalState, State, Stateful, random_state, set_random_state
from fxstn.bilevel.updates import Updates

# The values of these parts never change, so that a state in memory may share them.
GROWING = ("history", "best", "backtracking")


@dataclass
class RunParts:
    """All parts of a run that have a state. States are loaded in the order of the parts.

    problem, updates, counters, history, best: of the run.
    shared: {name: further part} whose state is the same in all processes.
    local: {name: part} with a state of its own in each process.
    identity: what two runs must have in common for one to go on with the other's state.
    settings: {name: plain value} of those that a run may change: a warning says which have.
    """

    problem: BilevelProblem
    updates: Updates
    counters: Counters
    history: History
    best: BestModel
    shared: Mapping[str, Stateful]
    local: Mapping[str, LocalState]
    identity: Mapping[str, object]
    settings: Mapping[str, object]

    def all_shared(self) -> dict[str, Stateful]:
        first: dict[str, Stateful] = {"problem": CompleteState(self.problem), "updates": self.updates}
        return {**first, **self.shared, "counters": self.counters, "history": self.history, "best": self.best}

    def state_dict(self) -> State:
        """Everything that what happens next depends on. Several processes: all must call it."""
        own = {"random": random_state()} | {name: part.state_dict() for name, part in self.local.items()}
        state: State = plain_numbers({
            "identity": dict(self.identity),
            "settings": dict(self.settings),
            "specs": specs.describe(self.problem),
            "shared": {name: part.state_dict() for name, part in self.all_shared().items()},
            "processes": distributed.gather(own),
        })  # fmt: skip
        return state

    def load(self, state: State, source: str) -> None:
        """Go on from a state. Several processes: all must call it.

        source: where the state comes from, for messages.

        A warning says which settings of the state's run this one takes anew. Raises ValueError, and changes nothing, where the
        state is of a run that trains something else.
        """
        self._check(state, source)
        try:
            state, changes, remains = specs.adapt(state, self.problem)
            updates, remarks = self.updates.adapt(state["shared"]["updates"])
        except ValueError as error:
            raise ValueError(f"{source} has {error}") from error
        self._load({**state, "shared": {**state["shared"], "updates": updates}}, source)
        changes += remarks
        pairs = [(name, state["settings"].get(name, "missing"), new) for name, new in self.settings.items()]
        changes += [f"{name}={new} (was {old})" for name, old, new in pairs if new != old]
        if (changes or remains) and not distributed.rank():
            texts = [f"this run takes anew: {'; '.join(changes)}"] if changes else []
            texts += [f"it keeps {'; '.join(remains)}"] if remains else []
            warn_caller(f"{source} was saved with other settings; {'; '.join(texts)}")

    def _load(self, state: State, source: str) -> None:
        """Load all parts, or none."""
        before, fault = copied_state(self.state_dict()), None
        try:
            self.restore(state)
        except Exception as error:  # of a part of the user's own: it may raise anything
            fault = error
        faults = distributed.gather("" if fault is None else f"{type(fault).__name__}: {fault}")
        if texts := [text for text in faults if text]:
            self.restore(before)
            raise ValueError(f"{source} cannot be loaded by this run, which is as it was ({texts[0]}); choose another out_dir, "
                             "or the same settings") from fault  # fmt: skip

    def restore(self, state: State) -> None:
        """Load the state of a run of the same settings."""
        for name, part in self.all_shared().items():
            part.load_state_dict(state["shared"][name])
        saved, rank = state["processes"], distributed.rank()
        for name, local in self.local.items():
            if len(saved) == distributed.processes():
                local.load_state_dict(saved[rank][name])
            else:
                local.restart(saved[0][name])
        set_random_state(saved[min(rank, len(saved) - 1)]["random"])
        if rank >= len(saved):
            distributed.seed_apart(self.counters.steps)

    def _check(self, state: State, source: str) -> None:
        for name, theirs in state["identity"].items():
            if theirs != self.identity[name]:
                raise ValueError(f"{source} has {name} {theirs}, this run {self.identity[name]}; choose another out_dir, or "
                                 "the same settings")  # fmt: skip
        ours, saved = _shapes(CompleteState(self.problem).state_dict()), _shapes(state["shared"]["problem"])
        if other := sorted(name for name in ours.keys() | saved.keys() if ours.get(name) != saved.get(name)):
            raise ValueError(f"{source} is a run of another model: {other[0]} is {saved.get(other[0], 'missing')} there and "
                             f"{ours.get(other[0], 'missing')} here; choose another out_dir")  # fmt: skip
        if len(state["processes"]) == distributed.processes():
            own = state["processes"][distributed.rank()]
            reasons = [reason for name, part in self.local.items() if (reason := part.refusal(own[name]))]
            if reasons := [reason for others in distributed.gather(reasons) for reason in others]:
                raise ValueError(f"{source} has {reasons[0]}; choose another out_dir, or the same loaders")


def operations_of(problem: nn.Module) -> dict[str, object]:
    """{path: what it is} of torch's own modules: two models with the same tensors may differ in them."""
    network = getattr(problem, "stn", None)
    root, prefix = (problem, "") if network is None else (network.model, "model.")
    torchs = [(path, module) for path, module in root.named_modules() if type(module).__module__.startswith("torch.nn")]
    return {prefix + path: f"{type(module).__name__}({module.extra_repr()})" for path, module in torchs}


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def copied_state(state: State) -> State:
    """The same state in memory of its own, off the accelerator."""
    growing = {name: value for name, value in state["shared"].items() if name in GROWING}
    changing = {name: value for name, value in state["shared"].items() if name not in GROWING}
    copied: State = tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf),
        {**state, "shared": changing},
    )
    return copied | {"shared": copied["shared"] | growing}
