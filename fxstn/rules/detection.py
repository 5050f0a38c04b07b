"""torchvision's operators: linear in the features, maxima by the indices chosen; positions have a tangent in RoIAlign only."""

from __future__ import annotations

import operator

import torch
import torchvision

from fxstn.ir.staging import call
from fxstn.ir.tangents import ZERO, all_zero
from fxstn.ops.kernels import expand_like, pick_regions, regions
from fxstn.ops.regions import region_shift
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import rule, total, zero

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


@rule(operators.deform_conv2d)
def deformable_convolution(d, input, weight, offset, mask, bias, *settings):
    _constant(d.offset, "offsets")
    convolved = lambda x, w, m, b: call(operators.deform_conv2d, x, w, offset, m, b, *settings)  # noqa: E731
    none = torch.zeros_like(bias)
    y = convolved(input, weight, mask, bias)
    return y, total(
        (d.input, lambda dx: convolved(dx, weight, mask, none)),
        (d.weight, lambda dw: convolved(input, dw, mask, none)),
        (d.mask, lambda dm: convolved(input, weight, dm, none)),
        (d.bias, lambda db: expand_like(db.view(1, -1, 1, 1), y)),
    )


def _constant(tangents, what):
    if not all_zero(tangents):
        raise NoRule(f"the {what} vary, and positions are not differentiated; detach them")
