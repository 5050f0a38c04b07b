"""The model as it is: a copy to keep, and a run that tells whether inputs or frontends are to blame for a failure."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection

import torch
from torch import nn

from fxstn.frontends.guards import UnsupportedError, mode_of
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.preservation import Preservation
from fxstn.ir.collector import paused_collector
from fxstn.ir.copies import deep_copy
from fxstn.ir.generators import forked_rng
from fxstn.ir.input_errors import explained_errors

COMPILED = "_orig_mod"  # the child of a module from torch.compile: the module that was compiled


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in which compiled modules stand as they were before torch.compile.

    A frontend follows Python, and the graphs of a network are compiled as a whole (`SelfTuningNetwork.compile`).
    """
    with paused_collector():
        model = deep_copy(model)
    while COMPILED in model._modules:
        model = model.get_submodule(COMPILED)
    for module in [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]:
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None  # what nn.Module.compile leaves
        for name, child in module._modules.items():
            while child is not None and COMPILED in child._modules:
                module._modules[name] = child = child.get_submodule(COMPILED)
    return model


def hooked_parameters(model: nn.Module) -> list[str]:
    """Names, in the plain copy of a model, of the parameters with hooks on their gradients, which the copy does not have."""
    return [
        name.replace(f"{COMPILED}.", "")
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]


def forward_of(model: nn.Module) -> Callable[..., object]:
    """The model's forward as a function of the model and its inputs: of its class, or of its own where it has one.

    Raises UnsupportedError for a forward of its own that is no method.
    """
    own = vars(model).get("forward")
    if own is None:
        return type(model).forward
    if not isinstance(own, types.MethodType) or own.__self__ is not model:
        what, remedy = (
            "a forward that is set on the module and is no method of it,",
            "set types.MethodType(function, model)",
        )
        raise UnsupportedError("", what, remedy)
    return own.__func__


def check_inputs(model: nn.Module, frozen: Collection[str], inputs: Inputs) -> None:
    """Run the model on the example inputs in train and in eval mode; both are left as they were.

    Raises ValueError or TypeError where an operation cannot take them, and whatever the model itself raises.
    """
    preserved = Preservation(model, inputs)
    for training in (True, False):
        with (
            explained_errors((inputs, None), "example_inputs", model),
            preserved as stand_ins,
            mode_of(model, training, frozen),
            forked_rng(),
        ):
            run_once(model, stand_ins)


def run_once(forward: Callable[..., object], inputs: Inputs) -> object:
    """The output of a forward, with gradients where the model can have them.

    A forward that takes derivatives itself needs them. torchvision's ColorJitter behind a layer writes into views and cannot
    have them; transform takes it over.
    """
    try:
        with torch.enable_grad():
            return forward(*inputs.args, **inputs.kwargs)
    except RuntimeError:
        with torch.no_grad():
            return forward(*inputs.args, **inputs.kwargs)
