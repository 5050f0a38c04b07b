"""Example inputs without their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def as_tuple(example_inputs: object) -> tuple:
    """The positional inputs: one input alone is a tuple of one."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


@dataclass(frozen=True)
class InputSpec:
    """Example inputs without their values: enough to follow a model again after it was copied, moved or loaded.

    inputs: tensors on the meta device, in the structure of the positional inputs.
    dtype: of the model's parameters at that time.
    """

    inputs: tuple
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple | None) -> InputSpec | None:
        """Of positional inputs; None for none."""
        if inputs is None:
            return None
        dtype = next(model.parameters(), torch.empty(0)).dtype
        return cls(tree_map_only(Tensor, lambda x: x.detach().to("meta"), inputs), dtype)

    def like(self, model: nn.Module) -> tuple:
        """Inputs on the model's device, and in its dtype where they were so before; a batch of one becomes two."""
        parameter = next(model.parameters(), torch.empty(0))
        sizes = [leaf.shape[0] for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor) and leaf.dim()]

        def zeros(x: Tensor) -> Tensor:
            if sizes[:1] == [1] and x.dim() and x.shape[0] == 1:
                x = x.repeat(2, *[1] * (x.dim() - 1))  # export would take a batch of one for a constant
            dtype = parameter.dtype if x.dtype == self.dtype else x.dtype
            return torch.zeros_like(x, dtype=dtype, device=parameter.device)

        return tree_map_only(Tensor, zeros, self.inputs)
