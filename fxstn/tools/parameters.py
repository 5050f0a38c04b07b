"""Which parameters of a network respond to its hyperparameters, one by one, and why the others do not."""

from __future__ import annotations

from typing import NamedTuple

from fxstn.network import SelfTuningNetwork
from fxstn.ops.response import responding
from fxstn.passes.hyperize import responses


class ParameterRow(NamedTuple):
    """A parameter.

    obstacle: why it does not respond; "" where it does.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    obstacle: str


def parameter_rows(stn: SelfTuningNetwork) -> list[ParameterRow]:
    """A row for each parameter, in their order in the model."""
    moved, obstacles = set(responding(stn.response, stn.named_weights)), {}
    if stn.frontend != "live":  # which has no graph to look into
        obstacles = responses([stn.canonical(training) for training in (True, False)], stn.structured).obstacles
    return [
        ParameterRow(
            name,
            tuple(parameter.shape),
            parameter.numel(),
            ""
            if name in moved
            else obstacles.get(name, "" if parameter.requires_grad else "frozen (requires_grad=False)")
            or "no operation reads it as the weights of a layer",
        )
        for name, parameter in stn.model.named_parameters()
    ]
