"""Models by name: torchvision's, or those of a function of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from fxstn.tools.functions import named_function, parameters_of


def build_model(name: str, classes: int, own_classes: bool = False) -> nn.Module:
    """A model for images.

    name: of a torchvision classification model; or 'package.module:function', a function that is called with num_classes and
        lies in the current folder or where Python finds modules.
    classes: number of classes.
    own_classes: whether a function may choose the number of classes itself. It is called without num_classes where it does not
        take that.

    Raises ValueError for an unknown name, or where the function does not return a module.
    """
    if ":" in name:
        return _call(name, classes, own_classes)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"model {name!r} is neither a torchvision classification model nor package.module:function")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception announce other initial weights
        return models.get_model(name, weights=None, num_classes=classes)


def _call(name: str, classes: int, own_classes: bool) -> nn.Module:
    """What the function 'package.module:function' returns."""
    function = named_function(name, "num_classes")
    takes_classes = _takes_classes(function)
    if not (takes_classes or own_classes):
        raise ValueError(
            f"model {name!r} takes no num_classes, and its classes must be those of the data; write "
            f"def {name.partition(':')[2]}(num_classes)"
        )
    model = function(num_classes=classes) if takes_classes else function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} must return an nn.Module, it returns {type(model).__name__}")
    return model


def _takes_classes(function: Callable[..., object]) -> bool:
    """Whether a function can be called with num_classes, as far as its signature says."""
    if (parameters := parameters_of(function)) is None:
        return True
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
