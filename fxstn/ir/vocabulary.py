"""Words about operations that several rooms use: which are dropout, views, links; which values are sizes."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Target

from fxstn.ir.signatures import Spelled

SIZES = {"size", "dim", "numel", "ndimension", "is_floating_point"}
NUMBERS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.numel, torch.Tensor.stride,
           torch.Tensor.storage_offset}  # fmt: skip
DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.feature_alpha_dropout,
    F.alpha_dropout,
    torch.feature_dropout,
}
# These drop whole channels, each of so many dimensions; of -1: of all that follow the first two.
SPATIAL: dict[Target, int] = {F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3, F.feature_alpha_dropout: 2,
                                   torch.feature_dropout: -1}  # fmt: skip
ALPHA = {F.alpha_dropout, F.feature_alpha_dropout}

LINKS = {torch.softmax, torch.log_softmax, torch.sigmoid}
VIEWS = {torch.squeeze, torch.unsqueeze, torch.flatten, torch.reshape, torch.Tensor.view, operator.getitem}


def is_size(node: object) -> bool:
    """Whether a node's value is Python numbers rather than a tensor: sizes and arithmetic on them."""
    if not isinstance(node, fx.Node):
        return True
    if node.op == "call_method":
        return node.target in SIZES
    if node.op != "call_function":
        return False
    if node.target in NUMBERS:
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    module, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "")
    arithmetic = module in ("_operator", "math") or (module.startswith("torch") and name.lstrip("_").startswith("sym_"))
    return arithmetic and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def dropout_settings(node: fx.Node | Spelled) -> tuple[float, bool]:
    """(p, training) of a dropout call."""
    settings: dict[str, Any] = dict(zip(("p", "training"), node.args[1:], strict=False)) | dict(node.kwargs)
    return settings.get("p", 0.5), bool(settings.get("training", True))


def is_opaque(function: object) -> bool:
    """A Python function that is neither torch's nor a helper of ours: one that user code asked fx not to look into."""
    module = (getattr(function, "__module__", None) or "").partition(".")[0]
    return inspect.isfunction(function) and module not in ("torch", "fxstn", "_operator", "math", "builtins")
