"""SettlingAdam, the optimizer of hyperparameters: the falling rate, the noise gate, and the generalisation gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from fxstn.bilevel.evidence import (
    MEAN_MEMORY,
    SQUARE_MEMORY,
    bound_gradient,
    noise_gate,
    update_evidence,
    weight_sum,
)
from fxstn.bilevel.state import restore_types
from fxstn.ir.input_errors import is_number

__all__ = ["SettlingAdam", "generalisation_gap", "learning_rate", "set_gap"]
__dir__ = __all__.copy  # what completion lists

SHARE = "share"  # in a parameter's state: what is left of the steps of each number, once some were taken back
# Where a network overfits completely, steps of uncertain gradients are this much shorter. Then the hypergradient is little more
# than noise (docs/results/hypergradient.md), and a start that is a usual recipe is not far from what is best.
CAUTION = 0.65
END = 0.1  # share of a range, at either end, where noise must not drive λ further: a regulariser does little there


def falling_rate(first: float, settle: float, steps: float) -> float:
    """The learning rate after so many steps: first / √(1 + steps / settle).

    λ then travels at most about 2 first √(settle T) in T steps: across its range in the few hyper steps of a short run, and
    it settles in a long one. The length of the run need not be known. (Nemirovski et al. 2009, Sec. 2.2: the rate of stochastic
    gradient descent with averaging falls as 1/√t.)
    """
    return first / math.sqrt(1 + steps / settle)


def needed_certainty(rises: Tensor, gap: float, position: Tensor) -> Tensor:
    """The share of the certainty, in [0, 1], that a step of each number needs.

    rises: whether the step raises the number.
    gap: the generalisation gap's share s, in [0, 1].
    position: where in its range the number is, in [0, 1].

    A step up needs 1 − s and a step down s, so that where the gradient is noise, x goes the way that the gap favours. Over the
    last tenth of the range this grows to 1 for steps towards the end: noise must not drive x to an end, where a regulariser
    does nothing and nothing brings x back.
    """
    room = torch.add(position, rises, alpha=-1).clamp_(-END, END)  # negative towards the upper end
    return torch.rsub(room.abs().add_(room, alpha=1 - 2 * gap), 1, alpha=0.5 / END)


def generalisation_gap(train_loss: float, valid_loss: float) -> float | None:
    """(L_V − L_T) / L_V in [0, 1]: the share of the validation loss that a stronger regularisation can gain at most.

    train_loss, valid_loss: mean losses, both evaluated without dropout and augmentation.

    A stronger regularisation does not fit the training data better, so at best L_V comes down to L_T. 0 where L_T is above L_V.
    None where the losses say nothing: not finite, negative, or a validation loss of zero.
    """
    if not (0 <= train_loss < math.inf and 0 < valid_loss < math.inf):
        return None
    return min(max(1 - train_loss / valid_loss, 0.0), 1.0)


def set_gap(optimizer: torch.optim.Optimizer, gap: float | None, regularizing: Sequence[bool]) -> None:
    """Limit the next steps of a `SettlingAdam` by the generalisation gap.

    gap: its share of the validation loss, in [0, 1] (`generalisation_gap`). None: no limit.
    regularizing: for each number of all parameters, in their order, whether a higher value is a stronger regularisation. Others
        are not limited.

    An optimizer that knows no gap stays as it is.
    Raises ValueError for a gap outside [0, 1], and where `regularizing` has another length.
    """
    groups = [group for group in optimizer.param_groups if "gap" in group]
    if not groups:
        return
    _check_gap(gap, "set_gap")
    masks = iter(_split_flags(regularizing, [x for group in groups for x in group["params"]], "set_gap: regularizing"))
    for group in groups:
        flags = [flag for _ in group["params"] for flag in next(masks).flatten().tolist()]
        group["gap"], group["limited"] = gap, flags


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of an optimizer's last step, in its first group; before a step, that of the first one.

    It is "lr" of the group, with a `SettlingAdam` lowered by the steps done.
    """
    group = optimizer.param_groups[0]
    if not isinstance(optimizer, SettlingAdam):
        return float(group["lr"])
    steps = max((optimizer.state[x]["step"].item() for x in group["params"] if x in optimizer.state), default=0)
    return falling_rate(group["lr"], group["settle"], max(steps - 1, 0))


def _check_gap(gap: object, name: str) -> None:
    if gap is not None and not (is_number(gap) and 0 <= gap <= 1):
        raise ValueError(f"{name}: gap={gap!r} must be a share in [0, 1], or None for no limit")


def _split_flags(flags: Sequence[bool], parameters: Sequence[Tensor], name: str) -> list[Tensor]:
    """Flags of the numbers of all parameters, as a mask for each. Raises ValueError, about `name`, for another length."""
    sizes = [x.numel() for x in parameters]
    if len(flags) != sum(sizes):
        raise ValueError(f"{name} has {len(flags)} entries for parameters of {sum(sizes)} numbers in all; give one entry for "
                         "each number")  # fmt: skip
    parts = torch.tensor(list(flags), dtype=torch.bool).split(sizes)
    return [part.reshape(x.shape).to(x.device) for part, x in zip(parts, parameters, strict=True)]


_OPTIONS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("positive and finite", lambda value: 0 < value < math.inf),
    "settle": ("positive", lambda value: value > 0),
    "certainty": ("at least 0 and finite, or None", lambda value: 0 <= value < math.inf),
}


def _check_group(group: Mapping[str, object], name: str) -> None:
    """Checks the options of a group; `name` begins the message. Raises TypeError for another type, ValueError out of range."""
    for key, (kind, is_right) in _OPTIONS.items():
        value = group[key]
        if key == "certainty" and value is None:
            continue
        if not is_number(value):
            raise TypeError(f"{name}: {key}={value!r} must be a number, {kind}")
        if not is_right(value):
            raise ValueError(f"{name}: {key}={value} must be {kind}")
    if not isinstance(group["limits"], bool):
        raise TypeError(f"{name}: limits={group['limits']!r} must be True or False")
    _check_gap(group["gap"], name)


class SettlingAdam(torch.optim.Optimizer):
    """Adam for hyperparameters. Its rate falls, noisy gradients move little, and the generalisation gap limits upward steps.

    The generalisation gap is (L_V − L_T) / L_V, the share of the validation loss L_V by which it exceeds the training loss L_T
    (`generalisation_gap`). A network without a gap does not overfit, so nothing regularises it more.

    params: as of every optimizer of torch. A group may have its own lr, settle, certainty and limits.
    lr: > 0, the rate of the first step. Schedulers change it.
    settle: > 0, number of steps after which the rate has fallen to lr/√2. Infinity: it does not fall.
    certainty: ≥ 0, number of standard deviations a gradient must be from zero for a full step; a larger number makes steps in
        noise smaller. None: the noise does not count, as in Adam.
    limits: whether a `BilevelRunner` limits the steps of these parameters by the gap.
    position: function of a parameter that returns where in its range each number is, in [0, 1], such as torch.sigmoid for
        logits. None: no number is near an end.

    Step t = 0, 1, … is x ← x − lr/√(1 + t/settle) · ρ m/√v, with Adam's averages m and v and the share ρ in [0, 1] of
    `noise_gate`. Noise hardly moves x; it makes Adam walk at random, because Adam divides by the size of the gradient. A
    gradient that keeps its direction moves x as Adam does. The averages are at least in float32, whatever the parameter is in.

    `set_gap` sets a group's "gap" s in [0, 1], and which numbers are "limited" by it. Their rises are multiplied by s, and
    their steps need the part of the certainty that `needed_certainty` says. All steps are multiplied by 1 − CAUTION s (1 − ρ):
    what is certain may travel far. Without a gap nothing is limited.

    Raises ValueError for lr, settle or certainty out of range, TypeError for an argument of another type.
    """

    position: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.4,
        settle: float = 25.0,
        certainty: float | None = 2.0,
        limits: bool = True,
        position: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "settle": settle, "certainty": certainty, "limits": limits, "gap": None, "limited": None,
        }  # fmt: skip
        _check_group(defaults, "SettlingAdam")
        if position is not None and not callable(position):
            raise TypeError(f"SettlingAdam: position={position!r} must be a function of a parameter, such as torch.sigmoid, or "
                            "None")  # fmt: skip
        self._masks: dict[int, tuple[list, list[Tensor]]] = {}
        super().__init__(params, defaults)
        self.position = position

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"position": self.position, "_masks": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = f"SettlingAdam, group {len(self.param_groups)}"
        if isinstance(param_group, dict):  # torch says what else is wrong with it
            _check_group(self.defaults | param_group, name)
        super().add_param_group(param_group)
        if wrong := [x for x in self.param_groups[-1]["params"] if not x.is_floating_point()]:
            self.param_groups.pop()
            raise TypeError(f"{name}: a parameter of {wrong[0].dtype} cannot be stepped; give floating-point numbers, those of "
                            "a complex one as torch.view_as_real has them")  # fmt: skip

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state_dict. The averages keep their type, where torch would round them to that of the parameter."""
        super().load_state_dict(state_dict)
        restore_types(self, state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the parameters that have a gradient.

        closure: computes the loss and its gradients anew, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            certainty, gap = group["certainty"], group["gap"]
            for x, mask in zip(group["params"], self._masks_of(group), strict=True):
                if x.grad is None:
                    continue
                evidence = update_evidence(bound_gradient(x.grad), self.state[x])
                m, root_v = (
                    weight_sum(MEAN_MEMORY, evidence.count),
                    math.sqrt(weight_sum(SQUARE_MEMORY, evidence.count)),
                )
                decrease = evidence.mean / evidence.square.sqrt().add_(1e-8 * root_v)
                if gap is None:
                    needed = torch.ones_like(decrease)
                else:
                    decrease, needed = self._limit_step(x, decrease, gap, mask)
                gate = noise_gate(evidence, certainty, needed) if certainty is not None else torch.ones_like(decrease)
                if SHARE in self.state[x]:
                    decrease = decrease * self.state[x][SHARE]
                if gap:
                    gate = torch.addcmul(gate * (1 - CAUTION * gap), gate, gate, value=CAUTION * gap)
                rate = falling_rate(group["lr"], group["settle"], evidence.count - 1)
                x.addcmul_(decrease, gate, value=-rate * root_v / m)
        return loss

    def _masks_of(self, group: dict[str, Any]) -> list[Tensor | None]:
        """For each parameter the numbers that the gap limits; None: all of them. They are made once, and again for others."""
        parameters, limited = group["params"], group["limited"]
        if group["gap"] is None or limited is None or all(limited):
            return [None] * len(parameters)
        key = [tuple(limited), *((x.shape, x.device) for x in parameters)]
        before, masks = self._masks.get(id(group), (None, []))
        if key != before:
            masks = _split_flags(limited, parameters, "SettlingAdam: limited")
            self._masks[id(group)] = key, masks
        return list(masks)

    @torch.no_grad()
    def take_back(self, x: Tensor, places: Tensor, flags: Tensor) -> None:
        """Put numbers of a parameter back where they were. They start from rest, with steps half as long as before.

        x: the parameter, of any shape (...).
        places: to go back to, (...).
        flags: which numbers, bool (...).
        """
        state = self.state.get(x)
        x.copy_(torch.where(flags, places, x))
        if state:  # it has made a step
            state["mean"].masked_fill_(flags, 0.0)
            state[SHARE] = torch.where(flags, 0.5, 1.0).to(x) * state.get(SHARE, 1.0)

    def _limit_step(self, x: Tensor, decrease: Tensor, gap: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is left of Adam's step, and the share of the certainty that it needs.

        decrease: the step, negative where x rises.
        mask: of the numbers that the gap limits. None: all.
        """
        rises = decrease < 0
        if mask is not None:
            rises &= mask
        needed = needed_certainty(rises, gap, self._place(x).to(decrease))
        if mask is not None:
            needed = torch.where(mask, needed, 1.0)
        return torch.addcmul(decrease, decrease, rises, value=gap - 1), needed

    def _place(self, x: Tensor) -> Tensor:
        """Where in its range each number is. Raises ValueError where `position` returns something else."""
        if self.position is None:
            return torch.full_like(x, 0.5)
        place = self.position(x)
        if not isinstance(place, Tensor) or place.shape != x.shape:
            got = f"shape {tuple(place.shape)}" if isinstance(place, Tensor) else type(place).__name__
            raise ValueError(f"SettlingAdam: position returns {got} for a parameter of shape {tuple(x.shape)}; return a tensor "
                             "of that shape, a share in [0, 1] for each number")  # fmt: skip
        return place
