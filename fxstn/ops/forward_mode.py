"""torch's forward mode, which leaves torch as it was where an operation fails in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """torch.func.jvp. Raises what it raises.

    Where an operation fails inside, as torch.quantile does without values, torch 2.14 leaves its dispatcher without autograd
    for the rest of the process; again when the frames of the error are freed. So they are freed here.
    """
    if torch.compiler.is_compiling():
        y, dy, *_ = torch.func.jvp(function, primals, tangents)
        return y, dy
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*keys):
        try:
            y, dy, *_ = torch.func.jvp(function, primals, tangents)
            return y, dy
        except (RuntimeError, NotImplementedError) as error:
            kind, text = type(error), str(error)
    raise kind(text)
