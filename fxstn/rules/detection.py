"""torchvision's operators: linear in the features, maxima by the indices chosen; some move with positions, too."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch
import torchvision

from fxstn.ir.staging import call
from fxstn.ir.tangents import ZERO, all_zero
from fxstn.ops.deformation import offset_shift
from fxstn.ops.kernels import pick_regions, regions
from fxstn.ops.regions import region_shift
from fxstn.rules.fallback import NoRule
from fxstn.rules.layers import BIAS, hyperlayer
from fxstn.rules.registry import ParameterRole, rule, total, zero

operators = torch.ops.torchvision

zero(operators.nms, torchvision.ops.nms)


def _register_average(function, with_map):
    @rule(function, kind="region")
    def region_average(d, input, boxes, *settings, **named):
        """Linear in the features.

        with_map: the second result says which channel was read.
        """
        _constant(d.boxes, "boxes")
        pooled = lambda x: call(function, x, boxes, *settings, **named)  # noqa: E731
        return pooled(input), (operator.getitem(pooled(d.input), 0), ZERO) if with_map else pooled(d.input)


for function in (torchvision.ops.roi_align, torchvision.ops.ps_roi_align, torchvision.ops.ps_roi_pool):
    _register_average(function, with_map=False)
_register_average(operators.ps_roi_align, with_map=True)
_register_average(operators.ps_roi_pool, with_map=True)


@rule(operators.roi_align, kind="region")
def region_align(d, input, rois, *settings):
    """Linear in the features; moves with the boxes, for which torch has no derivative of its own."""
    pooled = lambda x: call(operators.roi_align, x, rois, *settings)  # noqa: E731
    return pooled(input), total((d.input, pooled), (d.rois, lambda dr: region_shift(dr, input, rois, *settings)))


@rule(operators.roi_pool, kind="region")
def region_maximum(d, input, rois, spatial_scale, pooled_height, pooled_width):
    _constant(d.rois, "boxes")
    results = call(operators.roi_pool, input, rois, spatial_scale, pooled_height, pooled_width)
    return results, (pick_regions(d.input, rois, operator.getitem(results, 1)), ZERO)


@rule(torchvision.ops.roi_pool, kind="region")
def region_maximum_of_boxes(d, input, boxes, output_size, spatial_scale=1.0):
    _constant(d.boxes, "boxes")
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    rois = regions(boxes)
    results = call(operators.roi_pool, input, rois, spatial_scale, height, width)
    return operator.getitem(results, 0), pick_regions(d.input, rois, operator.getitem(results, 1))


@rule(operators.deform_conv2d, kind="layer", fresh=True, reads={1: ParameterRole("weight", (0,)), 4: BIAS})
def deformable_convolution(d, input, weight, offset, mask, bias, *settings):
    """Linear in the features, the weight and the mask; moves with the offsets."""
    convolved = lambda x, w, m, b: call(operators.deform_conv2d, x, w, offset, m, b, *settings)  # noqa: E731
    none = torch.zeros_like(bias)
    places = (*(tuple(settings[i : i + 2]) for i in (0, 2, 4)), *settings[6:])
    others = total(
        (d.input, lambda dx: convolved(dx, weight, mask, none)),
        (d.mask, lambda dm: convolved(input, weight, dm, none)),
        (d.offset, lambda do: offset_shift(do, input, weight, offset, mask, *places)),
    )
    layer = SimpleNamespace(input=ZERO, weight=d.weight, bias=d.bias)
    operation = lambda x, w, b: convolved(x, w, mask, none if b is None else b)  # noqa: E731
    y, dy = hyperlayer(layer, operation, input, weight, bias, channel=-3)
    return y, others if dy is ZERO else dy if others is ZERO else dy + others


def _constant(tangents, what):
    if not all_zero(tangents):
        raise NoRule(f"the {what} vary, and positions are not differentiated; detach them")
