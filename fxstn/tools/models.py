"""Models by name: torchvision's, or those of a function of the user's."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

from torch import nn


def build_model(name: str, classes: int) -> nn.Module:
    """A model for images.

    name: of a torchvision classification model; or 'package.module:function', a function that is called with num_classes and
        lies in the current folder or where Python finds modules.
    classes: number of classes.

    Raises ValueError for an unknown name, or where the function does not return a module.
    """
    if ":" in name:
        return _call(name, classes)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"--model {name!r} is neither a torchvision classification model nor package.module:function")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception announce other initial weights
        return models.get_model(name, weights=None, num_classes=classes)


def _call(name: str, classes: int) -> nn.Module:
    """What the function 'package.module:function' returns."""
    module, _, function = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; a script that pip installs has its own folder there
    try:
        model = getattr(importlib.import_module(module), function)(num_classes=classes)
    except (AttributeError, ImportError, TypeError) as error:
        raise ValueError(
            f"--model {name!r} cannot be built: {error}; name a function that can be imported and takes num_classes"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name!r} must return an nn.Module, it returns {type(model).__name__}")
    return model
