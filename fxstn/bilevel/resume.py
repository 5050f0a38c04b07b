"""The whole state of a run, as a dict for a file and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxstn.bilevel import distributed
from fxstn.bilevel.streams import random_state, set_random_state
from fxstn.bilevel.tally import RunningMeans

if TYPE_CHECKING:
    from fxstn.bilevel.runner import BilevelRunner

# attributes that are data already
PLAIN = ("steps", "response_steps", "hyper_steps", "best", "rollbacks_done")


def state_of(runner: BilevelRunner) -> dict[str, Any]:
    """Everything that what happens next depends on. Several processes: all must call it."""
    mine = {
        "random": random_state(),
        "train": runner._train.state_dict(),
        "valid": runner._valid.state_dict(),
        "problem": runner.problem.local_state(),
        "sums": runner._tally.state_dict() if runner._tally else {},
        "tensors": runner.local_tensors() if distributed.processes() > 1 else [],
    }
    return {
        "tunes": _tunes(runner),
        "problem": runner.problem.state_dict(),
        "updates": runner.updates.state_dict(),
        "averages": runner._averaged.averages if runner._averaged else None,
        "history": (runner.history.start, runner.history.rows),
        "along": runner._stepper.along,
        "watch": runner._watch.first,
        "said": sorted(runner._monitors.said),
        "told": runner._monitors.told,
        "processes": distributed.gathered(mine),
        **{name: getattr(runner, name) for name in PLAIN},
    }


def _tunes(runner: BilevelRunner) -> dict[str, Any]:
    """What two runs must have in common for one to go on with the other's state."""
    method = getattr(runner.stn, "method", type(runner.problem).__name__)
    kinds = {
        kind: {name: type(part).__name__ for name, part in parts.items()}
        for kind, parts in runner.updates.parts().items()
    }
    averaging = runner._averaged is not None
    return {
        "hyperparameters": list(runner.history.names), "method": method, **kinds, "averages (ema)": averaging,
        "replay of a schedule": runner.schedule is not None,
    }  # fmt: skip


def restore(runner: BilevelRunner, state: dict[str, Any], source: str) -> None:
    """Go on from a state. Raises ValueError, and changes nothing, where it is of a run that trains something else."""
    ours = _tunes(runner)
    for kind, theirs in state["tunes"].items():
        if theirs != ours[kind]:
            raise ValueError(
                f"{source} has {kind} {theirs}, this run {ours[kind]}; choose another out_dir, or the same settings"
            )
    shapes = {
        name: tuple(value.shape) for name, value in runner.problem.state_dict().items() if isinstance(value, Tensor)
    }
    saved = {name: tuple(value.shape) for name, value in state["problem"].items() if isinstance(value, Tensor)}
    if shapes != saved:
        other = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        raise ValueError(f"{source} is a run of another model: {other[0]} is {saved.get(other[0], 'missing')} there and "
                         f"{shapes.get(other[0], 'missing')} here; choose another out_dir")  # fmt: skip
    runner.problem.load_state_dict(state["problem"])
    runner.updates.load_state_dict(state["updates"])
    runner._limit.load_state_dict({})
    if runner._averaged:
        runner._averaged.load(state["averages"])
    start, rows = state["history"]
    runner.history.start, runner.history.rows = start, list(rows)
    runner._watch.first, runner._monitors.said = state["watch"], set(state["said"])
    runner._monitors.told = list(state["told"])
    for name, value in _on_device(runner, {name: state[name] for name in PLAIN}).items():
        setattr(runner, name, value)
    runner._stepper.along = list(_on_device(runner, state["along"]))
    _restore_process(runner, state["processes"])


def _on_device(runner: BilevelRunner, value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(runner.device), value)


def _restore_process(runner: BilevelRunner, saved: list[dict[str, Any]]) -> None:
    """Of the same number of processes each goes on where it was; otherwise the epoch under way begins anew."""
    rank = distributed.rank()
    mine = saved[min(rank, len(saved) - 1)]
    if len(saved) == distributed.processes():
        runner._train.load_state_dict(mine["train"])
        runner._valid.load_state_dict(mine["valid"])
        runner.problem.load_local_state(_on_device(runner, mine["problem"]))
        runner._tally = RunningMeans(**sums) if (sums := _on_device(runner, mine["sums"])) else None
        kept = runner.local_tensors() if distributed.processes() > 1 else []
        for tensor, value in zip(kept, mine["tensors"], strict=True):
            tensor.copy_(value)
    else:
        runner._train.follow(saved[0]["train"])
        runner._valid.follow(saved[0]["valid"])
        runner._tally = None
    set_random_state(mine["random"])
    if rank >= len(saved):
        distributed.seed_apart(runner.steps)
