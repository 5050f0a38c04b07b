"""Weight decay of a user's optimizer, taken over by λ: coupled as in SGD and Adam, or decoupled as in AdamW."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxstn.bilevel.faults import warn_caller
from fxstn.hp import HyperparameterSpace, Spec, WeightDecay
from fxstn.hp.hyperparameter import CHOSEN, DECAY
from fxstn.ir.input_errors import first_line, is_number
from fxstn.loops.step_hooks import gradient_factor
from fxstn.network import SelfTuningNetwork
from fxstn.ops.penalty import add_to_gradients, penalty, penalty_gradients
from fxstn.ops.precision import as_real, wide

Group = dict[str, Any]
# What does not say how a group decays: what groups have of their own, and how a step is computed.
_OTHERS = ("params", "param_names", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True)
class DecayedWeight:
    """A weight whose decay is tuned.

    index: of its coefficient in λ.
    norm: 2, or 1 for λ ‖w‖₁.
    number: of its group in the optimizer. The group's weight_decay goes on acting, and λ adds the difference.
    decoupled: whether that acts on the weight itself, beside the gradient.
    """

    name: str
    weight: nn.Parameter
    index: int
    norm: int
    optimizer: Optimizer
    number: int
    decoupled: bool

    @property
    def group(self) -> Group:
        """As it is now: an optimizer that loads a state has new groups."""
        return self.optimizer.param_groups[self.number]

    @property
    def constant(self) -> float:
        """The coefficient that the optimizer applies itself."""
        return float(self.group.get("weight_decay", 0.0)) if self.norm == 2 else 0.0

    def second_moment(self) -> tuple[Tensor, Tensor] | None:
        """(v, its correction for the start, 0-d) of an optimizer with decoupled decay like Adam's; None for another."""
        state = self.optimizer.state.get(self.weight, {})
        square = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if not self.decoupled or self.norm == 1 or not isinstance(square, Tensor) or square.shape != self.weight.shape:
            return None
        beta = float(self.group.get("betas", (0.0, 0.0))[-1])
        (square,) = as_real([square])
        if "step" not in state or not beta:
            return square, torch.ones(())
        step = torch.as_tensor(state["step"]).to(wide(square.dtype))  # which may be on the device: no float of it
        return square, -torch.expm1(step * math.log(beta))  # 1 - β^step, also on devices without float64


class TunedDecay:
    """Decays weights by λ, before each step of the user's optimizers.

    penalties: (parameter name, index of its coefficient, norm), of the network.
    """

    def __init__(
        self,
        penalties: Sequence[tuple[str, int, int]],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        hparams: HyperparameterSpace,
    ) -> None:
        self.hparams = hparams
        groups = groups_of(optimizers) if penalties else {}
        self.weights = [
            DecayedWeight(name, weight, index, norm, *groups[id(weight)])
            for name, index, norm in penalties
            if id(weight := model.get_parameter(name)) in groups
        ]

    @torch.no_grad()
    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(weight, the gradient of its penalty), of the weights that have a gradient: λ w, and λ D w where it is decoupled."""
        strengths = self.hparams().detach()
        for optimizer in {id(own.optimizer): own.optimizer for own in self.weights}.values():
            for part in self._alike(optimizer):
                weights, one = [own.weight for own in part], part[0]
                gradients = penalty_gradients(weights, strengths[one.index], one.norm)
                if metric := self.metric([own.name for own in part]) if one.norm == 2 else {}:
                    scaled = [g for own, g in zip(part, gradients, strict=True) if own.name in metric]
                    torch._foreach_mul_(as_real(scaled), [metric[own.name] for own in part if own.name in metric])
                yield from zip(weights, gradients, strict=True)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, first: bool = True) -> None:
        """Let λ act in place of the optimizer's own coefficient, in the step that follows.

        first: whether these are the first gradients of the step; a closure may compute several.

        A gradient that a GradScaler has left scaled gets the scaled penalty, and that of an optimizer that maximizes the
        negative one.
        """
        strengths = self.hparams().detach()
        scale = gradient_factor(optimizer)
        for part in self._alike(optimizer):
            one, weights = part[0], [own.weight for own in part]
            strength = strengths[one.index].to(one.weight)
            if not (one.decoupled and one.norm == 2):
                difference = strength - one.constant
                difference = difference if scale is None else difference * scale
                add_to_gradients(weights, difference, one.norm)
            elif first:
                lr = one.group["lr"]
                torch._foreach_mul_(list[Tensor](weights), (1 - lr * strength) / (1 - lr * one.constant))

    @torch.no_grad()
    def added_loss(self, optimizer: Optimizer) -> Tensor | float:
        """What `before_step` adds to the loss by its gradients: ½ μ ‖w‖², or μ ‖w‖₁, of each weight with coupled decay."""
        strengths, factor = self.hparams().detach(), gradient_factor(optimizer)
        total: Tensor | float = 0.0
        for part in self._alike(optimizer):
            one = part[0]
            if not (one.decoupled and one.norm == 2):
                value = penalty([own.weight for own in part], strengths[one.index] - one.constant, one.norm)
                total = total + (value if factor is None else value * factor)
        return total

    def _alike(self, optimizer: Optimizer) -> Iterable[list[DecayedWeight]]:
        """The weights of an optimizer that have a gradient, those together that decay alike."""
        alike: dict[tuple[int, int, int, torch.dtype], list[DecayedWeight]] = {}
        for own in self.weights:
            if own.optimizer is optimizer and own.weight.grad is not None:
                alike.setdefault((own.index, own.norm, own.number, own.weight.dtype), []).append(own)
        return alike.values()

    @torch.no_grad()
    def metric(self, names: Sequence[str]) -> dict[str, Tensor]:
        """{name: D, in the shape of the weight as `as_real` shows it}, of those weights with decoupled decay where D is not 1.

        The optimizer moves w by −lr · (D⁻¹ ∇L + λ w), so that it rests where ∇L + λ D w = 0. Adam and its kin have D = √v̂ + ε,
        from `exp_avg_sq`. Optimizers without it are treated as D = 1.
        """
        moments = {
            own.name: (*moment, float(eps) if is_number(eps := own.group.get("eps")) else 0.0)
            for own in self.weights
            if own.name in names and (moment := own.second_moment()) is not None
        }
        if not moments:
            return {}
        squares, corrections, smallest = zip(*moments.values(), strict=True)
        diagonals = torch._foreach_sqrt(torch._foreach_div(squares, corrections))
        torch._foreach_add_(diagonals, smallest)
        return dict(zip(moments, diagonals, strict=True))


def groups_of(optimizers: Sequence[Optimizer]) -> dict[int, tuple[Optimizer, int, bool]]:
    """{id of a parameter: its optimizer, the number of its group, whether weight decay is decoupled there}."""
    known: dict[tuple[type[Optimizer], str], bool] = {}
    result: dict[int, tuple[Optimizer, int, bool]] = {}
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            kind = (type(optimizer), repr([option for option in sorted(group.items()) if option[0] not in _OTHERS]))
            if kind not in known:
                known[kind] = is_decoupled(optimizer, group)
            result |= {id(parameter): (optimizer, number, known[kind]) for parameter in group["params"]}
    return result


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay acts on the weight itself: the group's flag where it has one, else seen from a step.

    An optimizer of the same class is tried on a small matrix of ones with a gradient of ones. Decoupled decay moves it by
    −lr · weight_decay · w. Coupled decay moves it as without decay and with a gradient that has weight_decay · w added.
    Warns where neither is so, or where no such optimizer can be made; λ then acts as coupled decay.
    """
    if "decoupled_weight_decay" in group or "weight_decay" not in group:
        return bool(group.get("decoupled_weight_decay"))
    options = {name: value for name, value in group.items() if name not in _OTHERS}
    lr, decay, sign = 1e-3, 0.5, -1 if group.get("maximize") else 1

    def after_steps(weight_decay: float, added: float = 0.0) -> float:
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        kind: Callable[..., Optimizer] = type(optimizer)
        twin = kind([weight], lr=lr)
        twin.param_groups[0].update(options | {"lr": lr, "weight_decay": weight_decay})
        for _ in range(2):
            weight.grad = sign * (1 + added * weight.detach())
            twin.step()
        return weight.mean().item()

    expected, name = 1 - (1 - lr * decay) ** 2, type(optimizer).__name__
    try:
        plain, decayed, coupled = after_steps(0.0), after_steps(decay), after_steps(0.0, decay)
    except Exception as error:  # an optimizer with a constructor of its own
        said = f"how {name} decays weights cannot be seen ({type(error).__name__}: {first_line(error)})"
    else:
        if abs(coupled - decayed) <= 1e-6 * max(abs(1 - decayed), lr * decay):
            return False
        if abs(plain - decayed - expected) < 0.02 * expected:
            return True
        said = f"{name} decays weights neither as SGD and Adam nor as AdamW do"
    warn_caller(
        f"{said}, and λ acts as weight decay in the gradient; set its weight_decay to 0, or give hparams without hp.WeightDecay"
    )
    return False


def decayed_specs(specs: Sequence[Spec] | None, optimizers: Sequence[Optimizer]) -> Sequence[Spec] | None:
    """The specs, with weight decay that starts at the lowest of the optimizers' groups, in a range around theirs."""
    rates = _rates(optimizers)
    if specs is None or not rates:
        return specs
    return [_starting_at(spec, rates) if _takes_over(spec) else spec for spec in specs]


def _rates(optimizers: Sequence[Optimizer]) -> list[float]:
    """The weight decays of the optimizers' groups that have any, from the lowest."""
    all_rates = [float(group.get("weight_decay") or 0.0) for part in optimizers for group in part.param_groups]
    return sorted({rate for rate in all_rates if rate > 0})


def _takes_over(spec: Spec) -> bool:
    """Whether a spec is weight decay without a start of its own."""
    return isinstance(spec, WeightDecay) and spec.norm == 2 and all(n.origin != CHOSEN for n in spec.numbers.values())


def _starting_at(spec: Spec, rates: Sequence[float]) -> Spec:
    result = copy.copy(spec)
    (name, number), *_ = spec.numbers.items()
    low, high = min(number.low, rates[0] / 100), max(number.high, 100 * rates[-1])
    result.numbers = {name: replace(number, init=rates[0], low=low, high=high, origin=DECAY)}
    return result


def without_undecayed(
    network: SelfTuningNetwork, specs: Sequence[Spec] | None, optimizers: Sequence[Optimizer]
) -> Sequence[Spec] | None:
    """The specs without the weights that no optimizer steps, and, where some group has decay, without those in groups that have
    none, unless a spec is for such alone; the very same where there is nothing to leave out."""
    own = _own_rates(network, optimizers)
    unstepped = {name for name, rate in own.items() if rate is None}
    undecayed = {name for name, rate in own.items() if rate == 0.0} if any(own.values()) else set()
    if not any(map(_takes_over, specs or ())) or not unstepped | undecayed or len(unstepped) == len(own):
        return specs
    return [_without(spec, unstepped, undecayed) if _takes_over(spec) else spec for spec in specs or ()]


def _without(spec: Spec, unstepped: Collection[str], undecayed: Collection[str]) -> Spec:
    """The spec of weight decay, with none on some parameters."""
    assert isinstance(spec, WeightDecay)
    result = copy.copy(spec)
    result.exempt, result.undecayed = unstepped, undecayed
    return result


def start_at_decay(network: SelfTuningNetwork, optimizers: Sequence[Optimizer]) -> None:
    """Start each coefficient at the decay of the first weight that it is for, where the specs leave the start open.

    One that is for weights without decay alone starts at the usual recipe.
    """
    own, space, starts = _own_rates(network, optimizers), network.hparams, dict[str, float]()
    others: dict[str, tuple[float, str, float]] = {}
    for name, index, _ in network.terms.penalties:
        if (rate := own.get(name)) and space.hyperparameters[index].origin == DECAY:
            start = starts.setdefault(space.names[index], rate)
            others |= {space.names[index]: (start, name, rate)} if rate != start else {}
    (usual,) = WeightDecay.numbers.values()
    anew = {
        one.name: replace(one, init=starts[one.name]) if one.name in starts
        else replace(one, init=usual.init, origin=usual.origin)
        for one in space.hyperparameters if one.origin == DECAY
    }  # fmt: skip
    space.hyperparameters = tuple(anew.get(one.name, one) for one in space.hyperparameters)
    space.set({name: one.init for name, one in anew.items()})
    for number, (start, name, rate) in others.items():
        warn_caller(f"{number} begins at {start:g}, the weight decay of its first weight; {name} has {rate:g}: give init=, or "
                    "tune the decay of each group by a spec of its own")  # fmt: skip


def _own_rates(network: SelfTuningNetwork, optimizers: Sequence[Optimizer]) -> dict[str, float | None]:
    """{parameter name: weight decay of its group} of the weights whose decay is tuned; None where no optimizer steps it."""
    rates = {
        id(parameter): float(group.get("weight_decay") or 0.0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    weights = {name: id(network.model.get_parameter(name)) for name, _, norm in network.terms.penalties if norm == 2}
    return {name: rates.get(weight) for name, weight in weights.items()}
