"""The model as it is, run on the example inputs: a mistake in them is told from a fault of a frontend."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from fxstn.frontends.guards import mode_of
from fxstn.frontends.preservation import preserved
from fxstn.ir.graphs import forked_rng
from fxstn.ir.input_errors import explained_errors


def check_inputs(model: nn.Module, frozen: Collection[str], inputs: tuple) -> None:
    """Run the model on the example inputs in train and in eval mode; both are left as they were.

    Raises ValueError or TypeError where an operation cannot take them, and whatever the model itself raises.
    """
    for training in (True, False):
        with (
            explained_errors((inputs, None), "example_inputs", model),
            preserved(model, inputs) as stand_ins,
            mode_of(model, training, frozen),
            forked_rng(),
            torch.enable_grad(),
        ):
            model(*stand_ins)
