"""Hyperlayers: operations that read a parameter with a response (paper, Eq. 3.14, linearised as in Eq. 3.13)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fxstn.layers.response import add_bias, add_scaled, bias_tangent, scale_channels
from fxstn.rules.registry import NoRule, rule
from fxstn.tangents import ZERO, Scaled


def _hyperlayer(d, operation, input, weight, bias, channel):
    """(y, dy) of operation(input, weight) + bias; the response's product shares the input of the general one."""
    if not all(isinstance(tangent, Scaled) or tangent is ZERO for tangent in (d.weight, d.bias)):
        raise NoRule("its weight or bias is computed from values that vary")
    y = operation(input, weight, bias)
    dy = ZERO if d.input is ZERO else operation(d.input, weight, None)
    if d.weight is not ZERO:
        product = operation(input, d.weight.response, None)
        dy = (
            scale_channels(product, d.weight.scale, channel)
            if dy is ZERO
            else add_scaled(dy, product, d.weight.scale, channel)
        )
    if d.bias is not ZERO:
        change = (d.bias.scale, d.bias.response, channel)
        dy = bias_tangent(y, *change) if dy is ZERO else add_bias(dy, *change)
    return y, dy


@rule(F.linear, kind="hyperlayer")
def linear_layer(d, input, weight, bias=None):
    return _hyperlayer(d, F.linear, input, weight, bias, channel=-1)


def _register_convolution(function, spatial):
    @rule(function, kind="hyperlayer")
    def convolution(d, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return _hyperlayer(d, partial(function, **settings), input, weight, bias, channel=-1 - spatial)


for spatial, function in enumerate([torch.conv1d, torch.conv2d, torch.conv3d], start=1):
    _register_convolution(function, spatial)
