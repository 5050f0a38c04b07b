"""Hyperparameters of a checkpoint: their ranges and what they act on; and a state in the units of other ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxstn.bilevel.evidence import AVERAGES
from fxstn.bilevel.network_problem import NetworkProblem
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import State
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.space import inverse_softplus

RANGE = ("low", "high", "log", "integer")


def describe(problem: BilevelProblem) -> State:
    """{name of a hyperparameter: what a checkpoint says of it}."""
    if not isinstance(problem, NetworkProblem):
        return {name: {"low": low, "high": high} for name, (low, high) in problem.ranges().items()}
    space, uses = problem.stn.hparams, problem.stn.recipe.plan.binding.uses()
    keys = (*RANGE, "init", "scale", "by_batch", "regularizes")
    return {
        p.name: {key: getattr(p, key) for key in keys} | {"uses": own}
        for p, own in zip(space.hyperparameters, uses, strict=True)
    }


def _hyperparameter(spec: State) -> Hyperparameter:
    return Hyperparameter(spec["init"], spec["low"], spec["high"], log=spec["log"], integer=spec["integer"])


def _changed(ours: State, theirs: State, keys: Sequence[str]) -> list[str]:
    """Names of the hyperparameters in which one of the keys differs."""
    return [name for name in ours if any(ours[name].get(key) != theirs.get(name, {}).get(key) for key in keys)]


def _range(spec: State) -> str:
    if not spec:
        return "no range"
    kinds = [kind for kind in ("log", "integer") if spec.get(kind)]
    return f"[{spec['low']:g}, {spec['high']:g}]{''.join(f' ({kind})' for kind in kinds)}"


def _moved(name: str, point: float, theirs: State, ours: State) -> float:
    """The point of the real line at which a hyperparameter has, in our range, the value that it has at `point` in theirs.

    Raises ValueError where the value is not in our range.
    """
    old, new = _hyperparameter(theirs), _hyperparameter(ours)
    if new.integer and not old.integer:
        raise ValueError(f"{name} as any number in {_range(theirs)}, this run as an integer; choose another out_dir, or leave "
                         "out integer")  # fmt: skip
    place = old.value_at(point)
    value = float(math.floor(place)) if old.integer else place
    if not new.low <= value <= new.high:
        raise ValueError(f"{name} at {value:.4g}, which is not in its new range {_range(ours)}; give a range with this value, "
                         "or choose another out_dir")  # fmt: skip
    place = place if new.integer else value
    return new.unconstrained_at(new.inside(place))


def adapt(state: State, problem: BilevelProblem) -> tuple[State, list[str], list[str]]:
    """A state of a run with other specs as one of this run; texts of what this run takes anew, and of what it keeps.

    λ keeps its values where its range has changed. What is in the units of the real line is converted: σ, so that the values
    are perturbed as before; Θ; the gradients and their averages. A new `scale` is used, a new `init` is not.

    Raises ValueError where a value is not in its new range, where a hyperparameter acts on something else, and for a problem,
    or a method, whose units are not known.
    """
    ours, theirs = describe(problem), state["specs"]
    for name in _changed(ours, theirs, ["uses"]):
        old, new = (", ".join(specs[name]["uses"]) or "the loss function" for specs in (theirs, ours))
        raise ValueError(f"{name} for {old}, this run for {new}; choose another out_dir, or the same hparams")
    ranges, scales = _changed(ours, theirs, RANGE), _changed(ours, theirs, ["scale"])
    changes = [f"{name} in {_range(ours[name])} (was {_range(theirs.get(name, {}))})" for name in ranges]
    changes += [f"{name} with scale={ours[name]['scale']:g}" for name in scales]
    for key in ("by_batch", "regularizes"):
        changes += [f"{name} with {key}={ours[name][key]}" for name in _changed(ours, theirs, [key])]
    remains = [
        f"the value of {name} (init={ours[name]['init']:g} is for a new run)"
        for name in _changed(ours, theirs, ["init"])
    ]
    if not ranges and not scales:
        return state, changes, remains
    if not isinstance(problem, NetworkProblem) or (ranges and problem.stn.method == "stn"):
        old, new = (_range(specs.get(ranges[0], {})) for specs in (theirs, ours))
        raise ValueError(f"{ranges[0]} in {old}, this run in {new}, and λ of such a problem cannot be converted; choose "
                         "another out_dir, or the same range")  # fmt: skip
    if ranges and not _settles(state):
        changes.append("the averages of hyper.optimizer")
    return _convert(state, ours, ranges, scales), changes, remains


def _settles(state: State) -> bool:
    """Whether the optimizer of λ is a SettlingAdam, whose averages have known units."""
    return bool(state["shared"]["updates"]["records"]["hyper.optimizer"]["initial"]["type"] == "SettlingAdam")


def _convert(state: State, ours: State, ranges: Sequence[str], scales: Sequence[str]) -> State:
    """The state with λ at the same values in other ranges, and σ anew where a spec gives another scale."""
    theirs, names = state["specs"], list(ours)
    shared = {**state["shared"], "problem": dict(state["shared"]["problem"])}
    tensors = shared["problem"]
    points, raw = (tensors[f"stn.hparams.{key}"].clone() for key in ("unconstrained", "raw_scale"))
    slopes = torch.ones(len(names), dtype=torch.float64)  # of the old point along the new one
    for name in ranges:
        index = names.index(name)
        before = points[index].item()
        after = _moved(name, before, theirs[name], ours[name])
        slopes[index] = _hyperparameter(ours[name]).slope_at(after) / _hyperparameter(theirs[name]).slope_at(before)
        points[index] = after
        scale = torch.nn.functional.softplus(raw[index].double()).item() / slopes[index].item()
        raw[index] = inverse_softplus(scale)
    for name in scales:
        raw[names.index(name)] = inverse_softplus(ours[name]["scale"])
    tensors["stn.response.flat_U"] = _times(tensors["stn.response.flat_U"], slopes)
    tensors |= {"stn.hparams.unconstrained": points, "stn.hparams.raw_scale": raw}
    stepper = shared["stepper"]
    gradients = [_times(gradient, slopes) for gradient in stepper["training_hypergradients"]]
    shared["stepper"] = {**stepper, "training_hypergradients": gradients}
    shared["updates"] = _convert_updates(shared["updates"], slopes, _settles(state))
    signs = [sign for sign in shared["monitors"]["signs"] if sign.partition(" ")[2] not in ranges]
    shared["monitors"] = {**shared["monitors"], "signs": signs}
    if ranges:  # where λ was is known in the old units alone
        shared["backtracking"] = {**shared["backtracking"], "points": []}
    return {**state, "shared": shared, "processes": [_convert_local(own, slopes) for own in state["processes"]]}


def _times(tensor: Tensor, factors: Tensor) -> Tensor:
    """Each entry of the last dimension by its factor; bit for bit as it was where that is 1."""
    return torch.where(factors == 1, tensor, (tensor.double() * factors).to(tensor.dtype))


def _convert_updates(updates: State, slopes: Tensor, settles: bool) -> State:
    """Averages of gradients in λ by the chain rule, where they are those of a SettlingAdam; others, and σ's, begin anew."""
    if bool((slopes == 1).all()):
        return updates
    optimizers = {name: {**state} for name, state in updates["optimizers"].items()}
    powers = dict(zip(AVERAGES, (1, 2, 2), strict=True))
    entries = optimizers["hyper.optimizer"]["state"] if settles else {}
    optimizers["hyper.optimizer"]["state"] = {
        key: entry | {average: _times(entry[average], slopes**power) for average, power in powers.items()}
        for key, entry in entries.items()
    }
    if "hyper.scale_optimizer" in optimizers:
        optimizers["hyper.scale_optimizer"]["state"] = {}
    return {**updates, "optimizers": optimizers}


def _convert_local(own: State, slopes: Tensor) -> State:
    """A process's state, with the ε that windows share in new units."""
    problem = own["problem"]
    if problem.get("epsilon") is None:
        return own
    return {**own, "problem": {**problem, "epsilon": _times(problem["epsilon"], 1 / slopes)}}
