"""Gives the modules of a model that own random operations a conditioned forward, and their own forward back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from fxstn.frontends.conditioned import ConditionedForward
from fxstn.frontends.site_mode import ModuleSites
from fxstn.ops.noise import Strengths


def condition_modules(model: nn.Module, sites: dict[str, ModuleSites], strengths: Tensor) -> None:
    """Give the modules that own random operations a forward that draws them at λ.

    sites: by module path.
    strengths: (h,), the values of λ; whoever moves λ writes into it.
    """
    shared = Strengths(strengths)
    for path, own in sites.items():
        module = model.get_submodule(path)
        vars(module)["forward"] = ConditionedForward(module, own, shared)


def conditioned_forwards(model: nn.Module) -> list[ConditionedForward]:
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, ConditionedForward)]


def note_owner(model: nn.Module, owner: object) -> None:
    """Note who moves λ of a model's conditioned forwards."""
    for forward in conditioned_forwards(model):
        forward.owner = ref(owner)


def has_owner(model: nn.Module) -> bool:
    """Whether somebody still moves λ of any conditioned forward of a model."""
    return any(forward.owner is not None and forward.owner() is not None for forward in conditioned_forwards(model))


def restore_modules(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for forward in conditioned_forwards(model):
        _put(forward.module, forward.own)


def _put(module: nn.Module, forward: object) -> None:
    if forward is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = forward


@contextmanager
def original_forwards(model: nn.Module) -> Iterator[None]:
    """A context in which every module runs its own forward, without torch.compile."""
    modules = list(model.modules())
    conditioned = conditioned_forwards(model)
    scripted = torch.jit.ScriptModule
    compiled = [m for m in modules if not isinstance(m, scripted) and m._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    restore_modules(model)
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for forward in conditioned:
            vars(forward.module)["forward"] = forward
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call
