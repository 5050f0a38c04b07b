"""Response parameters of one weight or bias, and the products that use them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxstn.staging import staged


class Response(nn.Module):
    """Response of one parameter w: Δw = (U δ) ⊙row R (paper, Eq. 3.14).

    U: (rows, h), starts at zero, so that a fresh response predicts no change. R: shaped like w, drawn from the uniform
    distribution that torch's linear and convolution layers start from, ±1/√fan_in.
    """

    def __init__(self, parameter: Tensor, fan_in: int, hyperparameters: int) -> None:
        super().__init__()
        zeros = torch.zeros(parameter.shape[0], hyperparameters, dtype=parameter.dtype, device=parameter.device)
        self.U = nn.Parameter(zeros)
        bound = 1 / math.sqrt(fan_in)
        self.R = nn.Parameter(torch.empty_like(parameter).uniform_(-bound, bound))

    def forward(self, delta: Tensor) -> Tensor:
        """Row scales U δ: (rows,) for delta (h,), (batch, rows) for (batch, h)."""
        return nn.functional.linear(delta, self.U)

    def change(self, delta: Tensor) -> Tensor:
        """Δw for one delta of shape (h,), shaped like the parameter."""
        scale = self(delta)
        return scale.view(-1, *[1] * (self.R.dim() - 1)) * self.R


def parameter_changes(tree: nn.Module, delta: Tensor) -> dict[str, Tensor]:
    """{parameter name: Δw} for one delta of shape (h,), over a tree of Response modules."""
    return {name: module.change(delta) for name, module in tree.named_modules() if isinstance(module, Response)}


def align(scale: Tensor, output: Tensor, dim: int) -> Tensor:
    """View row scales, (rows,) or (batch, rows), so that they broadcast over `output` along channel `dim` (negative).

    Raises ValueError when the rows of a per-example scale are not the examples of `output`.
    """
    shape = [1] * output.dim()
    shape[dim] = scale.shape[-1]
    if scale.dim() == 2:
        if output.dim() + dim < 1 or output.shape[0] != scale.shape[0]:
            raise ValueError(
                f"delta has {scale.shape[0]} rows, one per example, but a layer's output has shape "
                f"{tuple(output.shape)}, whose dimension 0 is not the batch; pass one delta of shape (h,) for all"
            )
        shape[0] = scale.shape[0]
    return scale.view(shape)


@staged
def for_all_examples(value: Tensor, dimensions: int, where: str) -> Tensor:
    """`value`, unless it has a row per example: put where the graph cannot tell which axis holds the examples.

    dimensions: of a value for the whole batch; 1 for row scales, 0 for a rate. Raises ValueError when there is one more.
    """
    if isinstance(value, Tensor) and value.dim() > dimensions:
        raise ValueError(
            f"{where}: the examples are not along dimension 0 there, so one perturbation per example is refused; pass "
            "delta and condition of shape (h,), or perturb='batch' to the losses and the runner"
        )
    return value


@staged
def scale_channels(output: Tensor, scale: Tensor, dim: int) -> Tensor:
    """`output` with channel `dim` multiplied by `scale`, per example when scale is (batch, channels)."""
    return output * align(scale, output, dim)


@staged
def add_scaled(tangent: Tensor, output: Tensor, scale: Tensor, dim: int) -> Tensor:
    """tangent + scale ⊙ output in one kernel; shapes as in `scale_channels`."""
    return torch.addcmul(tangent, output, align(scale, output, dim))


@staged
def add_bias(tangent: Tensor, scale: Tensor, response: Tensor, dim: int) -> Tensor:
    """tangent + the tangent of a bias, scale ⊙ response, along channel `dim`."""
    return tangent + align(scale * response, tangent, dim)


@staged
def bias_tangent(output: Tensor, scale: Tensor, response: Tensor, dim: int) -> Tensor:
    """The tangent of a bias alone, expanded to the shape of `output`."""
    return align(scale * response, output, dim).expand_as(output)
