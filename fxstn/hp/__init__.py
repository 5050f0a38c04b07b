"""Hyperparameters: specs to ask for them, and the space that holds them.

>>> from fxstn import hp
>>> hparams = [hp.Dropout("input", "layer*"), hp.WeightDecay("*", shared=True), hp.ColorJitter(init={"hue": 0.1})]
"""

from fxstn.hp.augment import (
    Affine,
    ColorJitter,
    Cutout,
    Erasing,
    Flip,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    Rotation,
    VerticalFlip,
)
from fxstn.hp.bijection import Bijection, Quantity
from fxstn.hp.operation import OPERATIONS, Operation
from fxstn.hp.regularize import DropConnect, StochasticDepth
from fxstn.hp.space import HyperparameterSpace
from fxstn.hp.specs import Dropout, LabelSmoothing, Number, Scalar, Spec, WeightDecay

__all__ = [
    "OPERATIONS",
    "Affine",
    "Bijection",
    "ColorJitter",
    "Cutout",
    "DropConnect",
    "Dropout",
    "Erasing",
    "Flip",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "HyperparameterSpace",
    "LabelSmoothing",
    "Number",
    "Operation",
    "Quantity",
    "Rotation",
    "Scalar",
    "Spec",
    "StochasticDepth",
    "VerticalFlip",
    "WeightDecay",
]
