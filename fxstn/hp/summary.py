"""What a network is, in ten lines: what is tuned, what responds, what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.space import HyperparameterSpace
from fxstn.ir.cost import CYCLE, LONGEST_CYCLE, RESPONSE_EVERY, cost_ratio
from fxstn.ir.coverage import Coverage
from fxstn.ops.parameters import parameters_in
from fxstn.ops.response import responding

KINDS = 4  # lines for kinds of hyperparameters


class Summarized(nn.Module):
    """Base of a network that tells what it is."""

    model: nn.Module
    response: nn.Module
    hparams: HyperparameterSpace
    method: str
    coverage: Coverage = Coverage()  # as transform has decided

    @property
    def frontend(self) -> str:
        """Which frontend follows the forward: "fx", "export" or "live"."""
        raise NotImplementedError

    def summary(self) -> str:
        """About ten lines: what is tuned, which parameters respond, and what training costs with the default settings.

        Costs are counted in forward passes: a step of the weights takes 3, a response step 5, a hyper step 4. They are no
        times: `fxstn bench` measures these.
        """
        name = type(self.model).__name__
        lines = [f"{name} that tunes itself: method {self.method!r}, followed by trace={self.frontend!r}"]
        count = len(self.hparams)
        lines += [f"tuned: {count} hyperparameter{'s' * (count != 1)}", *_kinds(self.hparams.hyperparameters)]
        lines += [*_responds(self.model, self.response), f"  {self.coverage}"]
        return "\n".join([*lines, *_costs(self.method)])

    def __repr__(self) -> str:
        return self.summary()


def _kinds(hyperparameters: Sequence[Hyperparameter]) -> list[str]:
    """A line for each kind, which is the last part of a name."""
    kinds: dict[str, list[Hyperparameter]] = {}
    for number in hyperparameters:
        kinds.setdefault(number.name.rpartition(".")[2], []).append(number)
    lines = []
    for kind, numbers in kinds.items():
        starts = sorted({number.init for number in numbers})
        start = f"{starts[0]:g}" if len(starts) == 1 else f"{starts[0]:g} to {starts[-1]:g}"
        ends = {(number.low, number.high) for number in numbers}
        within = "in [{:g}, {:g}]".format(*ends.pop()) if len(ends) == 1 else "in ranges of their own"
        lines.append(f"  {kind} × {len(numbers)}: start {start}, {within}")
    more = [f"  … and {len(lines) - KINDS} more kinds"] if len(lines) > KINDS else []
    return lines[:KINDS] + more


def _responds(model: nn.Module, response: nn.Module) -> list[str]:
    """How many parameters respond, and which do not."""
    parameters, moved = dict(model.named_parameters()), responding(response, parameters_in(model))
    elements, rest = sum(p.numel() for p in parameters.values()), [name for name in parameters if name not in moved]
    moving = sum(p.numel() for p in moved.values())
    share = moving / elements if elements else 0.0
    line = f"responds: {len(moved)} of {len(parameters)} parameters, {moving:,} of {elements:,} elements ({share:.0%})"
    others = [f"  not: {', '.join(rest[:3])}{f' and {len(rest) - 3} more' if len(rest) > 3 else ''}"] if rest else []
    return [line, *others]


def _costs(method: str) -> list[str]:
    """The passes of training against plain training, with the settings that a run has by default."""
    if method == "stn":
        return []
    first, last = (
        cost_ratio(1, 1 / (every * RESPONSE_EVERY), 1 / (every * CYCLE)) for every in (1, LONGEST_CYCLE / CYCLE)
    )
    return [
        f"cost with the default settings: {first:.2f} times the passes of plain training at first, {last:.2f} later",
        f"  (response steps every {RESPONSE_EVERY} steps, hyper steps every {CYCLE}; as λ settles, up to "
        f"{LONGEST_CYCLE // CYCLE} times rarer)",
        "more: fxstn.explain(stn) lists operations and reasons, stn.hparams the starts; stn.model is the model",
    ]
