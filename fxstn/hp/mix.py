"""Augmentations that combine two examples of a batch; the objectives give the loss a target combined alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation, Strength
from fxstn.hp.terms import Auxiliary
from fxstn.ops.color import as_float, like_before
from fxstn.ops.erase import boxes_mask, over_frames
from fxstn.ops.mixing import lesser_share, mixed_target
from fxstn.ops.noise import by_example


class Mixing(Auxiliary, Operation):
    """Base of operations that mix two examples. The draw ends with (partner, share), each of shape (batch,).

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.

    partner is the index of the example that is mixed in, share its share.

    A target of classes (batch, ...) becomes one of probabilities (batch, classes, ...), which `F.cross_entropy` takes. A target
    of floating point numbers is mixed as it is. Evaluation and the hyper step see plain examples.
    """

    def retarget(self, target: object, output: object, value: tuple[Tensor, ...]) -> object:
        partner, share = value[-2:]
        return mixed_target(target, output, partner, share)


class MixUp(Mixing):
    """α, in [0, 2], of the Beta(α, α) that shares are drawn from (Zhang et al. 2018, arXiv 1710.09412).

    An example becomes x + share · (x' − x), with x' another example of the batch. It keeps the larger share, so that α = 0
    mixes nothing.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"mixup": Hyperparameter(0.2, 0, 2)}

    @staticmethod
    def draw(x: Tensor, alpha: Strength) -> tuple[Tensor, Tensor]:
        return torch.randperm(len(x), device=x.device), lesser_share(x, alpha)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        partner, share = drawn
        values = as_float(x)
        return like_before(values + by_example(share, values) * (values[partner] - values), x)


class CutMix(Mixing):
    """α, in [0, 2], of the Beta(α, α) that shares are drawn from (Yun et al. 2019, arXiv 1905.04899).

    A box with that share of the area comes from another image of the batch. It has at most half the area, so that α = 0 mixes
    nothing. A target that is a map of classes gets the box, too.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"cutmix": Hyperparameter(1.0, 0, 2)}
    images = True

    @staticmethod
    def draw(x: Tensor, alpha: Strength) -> tuple[Tensor, Tensor, Tensor]:
        half = 0.5 * lesser_share(x, alpha).sqrt()[:, None]
        starts, lengths = [], []
        for size in x.shape[-2:]:
            reach = (half * size).floor()
            starts.append((torch.rand(len(x), 1, device=x.device) * size).floor() - reach)
            lengths.append(2 * reach)
        box = boxes_mask(starts[0], starts[1], lengths[0], lengths[1], (x.shape[-2], x.shape[-1]))
        return over_frames(box, x), torch.randperm(len(x), device=x.device), box.float().mean((1, 2, 3))

    def retarget(self, target: object, output: object, value: tuple[Tensor, ...]) -> object:
        box, partner, _ = value
        whole = isinstance(target, Tensor) and not target.is_floating_point()
        if isinstance(target, Tensor) and whole and target.dim() > 2 and target.shape[-2:] == box.shape[-2:]:
            inside = box.view(len(box), *[1] * (target.dim() - 3), *box.shape[-2:])  # a map of classes
            return torch.where(inside, target[partner], target)
        return super().retarget(target, output, value)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        box, partner, _ = drawn
        return torch.where(box, x[partner], x)
