"""What the steps of a run cost, in forward passes of the network, and how often they come unless settings say otherwise."""

from __future__ import annotations

GENERAL, RESPONSE, HYPER = 3, 5, 4  # forwards: an inner step (backward is two), a response step, a hyper step
RESPONSE_EVERY, CYCLE, LONGEST_CYCLE = 4, 5, 40  # inner steps: from a response step to the next, and of a cycle
RAMP = 16  # inner steps at the start of a run after which response steps become rarer by one step


def cost_ratio(steps: float, responses: float, hypers: float, fraction: float = 1.0) -> float:
    """Passes of a run over those of plain training, as many steps of w₀.

    steps, responses, hypers: the number of each. steps > 0.
    fraction: of a batch that a response step sees.
    """
    return (GENERAL * steps + RESPONSE * fraction * responses + HYPER * hypers) / (GENERAL * steps)
