"""F.l1_loss with a weight, which torch leaves out where it hands the call to a function mode or an fx proxy."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

_TORCHS_OWN = F.l1_loss


def _l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """F.l1_loss, as its documentation has it. With a weight it is the operations that torch computes then."""
    if weight is None:
        with mock.patch.object(F, "l1_loss", _TORCHS_OWN):  # it hands on whatever has its name
            return _TORCHS_OWN(input, target, size_average, reduce, reduction)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    errors = (input - target).abs() * weight
    if reduction == "none":
        return errors
    return errors.sum() / weight.sum() if reduction == "mean" else errors.sum()


def fill_tables_of_torch() -> None:
    """Have torch fill its tables of functions, which it does once, before another function stands for one of them."""
    torch.overrides.get_ignored_functions()
    torch.overrides.get_overridable_functions()


def l1_keeps_weight() -> AbstractContextManager[object]:
    """Inside, F.l1_loss keeps its weight (torch 2.15 leaves it out in modes and proxies; versions without one need nothing)."""
    if "weight" not in inspect.signature(_TORCHS_OWN).parameters:
        return nullcontext()
    fill_tables_of_torch()
    return mock.patch.object(F, "l1_loss", _l1_loss)
