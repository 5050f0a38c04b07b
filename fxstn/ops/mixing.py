"""Two examples of a batch combined: in which shares, and what becomes of their targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fxstn.ops.noise import by_example


def lesser_share(x: Tensor, alpha: Tensor | float) -> Tensor:
    """The lesser of b and 1 − b with b ~ Beta(α, α), drawn for each example.

    b is a ratio of gamma variables. They are drawn in logarithms, which small α need: one of shape α is one of shape α + 1
    times U^(1/α) (Marsaglia & Tsang 2000, Sec. 6).

    x: (batch, ...).
    alpha: α ≥ 0, a number or (batch,); 0 gives 0.

    Returns (batch,), in [0, 0.5].
    """
    alpha = by_example(alpha, x).flatten().expand(len(x))
    uniform = torch.rand(2, len(x), device=x.device, dtype=alpha.dtype).clamp_min(torch.finfo(alpha.dtype).tiny)
    first, second = torch._standard_gamma((alpha + 1).expand(2, -1)).log() + uniform.log() / alpha.clamp_min(1e-30)
    return torch.sigmoid(-(first - second).abs()) * (alpha > 0)


def mixed_target(target: object, output: object, partner: Tensor, share: Tensor) -> object:
    """target + share · (target of the partner − target), in every tensor of it.

    target: a structure of tensors (batch, ...). Classes, for an output (batch, classes, ...), become probabilities in the
        output's shape; anything else is mixed as it is.
    output: of the model.
    partner: (batch,), the number of the example that each is mixed with.
    share: (batch,), of the partner.

    Raises ValueError for targets that cannot be mixed. Classes out of range are looked for on the CPU only, where that waits
    for nothing.
    """

    def mixed(leaf: object) -> Tensor:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != len(partner):
            got = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"mixup and cutmix mix targets that are tensors with {len(partner)} examples; got {got}")
        if not leaf.is_floating_point():
            leaf = _as_numbers(leaf, output)
        return leaf + by_example(share, leaf).to(leaf.dtype) * (leaf[partner] - leaf)

    return tree_map(mixed, target)


def _as_numbers(target: Tensor, output: object) -> Tensor:
    dtype = output.dtype if isinstance(output, Tensor) and output.is_floating_point() else torch.get_default_dtype()
    if not isinstance(output, Tensor) or target.dim() != output.dim() - 1:
        return target.to(dtype)
    known = (
        target.device.type == "cpu" and not torch.compiler.is_compiling()
    )  # else looking at values would wait for them
    if known and not (int(target.min()) >= 0 and int(target.max()) < output.shape[1]):
        raise ValueError(
            f"mixup and cutmix turn classes into probabilities: they must be 0 to {output.shape[1] - 1}, the output's "
            f"classes, got {int(target.min())} to {int(target.max())}"
        )
    return F.one_hot(target, output.shape[1]).movedim(-1, 1).to(dtype)
