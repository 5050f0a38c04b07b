"""Resampling: interpolation, sampling on a grid, sliding windows, shuffles of pixels and channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxstn.ir.tangents import ZERO
from fxstn.ops.geometry import resample
from fxstn.ops.sampling import grid_tangent
from fxstn.rules.registry import linear, rule, total

linear(F.interpolate, F.affine_grid, F.unfold, F.fold, torch.ops.aten.col2im.default, fresh=True)
linear(F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle)


@rule(F.grid_sample, fresh=True)
def grid_sample(d, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    sample = lambda x: F.grid_sample(x, grid, mode, padding_mode, bool(align_corners))  # noqa: E731
    d_grid = ZERO if mode == "nearest" else d.grid
    return sample(input), total(
        (d.input, sample), (d_grid, lambda dg: grid_tangent(dg, input, grid, mode, padding_mode, bool(align_corners)))
    )


@rule(resample)
def affine_map(d, x, matrices, **settings):
    """Affine in x: outside of the image nothing moves."""
    fill = None if settings["fill"] is None else (0.0,)
    return resample(x, matrices, **settings), resample(d.x, matrices, **(settings | {"fill": fill}))
