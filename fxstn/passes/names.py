"""The names under which patterns find the modules, the operations and the weights of a model."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_PARAMETRIZATIONS = "parametrizations."  # the child of a module in which torch has those of its tensors


class ModelNames:
    """All names of what a model has. A module, or a weight, that is registered several times has several, in their order."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, list[str]] = {}  # by the first name
        self.parameters: dict[str, list[str]] = {}  # likewise
        self.tensors: dict[str, str] = {}  # {name of a module that is all for one tensor: name of the tensor}
        first: dict[nn.Module, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.modules.setdefault(first.setdefault(module, name), []).append(name)
            if isinstance(module, ParametrizationList):
                owner, _, tensor = name.rpartition(_PARAMETRIZATIONS)
                steps = [f"{name}.{child}" for child, _ in module.named_children()]
                self.tensors |= dict.fromkeys([name, *steps], owner + tensor)
        first_parameters: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.parameters.setdefault(first_parameters.setdefault(parameter, name), []).append(name)

    def of(self, path: str) -> list[str]:
        """The names of a module, or of an operation of a module; the first is `path`."""
        if path in self.modules:
            return self.modules[path]
        owner, _, operation = path.rpartition(".")
        return [f"{name}.{operation}".lstrip(".") for name in self.modules.get(owner, [owner])]

    def levels(self, parameter: str) -> tuple[list[str], list[str], list[str]]:
        """The names of a parameter's layer, of the tensor of the layer that it makes, and of the parameter.

        The layer of a parametrized tensor is the module that has the tensor, as conv.weight of conv.parametrizations.weight.
        """
        names = self.parameters[parameter]
        owners = [name.rpartition(".")[0] for name in names]
        tensors = [self.tensors.get(owner, name) for owner, name in zip(owners, names, strict=True)]
        layers = [tensor.rpartition(".")[0] for tensor in tensors]
        return layers, [*tensors, *(owner for owner in owners if owner in self.tensors)], names
